"""Meta's own checkpoints: `consolidated.NN.pth`, one per model-parallel shard, and `params.json`.

Every file is a torch state dict. Column-parallel matrices (wq, wk, wv, w1, w3, output) are split by rows, row-parallel
ones (wo, w2) by columns, the embedding by columns in LLaMA 1 and 2 and by rows in LLaMA 3; norms are in every file. The
rows of wq and wk are ordered so that the two numbers of a rotary pair lie beside each other within their head, where HF
keeps all first ones before all second ones.

`params.json` says neither F (it follows from a formula; here the shapes tell), nor the largest position, nor, up to
LLaMA 2, the vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convert.transforms.experts import dense_first
from jaxlm.errors import UserError
from jaxlm.jsontext import read_object
from jaxlm.models.families import write_config
from jaxlm.models.families.common import write_rope
from jaxlm.spec import DecoderSpec, RopeSpec, uniform_decoder
from jaxlm.tokenizer import find_tokenizer_files
from jaxlm.weights.ahead import read_ahead
from jaxlm.weights.dtypes import BFLOAT16
from jaxlm.weights.hf import StackedTensors, check_num_layers, copy_files, match_tensors
from jaxlm.weights.leaves import ParamSource, stored_blocks
from jaxlm.weights.names import Entry, Shape, leaf_shapes, stored_entries
from jaxlm.weights.output import Advance, Watcher
from jaxlm.weights.tensors import JoinedColumns, JoinedRows, Tensor, WrappedTensor, same_bytes
from jaxlm.weights.torch_write import TensorInfo, TorchZipWriter
from jaxlm.weights.torch_zip import read_torch_zip

PARAMS = "params.json"
FILE_NAMES = "consolidated.NN.pth"
_FILE = re.compile(r"consolidated\.(\d{2,})\.pth")
# A buffer of the first LLaMA; it follows from theta.
_IGNORED = re.compile(r"rope\.freqs")
# Keys that say how to run the model, or that the shapes of the tensors say better.
_NOT_NEEDED = {"multiple_of", "ffn_dim_multiplier", "max_batch_size", "max_seq_len", "model_parallel_size"}
_READ = {
    "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "norm_eps", "vocab_size", "rope_theta",
    "use_scaled_rope", "rope_scaling_factor", "rope_high_freq_factor",
}  # fmt: skip
# The embedding of LLaMA 3 is split by rows; so is its output, like everyone's.
_LLAMA3_THETA = 500000.0
_LLAMA3_VOCAB = 128256


@dataclass(frozen=True)
class MetaTensor:
    """One tensor in Meta's files, whose layout is HF's once the shards are joined.

    Args:
        name: with '{}' for the number of the layer.
        split: dims that model-parallel shards may split; () means that every shard holds the tensor whole. Two: LLaMA 1
            and 2 split the first one named, LLaMA 3 the second.
        paired: whether the two numbers of a rotary pair lie beside each other.
    """

    name: str
    split: tuple[int, ...] = ()
    paired: bool = False


# By `Row.path`; Meta's models have no other tensors.
TENSORS: dict[str, MetaTensor] = {
    "embed_tokens/embedding": MetaTensor("tok_embeddings.weight", (1, 0)),
    "input_layernorm/scale": MetaTensor("layers.{}.attention_norm.weight"),
    "self_attn/q_proj/kernel": MetaTensor("layers.{}.attention.wq.weight", (0,), paired=True),
    "self_attn/k_proj/kernel": MetaTensor("layers.{}.attention.wk.weight", (0,), paired=True),
    "self_attn/v_proj/kernel": MetaTensor("layers.{}.attention.wv.weight", (0,)),
    "self_attn/o_proj/kernel": MetaTensor("layers.{}.attention.wo.weight", (1,)),
    "post_attention_layernorm/scale": MetaTensor("layers.{}.ffn_norm.weight"),
    "mlp/gate_proj/kernel": MetaTensor("layers.{}.feed_forward.w1.weight", (0,)),
    "mlp/up_proj/kernel": MetaTensor("layers.{}.feed_forward.w3.weight", (0,)),
    "mlp/down_proj/kernel": MetaTensor("layers.{}.feed_forward.w2.weight", (1,)),
    "norm/scale": MetaTensor("norm.weight"),
    "lm_head/kernel": MetaTensor("output.weight", (0,)),
}


def _entries(config: DecoderSpec) -> list[Entry]:
    return stored_entries(config, {path: tensor.name for path, tensor in TENSORS.items()}, "Meta's")


def _tensor_of(entry: Entry) -> MetaTensor:
    return TENSORS[entry.path.removeprefix("layers/")]


@dataclass(frozen=True)
class PairedHeads(WrappedTensor):
    """Rows of heads in HF's order, read from a tensor in Meta's.

    Args:
        head_dim: rows of one head.
    """

    head_dim: int

    def rows(self, start: int, stop: int) -> np.ndarray:
        first, last = start // self.head_dim, -(-stop // self.head_dim)
        heads = self.tensor.rows(first * self.head_dim, last * self.head_dim)
        skip = first * self.head_dim
        return _reorder(heads, self.head_dim, pairs=True)[start - skip : stop - skip]


def _reorder(rows: np.ndarray, head_dim: int, pairs: bool) -> np.ndarray:
    """Whole heads from Meta's order to HF's (`pairs`), or back."""
    inside = (head_dim // 2, 2) if pairs else (2, head_dim // 2)
    heads = rows.reshape(-1, *inside, *rows.shape[1:])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(rows.shape)


def find_shards(directory: Path) -> list[Path]:
    """`consolidated.00.pth`, `consolidated.01.pth`, …; empty when there are none.

    Raises:
        UserError: when one of the row is missing.
    """
    shards = {int(m[1]): path for path in directory.iterdir() if (m := _FILE.fullmatch(path.name)) and path.is_file()}
    for number in range(max(shards, default=-1) + 1):
        if number not in shards:
            raise UserError(
                f"{directory}: consolidated.{number:02d}.pth is missing between the shards; all of them are needed"
            )
    return [shards[number] for number in sorted(shards)]


class MetaSource(StackedTensors):
    """A directory with Meta's checkpoint, read without loading it; shards are joined and heads reordered on the way.

    Args:
        max_positions: max_position_embeddings of the model; None takes that of the LLaMA generation it looks like.

    Raises:
        UserError: when a shard or tensor is missing, unexpected or of another shape than `params.json` says.
    """

    def __init__(self, path: Path, max_positions: int | None = None) -> None:
        super().__init__()
        self.path = path
        self.hf_config: dict[str, Any] | None = None
        self.tokenizer_files = _tokenizer_files(path)
        self.tokenizer_dir = next((f.parent for f in self.tokenizer_files if f.name.startswith("tokenizer.")), path)
        files = find_shards(path)
        if not files:
            raise UserError(f"{path}: has {PARAMS} but no consolidated.00.pth; download the weights too")
        shards = [_read_shard(file) for file in files]
        params = _read_params(path / PARAMS)
        sizes = _sizes(path / PARAMS, params, shards, files)
        check_num_layers(path / PARAMS, params["n_layers"], len(shards[0]))
        # As if untied first: Meta stores the head of tied models (LLaMA 3.2's small ones) too.
        untied = _config(path / PARAMS, params, sizes, tied=False)
        entries = _entries(untied)
        joined = {entry.name: _join(entry, shards, files, untied) for entry in entries}
        extra = {name: tensor for shard in shards for name, tensor in shard.items() if name not in joined}
        match_tensors(path, joined | extra, entries)
        embedding, head = (joined[TENSORS[path].name] for path in ("embed_tokens/embedding", "lm_head/kernel"))
        self.config = _config(path / PARAMS, params, sizes, tied=same_bytes(embedding, head))
        #: What was taken that the files do not say, in words.
        self.assumed: list[str] = []
        if self.config.tied_head:
            self.assumed.append("a tied head: output.weight equals tok_embeddings.weight")
        if max_positions is None:
            generation, max_positions = _generation(self.config, embedding.dtype)
            self.assumed.append(
                f"max_position_embeddings {max_positions}, as {generation} (Meta's files do not say it; "
                "another: --max-positions N)"
            )
        self.config = dataclasses.replace(self.config, max_position_embeddings=max_positions)
        self.add(path, leaf_shapes(self.config), joined, _entries(self.config))


def _tokenizer_files(path: Path) -> list[Path]:
    files = find_tokenizer_files(path)
    # LLaMA 1 and 2 were published with one tokenizer.model above the folders of all sizes.
    above = path.resolve().parent / "tokenizer.model"
    if not any(file.name == "tokenizer.model" for file in files) and above.is_file():
        files.append(above)
    return files


def _read_shard(file: Path) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in read_torch_zip(file).items() if not _IGNORED.fullmatch(name)}


def _read_params(where: Path) -> dict[str, Any]:
    params = read_object(where)
    unknown = sorted(key for key in params.keys() - _READ - _NOT_NEEDED if params[key] not in (None, False, -1))
    if unknown:
        raise UserError(
            f"{where}: {unknown[0]!r} ({params[unknown[0]]!r}) is not known; text-only LLaMA 1, 2 and 3 models in "
            "full precision are read"
        )
    wholes: dict[str, Any] = {
        "dim": None,
        "n_layers": None,
        "n_heads": None,
        "n_kv_heads": params.get("n_heads"),
        "vocab_size": -1,
    }
    for key, default in wholes.items():
        value = params.get(key) if params.get(key) is not None else default
        if type(value) is not int or not (0 < value < 1 << 31 or (key == "vocab_size" and value == -1)):
            raise UserError(f"{where}: {key} is {params.get(key)!r}; expected a positive whole number")
        params[key] = value
    for key, number in {"norm_eps": 1e-5, "rope_theta": 10000.0, "rope_high_freq_factor": 4.0}.items():
        given: Any = params.get(key) if params.get(key) is not None else number
        if type(given) not in (int, float) or not 0 < given < 1e300:
            raise UserError(f"{where}: {key} is {params.get(key)!r}; expected a positive number")
        params[key] = float(given)
    factor = params.get("rope_scaling_factor")
    if factor is not None and (type(factor) not in (int, float) or not 1 <= factor < 1e300):
        raise UserError(f"{where}: rope_scaling_factor is {factor!r}; expected a number of at least 1")
    if type(params.get("use_scaled_rope") or False) is not bool:
        raise UserError(f"{where}: use_scaled_rope is {params['use_scaled_rope']!r}; expected true or false")
    if params["n_heads"] % params["n_kv_heads"] or params["dim"] % (2 * params["n_heads"]):
        raise UserError(
            f"{where}: dim {params['dim']}, n_heads {params['n_heads']} and n_kv_heads {params['n_kv_heads']} do not "
            "fit: dim must be an even multiple of n_heads, and n_heads a multiple of n_kv_heads"
        )
    return params


def _check_count(where: Path, dim: int, shards: list[dict[str, Tensor]], files: list[Path]) -> None:
    """Refuses shards of which the last ones are missing: wq has `dim` rows, shared out; the norm is whole in each."""
    norm, parts = shards[0].get("norm.weight"), [shard.get("layers.0.attention.wq.weight") for shard in shards]
    rows = sum(part.shape[0] for part in parts if part is not None and part.shape)
    if norm is not None and norm.shape == (dim,) and 0 < rows < dim and dim * len(files) % rows == 0:
        raise UserError(
            f"{where.parent}: holds {len(files)} of the shards, up to {files[-1].name}, but together they have only "
            f"{rows} of the {dim} rows of wq that dim in {where.name} calls for: consolidated.{len(files):02d}.pth "
            f"seems to be missing (of {dim * len(files) // rows} in all); download all of them"
        )


def _sizes(where: Path, params: dict[str, Any], shards: list[dict[str, Tensor]], files: list[Path]) -> tuple[int, int]:
    """V and F from the shapes of all shards."""
    _check_count(where, params["dim"], shards, files)
    totals = []
    for name in ("output.weight", "layers.0.feed_forward.w1.weight"):
        total = 0
        for shard, file in zip(shards, files, strict=True):
            if name not in shard or len(shard[name].shape) != 2:
                raise UserError(
                    f"{file}: tensor {name!r} is missing or is not a matrix; that is not a shard of a LLaMA model"
                )
            total += shard[name].shape[0]
        totals.append(total)
    vocab, hidden = totals
    for key, value, expected in (
        ("vocab_size", params["vocab_size"], vocab),
        ("head_dim", params.get("head_dim"), params["dim"] // params["n_heads"]),
        ("hidden_dim", params.get("hidden_dim"), hidden),
    ):
        if value not in (None, -1, expected):
            raise UserError(f"{where}: {key} is {value!r}, but the tensors have {expected}")
    return vocab, hidden


def _config(where: Path, params: dict[str, Any], sizes: tuple[int, int], tied: bool) -> DecoderSpec:
    rope = RopeSpec(rope_theta=params["rope_theta"])
    if params.get("use_scaled_rope"):
        rope = _scaled(params["rope_theta"], params.get("rope_scaling_factor"), tied, params["rope_high_freq_factor"])
    elif params.get("rope_scaling_factor") is not None:
        raise UserError(f"{where}: rope_scaling_factor is given, but use_scaled_rope is not true")
    vocab, hidden = sizes
    third = vocab >= _LLAMA3_VOCAB
    return uniform_decoder(
        "llama",
        vocab_size=vocab,
        hidden_size=params["dim"],
        intermediate_size=hidden,
        num_layers=params["n_layers"],
        num_heads=params["n_heads"],
        num_kv_heads=params["n_kv_heads"],
        head_dim=params["dim"] // params["n_heads"],
        norm_eps=params["norm_eps"],
        rope=rope,
        tied_head=tied,
        bos_token_id=128000 if third else 1,
        eos_token_id=128001 if third else 2,
    )


def _scaled(theta: float, factor: float | None, tied: bool, high: float = 4.0) -> RopeSpec:
    # `use_scaled_rope` alone means 8 (LLaMA 3.1), but 32 in the small models of 3.2, which are those with a tied head.
    return RopeSpec(
        rope_type="llama3",
        rope_theta=theta,
        factor=float(factor or (32.0 if tied else 8.0)),
        low_freq_factor=1.0,
        high_freq_factor=high,
        original_max_position_embeddings=8192,
    )


def _generation(config: DecoderSpec, dtype: np.dtype[Any]) -> tuple[str, int]:
    """Which LLaMA a checkpoint looks like, and the length that was made for."""
    if config.attention.rotary.rope_type == "llama3":
        return "LLaMA 3.1 and later", 131072
    if config.attention.rotary.rope_theta == _LLAMA3_THETA:
        return "LLaMA 3", 8192
    if config.attention.rotary.rope_theta == 1e6:
        return "Code Llama", 16384
    # Both have the same keys; LLaMA 1 was published in float16, LLaMA 2 in bfloat16 or with grouped heads.
    if dtype == BFLOAT16 or config.attention.num_kv_heads != config.attention.num_heads:
        return "LLaMA 2", 4096
    return "LLaMA 1", 2048


def _join(entry: Entry, shards: list[dict[str, Tensor]], files: list[Path], config: DecoderSpec) -> Tensor:
    """One tensor from its parts in all shards, rows in HF's order."""
    tensor, count, stored = _tensor_of(entry), len(shards), entry.layout.stored
    parts = []
    for shard, file in zip(shards, files, strict=True):
        if entry.name not in shard:
            raise UserError(f"{file}: tensor {entry.name!r} is missing")
        parts.append(shard[entry.name])
    shapes = [part.shape for part in parts]
    whole: Tensor = parts[0]
    if count > 1 and tensor.split:
        allowed = [(dim, _part_shape(stored, dim, count)) for dim in tensor.split]
        dim = next((dim for dim, shape in allowed if all(part == shape for part in shapes)), None)
        if dim is None:
            expected = " or ".join(str(list(shape)) for _, shape in allowed)
            wrong = next((i for i, part in enumerate(shapes) if part != allowed[0][1]), 0)
            raise UserError(
                f"{files[wrong]}: tensor {entry.name!r} has shape {list(shapes[wrong])}, expected {expected}: "
                f"{list(stored)} split into {count} shards"
            )
        if dim == 0:
            whole = JoinedRows(entry.name, tuple((part, 0, part.shape[0]) for part in parts))
        else:
            whole = JoinedColumns(entry.name, tuple(parts))
    elif any(shape != stored for shape in shapes):
        wrong = next(i for i, shape in enumerate(shapes) if shape != stored)
        raise UserError(
            f"{files[wrong]}: tensor {entry.name!r} has shape {list(shapes[wrong])}, {PARAMS} expects {list(stored)}"
        )
    for part in parts:
        if part.dtype != parts[0].dtype:
            raise UserError(
                f"{part.file}: tensor {entry.name!r} is {part.dtype.name}, in the first shard {parts[0].dtype.name}"
            )
    return PairedHeads(whole, config.attention.head_dim) if tensor.paired else whole


