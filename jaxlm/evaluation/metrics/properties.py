"""Properties that captions of molecules name, by LPM-24's hierarchy of properties.

Facts: `evaluation/text_property_metrics.py` of language-plus-molecules/LPM-24-Dataset. A caption names a property when
the property's tokens stand in it one after the other. Figures of properties are averaged group by group, from the
innermost one; what has no value (no caption names it) is left out of its group, and a group without any value is 1
(in older versions of the script 0).
"""

from __future__ import annotations

import ast
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.errors import UserError
from jaxlm.jsontext import read_value

Tokens = Callable[[str], Sequence[str]]
# Groups from the outermost one, then the name.
PropertyPath = tuple[str, ...]


class Found(NamedTuple):
    """Captions in which a property is named by both, by the answer alone, by the reference alone."""

    both: int
    answer_only: int
    reference_only: int

    def figures(self) -> dict[str, float | None]:
        """Precision, recall and F1; None where a denominator is 0."""
        given, wanted = self.both + self.answer_only, self.both + self.reference_only
        return {
            "precision": self.both / given if given else None,
            "recall": self.both / wanted if wanted else None,
            "f1": 2 * self.both / (given + wanted) if given + wanted else None,
        }


def read_properties(path: Path) -> list[PropertyPath]:
    """The paths of all properties in LPM-24's nested_props.json: groups of groups of names.

    Raises:
        UserError: for a file of another form.
    """
    paths = _flat(read_value(path), ()) if path.is_file() else None
    if not paths:
        raise UserError(
            f"options.properties: {path} is not a hierarchy of properties; expected LPM-24's nested_props.json, "
            '{"group": [{"group": ["property", …]}, …]}'
        )
    return list(dict.fromkeys(paths))


def _flat(content: Any, above: PropertyPath) -> list[PropertyPath] | None:
    if not isinstance(content, dict):
        return None
    paths: list[PropertyPath] = []
    for group, members in content.items():
        for member in members if isinstance(members, list) else [None]:
            if isinstance(member, str):
                paths.append((*above, group, member))
            elif (inner := _flat(member, (*above, group))) is not None:
                paths += inner
            else:
                return None
    return paths


def read_combinations(path: Path) -> list[tuple[str, str]]:
    """Pairs of properties that training never shows together: LPM-24's train_withheld_combos.txt.

    Raises:
        UserError: for a file of another form.
    """
    pairs = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"options.combinations: {path} cannot be read ({error})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            pair = ast.literal_eval(line.strip().split("\t")[0])
            first, second = pair
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            first = second = None
        if not isinstance(first, str) or not isinstance(second, str):
            raise UserError(f"options.combinations: {path}:{number}: expected ('group__property', 'group__property')")
        pairs.append((first, second))
    return pairs


_BETWEEN = "\0"  # stands in no token


def _joined(tokens: Sequence[str]) -> str:
    return "".join(f"{_BETWEEN}{token}" for token in tokens) + _BETWEEN


def named(names: Sequence[str], captions: Sequence[str], tokens: Tokens) -> list[frozenset[str]]:
    """For each caption those of the names whose tokens stand in it one after the other.

    Args:
        names: of properties; of one with its groups, "group__property", the last part counts.
    """
    return list(map(_finder(tuple(names), tokens), captions))


@functools.lru_cache(maxsize=8)
def _finder(names: tuple[str, ...], tokens: Tokens) -> Callable[[str], frozenset[str]]:
    by_first: dict[str, list[tuple[str, str]]] = {}
    for name in dict.fromkeys(names):
        cut = tokens(name.split("__")[-1].lower())
        if cut:
            by_first.setdefault(cut[0], []).append((name, _joined(cut)))

    @functools.lru_cache(maxsize=65536)  # resamples of records have the same captions again and again
    def find(caption: str) -> frozenset[str]:
        cut = tokens(caption.lower())
        joined = _joined(cut)
        found = (name for first in set(cut) & by_first.keys() for name, wanted in by_first[first] if wanted in joined)
        return frozenset(found)

    return find


def property_figures(
    references: Sequence[str], answers: Sequence[str], paths: Sequence[PropertyPath], tokens: Tokens
) -> dict[str, float]:
    """Precision, recall and F1 over all properties, each level's mean of its groups."""
    names = [path[-1] for path in paths]
    pairs = list(zip(named(names, references, tokens), named(names, answers, tokens), strict=True))
    both = Counter(name for right, given in pairs for name in right & given)
    answer_only = Counter(name for right, given in pairs for name in given - right)
    reference_only = Counter(name for right, given in pairs for name in right - given)
    by_name = {path: Found(both[path[-1]], answer_only[path[-1]], reference_only[path[-1]]).figures() for path in paths}
    return {
        name: _averaged({path: figures[name] for path, figures in by_name.items()})
        for name in ("precision", "recall", "f1")
    }


def _averaged(values: dict[PropertyPath, float | None]) -> float:
    """The mean over the first level of paths, of which each is the mean of what lies below."""
    below: dict[str, dict[PropertyPath, float | None]] = {}
    level: list[float] = []
    for path, value in values.items():
        if len(path) > 1:
            below.setdefault(path[0], {})[path[1:]] = value
        elif value is not None:
            level.append(value)
    level += [_averaged(inner) for inner in below.values()]
    return sum(level) / len(level) if level else 1.0


def combination_figures(
    references: Sequence[str], answers: Sequence[str], pairs: Sequence[tuple[str, str]], tokens: Tokens
) -> dict[str, float]:
    """Precision, recall and F1 of pairs of properties, a pair being named when both are; 0 where there are none."""
    names = [name for pair in pairs for name in pair]
    both = answer_only = reference_only = 0
    for right, given in zip(named(names, references, tokens), named(names, answers, tokens), strict=True):
        for pair in pairs:
            is_wanted, is_given = right.issuperset(pair), given.issuperset(pair)
            both += is_wanted and is_given
            answer_only += is_given and not is_wanted
            reference_only += is_wanted and not is_given
    return {name: value or 0.0 for name, value in Found(both, answer_only, reference_only).figures().items()}
