"""Reading slices of stacked leaves, whatever the format, and finding out which format a directory is."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

import jaxlm.weights.leaves
import jaxlm.weights.native.layout
from convert.formats.hf_experts import write_hf
from convert.source import is_adapter, open_adapter, open_model
from jaxlm.errors import UserError
from jaxlm.models.families import write_config
from jaxlm.models.version1 import recorded
from jaxlm.spec import uniform_decoder
from jaxlm.weights.dtypes import BFLOAT16
from jaxlm.weights.leaves import LeafInfo, ParamSource, row_blocks, stored_blocks
from jaxlm.weights.names import hf_entries, leaf_shapes, num_params
from jaxlm.weights.native.write import write_model
from jaxlm.weights.output import output_directory

CONFIG = uniform_decoder(
    "llama",
    vocab_size=37,
    hidden_size=16,
    intermediate_size=24,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    qkv_bias=True,
    o_bias=True,
    mlp_bias=True,
)


class Memory:
    """A model held in memory."""

    def __init__(self, dtype: Any = np.float32) -> None:
        random = np.random.default_rng(0)
        self.path = Path("memory")
        self.config = CONFIG
        self.hf_config = None
        self.tokenizer_files: list[Path] = []
        self.prompt_files: list[Path] = []
        self.tokenizer_dir = self.path
        self.arrays = {p: random.standard_normal(s).astype(dtype) for p, s in leaf_shapes(CONFIG).items()}
        self.leaves = {path: LeafInfo(array.shape, array.dtype) for path, array in self.arrays.items()}

    def read(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        return self.arrays[path][index]


MODEL = Memory(BFLOAT16)


def nothing(nbytes: int) -> None:
    pass


def write_native(directory: Path) -> None:
    with output_directory(directory, 0) as folder:
        write_model(MODEL, folder, nothing)


def write_hf_sharded(directory: Path) -> None:
    with output_directory(directory, 0) as folder:
        write_hf(MODEL, folder, 3000, nothing)


def tree(arrays: dict[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for path, array in arrays.items():
        *parents, name = path.split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = array
    return nested


def write_checkpoint(directory: Path) -> None:
    """As training saves a step: Orbax with OCDBT, here with small chunks."""
    context = ocp.Context()
    context.array.saving.storage_options.chunk_byte_size = 512
    with context:
        ocp.save_checkpointables(
            directory, {"model": {"params": tree({k: jax.numpy.asarray(v) for k, v in MODEL.arrays.items()})}}
        )
    content = {
        "format": "jaxlm",
        "version": 1,
        "model": recorded(CONFIG),
        "lora": None,
        "base": None,
        "dtype": "bfloat16",
    }
    (directory / "jaxlm" / "tokenizer").mkdir(parents=True)
    (directory / "jaxlm" / "model.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ParamSource]:
    root = tmp_path_factory.mktemp("sources")
    write_native(root / "native")
    write_hf_sharded(root / "hf")
    write_checkpoint(root / "checkpoint")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxlm.weights.native.layout, "CHUNK_BYTES", 100)
        write_native(root / "chunks")
    return {path.name: open_model(path) for path in sorted(root.iterdir())}


@st.composite
def leaf_and_index(draw: st.DrawFn) -> tuple[str, tuple[slice, ...]]:
    path = draw(st.sampled_from(sorted(MODEL.arrays)))
    index = []
    for size in MODEL.arrays[path].shape[: draw(st.integers(0, MODEL.arrays[path].ndim))]:
        bound = st.none() | st.integers(-size - 1, size + 1)
        index.append(slice(draw(bound), draw(bound), draw(st.none() | st.integers(1, 3))))
    return path, tuple(index)


@given(leaf_and_index())
def test_any_slice_is_numpys(sources: dict[str, ParamSource], case: tuple[str, tuple[slice, ...]]) -> None:
    path, index = case
    want = MODEL.arrays[path][index]
    for name, source in sources.items():
        found = source.read(path, index)
        assert found.dtype == want.dtype and found.shape == want.shape, name
        assert found.tobytes() == want.tobytes(), name


def test_leaves(sources: dict[str, ParamSource]) -> None:
    for source in sources.values():
        assert dict(source.leaves) == MODEL.leaves and source.config == CONFIG


def test_blocks_are_the_tensors_in_hfs_layout(sources: dict[str, ParamSource], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxlm.weights.leaves, "READ_BYTES", 500)
    for entry in hf_entries(CONFIG):
        leaf = MODEL.arrays[entry.path] if entry.layer is None else MODEL.arrays[entry.path][entry.layer]
        matrix = leaf.reshape(entry.layout.stored) if not entry.layout.split else entry.layout.to_stored(leaf)
        for name, source in sources.items():
            for (start, stop), block in zip(row_blocks(entry.layout), stored_blocks(source, entry), strict=True):
                assert block.flags.c_contiguous and block.tobytes() == matrix[start:stop].tobytes(), (name, entry)


def test_no_chunk_is_read_for_every_block(sources: dict[str, ParamSource], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxlm.weights.leaves, "BLOCK_ELEMENTS", 20)
    source, calls = sources["native"], []
    read = source.read
    monkeypatch.setattr(source, "read", lambda path, index: calls.append(path) or read(path, index))  # type: ignore[func-returns-value]
    entry = next(entry for entry in hf_entries(CONFIG) if entry.path == "embed_tokens/embedding")
    assert len(list(stored_blocks(source, entry))) == 37 and len(calls) == 1


def test_reads_from_many_threads(sources: dict[str, ParamSource]) -> None:
    paths = sorted(MODEL.arrays) * 8
    for source in sources.values():
        with ThreadPoolExecutor(8) as pool:
            for path, found in zip(paths, pool.map(lambda p, s=source: s.read(p, ()), paths), strict=True):
                assert found.tobytes() == MODEL.arrays[path].tobytes()


def test_only_slices(sources: dict[str, ParamSource]) -> None:
    for bad in ((1,), (slice(None, None, -1),), (slice(None),) * 9):
        for source in sources.values():
            with pytest.raises(ValueError, match="slice"):
                source.read("norm/scale", bad)  # type: ignore[arg-type]


def test_loads_into_shards(sources: dict[str, ParamSource]) -> None:
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("fsdp", "tensor"))
    path = "layers/self_attn/q_proj/kernel"
    sharding = NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor"))
    for source in sources.values():
        array = jax.make_array_from_callback(source.leaves[path].shape, sharding, lambda i, s=source: s.read(path, i))
        assert np.asarray(array).tobytes() == MODEL.arrays[path].tobytes()


@pytest.mark.parametrize("chunk_bytes", [100, 64 << 20])
def test_orbax_restores_what_was_converted(chunk_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxlm.weights.native.layout, "CHUNK_BYTES", chunk_bytes)
    write_native(tmp_path / "native")
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = {p: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding) for p, leaf in MODEL.leaves.items()}
    found = ocp.load_checkpointables(tmp_path / "native", {"model": {"params": tree(abstract)}})["model"]["params"]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), b), found, tree(MODEL.arrays))
    chunks = [f for f in (tmp_path / "native" / "model").rglob("*") if f.is_file() and "c" in f.parts[-4:]]
    largest_layer = max(leaf.nbytes // (3 if p.startswith("layers/") else 1) for p, leaf in MODEL.leaves.items())
    assert all(f.stat().st_size <= largest_layer + 4 for f in chunks)


# ---- damage


def test_missing_chunk_is_no_zeros(tmp_path: Path) -> None:
    write_native(tmp_path / "native")
    (tmp_path / "native/model/params.norm.scale/c/0").unlink()
    with pytest.raises(UserError, match=r"'norm/scale' cannot be read .*copy it again"):
        open_model(tmp_path / "native").read("norm/scale", ())


@pytest.mark.parametrize("flip", [0, 17])
def test_flipped_byte_is_noticed(flip: int, tmp_path: Path) -> None:
    write_native(tmp_path / "native")
    chunk = tmp_path / "native/model/params.norm.scale/c/0"
    raw = bytearray(chunk.read_bytes())
    raw[flip] ^= 1
    chunk.write_bytes(raw)
    with pytest.raises(UserError, match="'norm/scale' cannot be read"):
        open_model(tmp_path / "native").read("norm/scale", ())


def test_missing_array(tmp_path: Path) -> None:
    write_native(tmp_path / "native")
    shutil.rmtree(tmp_path / "native/model/params.norm.scale")
    with pytest.raises(UserError, match=r"'params.norm.scale' cannot be opened"):
        open_model(tmp_path / "native")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 3, "written_by": "jaxlm 9.1"}, "written by jaxlm 9.1; this is jaxlm"),
        ({"format": "x"}, "reads format 'jaxlm' version 1"),
        ({"model": CONFIG.with_feed_forward(bias=False).to_dict()}, "'layers/mlp/down_proj/bias' has no place"),
        (
            {"model": dataclasses.replace(CONFIG, vocab_size=38).to_dict()},
            "has shape [37, 16], expected [38, 16]",
        ),
    ],
)
def test_model_json_must_fit(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    write_native(tmp_path / "native")
    file = tmp_path / "native" / "jaxlm" / "model.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError) as error:
        open_model(tmp_path / "native")
    assert words in str(error.value)


# ---- which directory is it


def test_newest_complete_step_of_a_run(tmp_path: Path) -> None:
    steps = tmp_path / "run" / "checkpoints"
    for step in ("9", "10", "11", "12.orbax-checkpoint-tmp-3"):
        write_native(steps / step)
    (steps / "11" / "commit_success.txt").unlink()
    assert open_model(tmp_path / "run").path == steps / "10"
    assert open_model(steps).path == steps / "10"
    assert open_model(steps / "9").path == steps / "9"
    for broken in ("11", "12.orbax-checkpoint-tmp-3"):
        with pytest.raises(UserError, match="not written to its end"):
            open_model(steps / broken)
    shutil.rmtree(steps / "9")
    shutil.rmtree(steps / "10")
    with pytest.raises(UserError, match="no complete checkpoint"):
        open_model(tmp_path / "run")


def test_what_is_no_model(tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "a").mkdir()
    assert "the directory is empty; accepted are" in refused("inspect", tmp_path / "a")
    for name in "wxyz":
        (tmp_path / "a" / name).touch()
    assert "found w, x, y, z; accepted are" in refused("inspect", tmp_path / "a")
    assert "no such directory or file" in refused("hf-to-jax", tmp_path / "b", tmp_path / "c")
    assert "is a file" in refused("hf-to-jax", tmp_path / "a" / "w", tmp_path / "c")
    (tmp_path / "a" / "config.json").write_text(json.dumps(write_config(CONFIG, "float32")))
    assert "has config.json but no weights" in refused("hf-to-jax", tmp_path / "a", tmp_path / "c")
    (tmp_path / "a" / "config.json").write_text("{")
    assert "not valid JSON" in refused("hf-to-jax", tmp_path / "a", tmp_path / "c")
    (tmp_path / "a" / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    message = refused("hf-to-jax", tmp_path / "a", tmp_path / "c")
    assert "'GPT2LMHeadModel' is not supported" in message

    supported = message.rpartition("supported: ")[2].split(", ")
    assert len(supported) == len(set(supported)) > 20
    config = write_config(CONFIG, "float32") | {"quantization_config": {"bits": 4}}
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    (tmp_path / "a" / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    assert "the model is quantised" in refused("hf-to-jax", tmp_path / "a", tmp_path / "c")


def test_wrong_direction(tmp_path: Path, refused: Callable[..., str]) -> None:
    write_native(tmp_path / "native")
    write_hf_sharded(tmp_path / "hf")
    assert "is a jaxlm model already" in refused("hf-to-jax", tmp_path / "native", tmp_path / "c")
    assert "is a Hugging Face model already" in refused("jax-to-hf", tmp_path / "hf", tmp_path / "c")
    assert not is_adapter(tmp_path / "hf") and not is_adapter(tmp_path / "native")
    with pytest.raises(UserError, match="is a full model"):
        open_adapter(tmp_path / "native")
    with pytest.raises(UserError, match=r"is not an adapter: found config\.json"):
        open_adapter(tmp_path / "hf")


def test_inspect(tmp_path: Path, run: Callable[..., str]) -> None:
    write_native(tmp_path / "native")
    write_hf_sharded(tmp_path / "hf")
    for directory in ("native", "hf"):
        printed = run("inspect", tmp_path / directory)
        assert "LlamaForCausalLM: L 3, D 16, V 37, tied False" in printed
        assert "every layer: F 24, H 4, K 2, h 6, rope" in printed
        assert f"{num_params(CONFIG):,} parameters" in printed
        assert "3x16x4x6" in printed and "bfloat16" in printed
    file = min((tmp_path / "hf").glob("*.safetensors"))
    assert "model.embed_tokens.weight" in run("inspect", file)
