"""`python -m jaxlm.plan`: see `jaxlm.cli.plan`."""

import sys

from jaxlm.cli.plan import main

if __name__ == "__main__":
    sys.exit(main())
