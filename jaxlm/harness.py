"""`python -m jaxlm.harness run --model jaxlm --model_args path=DIR --tasks …`: lm_eval's own command, knowing jaxlm.

Importing this module is enough for Python programs that call `lm_eval.simple_evaluate(model="jaxlm", …)`.
"""

from jaxlm.cli.harness import register
from jaxlm.errors import exit_status


def _main() -> None:
    register()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    raise SystemExit(exit_status(_main))
register()
