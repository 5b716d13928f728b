"""How a decoder knows where tokens stand: rotary, learned, relative, and prefixes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxlm.errors import UserError

DEFAULT_THETA = 10000.0
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


def check_positive(spec: Any, names: tuple[str, ...], zero: tuple[str, ...] = ()) -> None:
    """Refuses sizes that no tensor can have; fields may be None where that means something."""
    for name in names:
        value = getattr(spec, name)
        if (value is not None and not 0 <= value < 1 << 31) or (value == 0 and name not in zero):
            raise UserError(f"config: {name} is {value!r}; expected a positive number")


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding.

    Source: transformers `modeling_rope_utils.py`, whose field names these are; llama3 from Meta's LLaMA 3.1 release;
    yarn from arXiv:2309.00071; dynamic NTK and linear scaling as LLaMA's forks use them; longrope from
    arXiv:2402.13753: texts of more than `original_max_position_embeddings` tokens are turned by `long_factor`, all
    others by `short_factor`, which have a number for each pair of dims that turns.
    """

    rope_type: str = "default"
    rope_theta: float = DEFAULT_THETA
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    frequency_dtype: str | None = None  # what frequencies are rounded to: 'float16' in ChatGLM-6B; None for nothing

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_TYPES:
            raise UserError(f"rope: rope_type {self.rope_type!r} is not supported; known: {', '.join(ROPE_TYPES)}")
        if not self.rope_theta > 0:
            raise UserError(f"rope: rope_theta is {self.rope_theta!r}; expected a positive number")
        if self.frequency_dtype not in (None, "float16"):
            raise UserError(f"rope: frequency_dtype {self.frequency_dtype!r} is not 'float16'")
        for name in _NEEDED.get(self.rope_type, ("factor",)):
            if getattr(self, name) is None:
                raise UserError(f"rope: rope_type {self.rope_type!r} needs a {name!r}")
        for name in ("short_factor", "long_factor"):
            factors = getattr(self, name)
            if (factors is not None) != (self.rope_type == "longrope"):
                raise UserError(f"rope: {name} belongs to rope_type 'longrope', not to {self.rope_type!r}")
            if factors is not None and not all(factor > 0 for factor in factors):
                raise UserError(f"rope: {name} is {list(factors)}; expected positive numbers")

    @property
    def switch_length(self) -> int | None:
        """The longest text that `short_factor` turns; None where frequencies do not change at once."""
        return self.original_max_position_embeddings if self.rope_type == "longrope" else None


# rope_type -> the parameters that it cannot do without; of the others it is `factor`.
_NEEDED: dict[str, tuple[str, ...]] = {
    "default": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True)
class LearnedPositionsSpec:
    """A trained vector for each position, added to the token's.

    Args:
        num_rows: number of rows of the table.
        offset: row of position 0: 2 in OPT, whose first rows belong to padding.
    """

    num_rows: int
    offset: int = 0

    def __post_init__(self) -> None:
        check_positive(self, ("num_rows", "offset"), zero=("offset",))
        if self.offset >= self.num_rows:
            raise UserError(
                f"config: learned_positions has {self.num_rows} rows, all of them below offset {self.offset}"
            )

    @property
    def num_positions(self) -> int:
        """Number of positions that have a row."""
        return self.num_rows - self.offset


@dataclass(frozen=True)
class RelativeBiasSpec:
    """A trained bias of scores by the distance of query and key, one for each head (T5, arXiv:1910.10683).

    Args:
        num_buckets: number of classes of distances: near ones have one each, far ones share (see
            `nn.positions.relative_buckets`).
        max_distance: from here on all distances are in the last class.
    """

    num_buckets: int = 32
    max_distance: int = 128

    def __post_init__(self) -> None:
        check_positive(self, ("num_buckets", "max_distance"))
        # Half of the buckets are for keys behind the query, and half of those for single distances.
        if self.num_buckets % 4 or self.max_distance <= self.num_buckets // 2:
            raise UserError(
                f"config: a relative bias of {self.num_buckets} buckets up to distance {self.max_distance}: 4 divides "
                "the number of buckets, and half of it is below the distance"
            )


@dataclass(frozen=True)
class PrefixSpec:
    """GLM's rows (arXiv:2103.10360): the tokens of a text in front of the first `start_id` see each other.

    From that token on, positions stay what the first mask token's is; the first half of each head turns by them, the
    second half by the number of tokens since, which is 0 in front.

    Args:
        start_id: the token that an answer begins with.
        mask_ids: the mask tokens; the first of them that the text has counts.
    """

    start_id: int
    mask_ids: tuple[int, ...]
