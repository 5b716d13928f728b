"""`python -m jaxlm.harness run --model jaxlm --model_args path=DIR --tasks …`: lm_eval's own command, knowing jaxlm.

Importing this module is enough for Python programs that call `lm_eval.simple_evaluate(model="jaxlm", …)`.
"""

from jaxlm.cli.harness import register, run_lm_eval
from jaxlm.errors import exit_status

if __name__ == "__main__":
    raise SystemExit(exit_status(run_lm_eval))
register()