def _part_shape(shape: Shape, dim: int, count: int) -> Shape:
    return tuple(size // count if i == dim and size % count == 0 else size for i, size in enumerate(shape))


def write_meta(source: ParamSource, directory: Path, shards: int, advance: Advance) -> None:
    """Writes a model as Meta's checkpoint: all shards in one pass over the source.

    Args:
        directory: an existing, empty directory.
        shards: number of files, the model-parallel size it will be run with.
        advance: called with the bytes written.

    Raises:
        UserError: when Meta's format cannot hold the model, or `shards` does not divide it.
    """
    if source.config.experts is not None:
        raise UserError(
            f"{source.path}: its feed-forward layers are divided into {source.config.experts.num_experts} experts, for "
            f"which Meta's format has no place: {dense_first(source)}, or take the Hugging Face format, which has one "
            "(convert jax-to-hf)"
        )
    params = params_for(source.config)
    # Without its copy in the head a tied model would not load: Meta's code always has an output layer.
    config = dataclasses.replace(source.config, tied_head=False)
    entries = _entries(config)
    tensors = {entry.name: _tensor_of(entry) for entry in entries}
    splits = {name: _split_dim(tensor, source.config) for name, tensor in tensors.items()}
    # The head of a tied model is read from the embedding's leaf, but split like a head.
    entries = [
        entry if entry.path in source.leaves else dataclasses.replace(entry, path="embed_tokens/embedding")
        for entry in entries
    ]
    infos = []
    for entry in entries:
        shape, dim = entry.layout.stored, splits[entry.name]
        if dim is not None and shards > 1:
            if shape[dim] % shards or (entry.layout.view[dim] % shards and dim == 0):
                raise UserError(
                    f"--shards {shards}: {entry.name!r} of shape {list(shape)} cannot be split evenly "
                    f"({entry.layout.view[dim]} along dimension {dim}); use fewer shards"
                )
            shape = _part_shape(shape, dim, shards)
        infos.append(TensorInfo(entry.name, shape, source.leaves[entry.path].dtype))
    with contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(TorchZipWriter(directory / f"consolidated.{number:02d}.pth", infos))
            for number in range(shards)
        ]
        blocks_of = stack.enter_context(read_ahead((entry, stored_blocks(source, entry)) for entry in entries))
        for entry, blocks in blocks_of:
            for writer in writers:
                writer.begin(entry.name)
                if isinstance(advance, Watcher):
                    advance.final(writer.path, writer.settled)
            row = 0
            for block in blocks:
                if tensors[entry.name].paired:
                    block = _reorder(block, source.config.attention.head_dim, pairs=False)
                for number, part in _distribute(block, row, entry.layout.stored, splits[entry.name], shards):
                    writers[number].write(part)
                    advance(part.nbytes)
                row += block.shape[0]
    (directory / PARAMS).write_text(json.dumps(params) + "\n", encoding="utf-8")
    copy_files(source.tokenizer_files, directory)


