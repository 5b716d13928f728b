"""`python -m jaxlm.generate`: see `jaxlm.cli.generate`."""

import sys

from jaxlm.cli.generate import main

if __name__ == "__main__":
    sys.exit(main())
