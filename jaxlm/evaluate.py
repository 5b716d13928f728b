"""`python -m jaxlm.evaluate`: see `jaxlm.cli.evaluate`."""

from jaxlm.cli.evaluate import main

if __name__ == "__main__":
    main()
