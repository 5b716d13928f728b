"""`python -m jaxlm.plan`: see `jaxlm.cli.plan`."""

from jaxlm.cli.plan import main

if __name__ == "__main__":
    main()
