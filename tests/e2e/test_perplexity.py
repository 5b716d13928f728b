"""`jaxlm.evaluate --task perplexity` as a user runs it, against transformers and PEFT on the same texts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.commands.main import main as convert
from jaxlm.cli.evaluate import main
from jaxlm.cli.train import main as train
from tests.e2e.conftest import write_config

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("perplexity")]


@pytest.fixture(scope="session")
def models(base_config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/ (a run with alpaca_short), lora/ (on it), base-hf, lora-peft."""
    folder = tmp_path_factory.mktemp("perplexity")
    short = {"steps": 3, "eval_every": 0, "save_every": 0}
    config = write_config(folder / "a", base_config, train=short)
    assert train(["--config", str(config), "--output_dir", str(folder / "base")]) == 0
    model = {"path": str(folder / "base"), "shape": None}
    lora = {"rank": 4, "targets": ["q_proj", "down_proj"], "dora": True, "modules_to_save": ["norm"]}
    config = write_config(
        folder / "b", base_config, train=short, lora=lora, tokenizer=None, model=model, optimizer={"learning_rate": 0.1}
    )
    assert train(["--config", str(config), "--output_dir", str(folder / "lora")]) == 0
    assert convert(["jax-to-hf", str(folder / "base"), str(folder / "base-hf")]) == 0
    assert convert(["jax-to-peft", str(folder / "lora"), str(folder / "lora-peft")]) == 0
    return folder


def figures(tmp_path: Path, *words: str) -> dict[str, Any]:
    file = tmp_path / "figures.json"
    words = ("--task", "perplexity", *words, "--compilation_cache", "none", "--save_file", str(file))
    assert main(words) == 0
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def scored_by_torch(model: Any, rows: list[tuple[list[int], list[bool]]]) -> tuple[float, int, float]:
    """(sum of losses, tokens, share of right ones) of ids, each with whether it is scored."""
    torch = pytest.importorskip("torch")
    total, right, count = 0.0, 0, 0
    for ids, mask in rows:
        labels = torch.where(torch.tensor(mask), torch.tensor(ids), -100)[None]
        with torch.no_grad():
            out = model(torch.tensor([ids]), labels=labels)
        scored = int((labels[0, 1:] != -100).sum())
        total, count = total + float(out.loss) * scored, count + scored
        right += int(((out.logits[0, :-1].argmax(-1) == labels[0, 1:]) & (labels[0, 1:] != -100)).sum())
    return total, count, right / count


def hf(models: Path, adapter: bool = False) -> tuple[Any, Any]:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from jaxlm.tokenizer import load_tokenizer

    model = transformers.AutoModelForCausalLM.from_pretrained(models / "base-hf", dtype=torch.float32)
    if adapter:
        model = pytest.importorskip("peft").PeftModel.from_pretrained(model, models / "lora-peft")
    return model.eval(), load_tokenizer(models / "base-hf")


TEXTS = ["rock sand clay", "lava iron zinc salt acid base atom ion", "größe", "heat cold deep soft hard melt form flow"]


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("bos", [True, False])
def test_texts(adapter: bool, bos: bool, models: Path, tmp_path: Path) -> None:
    """Packed into rows over eight devices; bits are of the very characters that were scored."""
    model, tokenizer = hf(models, adapter)
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    name = "lora" if adapter else "base"
    found = figures(tmp_path, "--model", str(models / name), "--data", str(file), "--add_bos", str(bos).lower())
    encodings = [tokenizer.encode(text) for text in TEXTS]
    rows = [[tokenizer.bos_id, *one.ids] if bos else list(one.ids) for one in encodings]
    total, count, accuracy = scored_by_torch(model, [(ids, [True] * len(ids)) for ids in rows])
    assert found["tokens"] == count and found["template"] == "text" and found["unscored"] == (0 if bos else 4)
    assert found["loss"] == pytest.approx(total / count, abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert found["accuracy"] == pytest.approx(accuracy)
    unscored = [text[: 0 if bos else one.offsets[0][1]] for text, one in zip(TEXTS, encodings, strict=True)]
    characters = sum(map(len, TEXTS)) - sum(map(len, unscored))
    assert (found["characters"], found["bytes"]) == (characters, characters + 2)  # ö and ß
    assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / (characters + 2), rel=1e-5)
    assert found["bits_per_character"] == pytest.approx(total / math.log(2) / characters, rel=1e-5)
    assert found["bits_per_token"] == pytest.approx(found["loss"] / math.log(2))


