"""The generate command as a user runs it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from convert.commands.main import main as convert
from jaxlm.api import load
from jaxlm.cli.generate import main
from jaxlm.cli.train import main as train
from tests.e2e.conftest import write_config

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("generate")]
GREEDY = ["--max_new_tokens", "12", "--compilation_cache", "none"]


@pytest.fixture(scope="session")
def models(base_config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/ (a run), lora/ (an adapter run on it), and both in the formats of others: base-hf, lora-peft, merged-hf."""
    folder = tmp_path_factory.mktemp("models")
    one = {"steps": 4, "eval_every": 0, "save_every": 0}
    config = write_config(folder / "a", base_config, train=one)
    assert train(["--config", str(config), "--output_dir", str(folder / "base")]) == 0
    lora = {"rank": 4, "targets": ["q_proj", "down_proj"]}
    model = {"path": str(folder / "base"), "dtype": "float32"}
    config = write_config(folder / "b", base_config, train=one, lora=lora, tokenizer=None)
    values = yaml.safe_load(config.read_text())
    values["model"] = model
    values["optimizer"]["learning_rate"] = 0.3  # so far from the base that answers do not end at once
    config.write_text(yaml.safe_dump(values))
    assert train(["--config", str(config), "--output_dir", str(folder / "lora")]) == 0
    assert convert(["jax-to-hf", str(folder / "base"), str(folder / "base-hf")]) == 0
    assert convert(["jax-to-peft", str(folder / "lora"), str(folder / "lora-peft")]) == 0
    assert (
        convert(["merge", str(folder / "base"), str(folder / "lora"), str(folder / "merged-hf"), "--format", "hf"]) == 0
    )
    return folder


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main([*words, *GREEDY]) == 0
    return capsys.readouterr().out


