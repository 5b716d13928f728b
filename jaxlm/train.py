"""`python -m jaxlm.train`: see `jaxlm.cli.train`."""

from jaxlm.cli.train import main

if __name__ == "__main__":
    main()