RECORDS = [
    {"instruction": "rock sand", "output": "clay lava iron"},
    {"instruction": "zinc salt acid base", "output": "atom"},
    {"instruction": "gas", "output": ""},
]


def test_answers_in_the_template_of_the_training(models: Path, tmp_path: Path, capsys: Any) -> None:
    """Only they are scored, with their ends; an empty answer is an end. train_on_inputs scores the prompts too."""
    from jaxlm.data.records import Record
    from jaxlm.data.templates import load_template

    model, tokenizer = hf(models)
    file = tmp_path / "records.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    template = load_template("alpaca_short", tokenizer)
    answers, whole = [], []
    for record in RECORDS:
        text = template.render(Record("", record)).text()
        prompt = tokenizer.encode(text.removesuffix(record["output"])).ids
        ids = [tokenizer.bos_id, *tokenizer.encode(text).ids, tokenizer.eos_id]
        answers.append((ids, [place > len(prompt) for place in range(len(ids))]))
        whole.append((ids, [True] * len(ids)))
    words = ("--data", str(file), "--model", str(models / "base"))
    found = figures(tmp_path, *words)
    total, count, _ = scored_by_torch(model, answers)
    assert found["template"] == "alpaca_short" and found["tokens"] == count == found["tokens"]
    assert found["loss"] == pytest.approx(total / count, abs=1e-5)
    assert found["characters"] == sum(len(record["output"]) for record in RECORDS)
    assert "3 records, the answers" in capsys.readouterr().out
    # The exported model does not know its template, so it is said.
    words = ("--data", str(file), "--model", str(models / "base-hf"), "--template", "alpaca_short")
    assert figures(tmp_path, *words)["loss"] == pytest.approx(found["loss"], abs=1e-6)
    found = figures(tmp_path, *words, "--train_on_inputs", "true")
    total, count, _ = scored_by_torch(model, whole)
    assert found["tokens"] == count and found["loss"] == pytest.approx(total / count, abs=1e-5)


