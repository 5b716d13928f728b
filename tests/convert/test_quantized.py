"""`convert quantize`: the bits of rounding while reading, kept; adapters go into the original weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from convert.commands.formats import KINDS as VERB_KINDS
from convert.source import check_rounding, open_adapter, open_model
from jaxlm.errors import UserError
from jaxlm.nn.rounding import KINDS, dequantize, parts_of, quantize
from jaxlm.weights.native.layout import MODEL_JSON, SMALL_FILES
from jaxlm.weights.quantized import PartsReader, QuantizedSource, kernels_of, rounding_of
from tests.convert.tiny import make_adapter, make_hf_model

Run = Callable[..., str]


@pytest.fixture
def adapter_dir(tmp_path: Path) -> Path:
    make_adapter(make_hf_model(), tmp_path / "adapter")
    return tmp_path / "adapter"


def record_rounding(adapter: Path, rounding: str) -> None:
    """As a run on a quantised base does."""
    file = adapter / SMALL_FILES / MODEL_JSON
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rounding": rounding}))


def test_the_verb_offers_every_kind() -> None:
    assert VERB_KINDS == KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_what_reading_rounds(kind: str, hf_dir: Path, tmp_path: Path, run: Run) -> None:
    """Its arrays, and what they stand for; all else as it was, and the same files when it is done again."""
    said = run("quantize", hf_dir, tmp_path / "small", "--kind", kind)
    assert "sums of each in manifest.json" in said and kind in said
    run("quantize", hf_dir, tmp_path / "again", "--kind", kind)
    first, second = (
        json.loads((tmp_path / name / "manifest.json").read_text())["files"] for name in ("small", "again")
    )
    assert {name for name in first if first[name] != second[name]} <= {"_CHECKPOINT_METADATA"}  # it has the time
    source, small = open_model(hf_dir), open_model(tmp_path / "small")
    assert isinstance(small, QuantizedSource) and small.kind == kind and small.rounding == rounding_of(source, kind)
    kernels = kernels_of(source.config)
    assert len(kernels) == 7 and list(small.leaves) == list(source.leaves)
    reader = PartsReader(source, kind, kernels)
    for path, leaf in source.leaves.items():
        whole = source.read(path, ())
        if path not in kernels:
            np.testing.assert_array_equal(small.read(path, ()), whole)
            continue
        for layer in range(leaf.shape[0]):
            parts = quantize(kind, whole[layer], kernels[path])
            for name, values in parts.items():
                index = (slice(layer, layer + 1),)
                np.testing.assert_array_equal(small.read_part(f"{path}/{name}", index)[0], values)
                np.testing.assert_array_equal(reader.read(f"{path}/{name}", index)[0], values)
            dense = dequantize(kind, parts, leaf.shape[1:], kernels[path])
            np.testing.assert_array_equal(
                small.read(path, (slice(layer, layer + 1), slice(1, None, 2)))[0], dense[1::2]
            )


def test_an_adapter_is_merged_into_the_original_weights(
    hf_dir: Path, adapter_dir: Path, tmp_path: Path, run: Run, refused: Callable[..., str]
) -> None:
    run("quantize", hf_dir, tmp_path / "small")
    run("merge", hf_dir, adapter_dir, tmp_path / "wanted", "--format", "jax")
    run("merge", tmp_path / "small", adapter_dir, tmp_path / "merged")
    wanted, merged = open_model(tmp_path / "wanted"), open_model(tmp_path / "merged")
    assert wanted.leaves == merged.leaves
    for path in wanted.leaves:
        np.testing.assert_array_equal(merged.read(path, ()), wanted.read(path, ()))
    run("merge", tmp_path / "small", adapter_dir, tmp_path / "rough", "--rounded")
    rough, path = open_model(tmp_path / "rough"), "layers/self_attn/q_proj/kernel"
    error = np.abs(rough.read(path, ()) - wanted.read(path, ())).max()
    assert 0 < error < 0.2 * np.abs(wanted.read(path, ())).max()
    # The original changes, then it is gone.
    make_hf_model(seed=5).save_pretrained(hf_dir)
    assert "has other weights by now" in refused("merge", tmp_path / "small", adapter_dir, tmp_path / "out")
    hf_dir.rename(tmp_path / "away")
    said = refused("merge", tmp_path / "small", adapter_dir, tmp_path / "out")
    assert "which is not here" in said and "--rounded" in said


def test_an_adapter_of_another_rounding_is_refused(
    hf_dir: Path, adapter_dir: Path, tmp_path: Path, run: Run, refused: Callable[..., str]
) -> None:
    run("quantize", hf_dir, tmp_path / "nf4")
    run("quantize", hf_dir, tmp_path / "int8", "--kind", "int8")
    run("peft-to-jax", adapter_dir, tmp_path / "lora", "--base", hf_dir)
    make_hf_model(seed=5).save_pretrained(tmp_path / "other")
    record_rounding(tmp_path / "lora", rounding_of(open_model(hf_dir), "nf4"))
    for base in ("nf4", "hf"):
        source = open_model(tmp_path / base)
        check_rounding(open_adapter(tmp_path / "lora", source), source)
    said = refused("merge", tmp_path / "int8", tmp_path / "lora", tmp_path / "out")
    assert "rounded to nf4-1" in said and "rounded to int8-1" in said
    said = refused("merge", tmp_path / "other", tmp_path / "lora", tmp_path / "out")
    assert "was trained on another model" in said
    record_rounding(tmp_path / "lora", "nf4-9 00")
    assert "this version knows" in refused("merge", tmp_path / "nf4", tmp_path / "lora", tmp_path / "out")


def test_rounded_weights_are_not_rounded_again(
    hf_dir: Path, tmp_path: Path, run: Run, refused: Callable[..., str]
) -> None:
    run("quantize", hf_dir, tmp_path / "small")
    assert "in nf4 already" in refused("quantize", tmp_path / "small", tmp_path / "out")
    assert "not rounded again" in refused("quantize", tmp_path / "small", tmp_path / "out", "--kind", "int8")
    run("jax-to-hf", tmp_path / "small", tmp_path / "back")  # what it stands for
    back, small = open_model(tmp_path / "back"), open_model(tmp_path / "small")
    for path in small.leaves:
        np.testing.assert_array_equal(back.read(path, ()), small.read(path, ()))


def test_an_array_that_is_cut_short_is_named(hf_dir: Path, tmp_path: Path, run: Run) -> None:
    run("quantize", hf_dir, tmp_path / "small")
    (tmp_path / "small" / "model" / "params.layers.mlp.up_proj.kernel.codes" / "zarr.json").unlink()
    with pytest.raises(UserError, match=r"params\.layers\.mlp\.up_proj\.kernel\.codes"):
        open_model(tmp_path / "small")


def test_parts_that_no_model_has_are_refused(hf_dir: Path, tmp_path: Path, run: Run) -> None:
    """model.json that says int8 of arrays in nf4."""
    run("quantize", hf_dir, tmp_path / "small")
    record_rounding(tmp_path / "small", rounding_of(open_model(hf_dir), "int8"))
    with pytest.raises(UserError, match=r"kernel/values.*is missing"):
        open_model(tmp_path / "small")
    assert set(parts_of("int8", (4, 4), 1)) == {"values", "factors"}
