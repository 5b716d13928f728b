"""How sources share a run: weights by their sizes, and the table of what a run takes of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxlm.config import DataConfig
from jaxlm.errors import UserError


def source_names(config: DataConfig) -> list[str]:
    """The training sources as reports call them: their paths, numbered where one stands several times."""
    paths = [source.path for source in config.train]
    return [
        path if paths.count(path) == 1 else f"{path} ({paths[: number + 1].count(path)})"
        for number, path in enumerate(paths)
    ]


def source_weights(config: DataConfig, tokens: Sequence[int]) -> tuple[float, ...]:
    """How often each training source is seen in an epoch.

    With `alpha` sources have shares in proportion to weight x tokens^alpha, and an epoch as many tokens as they have
    together. The exponent is that of multilingual models (mT5, arXiv:2010.11934, section 3.1).

    Args:
        config: the data section.
        tokens: of each source.

    Raises:
        UserError: a source without tokens that should have a share of them.
    """
    for source, count in zip(config.train, tokens, strict=True):
        if source.tokens is not None and count == 0:
            raise UserError(
                f"data.train: {source.path}: tokens is {source.tokens:g}, but nothing is left of this source; leave it "
                "out, or see above why its records were dropped"
            )
    alpha = None if config.mixing is None else config.mixing.alpha
    if alpha is None:
        return tuple(
            source.weight if source.tokens is None else source.tokens / count
            for source, count in zip(config.train, tokens, strict=True)
        )
    parts = [source.weight * count**alpha if count else 0.0 for source, count in zip(config.train, tokens, strict=True)]
    scale = sum(tokens) / sum(parts)
    # Six digits: powers differ in their last bits between machines, and all hosts must draw the same documents.
    return tuple(
        float(f"{scale * part / count:.6g}") if count else 0.0 for part, count in zip(parts, tokens, strict=True)
    )


def source_limits(config: DataConfig) -> tuple[float, ...]:
    """How often each training source is seen at most in a run; empty where none has a limit."""
    limits = [source.max_passes for source in config.train]
    if all(limit is None for limit in limits):
        return ()
    return tuple(float("inf") if limit is None else limit for limit in limits)


@dataclass(frozen=True)
class SourceShare:
    """What a run takes of a source.

    Args:
        name: of the source.
        tokens: that the source has.
        passes: over it.
    """

    name: str
    tokens: int
    passes: float

    @property
    def taken(self) -> float:
        """Tokens, repeated ones counted each time."""
        return self.tokens * self.passes


def table(shares: Sequence[SourceShare]) -> list[str]:
    """Lines of a table with a head: each source, its tokens, its share of the run's, passes over it."""
    whole = sum(share.taken for share in shares)
    lines = [("source", "tokens", "in the run", "share", "passes")]
    for share in shares:
        part = share.taken / whole if whole else 0.0
        figures = f"{share.tokens:,}", f"{share.taken:,.0f}", f"{part:.2%}", f"{share.passes:.2f}"
        lines.append((share.name, *figures))
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    return [
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    ]