def test_ends_alone_are_no_text(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "empty.json"
    file.write_text(json.dumps([{"instruction": "rock", "output": ""}]))
    found = figures(tmp_path, "--model", str(models / "base"), "--data", str(file))
    assert (found["tokens"], found["bytes"], found["bits_per_byte"]) == (1, 0, None)
    # Without ends there is nothing at all.
    words = ["--task", "perplexity", "--model", str(models / "base"), "--data", str(file), "--add_eos", "false"]
    capsys.readouterr()
    assert main(words) == 2
    assert "has nothing to score in 1 records (template alpaca_short)" in capsys.readouterr().err


def test_a_loss_that_is_no_number() -> None:
    from jaxlm.errors import UserError
    from jaxlm.evaluation.perplexity import figures

    with pytest.raises(UserError, match=r"loss on these texts is nan: .*--model.dtype float32"):
        figures(math.nan, 3, 0, 4, 4)
    assert figures(3000.0, 3, 0, 4, 4).perplexity > 1e300  # and not inf, which JSON does not have


@pytest.mark.parametrize(("length", "stride"), [(32, None), (32, 8), (64, 48)])
def test_a_text_longer_than_a_row(length: int, stride: int | None, models: Path, tmp_path: Path) -> None:
    """The sliding window of transformers' own guide: every token once, each window with what stands before."""
    model, tokenizer = hf(models)
    words = np.random.default_rng(0).choice(["rock", "sand", "clay", "lava", "iron", "zinc", "salt"], 90)
    file = tmp_path / "long.txt"
    file.write_text(" ".join(words))
    more = () if stride is None else ("--stride", str(stride))
    found = figures(
        tmp_path, "--model", str(models / "base-hf"), "--data", str(file), "--sequence_length", str(length), *more
    )
    ids = [tokenizer.bos_id, *tokenizer.encode(file.read_text()).ids]
    rows, done = [], 1
    for start in range(0, len(ids), stride or length - 1):
        stop = min(start + length, len(ids))
        rows.append((ids[start:stop], [place >= done for place in range(start, stop)]))
        done = stop
        if stop == len(ids):
            break
    total, count, _ = scored_by_torch(model, rows)
    assert len(ids) > 2 * length and found["long"] == 1
    assert found["tokens"] == count == len(ids) - 1
    assert found["loss"] == pytest.approx(total / count, abs=1e-5)
    assert found["bytes"] == len(file.read_bytes())


def test_every_way_to_name_a_model_and_devices(models: Path, tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(TEXTS))
    data = ("--data", str(file))
    one = ("--mesh.data", "1", "--mesh.fsdp", "8")
    expected = figures(tmp_path, "--model", str(models / "lora"), *data)["loss"]
    assert expected != pytest.approx(figures(tmp_path, "--model", str(models / "base"), *data)["loss"], abs=1e-3)
    for words in (
        ("--model", str(models / "base-hf"), "--adapter", str(models / "lora-peft")),
        ("--model", str(models / "lora"), "--model.merge_adapter", "true"),
        ("--model", str(models / "lora"), "--mesh.tensor", "2", "--batch_size", "1"),
        ("--model", str(models / "lora"), *one),
    ):
        assert figures(tmp_path, *words, *data)["loss"] == pytest.approx(expected, abs=1e-5), words
    # All experts on, in another order of the neurons, it is the same model.
    moe = ["--experts", "4", "--top-k", "text=4", "--router", "modality"]
    assert convert(["moefy", str(models / "base"), str(tmp_path / "moe"), *moe]) == 0
    words = ("--model", str(tmp_path / "moe"), "--adapter", str(models / "lora"))
    assert figures(tmp_path, *words, *data)["loss"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_weights_in_few_bits(kind: str, models: Path, tmp_path: Path) -> None:
    """Rounded while they are read, or stored so by `convert quantize`: the same figures, near those of the numbers."""
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    data = ("--data", str(tmp_path / "texts.txt"))
    base, stored = models / "base", tmp_path / "stored"
    exact = figures(tmp_path, "--model", str(base), *data)["loss"]
    rounded = figures(tmp_path, "--model", str(base), "--model.quantize", kind, *data)["loss"]
    assert convert(["quantize", str(base), str(stored), "--kind", kind]) == 0
    assert figures(tmp_path, "--model", str(stored), *data)["loss"] == rounded
    assert 0 < abs(rounded - exact) < (2e-3 if kind == "int8" else 5e-2)
    lora = ("--adapter", str(models / "lora"), *data)
    words = ("--model", str(base), "--model.quantize", kind, *lora)
    adapted, plain = (figures(tmp_path, *each)["loss"] for each in (words, ("--model", str(base), *lora)))
    assert 0 < abs(adapted - plain) < (2e-3 if kind == "int8" else 5e-2)
    assert abs(adapted - rounded) > 1e-3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "model: name one"),
        (["--model", "BASE"], "data: name a file"),
        (["--model", "BASE", "--data", "none.txt"], "none.txt"),
        (["--model", "nowhere", "--data", "TEXTS"], "nowhere: no such directory"),
        (["--model", "BASE", "--data", "TEXTS", "--predictions", "x.json"], "predictions: are not for perplexity"),
        (["--model", "BASE", "--data", "TEXTS", "--stride", "128"], "stride: 128 must be 1 to 127"),
        (["--model", "BASE", "--data", "TEXTS", "--stride", "0"], "stride: 0"),
        (["--model", "BASE", "--data", "TEXTS", "--sequence_length", "129"], "reads at most 128"),
        (["--model", "BASE", "--data", "TEXTS", "--sequence_length", "1"], "sequence_length: 1"),
        (["--model", "BASE", "--data", "TEXTS", "--batch_size", "0"], "batch_size: 0"),
        (["--model", "BASE", "--data", "TEXTS", "--mesh.sequence", "2"], "mesh.sequence: 2"),
        (["--model", "BASE", "--data", "TEXTS", "--save_file", "/none/x.json"], "nothing can be written in /none"),
        (["--model", "BASE", "--data", "TEXTS", "--template", "none"], "template 'none' is unknown"),
        (["--model", "BASE", "--data", "RECORDS", "--data.columns", "{output: answer}"], "answer"),
        (["--model", "BASE", "--data", "TEXTS", "--model.merge_adapter", "true"], "no adapter to merge"),
        (["--model", "BASE", "--data", "TEXTS", "--strid", "3"], "did you mean 'stride'"),
    ],
)
def test_mistakes(
    words: list[str],
    message: str,
    models: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # where an evaluation that is begun has its directory
    (tmp_path / "texts.txt").write_text("rock\n")
    (tmp_path / "records.json").write_text(json.dumps(RECORDS))
    places = {
        "BASE": models / "base",
        "TEXTS": tmp_path / "texts.txt",
        "RECORDS": tmp_path / "records.json",
    }
    capsys.readouterr()
    assert main(["--task", "perplexity", *(str(places.get(word, word)) for word in words)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error, error
