"""`python -m jaxlm.train`: see `jaxlm.cli.train`."""

import sys

from jaxlm.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
