"""Reports of a run: progress on the terminal, metrics.jsonl, TensorBoard and W&B when asked for."""

from __future__ import annotations

import contextlib
import json
import re
import time
import uuid
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from jaxlm.devices.chips import peak_flops
from jaxlm.errors import UserError
from jaxlm.runs.metrics import METRICS, read_metrics
from jaxlm.spec import ENCODER, DecoderSpec
from jaxlm.units import duration
from jaxlm.weights.names import leaf_shapes, num_elements, num_params


def flops_per_token(model: DecoderSpec, length: int, full: bool, encoder_length: int | None = None) -> float:
    """FLOPs of one training token: 6 N for full fine-tuning, 4 N for adapters, plus causal attention.

    N counts the matrices a token is multiplied with: no embedding look-up, and of experts those that a token of text
    uses (`idle_params`); adapters and routers are neglected. Attention is 4 L H h T FLOPs a token forward (scores and
    values) and twice that backward, halved because causal. Recomputation does not count (MFU, arXiv:2204.02311
    appendix B).

    With an encoder, a token of the decoder brings encoder_length / length tokens of the source along.
    """
    share = (encoder_length or length) / length
    learned = 0 if model.learned_positions is None else model.learned_positions.num_rows
    looked_up = 0 if model.tied_head else model.vocab_size
    matrices: float = (
        num_params(model.with_experts(None)) - looked_up * model.embedding_dims - learned * model.hidden_size
    )
    matrices -= idle_params(model)
    attention = 12 * sum(layer.attention.num_heads * layer.attention.head_dim for layer in model.layers()) * length / 2
    if model.encoder is not None:
        shapes = leaf_shapes(model)
        of_source = sum(num_elements(shapes[path]) for path in shapes if reads_source(path))
        matrices += of_source * (share - 1)
        to_source = (layer.attention for layer in model.layers())
        own = (layer.attention for layer in model.encoder.layers())
        attention += 12 * length * share * sum(each.num_heads * each.head_dim for each in to_source)
        attention += 12 * length * share**2 * sum(each.num_heads * each.head_dim for each in own)
    return (6 if full else 4) * matrices + attention


def idle_params(model: DecoderSpec) -> float:
    """Parameters of experts that a token of text is not multiplied with.

    Routers by activation need all of gate and up to choose by: with them only down has idle parts.
    """
    idle = 0.0
    for layer in model.layers():
        experts = layer.feed_forward.experts
        if experts is not None:
            matrices = 1 if experts.router.startswith("activation") else 3
            idle += (
                matrices * model.hidden_size * layer.feed_forward.size * (1 - experts.top_k[0] / experts.num_experts)
            )
    return idle


def reads_source(path: str) -> bool:
    """Whether a leaf is multiplied with tokens of the source."""
    return path.startswith(ENCODER) or "/cross_attn/k_proj/" in path or "/cross_attn/v_proj/" in path


