"""`python -m convert`."""

import sys

from convert.commands.main import main

if __name__ == "__main__":
    sys.exit(main(prog="python -m convert"))
