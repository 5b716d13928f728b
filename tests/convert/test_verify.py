"""verify and inspect: what they find, against numpy, PyTorch and transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from convert.analysis.probe import agreement, logits, random_tokens
from convert.analysis.verify import Difference, compare_blocks
from convert.commands.main import main
from convert.source import open_model
from tests.convert import tiny

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def verify(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    status = main(["verify", *map(str, arguments)])
    printed = capsys.readouterr()
    assert status in (0, 1), printed.err
    return status, printed.out


def change(directory: Path, name: str, edit: Callable[[Any], None]) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(directory / "model.safetensors")
    edit(state[name])
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})


class TestBlocks:
    @pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
    def test_ulps(self, dtype: type) -> None:
        """Distances in representable numbers, across zero too."""
        bits = np.dtype(f"u{np.dtype(dtype).itemsize}")
        one, tiny_number = np.array(1, dtype), np.array(1, bits).view(dtype)
        above = (one.view(bits) + bits.type(3)).view(dtype)
        a = np.array([1, 0, tiny_number, -tiny_number, 1], dtype)
        b = np.array([above, 0, -tiny_number, tiny_number, -1], dtype)
        for count, ulp in ((1, 3), (2, 3), (3, 3), (4, 3), (5, 2 * int(one.view(bits)))):
            found = Difference("x", (5,), ("", ""))
            compare_blocks(a[:count], b[:count], found)
            assert (found.max_ulp, found.different) == (ulp, {1: 1, 2: 1, 3: 2, 4: 3, 5: 4}[count])
        assert found.max_abs == 2.0 and found.max_rel == 2.0

    def test_signs_of_zero_and_what_is_no_number(self) -> None:
        for first, second, different in (([0.0, 1.0], [-0.0, 1.0], 1), ([np.nan], [np.nan], 0)):
            found = Difference("x", (1,), ("", ""))
            compare_blocks(np.array(first, np.float32), np.array(second, np.float32), found)
            assert (found.different, found.max_ulp, found.max_abs, found.max_rel) == (different, 0, 0, 0)
        found = Difference("x", (3,), ("", ""))  # most of them differ, one by nothing that is a number
        compare_blocks(np.array([np.inf, 1, 2], np.float32), np.array([np.inf, 2, 4], np.float32), found)
        assert (found.different, found.max_abs, found.max_rel) == (2, 2, 0.5)
        for bad in (np.nan, np.inf):
            found = Difference("x", (1,), ("", ""))
            compare_blocks(np.array([1.0], np.float32), np.array([bad], np.float32), found)
            assert found.max_abs == np.inf and found.different == 1

    def test_two_dtypes(self) -> None:
        """Compared as numbers; ulps tell whether one is the other rounded."""
        wide = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
        half = wide.astype(ml_dtypes.bfloat16)
        found = Difference("x", (1000,), ("", ""))
        compare_blocks(wide, half, found)
        assert found.max_ulp == 0 and found.different == (wide != half.astype(np.float32)).sum() > 0
        assert found.max_abs == np.abs(wide - half.astype(np.float32)).max() and found.max_rel < 2**-8
        # Of the two 16-bit dtypes bfloat16 has fewer digits, whichever comes first.
        other = wide.astype(np.float16)
        rounded = other.astype(ml_dtypes.bfloat16)
        for pair in ((other, rounded), (rounded, other)):
            found = Difference("x", (1000,), ("", ""))
            compare_blocks(*pair, found)
            assert found.max_ulp == 0 and found.different
        same = Difference("x", (1000,), ("", ""))
        compare_blocks(half.astype(np.float32), half, same)
        assert not same.different


@pytest.mark.parametrize("name", ["llama", "tied", "biases", "llama3_rope", "qwen2", "mistral", "head_dim"])
def test_logits_are_transformers(name: str, tmp_path: Path) -> None:
    from tests.convert.test_hf import MODELS

    model = tiny.make_hf_model(**MODELS[name])
    model.save_pretrained(tmp_path / "hf")
    ids = random_tokens(37, 3, 20)
    with torch.no_grad():
        want = model(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(logits(open_model(tmp_path / "hf"), ids), want, atol=2e-5)


def test_agreement_is_torchs() -> None:
    random = np.random.default_rng(0)
    a, b = (random.standard_normal((2, 3, 11)).astype(np.float32) for _ in range(2))
    found = agreement(a, b)
    p, q = (torch.log_softmax(torch.tensor(x).double().reshape(-1, 11), -1) for x in (a, b))
    kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    assert found.kl == pytest.approx(float(kl.mean())) and found.max_kl == pytest.approx(float(kl.max()))
    assert found.max_abs == np.abs(a - b).max()
    assert found.top1 == (a.argmax(-1) == b.argmax(-1)).mean() and found.tokens == 6
    same = agreement(a, a)
    assert (same.kl, same.max_abs, same.top1) == (0, 0, 1)


def test_formats_are_equal(
    hf_dir: Path, tmp_path: Path, run: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    run("hf-to-jax", hf_dir, tmp_path / "jax")
    run("hf-to-meta", hf_dir, tmp_path / "meta")
    run("hf-to-mindspore", hf_dir, tmp_path / "ms")
    for other in ("jax", "meta", "ms"):
        status, printed = verify(capsys, hf_dir, tmp_path / other)
        assert status == 0 and "30 tensors compared, 30 equal, 0 differ" in printed and ": equal" in printed
        assert "logits" not in printed  # nothing differs
    # In another dtype every number counts.
    run("hf-to-jax", hf_dir, tmp_path / "half", "--dtype", "bfloat16")
    status, printed = verify(capsys, hf_dir, tmp_path / "half")
    assert (
        status == 1
        and "30 tensors are float32 and bfloat16" in printed
        and "rounding to bfloat16" in printed
        and "NOT equal" in printed
    )
    run("jax-to-hf", tmp_path / "half", tmp_path / "wide", "--dtype", "float32")
    assert verify(capsys, tmp_path / "half", tmp_path / "wide", "--no-logits")[0] == 0


def test_a_changed_bit(hf_dir: Path, tmp_path: Path, run: Callable[..., str], capsys: Any) -> None:
    run("hf-to-jax", hf_dir, tmp_path / "jax")
    name = "model.layers.2.mlp.down_proj.weight"
    change(hf_dir, name, lambda tensor: tensor[7:8, 3:4].view(torch.int32).add_(1))
    status, printed = verify(capsys, hf_dir, tmp_path / "jax")
    assert status == 1 and "29 equal, 1 differ" in printed and f"{name}  " in printed
    assert "NOT equal" in printed and "logits of 128 tokens: largest difference" in printed
    status, printed = verify(capsys, hf_dir, tmp_path / "jax", "--json")
    report = json.loads(printed)
    assert status == 1 and not report["same"] and report["logits"]["top1"] == 1.0
    (worst,) = (tensor for tensor in report["tensors"] if tensor["different"])
    assert (worst["name"], worst["different"], worst["max_ulp"]) == (name, 1, 1)
    assert 0 < worst["max_abs"] < 1e-7 and 0 < worst["max_rel"] < 2e-7
    assert verify(capsys, hf_dir, tmp_path / "jax", "--tolerance", "1e-6", "--no-logits")[0] == 0
    assert verify(capsys, hf_dir, tmp_path / "jax", "--tolerance", "1e-12", "--no-logits")[0] == 1


def test_logit_probe_measures(tmp_path: Path, capsys: Any) -> None:
    models = [tiny.make_hf_model(seed=seed) for seed in (0, 1)]
    for number, model in enumerate(models):
        model.save_pretrained(tmp_path / str(number))
    status, printed = verify(capsys, tmp_path / "0", tmp_path / "1", "--json")
    found = json.loads(printed)["logits"]
    with torch.no_grad():
        want = [model(torch.tensor(random_tokens(37))).logits.numpy() for model in models]
    reference = agreement(*want)
    assert status == 1 and found["kl"] == pytest.approx(reference.kl, rel=1e-3) and found["top1"] == reference.top1
    assert found["max_abs"] == pytest.approx(reference.max_abs, abs=1e-4) and found["kl"] > 1e-3


def test_coverage(hf_dir: Path, tmp_path: Path, capsys: Any) -> None:
    tiny.make_hf_model(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    status, printed = verify(capsys, hf_dir, tmp_path / "tied", "--no-logits")
    assert status == 1 and f"only in {hf_dir}: lm_head.weight" in printed
    tiny.make_hf_model(vocab_size=40, num_hidden_layers=2).save_pretrained(tmp_path / "other")
    status, printed = verify(capsys, hf_dir, tmp_path / "other")
    assert "model.embed_tokens.weight: shape [37, 16] and [40, 16]" in printed
    assert "only in" in printed and "model.layers.2.input_layernorm.weight" in printed


def test_configurations_count(hf_dir: Path, tmp_path: Path, run: Callable[..., str], capsys: Any) -> None:
    """The same numbers with another rotary base are another model; another largest position is only noted."""
    run("hf-to-jax", hf_dir, tmp_path / "jax")
    config = json.loads((hf_dir / "config.json").read_text())
    (hf_dir / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 77}))
    status, printed = verify(capsys, hf_dir, tmp_path / "jax")
    assert status == 0 and "note: configuration: max_position_embeddings is 77 and 64" in printed
    (hf_dir / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    status, printed = verify(capsys, hf_dir, tmp_path / "jax")
    assert status == 1 and "norm.eps is" in printed and "30 equal" in printed and "logits of" in printed


def test_adapters(tmp_path: Path, run: Callable[..., str], refused: Callable[..., str], capsys: Any) -> None:
    base = tiny.make_hf_model()
    base.save_pretrained(tmp_path / "base")
    tiny.make_adapter(base, tmp_path / "peft")
    tiny.make_adapter(tiny.make_hf_model(), tmp_path / "other", lora_alpha=8)
    run("peft-to-jax", tmp_path / "peft", tmp_path / "jax", "--base", tmp_path / "base")
    for pair in (("peft", "jax"), ("jax", "peft")):
        status, printed = verify(capsys, *(tmp_path / name for name in pair))
        assert status == 0 and "12 tensors compared, 12 equal" in printed
    status, printed = verify(capsys, tmp_path / "peft", tmp_path / "other", "--base", tmp_path / "base")
    assert status == 1 and "alpha is 6.0 and 8.0" in printed and "12 equal" in printed
    assert "give the base model" in refused("verify", tmp_path / "peft", tmp_path / "other")
    assert "convert merge BASE" in refused("verify", tmp_path / "base", tmp_path / "peft")


def test_manifest(hf_dir: Path, tmp_path: Path, run: Callable[..., str], refused: Any, capsys: Any) -> None:
    run("hf-to-jax", hf_dir, tmp_path / "jax")
    status, printed = verify(capsys, tmp_path / "jax")
    assert status == 0 and "files are as they were written" in printed
    chunk = max((tmp_path / "jax" / "model").rglob("c/*"), key=lambda path: path.is_file())
    data = bytearray(chunk.read_bytes())
    data[5] ^= 64
    chunk.write_bytes(data)
    (tmp_path / "jax" / "mine.txt").touch()
    status, printed = verify(capsys, tmp_path / "jax")
    assert status == 1 and f"{chunk}: has changed" in printed and "mine.txt: is not in the manifest" in printed
    status, printed = verify(capsys, tmp_path / "jax", "--json")
    assert status == 1 and list(json.loads(printed)["bad"]) == [chunk.relative_to(tmp_path / "jax").as_posix()]
    assert "has no manifest.json" in refused("verify", hf_dir)
    assert "--tolerance" in refused("verify", hf_dir, hf_dir, "--tolerance", "-1")


def test_inspect(hf_dir: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    from jaxlm.tokenizer import train_sentencepiece

    (tmp_path / "text.txt").write_text("a little text of some words\n" * 9)
    tokenizer = train_sentencepiece([tmp_path / "text.txt"], 270, hf_dir)
    run("hf-to-jax", hf_dir, tmp_path / "jax")
    run("hf-to-meta", hf_dir, tmp_path / "meta")
    total = sum(float(t.double().sum()) for t in tiny.make_hf_model().state_dict().values())
    for name, form, tokens in ((hf_dir, "Hugging Face", True), ("jax", "jaxlm", True), ("meta", "Meta", False)):
        found = json.loads(run("inspect", tmp_path / name, "--json", "--checksum"))
        assert (found["kind"], found["format"], found["config"]["hidden_size"]) == ("model", form, 16)
        assert found["checksum"]["sum"] == pytest.approx(total, abs=1e-4)
        assert found["checksum"]["with_rotary_buffers"] == pytest.approx(total + 3 * 1.01, abs=1e-4)
        assert sum(tensor["bytes"] for tensor in found["tensors"]) == found["nbytes"] == 4 * found["parameters"]
        assert (found["manifest"] is None) == (name == hf_dir)
        if tokens:
            assert found["tokenizer"]["vocab_size"] == tokenizer.vocab_size
            assert found["tokenizer"]["special_tokens"] == ["<unk>", "<s>", "</s>"]
            assert found["tokenizer"]["bos_id"] == 1 and found["tokenizer"]["chat_template"] is False
    printed = run("inspect", tmp_path / "jax", "--checksum")
    assert "jaxlm model" in printed and f"sum of all numbers: {total:.4f}" in printed and "manifest: " in printed
    assert f"sum of all numbers: {total:.4f}" in run("inspect", hf_dir / "model.safetensors", "--checksum")

    file = "consolidated.00.pth"
    assert "layers.2.attention.wq.weight" in run("inspect", tmp_path / "meta" / file)
    for path, other in ((hf_dir, True), (tmp_path / "meta", True), (tmp_path / "jax", False)):
        assert ("under jaxlm's names" in run("inspect", path)) == other
    assert "under jaxlm's names" not in run("inspect", tmp_path / "meta" / file)


def test_interrupted(monkeypatch: pytest.MonkeyPatch, hf_dir: Path, tmp_path: Path, capsys: Any) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    for module in ("convert.source", "convert.conversion"):
        monkeypatch.setattr(f"{module}.open_model", interrupt)
    monkeypatch.setattr("convert.analysis.describe.describe", interrupt)
    for arguments, written in (
        (["verify", hf_dir, hf_dir], False),
        (["inspect", hf_dir], False),
        (["hf-to-jax", hf_dir, tmp_path / "out"], True),
    ):
        assert main([str(argument) for argument in arguments]) == 130
        assert ("nothing was left at the destination" in capsys.readouterr().err) == written


def test_whoever_has_seen_enough(hf_dir: Path) -> None:
    """`convert inspect … | head -1` ends quietly."""
    command = [sys.executable, "-m", "convert", "inspect", str(hf_dir)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 0
    process.stderr.close()


def test_inspect_adapters(tmp_path: Path, run: Callable[..., str]) -> None:
    base = tiny.make_hf_model()
    base.save_pretrained(tmp_path / "base")
    tiny.make_adapter(base, tmp_path / "peft")
    bare = json.loads(run("inspect", tmp_path / "peft", "--json"))
    assert bare["config"]["lora_alpha"] == 6 and bare["format"] == "PEFT" and len(bare["tensors"]) == 12
    full = json.loads(run("inspect", tmp_path / "peft", "--json", "--checksum", "--base", tmp_path / "base"))
    assert full["summary"] == "LoRA rank 2, alpha 6, on q_proj v_proj" and full["format"] == "PEFT"
    run("peft-to-jax", tmp_path / "peft", tmp_path / "jax", "--base", tmp_path / "base")
    other = json.loads(run("inspect", tmp_path / "jax", "--json", "--checksum"))
    assert other["format"] == "jaxlm" and other["checksum"] == full["checksum"]
