"""Checkpoints of a run: Orbax, asynchronous, atomic; everything needed to go on exactly.

A step directory is a jaxlm directory (`jaxlm.weights.native`, which says what lies where) with `train/` (optimizer,
step, key) and the run's own small files beside what makes it a model: it can stand alone as one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
from collections.abc import Awaitable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from jaxlm.errors import UserError
from jaxlm.training.state import TrainState
from jaxlm.weights.native import layout
from jaxlm.weights.native.layout import ARRAYS, COMMITTED, DATA_STATE, SMALL_FILES, TRAIN

LOSS = "validation_loss"
TRAINED = "trained"  # in `train`, what trains where the model is an average of it
LOWER = "lower is better"  # beside another figure than the loss


class SmallFiles:
    """A folder of small files as one Orbax checkpointable, written by the first process."""

    def __init__(self, files: Mapping[str, bytes] | None = None) -> None:
        self.files = dict(files or {})

    async def save(self, directory: Any) -> Awaitable[None]:
        files = dict(self.files)

        async def write() -> None:
            folder = Path(await directory.await_creation())
            if not ocp.multihost.is_primary_host(0):
                return
            for name, content in files.items():
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)

        return write()

    async def load(self, directory: Any) -> Awaitable[None]:
        async def read() -> None:
            folder = Path(directory)
            paths = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
            paths.pop(COMMITTED, None)  # Orbax's own
            self.files = {name: path.read_bytes() for name, path in paths.items()}

        return read()


def _context() -> ocp.Context:
    context = ocp.Context()
    context.array.saving.storage_options.chunk_byte_size = layout.CHUNK_BYTES
    context.array.saving.scoped_storage_options_creator = _storage
    return context


def _storage(path: Any, value: Any) -> Any:
    """No chunk spans two layers: what reads a model layer by layer would read such a chunk for each of them."""
    stacked = any(f"['{stack}']" in jax.tree_util.keystr(path) for stack in ("layers", "tail"))
    if not stacked or getattr(value, "ndim", 0) < 2:
        return None
    return ocp.options.ArrayOptions.Saving.StorageOptions(shard_axes=(0,))


class Checkpoints:
    """The checkpoints below one directory.

    Args:
        directory: made if missing; leftovers of interrupted saves in it are removed.
        keep: number of newest steps to keep, besides the best one.
        metric: the figure that decides which is the best.
    """

    def __init__(self, directory: Path, keep: int, metric: str = LOSS) -> None:
        self._metric = metric
        policies = ocp.training.preservation_policies
        best = policies.BestN(
            get_metric_fn=self._goodness,
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        self._directory = directory
        try:
            self._checkpointer = ocp.training.Checkpointer(
                directory.absolute(),
                context=_context(),
                save_decision_policy=_Always(),
                preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
                cleanup_tmp_directories=True,
            )
        except OSError as error:
            raise _disk_error(directory, error) from error
        self._pending: Any = None

    def steps(self) -> list[int]:
        """Complete checkpoints, oldest first."""
        return sorted(checkpoint.step for checkpoint in self._checkpointer.checkpoints)

    def path(self, step: int) -> Path:
        return self._directory / str(step)

    def _goodness(self, metrics: Mapping[str, Any]) -> float:
        """More is better; checkpoints that were measured by another figure come last."""
        if self._metric not in metrics:
            return -math.inf
        return -float(metrics[self._metric]) if metrics.get(LOWER, True) else float(metrics[self._metric])

    def best(self) -> tuple[int, float] | None:
        """(step, figure) of the best kept checkpoint, the earliest of equals, if any was evaluated."""
        scored = [
            (-self._goodness(c.metrics), c.step, float(c.metrics[self._metric]))
            for c in self._checkpointer.checkpoints
            if c.metrics and self._metric in c.metrics
        ]
        if not scored:
            return None
        _, step, value = min(scored)
        return step, value

    def save(
        self,
        state: TrainState,
        data_state: dict[str, Any],
        files: Mapping[str, bytes],
        figure: float | None,
        higher_is_better: bool = False,
        weights: Any = None,
    ) -> int:
        """Starts saving in the background, after the save before it is done; returns the step.

        Args:
            figure: of this state, by which checkpoints are compared; None: it was not measured.
            higher_is_better: whether more of the figure is better.
            weights: what others read as the model where it is not what trains, which is then kept beside it.
        """
        self.wait()
        step = int(state.step)
        items = {
            ARRAYS: state.trainable if weights is None else weights,
            TRAIN: _train_part(state, averages=weights is not None),
            SMALL_FILES: SmallFiles({**files, DATA_STATE: json.dumps(data_state).encode()}),
        }
        metrics: dict[str, Any] | None = None if figure is None else {self._metric: figure}
        if metrics is not None and self._metric != LOSS:
            metrics[LOWER] = not higher_is_better
        try:
            self._pending = self._checkpointer.save_checkpointables_async(step, items, metrics=metrics, force=True)
        except OSError as error:
            raise _disk_error(self.path(step), error) from error
        return step

    def wait(self) -> None:
        """Until the save in progress is complete; UserError if the disk refused it."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except OSError as error:
            raise _disk_error(self._directory, error) from error
        except ValueError as error:
            # TensorStore reports a full disk as ValueError("RESOURCE_EXHAUSTED ... No space left on device").
            if "No space left" not in str(error):
                raise
            raise _disk_error(self._directory, OSError(errno.ENOSPC, "No space left on device")) from error

    def files(self, step: int) -> dict[str, bytes]:
        """The small files of a step: model.json, run.json, tokenizer/..."""
        holder = SmallFiles()
        self._checkpointer.load_checkpointables(step, {SMALL_FILES: holder})
        return holder.files

    def restore(self, step: int, abstract: TrainState, averages: bool = False) -> tuple[TrainState, dict[str, Any]]:
        """State (placed as `abstract` says) and data-iterator state of a step.

        Args:
            averages: the model is an average of what trains, see `save`.

        Raises:
            UserError: for a checkpoint that cannot be read, naming it.
        """
        try:
            stored = self._checkpointer.load_checkpointables(
                step, {TRAIN: _train_part(abstract, averages)} | ({} if averages else {ARRAYS: abstract.trainable})
            )
        except (ValueError, KeyError, OSError) as error:
            if self._model_is_readable(step, abstract):
                raise UserError(
                    f"{self.path(step)}: the weights can be read, the optimizer's state cannot: another version of "
                    "jaxlm, whose optimizer keeps something else, wrote it, or it is damaged. Go on with that version; "
                    "or begin a new run from these weights in another output_dir (model.path, or lora.init_from for an "
                    "adapter)"
                ) from error
            raise UserError(
                f"{self.path(step)}: this checkpoint cannot be read ({str(error).splitlines()[0][:300]}); "
                f"to go on from an earlier one, delete or move it away"
            ) from error
        train = dict(stored[TRAIN])
        trainable = train.pop(TRAINED) if averages else stored[ARRAYS]
        state = abstract.replace(trainable=trainable, **train)  # type: ignore[attr-defined]
        return state, json.loads(self.files(step)[DATA_STATE])

    def _model_is_readable(self, step: int, abstract: TrainState) -> bool:
        try:
            self._checkpointer.load_checkpointables(step, {ARRAYS: abstract.trainable})
        except (ValueError, KeyError, OSError):
            return False
        return True

    def close(self) -> None:
        self.wait()
        self._checkpointer.close()


class _Always:
    """The loop decides when to save; Orbax need not."""

    def should_save(self, step: Any, previous_steps: Any, *, context: Any) -> bool:
        return True


def _train_part(state: TrainState, averages: bool) -> dict[str, Any]:
    return ({TRAINED: state.trainable} if averages else {}) | {
        "step": state.step,
        "opt_state": state.opt_state,
        "dropout_key": state.dropout_key,
        "skipped": state.skipped,
    }


def _disk_error(path: Path, error: OSError) -> UserError:
    reason = error.strerror or str(error)
    return UserError(f"{path}: cannot write a checkpoint ({reason}); free space or choose another output_dir")


def tree_hash(tree: Any) -> str:
    """SHA-256 over all leaves' bytes in path order: equal only if every bit is."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(np.asarray(leaf)).tobytes())
    return digest.hexdigest()
