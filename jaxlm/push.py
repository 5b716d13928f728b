"""`python -m jaxlm.push`: see `jaxlm.cli.push`."""

import sys

from jaxlm.cli.push import main

if __name__ == "__main__":
    sys.exit(main())
