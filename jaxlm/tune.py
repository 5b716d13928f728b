"""`python -m jaxlm.tune`: see `jaxlm.cli.tune`."""

from jaxlm.cli.tune import main

if __name__ == "__main__":
    main()
