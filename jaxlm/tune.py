"""`python -m jaxlm.tune`: see `jaxlm.cli.tune`."""

import sys

from jaxlm.cli.tune import main

if __name__ == "__main__":
    sys.exit(main())
