"""`python -m jaxlm.run_as`: see `jaxlm.cli.run_as`."""

import sys

from jaxlm.cli.run_as import main

if __name__ == "__main__":
    sys.exit(main())
