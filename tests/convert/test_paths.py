"""Paths as people type them, and what a directory that is no model lacks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from convert.source import open_adapter
from jaxlm.errors import UserError
from jaxlm.tokenizer import load_tokenizer
from tests.convert.tiny import make_adapter, make_hf_model


@pytest.fixture
def home(hf_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home directory with a model and an adapter; the working directory is another."""
    make_adapter(make_hf_model(), tmp_path / "peft")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path


def test_home(home: Path, run: Callable[..., str]) -> None:
    """In every kind of argument: positions, options with a space and with =, lists, the options of other scripts."""
    run("hf-to-jax", "~/hf", "~/jax")
    run("peft-to-jax", "~/peft", "~/adapter", "--base=~/hf")
    run("merge", "~/jax", "~/adapter", "~/merged")
    run("merge", "--path_zhixi=~/hf", "--path_lora", "~/peft", "--path_sfted=~/merged2")
    run("make-delta", "~/hf", "~/merged2", "~/delta")
    run("hf-to-mindspore", "~/hf", "~/ms")
    run("mindspore-to-hf", "~/ms/model.ckpt", "~/back", "--config", "~/hf/config.json")
    assert "equal" in run("verify", "~/hf", "~/back")
    assert "LlamaForCausalLM" in run("inspect", "~/jax")
    for name in ("jax", "adapter", "merged", "merged2", "delta", "ms", "back"):
        assert (home / name).is_dir(), name
    assert list(Path.cwd().iterdir()) == []


def test_text_is_no_path(home: Path, run: Callable[..., str]) -> None:
    from convert.commands.main import _expand, _parser

    for words, name, want in (
        (["verify", "~/a", "~/b", "--prompt", "~/what"], "prompt", ["~/what"]),
        (["extend-vocab", "~/a", "~/b", "--tokens", "~/,x"], "tokens", "~/,x"),
        (["extend-vocab", "~/a", "~/b", "--tokens", "~/new.txt"], "tokens", str(home / "new.txt")),
        (["extend-vocab", "./~nobody-here/a", "~/b", "--tokens", "x,"], "source", "./~nobody-here/a"),
    ):
        options = _parser("convert")[0].parse_args(words)
        _expand(options)
        assert getattr(options, name) == want


def test_a_user_that_is_not_known(home: Path, run: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    """Refused as a source and as a destination; a folder of such a name is meant with ./ in front."""
    from convert.commands.main import main

    for words in (["~nobody-here/a", "b"], ["~/hf", "~nobody-here/b"]):
        assert main(["hf-to-jax", *words]) == 2
        message = capsys.readouterr().err
        assert "there is no home directory ~nobody-here" in message and "./~nobody-here/" in message
    assert list(Path.cwd().iterdir()) == []
    run("hf-to-jax", "~/hf", "./~nobody-here/b")
    assert "LlamaForCausalLM" in run("inspect", "./~nobody-here/b")


def test_the_base_is_recorded_whole(home: Path, run: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter made in one folder is used in another."""
    monkeypatch.chdir(home)
    run("peft-to-jax", "peft", "adapter", "--base", "hf")
    assert open_adapter("adapter").base == str(home / "hf")


def test_a_name_on_the_hub(home: Path, refused: Callable[..., str]) -> None:
    message = refused("hf-to-jax", "meta-llama/Llama-2-7b-hf", home / "out")
    assert "hf download meta-llama/Llama-2-7b-hf --local-dir Llama-2-7b-hf" in message
    for path in ("hf/nothing", "/nowhere/x", "nowhere"):
        assert "hf download" not in refused("hf-to-jax", str(home / path), home / "out")
    (home / "elsewhere" / "models").mkdir()
    assert "hf download" not in refused("hf-to-jax", "models/llama", home / "out")


@pytest.mark.parametrize("parts", [False, True])
def test_no_config_json(parts: bool, tmp_path: Path, refused: Callable[..., str]) -> None:
    make_hf_model().save_pretrained(tmp_path / "hf", **({"max_shard_size": "8KB"} if parts else {}))
    (tmp_path / "hf" / "config.json").unlink()
    for verb in (["hf-to-jax", tmp_path / "hf", tmp_path / "out"], ["inspect", tmp_path / "hf"]):
        message = refused(*verb)
        assert "has weights (model" in message and "no config.json" in message


def test_a_tokenizer_in_parts(tmp_path: Path) -> None:
    """vocab.json and merges.txt: the message has the command that makes a tokenizer.json, and it does."""
    import subprocess
    import sys

    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    model = tokenizers.models.BPE()
    fast = tokenizers.Tokenizer(model)
    fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"]
    )
    fast.train_from_iterator(["hello world, hello there"] * 3, trainer)
    fast.model.save(str(tmp_path))
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(
        UserError, match=r"has vocab\.json and merges\.txt of the class Qwen2Tokenizer, but no tokenizer\.json"
    ) as error:
        load_tokenizer(tmp_path)
    command = str(error.value).split("Run once: python -c ")[1].strip('"')
    subprocess.run([sys.executable, "-c", command], check=True, capture_output=True)
    found = load_tokenizer(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert found.encode("hello world").ids == theirs("hello world").input_ids
