"""make-delta and apply-delta, bit by bit against the published procedures written out in PyTorch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.commands.combine import FAMILY_NAMES
from convert.source import open_model
from convert.transforms.delta import FAMILIES, inv_freq_sum, published_sum, sum_matches
from convert.transforms.vocab import mean_row
from jaxlm.models.families import load_shape
from tests.convert.tiny import make_hf_model, save_torch

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


def save(model: Any, directory: Path, tokenizer: str = "") -> Path:
    """The model, with a stand-in for its tokenizer."""
    model.save_pretrained(directory)
    if tokenizer:
        (directory / "tokenizer.model").write_text(tokenizer)
    return directory


def load(directory: Path, dtype: str) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))


def grow_like_stanford(model: Any, rows: int) -> None:
    """What smart_tokenizer_and_embedding_resize does: the mean of the old rows."""
    for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
        old = embedding.weight.data
        new = torch.zeros(rows, old.shape[1], dtype=old.dtype)
        new[: len(old)] = old
        new[len(old) :] = old.mean(dim=0, keepdim=True)
        embedding.weight = torch.nn.Parameter(new)


def grow_like_fastchat(model: Any, rows: int) -> None:
    """What FastChat 0.1 does: zeros below the old rows."""
    for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
        old = embedding.weight.data
        added = torch.zeros((rows - len(old), old.shape[1]), dtype=old.dtype)
        embedding.weight = torch.nn.Parameter(torch.cat([old, added]))


GROW = {None: lambda model, rows: None, "mean": grow_like_stanford, "zero": grow_like_fastchat}


def published(base: Path, other: Path, family: str, sign: int, dtype: str | None = None) -> dict[str, Any]:
    """The state dict that the family's script computes: load both in its dtype, grow the base, add or subtract."""
    dtype = dtype or FAMILIES[family].dtype
    first, second = load(base, dtype), load(other, dtype)
    GROW[FAMILIES[family].new_row](first, second.config.vocab_size)
    result, other_state = {}, second.state_dict()
    for name, tensor in first.state_dict().items():
        result[name] = tensor + other_state[name] if sign > 0 else other_state[name] - tensor
    return result


def assert_state(directory: Path, want: dict[str, Any]) -> None:
    found = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="auto").state_dict()
    assert found.keys() == want.keys()
    for name, tensor in want.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def two_models(tmp_path: Path, family: str, stored: str = "float32") -> tuple[Path, Path]:
    added = 1 if FAMILIES[family].new_row else 0
    # Torch sums up columns in the usual order when they fill its widest registers four times.
    wide = {"hidden_size": 64} if FAMILIES[family].new_row == "mean" else {}
    base = save(make_hf_model(dtype=stored, **wide), tmp_path / "base", "base's")
    tuned = make_hf_model(dtype=stored, seed=1, vocab_size=37 + added, **wide)
    return base, save(tuned, tmp_path / "tuned", "tuned's")


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_reproduce_the_published_procedure(
    family: str, stored: str, tmp_path: Path, run: Callable[..., str]
) -> None:
    base, tuned = two_models(tmp_path, family, stored)
    delta, back = tmp_path / "delta", tmp_path / "back"
    run("make-delta", base, tuned, delta, "--family", family)
    assert_state(delta, published(base, tuned, family, -1))
    assert (delta / "tokenizer.model").read_text() == "tuned's"
    run("apply-delta", base, delta, back, "--family", family)
    assert_state(back, published(base, delta, family, +1))
    side = "base's" if FAMILIES[family].side == "base" else "tuned's"
    assert (back / "tokenizer.model").read_text() == side
    config = json.loads((back / "config.json").read_text())
    assert config["vocab_size"] == load(tuned, "float32").config.vocab_size
    assert config.get("dtype", config.get("torch_dtype")) == FAMILIES[family].dtype


def test_family_names() -> None:
    """The command has its own list, so that its help needs no heavy import."""
    assert tuple(FAMILIES) == FAMILY_NAMES


def test_knowlm_in_float16(tmp_path: Path, run: Callable[..., str]) -> None:
    """float16 sums are not the float32 sums rounded: both models are rounded before."""
    base, tuned = two_models(tmp_path, "knowlm")
    run("apply-delta", base, tuned, tmp_path / "half", "--family", "knowlm", "--dtype", "float16")
    want = published(base, tuned, "knowlm", +1, "float16")
    assert_state(tmp_path / "half", want)
    wide = published(base, tuned, "knowlm", +1)
    assert any(not torch.equal(wide[name].half(), want[name]) for name in want)


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 37, 256, 300, 4113])
def test_mean_row_is_torchs(rows: int, tmp_path: Path) -> None:
    """4113 rows use all four levels of torch's partial sums."""
    model = make_hf_model(vocab_size=rows, tie_word_embeddings=True, num_hidden_layers=1, hidden_size=64)
    model.save_pretrained(tmp_path / "hf")
    want = model.get_input_embeddings().weight.data.mean(dim=0)
    found = mean_row(open_model(tmp_path / "hf"), "embed_tokens/embedding", rows)
    assert found.tobytes() == want.numpy().tobytes()
    if rows > 4000:  # the order of the additions matters
        assert not np.array_equal(found, model.get_input_embeddings().weight.data.numpy().cumsum(0)[-1] / rows)


