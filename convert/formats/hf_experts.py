"""Models of experts as Hugging Face directories: what lies beside the weights that transformers reads.

    DIR/config.json, model*.safetensors    a plain dense model, neurons in their original order (or Mixtral's layout)
    DIR/jaxlm_experts/experts.json         {"format": "jaxlm-experts", "version": 1, "moe": ..., "sha256": {FILE: ...}}
    DIR/jaxlm_experts/partition.npy        int32 [L, F], the neuron at each place (`jaxlm.weights.partition`); not there
                                           when the model keeps no other order
    DIR/jaxlm_experts/router.safetensors   a learned router's matrices; not in Mixtral's layout, which has them itself

A folder of their own, because some programs take every *.safetensors in a directory for weights. The sums tie the files
of one export together; they say nothing of the weights, which may have been trained further as a dense model.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convert.formats.mixtral import MixtralSource, is_mixtral, mixtral_spec, write_mixtral
from convert.transforms.experts import ROUTER, DenseSource, MoefiedSource
from jaxlm.errors import UserError
from jaxlm.jsonfields import build, check_format
from jaxlm.jsontext import read_object
from jaxlm.models.families import FAMILIES, family_of
from jaxlm.models.version1 import ExpertsFields
from jaxlm.spec import DecoderSpec, ExpertsSpec
from jaxlm.sums import file_sha256
from jaxlm.weights.bitsandbytes import BitsAndBytesSource, uses_bitsandbytes
from jaxlm.weights.hf import HfSource, StackedTensors, match_tensors, parse_hf_config, write_files
from jaxlm.weights.leaves import DerivedSource, ParamSource, stored_blocks
from jaxlm.weights.names import Entry, hf_entries, leaf_shapes
from jaxlm.weights.output import Advance
from jaxlm.weights.partition import PARTITION_FILE, load_partition, npy_bytes
from jaxlm.weights.safetensors import read_safetensors, write_safetensors_file
from jaxlm.weights.tensors import TensorSpec

FOLDER = "jaxlm_experts"
EXPERTS_FILE = "experts.json"
ROUTER_FILE = "router.safetensors"
FORMAT, VERSION = "jaxlm-experts", 1


class HfExperts(MoefiedSource):
    """A dense Hugging Face model with the files that make it one of experts."""


class MixtralExperts(DerivedSource):
    """Mixtral's layout with what it has no place for: modalities, architecture, the original order of the neurons."""

    def __init__(self, source: MixtralSource, config: DecoderSpec, partition: np.ndarray | None) -> None:
        super().__init__(source)
        self.config = config
        self._partition = partition

    @property
    def partition(self) -> np.ndarray | None:
        return self._partition


# The classes that `open_hf` gives.
HF_SOURCES = (HfSource, HfExperts, MixtralExperts)


def open_hf(path: Path) -> ParamSource:
    """A Hugging Face directory: a dense model, one of experts that jaxlm wrote, or Mixtral's.

    Raises:
        UserError: when a file is missing, damaged, or does not fit the others.
    """
    folder = path / FOLDER
    content = read_object(path / "config.json")
    if uses_bitsandbytes(content):
        return BitsAndBytesSource(path)
    source = MixtralSource(path) if is_mixtral(content) else HfSource(path)
    if not folder.is_dir():
        return source
    beside = _read_folder(folder, source.config)
    if isinstance(source, MixtralSource):
        own, other = source.config.experts, beside.moe
        assert own is not None
        if (own.num_experts, own.router, set(own.top_k)) != (other.num_experts, other.router, set(other.top_k)):
            raise UserError(
                f"{folder / EXPERTS_FILE}: says {other.num_experts} experts, router {other.router}, top_k "
                f"{sorted(set(other.top_k))}; config.json has {own.num_experts}, learned, {own.top_k[0]}. It belongs "
                f"to another model: copy the folder that was written with this one, or remove it"
            )
        family = beside.family or source.config.family
        # The layout that it has now, whatever the experts were made of.
        moe = dataclasses.replace(other, layout="mixtral")
        config = dataclasses.replace(source.config.with_experts(moe), family=family)
        return MixtralExperts(source, config, beside.partition)
    return HfExperts(source, beside.partition, beside.moe, beside.router)