class MetricsWriter:
    """Appends to output_dir/metrics.jsonl; TensorBoard and W&B beside it when configured.

    Args:
        output_dir: the run directory.
        resumed_step: step that the run goes on from. Lines of later steps, written by a run that was killed after its
            last checkpoint, are dropped, so that the file has one line a step.
        tensorboard: also write event files.
        wandb: project name, or None.
        config: the run's configuration, for W&B.
    """

    def __init__(
        self, output_dir: Path, resumed_step: int, tensorboard: bool, wandb: str | None, config: dict[str, Any]
    ) -> None:
        self.path = output_dir / METRICS
        if self.path.exists():
            # A run that starts over from step 0 evaluates that step again.
            lines = [line for line in read_metrics(self.path) if 0 < resumed_step >= line["step"]]
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            temporary.replace(self.path)
        self._file = self.path.open("a", encoding="utf-8")
        self._tensorboard: Any = None
        self._wandb: Any = None
        if tensorboard:
            try:
                from tensorboardX import SummaryWriter
            except ImportError:
                raise UserError("train.tensorboard: needs tensorboardX; pip install 'jaxlm[tensorboard]'") from None
            self._tensorboard = SummaryWriter(str(output_dir / "tensorboard"), purge_step=resumed_step + 1)
        if wandb:
            try:
                import wandb as wandb_module
            except ImportError:
                raise UserError("train.wandb: needs wandb; pip install 'jaxlm[wandb]'") from None
            identity = output_dir / "wandb_id"  # a resumed run goes on in the same W&B run
            if not identity.exists():
                identity.write_text(uuid.uuid4().hex, encoding="utf-8")
            self._wandb = wandb_module.init(
                project=wandb,
                dir=str(output_dir),
                config=config,
                id=identity.read_text(encoding="utf-8"),
                resume="allow",
            )

    def write(self, step: int, values: dict[str, Any]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        numbers = numbers_by_name(values)
        if self._tensorboard is not None:
            for key, value in numbers.items():
                self._tensorboard.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def close(self) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def numbers_by_name(values: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics; those that stand by name below a key are called key/name."""
    flat = dict(values)
    for key, group in values.items():
        if isinstance(group, dict):
            flat |= {f"{key}/{name}": value for name, value in group.items()}
    return {key: value for key, value in flat.items() if isinstance(value, (int, float))}


class _Values(ProgressColumn):
    """loss, learning rate and speed of the last step."""

    def render(self, task: Task) -> Text:
        return Text(str(task.fields.get("values", "")))


# Speed is also shown with pauses (evaluation, saving) where less than this share of the time is in steps.
SHOWN_PAUSES = 0.99
NARROW = 120  # columns; below, the bar is short and has less beside it: it stays one line, also of 80


class ProgressReport:
    """A bar on a terminal; elsewhere (log files, CI) a plain line now and then.

    Args:
        console: the terminal; None on all hosts but the first.
        log: this process's log file, which gets the plain lines too; None for a single process.
        total: number of steps of the run.
        start: number of steps already done.
        flops: FLOPs per token, for MFU.
    """

    LINES = 20  # plain lines over a whole run

    def __init__(
        self, console: Console | None, total: int, start: int, flops: float, log: Console | None = None
    ) -> None:
        self._console, self._total, self._flops, self._log = console, total, flops, log
        self._every = max(1, total // self.LINES)
        self._begun = self._clock = time.perf_counter()
        self._tokens, self._stepping = 0, 0.0  # of this start: tokens, and seconds without pauses
        self._speed: float | None = None
        peak = peak_flops(jax.devices()[0].device_kind)
        self._peak = None if peak is None else peak * jax.device_count()
        self._bar: Progress | None = None
        self._is_narrow = console is not None and console.width < NARROW
        if console is not None and console.is_terminal:
            self._bar = Progress(
                *([] if self._is_narrow else [TextColumn("{task.description}")]),
                BarColumn(bar_width=8 if self._is_narrow else 24),
                TextColumn("{task.completed}/{task.total}"),
                _Values(),
                TimeRemainingColumn(),
                console=console,
            )
            self._bar.start()
            self._task = self._bar.add_task("training", total=total, completed=start)

    def step(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        """Shows a finished step; returns speed figures for the metrics file."""
        now = time.perf_counter()
        elapsed = now - self._clock
        self._tokens += int(metrics["tokens"])
        self._stepping += elapsed
        speed = metrics["tokens"] / max(elapsed, 1e-9)
        self._speed = speed if self._speed is None else 0.9 * self._speed + 0.1 * speed
        self._clock = now
        figures = {
            "tokens_per_second": round(speed, 1),
            "tokens_per_second_with_pauses": round(self._tokens / max(now - self._begun, 1e-9), 1),
            "step_seconds": round(elapsed, 4),
            **memory_peaks(),
        }
        text = f"loss {metrics['loss']:.4f}  lr {metrics['learning_rate']:.2e}  {self._speed:,.0f} tokens/s"
        if "reward" in metrics:  # GRPO, whose loss stays near 0 while the reward rises
            text = f"reward {metrics['reward']:.3f}  {text}"
        share = self._stepping / max(now - self._begun, 1e-9)
        pauses = f" ({self._speed * share:,.0f} with pauses)" if share < SHOWN_PAUSES else ""
        further = ""
        if self._peak is not None:
            figures["mfu"] = round(speed * self._flops / self._peak, 4)
            further += f"  MFU {self._speed * self._flops / self._peak:.1%}"
        if metrics["skipped"]:
            further += f"  skipped {int(metrics['skipped'])}"
        if self._bar is not None:
            shown = text + ("" if self._is_narrow else pauses) + further
            self._bar.update(self._task, completed=step, values=shown)
        text += pauses + further
        if step % self._every == 0 or step == self._total:
            left = (self._total - step) * (metrics["tokens"] / max(self._speed, 1e-9))
            for console in (None if self._bar else self._console, self._log):
                if console is not None:
                    console.print(f"step {step}/{self._total}  {text}  {duration(left)} left", highlight=False)
        return figures

    def say(self, text: str) -> None:
        """A line above the bar."""
        for console in (self._console, self._log):
            if console is not None:
                console.print(text, highlight=False)

    def pause(self) -> None:
        """Excludes the time until now (evaluation, saving) from the next step's speed."""
        self._clock = time.perf_counter()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def memory_peaks() -> dict[str, int]:
    """The most bytes that this process has held so far (host_memory), and of its devices that with most of them.

    A key is left out where neither the system nor the backend says it.
    """
    peaks = {}
    with contextlib.suppress(OSError):  # not a Linux
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        if (peak := re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)) is not None:
            peaks["host_memory"] = 1024 * int(peak[1])
    devices = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    used = [bytes_used for bytes_used in devices if bytes_used is not None]
    return peaks | ({"device_memory": max(used)} if used else {})
