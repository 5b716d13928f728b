"""`python -m jaxlm.generate`: see `jaxlm.cli.generate`."""

from jaxlm.cli.generate import main

if __name__ == "__main__":
    main()