def read_hf_shape(path: Path) -> DecoderSpec:
    """The shape of a Hugging Face directory, whose weights need not be there.

    Raises:
        UserError: config.json is not that of a supported model.
    """
    if (path / FOLDER).is_dir():
        return open_hf(path).config
    content = read_object(path / "config.json")
    return (mixtral_spec if is_mixtral(content) else parse_hf_config)(path / "config.json", content)


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclass
class _Folder:
    moe: ExpertsSpec
    partition: np.ndarray | None
    router: StackedTensors | None
    family: str | None


def _read_folder(folder: Path, dense: DecoderSpec) -> _Folder:
    """Args: dense: the shape that config.json gives, experts or not."""
    where = folder / EXPERTS_FILE
    content = read_object(where)
    check_format(content, FORMAT, VERSION, where)
    moe = _moe(where, content.get("moe"))
    try:
        config = dense.with_experts(moe)
    except UserError as error:
        raise UserError(f"{where}: {error}; it belongs to another model") from None
    for name, (start, stop) in zip(moe.modalities[1:], moe.ranges, strict=True):
        if stop > dense.vocab_size:
            raise UserError(
                f"{where}: tokens of {name} are {start} to {stop - 1}, the model has {dense.vocab_size}; "
                "it belongs to another model"
            )
    architecture = content.get("architecture")
    known = {family.architecture: name for name, family in FAMILIES.items()}
    if architecture is not None and architecture not in list(known):
        raise UserError(f"{where}: architecture {architecture!r} is none of {', '.join(known)}")
    sums = content.get("sha256")
    if not isinstance(sums, dict) or not sums.keys() <= {PARTITION_FILE, ROUTER_FILE}:
        raise UserError(f"{where}: sha256 is {sums!r}; expected the sums of {PARTITION_FILE} and {ROUTER_FILE}")
    for name in (PARTITION_FILE, ROUTER_FILE):
        if name not in sums and (folder / name).exists():
            raise UserError(f"{folder / name}: {EXPERTS_FILE} does not know it; copy the whole folder again")
    partition = router = None
    if PARTITION_FILE in sums:
        partition = load_partition(folder / PARTITION_FILE, config.num_layers, config.feed_forward.size)
    if ROUTER_FILE in sums:
        router = _read_router(folder / ROUTER_FILE, config)
    elif moe.router == "learned" and dense.experts is None:
        raise UserError(f"{where}: the router is learned, but there is no {ROUTER_FILE}; copy the whole folder again")
    for name, expected in sums.items():
        if file_sha256(folder / name) != expected:
            raise UserError(
                f"{folder / name}: is not the file that {EXPERTS_FILE} was written with (its sha256 differs); "
                "copy the whole folder again"
            )
    return _Folder(moe, partition, router, None if architecture is None else known[architecture])


def _moe(where: Path, values: Any) -> ExpertsSpec:
    """The section `moe`, every value checked: the file may have been edited by hand."""
    needed = {"experts", "router", "modalities", "ranges", "top_k"}
    known = {field.name for field in dataclasses.fields(ExpertsFields)}
    if not isinstance(values, dict) or not needed <= values.keys() <= known:
        raise UserError(f"{where}: moe must have {', '.join(sorted(known))}; it is {values!r}")

    def numbers(value: Any) -> bool:
        return isinstance(value, list) and all(type(number) is int and abs(number) < 1 << 31 for number in value)

    good = {
        "experts": numbers([values["experts"]]),
        "router": isinstance(values["router"], str),
        "modalities": isinstance(values["modalities"], list) and all(isinstance(v, str) for v in values["modalities"]),
        "ranges": isinstance(values["ranges"], list) and all(numbers(v) and len(v) == 2 for v in values["ranges"]),
        "top_k": numbers(values["top_k"]),
        "shared": numbers([values.get("shared", 0)]),
        "layout": isinstance(values.get("layout", "dense"), str),
        "weights": isinstance(values.get("weights", "k_times"), str),
    }
    for key, fits in good.items():
        if not fits:
            raise UserError(f"{where}: moe.{key} is {values[key]!r}, which is not a value of its kind")
    try:
        return build(ExpertsFields, values, "moe").spec()
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _router_entries(config: DecoderSpec) -> list[Entry]:
    return [entry for entry in hf_entries(config) if entry.path == ROUTER]