@pytest.mark.parametrize("stored", [("float16", "float32"), ("bfloat16", "float16"), ("bfloat16", "bfloat16")])
def test_without_a_family_the_wider_dtype_is_used(
    stored: tuple[str, str], tmp_path: Path, run: Callable[..., str]
) -> None:
    base = save(make_hf_model(dtype=stored[0]), tmp_path / "base")
    delta = save(make_hf_model(dtype=stored[1], seed=2), tmp_path / "delta")
    run("apply-delta", base, delta, tmp_path / "out")
    first, second = load(base, stored[0]).state_dict(), load(delta, stored[1]).state_dict()
    if stored[0] != stored[1]:  # torch promotes mixed 16-bit numbers to float32 too
        assert (next(iter(first.values())) + next(iter(second.values()))).dtype == torch.float32
    assert_state(tmp_path / "out", {name: first[name] + second[name] for name in first})


def test_recover_of_make_in_float32(tmp_path: Path, run: Callable[..., str]) -> None:
    """Equal bit by bit where the difference is exact (Sterbenz); elsewhere within one rounding of the larger number."""
    base, tuned = two_models(tmp_path, "knowlm")
    run("make-delta", base, tuned, tmp_path / "delta", "--family", "knowlm")
    run("apply-delta", base, tmp_path / "delta", tmp_path / "back", "--family", "knowlm")
    states = [load(path, "float32").state_dict() for path in (base, tuned, tmp_path / "back")]
    equal = total = 0
    for name in states[0]:
        b, t, back = (state[name].numpy() for state in states)
        exact = (t / 2 <= b) & (b <= 2 * t) | (2 * t <= b) & (b <= t / 2)
        assert np.array_equal(back[exact], t[exact]), name
        # |back - t| <= ulp(t - b) / 2 from the difference, and ulp(t) / 2 from the sum.
        bound = np.spacing(np.abs(t - b)) / 2 + np.spacing(np.abs(t)) / 2
        assert (np.abs(back.astype(np.float64) - t) <= bound).all(), name
        equal, total = equal + int((back == t).sum()), total + t.size
    assert 0.5 < equal / total < 1


@pytest.mark.parametrize(
    "forms", [("bin", "hf"), ("hf", "jax"), ("jax", "bin_sharded"), ("jax", "jax"), ("meta", "hf")]
)
@pytest.mark.parametrize("family", ["k2", "alpaca"])
def test_any_mixture_of_formats(
    family: str, forms: tuple[str, str], tmp_path: Path, run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, delta = two_models(tmp_path, family)
    run("apply-delta", base, delta, tmp_path / "want", "--family", family)

    def converted(directory: Path, form: str) -> Path:
        out = directory.with_name(f"{directory.name}-{form}")
        if form.startswith("bin"):
            save_torch(load(directory, "float32"), out, shards=2 if form == "bin_sharded" else 1)
            return out
        if form == "hf":
            return directory
        run(f"hf-to-{form}", directory, out)
        return out

    paths = [converted(path, form) for path, form in zip((base, delta), forms, strict=True)]
    run("apply-delta", *paths, tmp_path / "hf", "--family", family)
    run("apply-delta", *paths, tmp_path / "jax", "--family", family, "--format", "jax")
    run("jax-to-hf", tmp_path / "jax", tmp_path / "from_jax")
    want = load(tmp_path / "want", FAMILIES[family].dtype).state_dict()
    assert_state(tmp_path / "hf", want)
    assert_state(tmp_path / "from_jax", want)


def test_mindspore_delta_onto_a_hugging_face_base(tmp_path: Path, run: Callable[..., str]) -> None:
    """MindSpore's file does not say the shape: it is the base's, unless something beside the file says it."""
    base, delta = two_models(tmp_path, "knowlm", "float16")
    run("hf-to-mindspore", delta, tmp_path / "ms")
    (file,) = (tmp_path / "ms").glob("*.ckpt")
    for out in ("beside", "bare"):
        run("apply-delta", base, file, tmp_path / out)
        assert_state(tmp_path / out, published(base, delta, "k2", +1))
        (tmp_path / "ms" / "config.json").unlink(missing_ok=True)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--base-model-path", "{base}", "--target-model-path", "{out}", "--delta-path", "{delta}", "--low-cpu-mem"],
        ["--base", "{base}", "--target", "{out}", "--delta", "{delta}"],
        ["--base_model_path={base}", "--target_model_path={out}", "--delta_path={delta}"],
        ["--path_raw", "{base}", "--path_diff", "{delta}", "--path_tuned", "{out}", "--is_fp16", "True"],
        ["--path_raw={base}", "--path-tuned={out}", "--path_diff={delta}", "--is_fp16", "--device=cpu"],
    ],
)
def test_the_scripts_own_options(arguments: list[str], tmp_path: Path, run: Callable[..., str]) -> None:
    base, delta = two_models(tmp_path, "k2", "float16")
    run("apply-delta", *(item.format(base=base, delta=delta, out=tmp_path / "out") for item in arguments))
    assert_state(tmp_path / "out", published(base, delta, "k2", +1))
    # For make_delta the roles of --target and --delta are exchanged.
    names = {"base": base, "out": delta, "delta": tmp_path / "difference"}
    run("make-delta", *(item.format(**names) for item in arguments))
    assert_state(tmp_path / "difference", published(base, delta, "k2", -1))


