"""`python -m jaxlm.doctor`: see `jaxlm.cli.doctor`."""

from jaxlm.cli.doctor import main

if __name__ == "__main__":
    main()