def _read_router(file: Path, config: DecoderSpec) -> StackedTensors:
    if not config.learned_router:
        assert config.experts is not None
        raise UserError(
            f"{file}: the router is {config.experts.router}, which has no matrices; copy the whole folder again"
        )
    tensors = read_safetensors(file)
    entries = _router_entries(config)
    match_tensors(file, tensors, entries)
    router = StackedTensors()
    router.add(file, {ROUTER: leaf_shapes(config)[ROUTER]}, tensors, entries)
    return router


# --- writing ----------------------------------------------------------------------------------------------------------


def hf_layout(source: ParamSource, layout: str | None) -> str:
    """'dense' or 'mixtral': the layout that was asked for, else the one that the model came in; 'own': its family's.

    Raises:
        UserError: one was asked for, and the family's files hold experts themselves.
    """
    moe, family = source.config.experts, family_of(source.config)
    if moe is not None and family.experts is not None:
        if layout is not None:
            raise UserError(
                f"--layout {layout}: the files of {family.architecture} hold experts themselves; leave --layout out"
            )
        return "own"
    return layout or (moe.layout if moe else "dense")


def write_hf(
    source: ParamSource, directory: Path, shard_size: int, advance: Advance, layout: str | None = None
) -> None:
    """Writes a model, dense or of experts, as a Hugging Face directory, one piece of a tensor at a time.

    Args:
        directory: an existing, empty directory.
        shard_size: bytes of tensors in a file; a larger tensor gets a file of its own.
        advance: called with the bytes written.
        layout: for a model of experts: 'dense', its neurons in their original order and the experts in files beside it;
            or 'mixtral'; None: the one that it came in.

    Raises:
        UserError: when Mixtral's layout has no place for the model.
    """
    layout = hf_layout(source, layout)
    if layout == "mixtral":
        write_mixtral(source, directory, shard_size, advance)
    elif layout == "own":
        write_files(source, directory, shard_size, advance)
        return
    else:
        plain = source if source.config.experts is None else DenseSource(source, strict=False)
        write_files(plain, directory, shard_size, advance)
    if source.config.experts is not None:
        write_folder(source, directory, advance, layout == "mixtral")


def write_folder(source: ParamSource, directory: Path, advance: Advance, mixtral: bool = False) -> None:
    """Writes DIR/jaxlm_experts of a model of experts.

    Args:
        mixtral: the weights are in Mixtral's layout, router included.
        advance: called with the bytes of the router written.
    """
    moe, partition = source.config.experts, source.partition
    assert moe is not None
    folder = directory / FOLDER
    folder.mkdir()
    values = ExpertsFields.of(dataclasses.replace(moe, layout="dense")).to_dict()  # the directory shows the layout
    content: dict[str, Any] = {"format": FORMAT, "version": VERSION, "moe": values}
    if mixtral:
        content["architecture"] = family_of(source.config).architecture
    if partition is not None:
        (folder / PARTITION_FILE).write_bytes(npy_bytes(partition))
    if moe.router == "learned" and not mixtral:
        dtype = source.leaves[ROUTER].dtype
        specs = [
            TensorSpec(entry.name, entry.layout.stored, dtype, stored_blocks(source, entry))
            for entry in _router_entries(source.config)
        ]
        write_safetensors_file(folder / ROUTER_FILE, specs, advance)
    content["sha256"] = {file.name: file_sha256(file) for file in sorted(folder.iterdir())}
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    (folder / EXPERTS_FILE).write_text(text, encoding="utf-8")
