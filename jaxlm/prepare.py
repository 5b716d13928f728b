"""`python -m jaxlm.prepare`: see `jaxlm.cli.prepare`."""

import sys

from jaxlm.cli.prepare import main

if __name__ == "__main__":
    sys.exit(main())
