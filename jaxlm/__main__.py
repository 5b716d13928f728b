"""`python -m jaxlm VERB`: see `jaxlm.cli.main`."""

import sys

from jaxlm.cli.main import main

if __name__ == "__main__":
    sys.exit(main(prog="python -m jaxlm"))