def test_tokenizer_can_be_chosen(tmp_path: Path, run: Callable[..., str], refused: Callable[..., str]) -> None:
    base, delta = two_models(tmp_path, "k2")
    (tmp_path / "third").mkdir()
    assert "holds no tokenizer files" in refused(
        "apply-delta", base, delta, tmp_path / "x", "--tokenizer", tmp_path / "third"
    )
    (tmp_path / "third" / "tokenizer.json").write_text("third")
    run("apply-delta", base, delta, tmp_path / "a", "--family", "k2", "--tokenizer", "delta")
    assert (tmp_path / "a" / "tokenizer.model").read_text() == "tuned's"
    run("apply-delta", base, delta, tmp_path / "b", "--tokenizer", "base")
    assert (tmp_path / "b" / "tokenizer.model").read_text() == "base's"
    run("apply-delta", base, delta, tmp_path / "c", "--tokenizer", tmp_path / "third")
    assert (tmp_path / "c" / "tokenizer.json").read_text() == "third"
    assert not (tmp_path / "c" / "tokenizer.model").exists() and (tmp_path / "c" / "generation_config.json").exists()


def test_k2_delta_without_tokenizer_and_base_without_one(tmp_path: Path, run: Callable[..., str]) -> None:
    """K2's repository ships none; where the preferred side has none, the other one is asked."""
    base, delta = two_models(tmp_path, "k2")
    (delta / "tokenizer.model").unlink()
    run("apply-delta", base, delta, tmp_path / "a", "--family", "vicuna-v1.1")
    assert (tmp_path / "a" / "tokenizer.model").read_text() == "base's"
    (base / "tokenizer.model").unlink()
    run("apply-delta", base, delta, tmp_path / "b", "--family", "k2")
    assert not (tmp_path / "b" / "tokenizer.model").exists()


def test_added_token_is_ambiguous(tmp_path: Path, run: Callable[..., str], refused: Callable[..., str]) -> None:
    base, delta = two_models(tmp_path, "alpaca")
    message = refused("apply-delta", base, delta, tmp_path / "out")
    for word in ("37 rows", "38", "--new-row mean", "--new-row zero", "alpaca", "vicuna-v0"):
        assert word in message
    for family, new_row in (("alpaca", "mean"), ("vicuna-v0", "zero")):
        run("apply-delta", base, delta, tmp_path / family, "--family", family)
        dtype = FAMILIES[family].dtype
        run("apply-delta", base, delta, tmp_path / new_row, "--new-row", new_row, "--dtype", dtype)
        assert_state(tmp_path / new_row, load(tmp_path / family, dtype).state_dict())
    message = refused("apply-delta", base, delta, tmp_path / "out", "--family", "k2")
    assert "k2 adds no tokens" in message and "alpaca" in message
    assert "do not belong together" in refused("apply-delta", delta, base, tmp_path / "out")
    message = refused("apply-delta", base, base, tmp_path / "out", "--family", "alpaca")
    assert "37" in message and "leave --family out" in message


def test_tied_models(tmp_path: Path, run: Callable[..., str]) -> None:
    base = save(make_hf_model(tie_word_embeddings=True), tmp_path / "base")
    tuned = save(make_hf_model(tie_word_embeddings=True, seed=1, vocab_size=40), tmp_path / "tuned")
    run("make-delta", base, tuned, tmp_path / "delta", "--new-row", "mean")
    run("apply-delta", base, tmp_path / "delta", tmp_path / "back", "--new-row", "mean")
    want, found = load(tuned, "float32").state_dict(), load(tmp_path / "back", "float32").state_dict()
    for name, tensor in want.items():
        assert torch.allclose(found[name], tensor, rtol=0, atol=1e-6), name


