"""Training: `jaxlm.train(config)` in Python, `python -m jaxlm.train` in a shell (see `jaxlm.cli.train`).

A function and a module share the name. Whoever imports `jaxlm.train` gets this module, which can be called like the
function, whatever was imported first.
"""

from __future__ import annotations

import sys
import types
from typing import TYPE_CHECKING

from jaxlm.cli.train import main
from jaxlm.config import RunConfig, to_dict
from jaxlm.config.reading import build, check_keys
from jaxlm.errors import UserError
from jaxlm.locate import locate_paths

if TYPE_CHECKING:
    from jaxlm.training.job import Outcome


def train(config: RunConfig, *, verbose: bool = False) -> Outcome:
    """Trains as `jaxlm train` does, and returns what the run left behind.

    Calling it again with the same configuration goes on where the run stopped, or returns at once when it is complete.
    Ctrl-C raises KeyboardInterrupt; what was saved by then is kept. Signals are not followed otherwise.

    Args:
        config: one run; a configuration with stages is one call for each of them.
        verbose: say at start-up also what choices rest on.

    Returns:
        the step reached, the newest checkpoint, validation losses, and the trained model.

    Raises:
        UserError: a mistake in the configuration or its files, naming the key, the value and the way out.
    """
    # JAX is imported only here, and not by `import jaxlm.train`.
    from jaxlm.cli.train import run_stages
    from jaxlm.training.checks import check_config
    from jaxlm.training.stop import Stop

    if not isinstance(config, RunConfig):
        raise UserError(f"config: expected a jaxlm.RunConfig, found {type(config).__name__}")
    if config.stages is not None:
        raise UserError("stages: jaxlm.train trains one run; call it once for each stage, with the stage's own keys")
    config = build(locate_paths(check_keys(to_dict(config), RunConfig, "config"), RunConfig), RunConfig)
    check_config(config)
    (outcome,) = run_stages([config], Stop(), verbose)  # a Stop that is not entered follows no signals
    return outcome


class _CallableModule(types.ModuleType):
    def __call__(self, config: RunConfig, *, verbose: bool = False) -> Outcome:
        """See `train`."""
        return train(config, verbose=verbose)


if __name__ == "__main__":
    sys.exit(main())
else:
    sys.modules[__name__].__class__ = _CallableModule
