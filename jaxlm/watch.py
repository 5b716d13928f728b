"""`python -m jaxlm.watch`: see `jaxlm.cli.watch`."""

import sys

from jaxlm.cli.watch import main

if __name__ == "__main__":
    sys.exit(main())