def test_a_lora_run_brings_its_base_along_from_anywhere(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained with a relative path, used from another folder, then moved together with its base."""
    place = tmp_path / "project"
    place.mkdir()
    shutil.copytree(models / "base", place / "base")
    run = yaml.safe_load((models / "lora" / "config.yaml").read_text()) | {"output_dir": "lora"}
    run["model"]["path"] = "base"
    run["train"] |= {"steps": 1}
    (place / "run.yaml").write_text(yaml.safe_dump(run))
    monkeypatch.chdir(place)
    assert train(["--config", "run.yaml"]) == 0
    assert convert(["jax-to-peft", "lora", "peft"]) == 0
    recorded = json.loads((place / "peft/adapter_config.json").read_text())["base_model_name_or_path"]
    assert recorded == str(place / "base")
    monkeypatch.chdir("/")
    capsys.readouterr()
    ask = ["--prompt", "rock sand clay"]
    first = answer(capsys, "--model", str(place / "lora"), *ask)
    place.rename(tmp_path / "moved")
    assert answer(capsys, "--model", str(tmp_path / "moved/lora"), *ask) == first


def test_every_way_to_name_a_model(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run remembers its template; other formats are told. All ways to the same weights give the same text."""
    ask = ["--prompt", "rock sand clay"]
    told = [*ask, "--template", "alpaca_short"]
    capsys.readouterr()
    base = answer(capsys, "--model", str(models / "base"), *ask)
    assert base == answer(capsys, "--model", str(models / "base-hf"), *told)
    adapted = answer(capsys, "--model", str(models / "lora"), *ask)
    assert adapted != base
    for words in (
        ["--model", str(models / "base"), "--adapter", str(models / "lora"), *ask],
        ["--base_model", str(models / "base-hf"), "--lora-weights", str(models / "lora-peft"), *told],
        ["--model", str(models / "lora"), "--model.merge_adapter", *ask],
        ["--model", str(models / "merged-hf"), *told],
        ["--adapter", str(models / "lora"), "--mesh.tensor", "2", "--mesh.data", "4", "--mesh.fsdp", "1", *ask],
    ):
        assert answer(capsys, *words) == adapted, words
    # In another order of the neurons, all experts on, both are the same function.
    moe = ["--experts", "4", "--top-k", "text=4", "--router", "modality"]
    assert convert(["moefy", str(models / "base"), str(models / "moe"), *moe]) == 0
    capsys.readouterr()
    for adapter, words in (("lora", ask), ("lora-peft", told)):
        assert answer(capsys, "--model", str(models / "moe"), "--adapter", str(models / adapter), *words) == adapted


def test_transformers_gives_the_same_text(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from jaxlm.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(models / "base-hf")
    ids = [tokenizer.bos_id, *tokenizer.encode("rock sand clay lava").ids]
    model = transformers.AutoModelForCausalLM.from_pretrained(models / "merged-hf", dtype=torch.float32)
    out = model.generate(torch.tensor([ids]), max_new_tokens=12, num_beams=3, do_sample=False)[0, len(ids) :].tolist()
    capsys.readouterr()
    words = ["--model", str(models / "merged-hf"), "--template", "text", "--num_beams", "3"]
    found = answer(capsys, *words, "--prompt", "rock sand clay lava")
    assert found.strip() == tokenizer.decode(out).strip()


def test_a_file_of_prompts(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "p.jsonl"
    data.write_text('{"instruction": "rock"}\n"sand and clay"\nnot json\n{"prompt": "lava"}\n')
    save = tmp_path / "out" / "a.json"
    words = ["--model", str(models / "base"), "--predict_data", str(data), "--save_file", str(save), *GREEDY]
    assert main(words) == 1
    rows = json.loads(save.read_text())
    assert [sorted(row) for row in rows] == [
        ["answer", "instruction"],
        ["answer", "question"],
        ["error"],
        ["answer", "prompt"],
    ]
    said = capsys.readouterr().err
    assert "p.jsonl:3" in said and "3 answered" in said
    assert not list(save.parent.glob("*.partial"))
    single = answer(capsys, "--model", str(models / "base"), "--prompt", "sand and clay")
    assert single.strip() == rows[1]["answer"]
    assert main(words) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 1


def test_the_best_of_several_answers(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the model itself as its judge, as `LoadedModel.best_of` chooses."""
    data, save = tmp_path / "p.jsonl", tmp_path / "a.jsonl"
    data.write_text(
        '{"instruction": "rock", "reward": 7}\n{"instruction": "%s"}\n{"instruction": "lava"}\n' % ("a " * 70)
    )
    drawn = ["--best_of", "3", "--reward_model", str(models / "base"), "--temperature", "1", "--seed", "5", *GREEDY]
    words = ["--model", str(models / "base"), *drawn]
    assert main([*words, "--predict_data", str(data), "--save_file", str(save)]) == 1
    rows = [json.loads(line) for line in save.read_text().splitlines()]
    assert [sorted(row) for row in rows] == [
        ["answer", "instruction", "jaxlm_reward", "reward"],
        ["error", "instruction"],
        ["answer", "instruction", "reward"],
    ]
    assert "p.jsonl:2" in rows[1]["error"]
    model = load(models / "base")
    wanted = model.best_of(["rock", "", "lava"][::2], 3, model, max_new_tokens=12, temperature=1.0, seed=5)
    assert rows[0]["answer"] == wanted[0][0].text
    assert rows[0]["jaxlm_reward"] == pytest.approx(wanted[0][1], abs=1e-4)
    capsys.readouterr()
    assert main([*words, "--prompt", "rock"]) == 0
    said = capsys.readouterr()
    assert said.out == f"{wanted[0][0].text}\n" and f"reward {wanted[0][1]:.3f}, the highest of 3" in said.err


@pytest.mark.slow
def test_sigkill_in_the_middle_of_a_file(models: Path, tmp_path: Path) -> None:
    data = tmp_path / "p.txt"
    data.write_text("".join(f"rock {'sand ' * (n % 7)}{n}\n" for n in range(40)))

    def command(save: Path) -> list[str]:
        words = ["--model", str(models / "base"), "--predict_data", str(data), "--save_file", str(save)]
        sampling = ["--temperature", "1.0", "--max_new_tokens", "24", "--batch_size", "2", "--mesh.fsdp", "1"]
        return [sys.executable, "-m", "jaxlm.generate", *words, *sampling, "--compilation_cache", "none"]

    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    subprocess.run(command(tmp_path / "whole.txt"), check=True, env=environment, capture_output=True)
    process = subprocess.Popen(command(tmp_path / "killed.txt"), env=environment, stderr=subprocess.DEVNULL)
    journal = tmp_path / "killed.txt.partial"
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 4):
        assert process.poll() is None, "the run ended before it was killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = journal.read_bytes().count(b"\n") - 1
    assert 0 < done < 40 and not (tmp_path / "killed.txt").exists()
    again = subprocess.run(
        command(tmp_path / "killed.txt"), check=True, env=environment, capture_output=True, text=True
    )
    assert f"{done} of 40 prompts were answered before" in again.stderr
    assert (tmp_path / "killed.txt").read_bytes() == (tmp_path / "whole.txt").read_bytes()


def test_words_of_the_command_line(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Texts that look like YAML stay texts; lists take one value, several, or the word again."""
    from jaxlm.cli.parser import parse_config
    from jaxlm.config import GenerateConfig

    def parse(*words: str) -> GenerateConfig:
        return parse_config(words, GenerateConfig, prog="", description="", aliases={})

    assert parse("--prompt", "# Heading").prompt == "# Heading"
    assert parse("--prompt", "~", "--input", "null").prompt == "~"
    assert parse("--stop", "###").stop == ("###",)
    assert parse("--stop", "User:", "--stop", "a, b").stop == ("User:", "a, b")
    assert parse("--stop", '["x", "y"]').stop == ("x", "y")
    assert parse("--stop_ids", "2").stop_ids == (2,)
    assert parse("--stop-ids", "2,3", "--stop_ids=4").stop_ids == (2, 3, 4)
    free = answer(capsys, "--model", str(models / "lora"), "--prompt", "rock sand")
    assert free.strip()
    stop = free.strip()[-1]
    assert answer(capsys, "--model", str(models / "lora"), "--prompt", "rock sand", "--stop", stop).strip() == (
        free.strip().split(stop)[0].strip()
    )


def test_a_conversation_through_a_pipe(models: Path) -> None:
    words = ["--model", str(models / "base"), "--interactive", *GREEDY]
    typed = "rock\n/set max_new_tokens 3\nsand\n/reset\n"
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    found = subprocess.run(
        [sys.executable, "-m", "jaxlm.generate", *words], input=typed, capture_output=True, text=True, env=environment
    )
    assert found.returncode == 0, found.stderr
    assert "max_new_tokens 3" in found.stderr and "because of max_new_tokens" in found.stderr
    assert "template   alpaca_short: the one it was trained with" in found.stderr


JUDGED = ["--model", "{models}/base", "--prompt", "a", "--reward_model", "{models}/base"]
BAD = [
    ([], "model: name one"),
    (["--model", "{models}/base"], "give one of --prompt"),
    (["--model", "{models}/base", "--prompt", "a", "--interactive"], "found --prompt and --interactive"),
    (["--model", "{models}/base", "--prompt", " "], "prompt: it is empty"),
    (["--model", "{models}/base", "--prompt", "a", "--temperature", "-1"], "temperature: -1.0"),
    (["--model", "{models}/base", "--prompt", "a", "--template", "alpacca"], "error: template 'alpacca' is unknown"),
    (["--model", "{models}/base", "--prompt", "rock " * 200], "tokens, the model's context is 128"),
    (["--model", "{models}/base", "--prompt", "a", "--adapter", "{models}/base"], "is a full model"),
    (["--model", "{models}/base", "--prompt", "a", "--model.merge_adapter"], "no adapter to merge"),
    (["--model", "{models}/base", "--prompt", "a", "--system", "b"], "no place for a system message"),
    (["--model", "{models}/base", "--predict_data", "p.txt"], "predict_data and save_file go together"),
    (["--model", "{models}/base", "--predict_data", "p.txt", "--save_file", "o.xml"], "the ending must be one of"),
    (["--model", "{models}/base", "--predict_data", "none.txt", "--save_file", "o.txt"], "none.txt does not exist"),
    (["--model", "{models}/base", "--prompt", "a", "--template", "chat"], "no chat template"),
    (["--model", "{models}/base", "--prompt", "a", "--best_of", "4"], "best_of and reward_model go together"),
    ([*JUDGED, "--best_of", "1", "--temperature", "1"], "best_of: 1 must be at least 2"),
    ([*JUDGED, "--best_of", "4"], "best_of: 4 equal answers at temperature 0"),
    ([*JUDGED, "--best_of", "4", "--temperature", "1", "--samples", "2"], "samples: 2 with best_of"),
    ([*JUDGED, "--best_of", "4", "--num_beams", "2"], "num_beams: 2 with best_of"),
    (
        ["--model", "{models}/base", "--interactive", *JUDGED[4:], "--best_of", "4", "--temperature", "1"],
        "a conversation",
    ),
    (
        ["--model", "{models}/base", "--prompt", "a", "--samples", "2", "--tempreature", "1"],
        "did you mean 'temperature'",
    ),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_bad_input(models: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [word.replace("{models}", str(models)) for word in words]
    assert main([*(words or ["--prompt", "a"]), "--compilation_cache", "none"]) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


def test_an_adapter_of_another_base(
    models: Path, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((models / "base-hf" / "config.json").read_text())
    other = tmp_path / "other"
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(config | {"hidden_size": 32, "head_dim": 8})))
    model.save_pretrained(other)
    for adapter in ("lora", "lora-peft"):
        words = ["--model", str(other), "--adapter", str(models / adapter), "--tokenizer", str(inputs / "tokenizer")]
        assert main([*words, "--prompt", "a"]) == 2
        assert "shape" in capsys.readouterr().err
