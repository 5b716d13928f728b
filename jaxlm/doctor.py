"""`python -m jaxlm.doctor`: see `jaxlm.cli.doctor`."""

import sys

from jaxlm.cli.doctor import main

if __name__ == "__main__":
    sys.exit(main())
