"""What an answer is worth: rewards by name, and functions of the user's.

A reward takes three lists, prompts, answers and the records' own answers, all texts, and returns a number for each.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxlm.errors import UserError
from jaxlm.evaluation.metrics.ie import parse_json_answer
from jaxlm.evaluation.metrics.molecules import read_smiles
from jaxlm.evaluation.metrics.regression import first_number
from jaxlm.evaluation.metrics.tuples import count, precision_recall_f1
from jaxlm.jsontext import parse
from jaxlm.locate import at_home

Reward = Callable[[Sequence[str], Sequence[str], Sequence[str]], Sequence[float]]


def _exact(answer: str, right: str) -> float:
    return float(answer.strip() == right.strip())


def _number(answer: str, right: str, tolerance: float = 0.01) -> float:
    given, wanted = first_number(answer), first_number(right)
    return float(given is not None and wanted is not None and math.isclose(given, wanted, rel_tol=tolerance))


def _valid_smiles(answer: str, right: str) -> float:
    return float(read_smiles(answer.strip()) is not None)


def _json(answer: str, right: str, schema: Any = None) -> float:
    try:
        content = parse(answer)
    except ValueError:
        return 0.0
    return 1.0 if schema is None else float(schema.is_valid(content))


def _triple_f1(answer: str, right: str) -> float:
    wanted, given = (parse_json_answer(text, "RE").tuples for text in (right, answer))
    return precision_recall_f1(count(wanted, given, as_sets=True))[2]


_ALONE = {
    "exact": _exact,
    "number": _number,
    "valid_smiles": _valid_smiles,
    "valid_json": _json,
    "triple_f1": _triple_f1,
}


def load_reward(name: str) -> Reward:
    """A reward by its name in `grpo.rewards`.

    Raises:
        UserError: there is none of this name, or what it names cannot be used.
    """
    kind, _, detail = name.partition(":")
    if name in _ALONE:
        return partial(_each, _ALONE[name])
    if kind == "number":
        try:
            tolerance = float(detail)
        except ValueError:
            tolerance = -1.0
        if not 0 <= tolerance < math.inf:
            raise UserError(f"grpo.rewards: {name!r}: the tolerance is a number, 0 or more, e.g. number:0.05")
        return partial(_each, partial(_number, tolerance=tolerance))
    if kind == "json_schema":
        return partial(_each, partial(_json, schema=_schema(name, detail)))
    file, _, function = name.rpartition(":")
    if file.endswith(".py"):
        return _of_user(name, file, function)
    raise UserError(
        f"grpo.rewards: {name!r} is unknown; choose {', '.join(_ALONE)}, number:TOLERANCE, json_schema:FILE, or give "
        "FILE.py:FUNCTION"
    )


def _each(
    reward: Callable[[str, str], float], prompts: Sequence[str], answers: Sequence[str], right: Sequence[str]
) -> list[float]:
    return [reward(*pair) for pair in zip(answers, right, strict=True)]


def _schema(name: str, file: str) -> Any:
    try:
        import jsonschema  # an extra
    except ImportError:
        raise UserError(f"grpo.rewards: {name!r} needs jsonschema; pip install 'jaxlm[rewards]'") from None
    path = at_home(file)
    try:
        content = parse(path.read_text(encoding="utf-8"))
        validator = jsonschema.validators.validator_for(content)
        validator.check_schema(content)
    except (OSError, ValueError, jsonschema.SchemaError) as error:
        raise UserError(f"grpo.rewards: {name!r}: {file} is not a JSON schema: {error!s:.120}") from None
    return validator(content)


def _of_user(name: str, file: str, function: str) -> Reward:
    path = at_home(file)
    if not path.is_file():
        raise UserError(f"grpo.rewards: {name!r}: {file} is not a file")
    spec = importlib.util.spec_from_file_location(f"rewards_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    found = getattr(module, function, None)
    if not callable(found):
        raise UserError(f"grpo.rewards: {name!r}: {file} has no function {function!r}")
    return found


def checked(name: str, values: Any, answers: Sequence[str]) -> NDArray[np.float64]:
    """The numbers [n] that a reward gave.

    Raises:
        UserError: they are not as many as answers, or not all finite numbers.
    """
    try:
        array = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        array = np.zeros((0, 0))
    if array.shape != (len(answers),):
        raise UserError(
            f"grpo.rewards: {name!r} must return a list of {len(answers)} numbers, one an answer; found {values!r:.80}"
        )
    wrong = np.flatnonzero(~np.isfinite(array))
    if len(wrong):
        raise UserError(
            f"grpo.rewards: {name!r} gave {array[wrong[0]]} for the answer {answers[wrong[0]]!r:.80}; a reward is a "
            "finite number (0 for an answer that cannot be judged)"
        )
    return array
