"""`python -m jaxlm.evaluate`: see `jaxlm.cli.evaluate`."""

import sys

from jaxlm.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
