"""`python -m jaxlm.report`: see `jaxlm.cli.report`."""

import sys

from jaxlm.cli.report import main

if __name__ == "__main__":
    sys.exit(main())