def test_models_that_do_not_fit(tmp_path: Path, refused: Callable[..., str]) -> None:
    base = save(make_hf_model(), tmp_path / "base")
    wide = save(make_hf_model(intermediate_size=28), tmp_path / "wide")
    message = refused("apply-delta", base, wide, tmp_path / "out")
    assert str(wide) in message and "mlp" in message and "28" in message and "24" in message
    assert f"another base than {base} (its feed_forward.size is 28, of the base 24)" in message
    narrow = save(make_hf_model(hidden_size=8, head_dim=4), tmp_path / "narrow")
    message = refused("apply-delta", base, narrow, tmp_path / "out", "--new-row", "mean")
    assert "[37, 8], expected [37, 16]" in message and "hidden_size is 8, of the base 16" in message
    deep = save(make_hf_model(num_hidden_layers=4), tmp_path / "deep")
    assert str(deep) in refused("apply-delta", base, deep, tmp_path / "out")
    tied = save(make_hf_model(tie_word_embeddings=True), tmp_path / "tied")
    assert "lm_head/kernel" in refused("apply-delta", base, tied, tmp_path / "out")


def test_overflow_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    models = [make_hf_model(dtype="float16", seed=seed) for seed in (0, 1)]
    for model, name in zip(models, ("base", "delta"), strict=True):
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[3, 3] = 4e4
        save(model, tmp_path / name)
    message = refused("apply-delta", tmp_path / "base", tmp_path / "delta", tmp_path / "out")
    assert "model.layers.1.mlp.up_proj.weight" in message and "float16" in message and "--dtype float32" in message


def test_directories_by_position_or_by_option(refused: Callable[..., str]) -> None:
    for arguments in (["a", "b"], ["a", "--base", "b", "--delta", "c"], ["--base", "a"], []):
        assert "expected three directories, BASE DELTA OUT" in refused("apply-delta", *arguments)
    assert "contradict" in refused("apply-delta", "a", "b", "c", "--is_fp16", "--dtype", "float32")
    assert "expected True or False" in refused("apply-delta", "a", "b", "c", "--is_fp16=maybe")


class TestSums:
    """Against the constants in the published scripts, and what a state dict of an old transformers version adds."""

    def test_rotary_buffers(self) -> None:
        inv_freq = 1.0 / (10000 ** (torch.arange(0, 128, 2).float() / 128))
        for shape, layers, published_extra in (("llama-7b", 32, 238.7185), ("llama-13b", 40, 298.3982)):
            extra = inv_freq_sum(load_shape(shape))
            assert extra == pytest.approx(layers * float(inv_freq.double().sum()), rel=1e-6)
            assert extra == pytest.approx(published_extra, abs=1e-3)

    def test_published_with_and_without_buffers(self) -> None:
        config = load_shape("llama-7b")
        for total in (50637.1836, 50637.1836 - 238.7185, 50637.5, 50637.0 - 238.7):
            assert sum_matches(total, 50637.1836, config)
        for total in (50637.1836 + 238.7185, 50637.1836 - 100, 50640.0, float("nan")):
            assert not sum_matches(total, 50637.1836, config)

    def test_only_for_the_published_shape(self) -> None:
        import dataclasses

        config = dataclasses.replace(load_shape("llama-7b"), vocab_size=32001)
        assert published_sum("alpaca", config) == 50637.1836
        assert published_sum("knowlm", load_shape("llama-13b")) == 94052.2891
        assert published_sum("alpaca", load_shape("llama-13b")) is None
        assert published_sum("knowlm", config) is None and published_sum("k2", config) is None

    @pytest.mark.parametrize("form", ["hf", "jax"])
    @pytest.mark.parametrize("buffers", [True, False])
    def test_expected_sum(
        self, buffers: bool, form: str, tmp_path: Path, run: Callable[..., str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        base, delta = two_models(tmp_path, "knowlm")
        state = published(base, delta, "knowlm", +1)
        total = sum(float(tensor.double().sum()) for tensor in state.values())
        if buffers:
            total += 3 * float((1.0 / 10000 ** (torch.arange(0, 4, 2).float() / 4)).sum())
        arguments = ["apply-delta", base, delta, "--format", form, "--expect-sum"]
        assert "as expected" in run(*arguments[:3], tmp_path / "good", *arguments[3:], f"{total:.4f}")
        from convert.commands.main import main

        bad = [*arguments[:3], tmp_path / "bad", *arguments[3:], f"{total + 0.1:.4f}"]
        assert main([str(item) for item in bad]) == 0  # a warning: the model is there
        printed = capsys.readouterr()
        assert "warning: the sum" in printed.err and "as expected" not in printed.out
        assert (tmp_path / "bad").is_dir()
        quiet = [*bad[:3], tmp_path / "quiet", *bad[4:], "--check_integrity_naively", "False"]
        assert "sum  " not in run(*quiet)
