"""`python -m jaxlm.serve`: the command, which lies above this room and is therefore called by its name."""

import importlib
import sys

if __name__ == "__main__":
    sys.exit(importlib.import_module("jaxlm.cli.serve").main())
