"""Which examples of a store a run has been given, so that another run may do without them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxlm.config import RunConfig
from jaxlm.config.files import load_run_yaml
from jaxlm.data.loader import Data
from jaxlm.data.report import Report
from jaxlm.data.split import drawn_examples
from jaxlm.data.store.stored import StoredTokens
from jaxlm.errors import UserError
from jaxlm.jsontext import read_object
from jaxlm.locate import at_home
from jaxlm.weights.native.layout import DATA_STATE, RUN_YAML, SMALL_FILES, find_native

_BLOCK = 1 << 16  # examples whose masks are read at a time


@dataclasses.dataclass(frozen=True)
class _Lengths:
    """What decides the order of a run: where its examples begin, and of which source they are."""

    offsets: NDArray[np.int64]
    source: NDArray[np.int32]
    encoder_ids: None = None
    encoder_offsets: None = None

    def __len__(self) -> int:
        return len(self.source)

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)


def consumed_examples(store: Path, run: Path, steps: int | None = None) -> NDArray[np.bool_]:
    """bool [examples]: those that a run has been given, up to its newest checkpoint.

    Args:
        store: the directory of the store that the run trains on.
        run: the run's directory, or one of its checkpoints.
        steps: only its first steps; None: all.

    Raises:
        UserError: it trains on something else, or cuts examples, so that its own are not the store's.
    """
    checkpoint = find_native(run)
    if checkpoint is None:
        raise UserError(f"--consumed: {run} holds no checkpoint of a run, so nothing says what it was given")
    small = checkpoint / SMALL_FILES
    config = load_run_yaml((small / RUN_YAML).read_text(encoding="utf-8"), str(small / RUN_YAML))
    state = read_object(small / DATA_STATE)
    tokens = StoredTokens(store)
    kept = _kept(config, tokens, store, run)
    numbers = np.flatnonzero(kept)
    lengths = tokens.lengths[numbers]
    examples: Any = _Lengths(np.concatenate([[0], np.cumsum(lengths)]), np.zeros(len(numbers), np.int32))
    data = Data(config.data, config.train.seed, examples, None, Report((), ()), "").with_packing(
        state.get("packing", 1)
    )
    order = data.train_batches(
        config.train.global_batch_size, 1, config.train.epochs, config.train.steps, known=state
    ).order
    done = int(state["step"]) if steps is None else steps
    if not 0 <= done <= int(state["step"]):
        raise UserError(f"--steps: {done}; {run} has done {state['step']} steps, by its newest checkpoint")
    given = np.zeros(len(tokens), np.bool_)
    for step in range(done):
        for share in order.shares(step):
            places = np.searchsorted(examples.offsets, share.rows.pieces(share.numbers).starts, side="right") - 1
            given[numbers[places]] = True
    return given


def _kept(config: RunConfig, tokens: StoredTokens, store: Path, run: Path) -> NDArray[np.bool_]:
    """bool [examples]: those among the run's training data.

    Raises:
        UserError: the run has other examples than the store.
    """
    sources = [source.path for source in config.data.train]
    if len(sources) != 1 or not at_home(sources[0]).exists() or not at_home(sources[0]).samefile(store):
        raise UserError(
            f"--consumed: {run} trains on {', '.join(sources)}, not on {store} alone; which of its examples it was "
            "given can be told for a run on one store"
        )
    longest = int(tokens.lengths.max(initial=0))
    if longest > config.data.sequence_length and config.data.packing_mode != "group_texts":
        raise UserError(
            f"--consumed: {run} cuts the store's examples ({longest:,} tokens at most) to data.sequence_length, "
            f"{config.data.sequence_length:,}, so its own are others"
        )
    if tokens.encoder_ids is not None or config.data.train[0].limit is not None:
        raise UserError(f"--consumed: {run} has an encoder, or a limit; what it was given cannot be told by the store")
    kept = np.zeros(len(tokens), np.bool_)
    for first in range(0, len(tokens), _BLOCK):
        offsets = np.asarray(tokens.offsets[first : first + _BLOCK + 1])
        counts = np.concatenate([[0], np.cumsum(tokens.loss_mask[offsets[0] : offsets[-1]], dtype=np.int64)])
        kept[first : first + _BLOCK] = np.diff(counts[offsets - offsets[0]]) > 0  # others have nothing to learn
        tokens.release()
    held_out = config.data.validation
    if isinstance(held_out, (int, float)) and held_out:
        records = _Records(np.asarray(tokens.record)[kept])
        kept[np.flatnonzero(kept)[drawn_examples(records, held_out, config.train.seed)]] = False  # type: ignore[arg-type]
    return kept


@dataclasses.dataclass(frozen=True)
class _Records:
    """The records of examples, which is all that a drawing asks for."""

    record: NDArray[np.int64]