def _split_dim(tensor: MetaTensor, config: DecoderSpec) -> int | None:
    if len(tensor.split) < 2:
        return tensor.split[0] if tensor.split else None
    third = config.attention.rotary.rope_type == "llama3" or config.attention.rotary.rope_theta == _LLAMA3_THETA
    return tensor.split[1 if third else 0]


def _distribute(
    block: np.ndarray, row: int, stored: Shape, dim: int | None, shards: int
) -> Iterator[tuple[int, np.ndarray]]:
    """The parts of a block of rows, which begins at `row` of the tensor, with the shards they belong to."""
    if shards == 1 or dim is None:
        for number in range(shards):
            yield number, block
    elif dim == 0:
        each = stored[0] // shards
        first = row
        while first < row + block.shape[0]:
            number = first // each
            last = min((number + 1) * each, row + block.shape[0])
            yield number, block[first - row : last - row]
            first = last
    else:
        for number, part in enumerate(np.split(block, shards, axis=1)):
            yield number, np.ascontiguousarray(part)


def params_for(config: DecoderSpec) -> dict[str, Any]:
    """The `params.json` of a model.

    Raises:
        UserError: when Meta's code could not run it: biases, a sliding window, another RoPE, heads that do not fill D.
    """
    _entries(dataclasses.replace(config, tied_head=False))
    if config.attention.window is not None:
        raise UserError(f"the model has a sliding window of {config.attention.window}; Meta's format has none")
    heads, head_dim, rope = config.attention.num_heads, config.attention.head_dim, config.attention.rotary
    if heads * head_dim != config.hidden_size:
        raise UserError(
            f"the model has {heads} heads of {head_dim} for D {config.hidden_size}; in Meta's format the heads fill D"
        )
    params: dict[str, Any] = {
        "dim": config.hidden_size,
        "n_layers": config.num_layers,
        "n_heads": config.attention.num_heads,
        "vocab_size": config.vocab_size,
        "norm_eps": config.norm.eps,
    }
    if config.attention.num_kv_heads != config.attention.num_heads:
        params["n_kv_heads"] = config.attention.num_kv_heads
    params |= ffn_params(config.hidden_size, config.feed_forward.size)
    if rope.rope_theta != 10000.0:
        params["rope_theta"] = rope.rope_theta
    if rope.rope_type == "llama3":
        params["use_scaled_rope"] = True
        if rope.factor != _scaled(rope.rope_theta, None, config.tied_head).factor:
            params["rope_scaling_factor"] = rope.factor
        if rope != _scaled(rope.rope_theta, rope.factor, False):
            raise UserError(f"the model's llama3 rope {write_rope(rope)} differs from Meta's (1, 4 and 8192)")
    elif rope.rope_type != "default":
        raise UserError(f"the model has rope_type {rope.rope_type!r}; Meta's format has 'default' and 'llama3'")
    # Which refuses what no LLaMA computes, by name.
    write_config(dataclasses.replace(config, family="llama"), "float32")
    return params


def ffn_params(dim: int, hidden: int) -> dict[str, Any]:
    """`multiple_of` and `ffn_dim_multiplier` with which Meta's formula gives F = `hidden` for D = `dim`."""
    for multiple, published in ((256, None), (256, 1.5), (4096, 1.3), (1024, 1.3)):
        if _ffn_dim(dim, multiple, published) == hidden:
            return {"multiple_of": multiple} | ({} if published is None else {"ffn_dim_multiplier": published})
    # Between two whole numbers, so that rounding down gives the lower one.
    multiplier = (hidden + 0.5) / int(2 * 4 * dim / 3)
    assert _ffn_dim(dim, 1, multiplier) == hidden, (dim, hidden)
    return {"multiple_of": 1, "ffn_dim_multiplier": multiplier}


def _ffn_dim(dim: int, multiple: int, multiplier: float | None) -> int:
    hidden = int(2 * 4 * dim / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return multiple * -(-hidden // multiple)
