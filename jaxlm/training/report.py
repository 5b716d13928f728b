"""Reports of a run: progress on the terminal, metrics.jsonl, TensorBoard and W&B when asked for, the loss plot."""

from __future__ import annotations

import json
import math
import time
import uuid
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from jaxlm.devices.chips import peak_flops
from jaxlm.errors import UserError
from jaxlm.spec import ENCODER, DecoderSpec
from jaxlm.weights.names import leaf_shapes, num_elements, num_params


def flops_per_token(model: DecoderSpec, length: int, full: bool, encoder_length: int | None = None) -> float:
    """FLOPs of one training token: 6 N for full fine-tuning, 4 N for adapters, plus causal attention.

    N counts the matrices a token is multiplied with (no embedding look-up); adapters themselves are
    neglected. Attention is 4 L H h T FLOPs a token forward (scores and values) and twice that backward,
    halved because causal. Recomputation does not count (MFU, arXiv:2204.02311 appendix B).

    With an encoder, a token of the decoder brings encoder_length / length tokens of the source along.
    """
    share = (encoder_length or length) / length
    learned = 0 if model.learned_positions is None else model.learned_positions.num_rows
    looked_up = 0 if model.tied_head else model.vocab_size
    matrices: float = num_params(model) - looked_up * model.embedding_dims - learned * model.hidden_size
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
        self.path = output_dir / "metrics.jsonl"
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


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line cut short by a crash is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


class _Values(ProgressColumn):
    """loss, learning rate and speed of the last step."""

    def render(self, task: Task) -> Text:
        return Text(str(task.fields.get("values", "")))


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
        self._clock, self._step, self._tokens = time.perf_counter(), start, 0
        self._speed: float | None = None
        peak = peak_flops(jax.devices()[0].device_kind)
        self._peak = None if peak is None else peak * jax.device_count()
        self._bar: Progress | None = None
        if console is not None and console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
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
        self._tokens += int(metrics["tokens"])
        elapsed = now - self._clock
        speed = metrics["tokens"] / max(elapsed, 1e-9)
        self._speed = speed if self._speed is None else 0.9 * self._speed + 0.1 * speed
        self._clock = now
        figures = {"tokens_per_second": round(speed, 1), "step_seconds": round(elapsed, 4)}
        text = f"loss {metrics['loss']:.4f}  lr {metrics['learning_rate']:.2e}  {self._speed:,.0f} tok/s"
        if self._peak is not None:
            figures["mfu"] = round(speed * self._flops / self._peak, 4)
            text += f"  MFU {self._speed * self._flops / self._peak:.1%}"
        if metrics["skipped"]:
            text += f"  skipped {int(metrics['skipped'])}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, values=text)
        if step % self._every == 0 or step == self._total:
            left = (self._total - step) * (metrics["tokens"] / max(self._speed, 1e-9))
            for console in (None if self._bar else self._console, self._log):
                if console is not None:
                    console.print(f"step {step}/{self._total}  {text}  {_duration(left)} left", highlight=False)
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


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def plot_losses(metrics: list[dict[str, Any]], target: Path) -> None:
    """Training and validation loss over steps, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [m for m in metrics if "loss" in m and math.isfinite(m["loss"])]
    train = np.array([(m["step"], m["loss"], m.get("tokens", 1.0)) for m in lines], np.float64).reshape(-1, 3)
    valid = [(m["step"], m["validation_loss"]) for m in metrics if "validation_loss" in m]
    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=120)
    if len(train):
        step, loss, tokens = binned(train)
        area = 14 * np.minimum(tokens / np.median(tokens), 2)  # a batch of few tokens is not an outlier
        axes.scatter(step, loss, area, color="tab:blue", alpha=0.3, linewidths=0, label="training, area by tokens")
        axes.plot(step, smoothed(step, loss, tokens), color="tab:blue", linewidth=1.5, label="training, smoothed")
    if valid:
        axes.plot(*zip(*valid, strict=True), color="tab:orange", marker="o", markersize=4, label="validation")
    axes.set(xlabel="step", ylabel="loss per target token (nats)", title=target.parent.name)
    axes.grid(alpha=0.3)
    if len(train) or valid:
        axes.legend()
    figure.tight_layout()
    figure.savefig(target)
    pyplot.close(figure)


def binned(points: NDArray[np.float64], most: int = 1000) -> tuple[NDArray[np.float64], ...]:
    """(step, loss, tokens) of at most `most` groups of neighbouring points; step and loss are means weighted by tokens.

    Args:
        points: [n, 3]: step, loss, number of target tokens.
        most: number of groups.
    """
    group = np.arange(len(points)) * most // len(points) if len(points) > most else np.arange(len(points))
    step, loss, tokens = points.T
    steps, losses, total = (
        np.bincount(group, values).astype(np.float64) for values in (tokens * step, tokens * loss, tokens)
    )
    return steps / total, losses / total, total


def smoothed(step: NDArray[np.float64], loss: NDArray[np.float64], tokens: NDArray[np.float64]) -> NDArray[np.float64]:
    """The loss without its noise: at each point a straight line is fitted to its neighbours (local linear regression).

    Neighbours are weighted by a Gaussian whose width is a 50th of the run, and by their tokens. A moving average would
    lag behind a falling loss, and start at the first value; a straight line through both sides does neither.

    Args:
        step, loss, tokens: [n].

    Returns:
        [n].
    """
    width = max((step[-1] - step[0]) / 50, 1.0)
    result = np.empty_like(loss)
    for i, centre in enumerate(step):
        x = step - centre
        weight = tokens * np.exp(-0.5 * (x / width) ** 2)
        s0, s1, s2 = weight.sum(), (weight * x).sum(), (weight * x * x).sum()
        spread = s0 * s2 - s1 * s1
        line = weight * (s2 - s1 * x) / spread if spread > 1e-9 * s0 * s0 else weight / s0
        result[i] = (line * loss).sum()
    return result


def print_pairs(console: Console, pairs: list[tuple[str, str]]) -> None:
    """Prints aligned 'name  value' lines; values are never wrapped, so that paths can be copied."""
    width = max(len(name) for name, _ in pairs)
    for name, value in pairs:
        console.print(f"{name:{width}}  {value}", highlight=False, markup=False, soft_wrap=True)
