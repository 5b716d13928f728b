"""Words and files to a configuration: sources as bare paths, shares, flags that need no value."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxlm.cli.parser import parse_run
from jaxlm.cli.train import main
from jaxlm.cli.words import Flag
from jaxlm.config import DataConfig, RunConfig, SourceConfig, to_dict
from jaxlm.config.schema import all_keys
from jaxlm.errors import UserError
from jaxlm.training.checks import check_config, check_files


def parsed(*words: str) -> tuple[RunConfig, dict[str, Any]]:
    flags = {"preview": Flag("rows", int, 3)}
    (config,), given, _ = parse_run(list(words), prog="x", description="x", flags=flags)
    return config, given


def data_of(*words: str) -> DataConfig:
    return parsed(*words)[0].data


def paths(*words: str) -> list[str]:
    return [source.path for source in data_of(*words).train]


def test_sources_may_be_words() -> None:
    assert paths("--data.train", "my.json") == ["my.json"]
    assert paths("--data.train", "a.json", "b,c.json", "--model.shape", "x") == ["a.json", "b,c.json"]
    assert paths("--data.train", "a.json", "--data.train=b.json") == ["a.json", "b.json"]
    assert paths("--data.train", "[{path: a.json}, b.json]") == ["a.json", "b.json"]
    (source,) = data_of("--data.train", "{path: a.json, weight: 2.0}").train
    assert (source.path, source.weight) == ("a.json", 2.0)
    with pytest.raises(UserError, match=r"data\.train: expected keys and values, found 5"):
        paths("--data.train", "[5]")
    assert parsed("--lora.targets", "q_proj", "v_proj")[0].lora.targets == ("q_proj", "v_proj")  # type: ignore[union-attr]


def test_sources_in_a_file_may_be_paths(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    for train in ("my.json", "[my.json]", "{path: my.json}", "[{path: my.json}]"):
        file.write_text(f"model: some/where\ndata: {{train: {train}, validation: held.json}}\n")
        config, _ = parsed("--config", str(file))
        assert [source.path for source in config.data.train] == ["my.json"]
        assert [source.path for source in config.data.validation] == ["held.json"]  # type: ignore[union-attr]
        assert config.model.path == "some/where"
    file.write_text("stages: [{name: one, data: {train: my.json}}]\n")
    assert [source.path for source in parsed("--config", str(file))[0].data.train] == ["my.json"]


@pytest.mark.parametrize(("word", "value"), [("2000", 2000), ("0.1", 0.1), ("0", 0)])
def test_validation_may_be_a_number_or_a_share(tmp_path: Path, word: str, value: float) -> None:
    found = data_of("--data.validation", word).validation
    assert found == value and type(found) is type(value)
    (tmp_path / "a.yaml").write_text(f"data: {{validation: {word}}}\n")
    assert data_of("--config", str(tmp_path / "a.yaml")).validation == value


def test_validation_may_be_sources() -> None:
    validation = data_of("--data.validation", "a.json", "b.json").validation
    assert isinstance(validation, tuple) and [source.path for source in validation] == ["a.json", "b.json"]


@pytest.mark.parametrize(("word", "value"), [("1e-1", 0.1), (".5", 0.5), ("'0.1'", 0.1), ("'20'", 20)])
def test_validation_may_be_a_number_that_yaml_takes_for_a_text(tmp_path: Path, word: str, value: float) -> None:
    (tmp_path / "a.yaml").write_text(f"data: {{validation: {word}}}\n")
    assert data_of("--config", str(tmp_path / "a.yaml")).validation == value
    assert data_of("--data.validation", word.strip("'")).validation == value


def test_a_key_may_be_set_for_all_sources(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("data: {train: [{path: a.json, weight: 2.0}, b.json]}\n")
    templates = ("--data.train.template", "chat", "--data.train.columns", "{messages: turns}")
    for words in (
        ("--config", str(file)),
        ("--data.train", "a.json", "b.json"),
        ("--data.train.path", "a.json", "--data.train", "b.json"),
    ):
        for order in ((*words, *templates), (*templates, *words)):
            sources = data_of(*order).train
            assert [(source.path, source.template) for source in sources] == [("a.json", "chat"), ("b.json", "chat")]
            assert all(source.columns == {"messages": "turns"} for source in sources)
    assert data_of("--config", str(file), "--data.train.template", "text").train[0].weight == 2
    with pytest.raises(UserError, match=r"data\.train\.template: there is no list data\.train"):
        data_of("--data.train.template", "chat")
    with pytest.raises(UserError, match=r"data\.validation\.template: there is no list data\.validation"):
        data_of("--data.validation", "0.1", "--data.validation.template", "chat")


def _nullable(hint: Any) -> bool:
    return type(None) in typing.get_args(hint)


KEYS = [
    (f"{section}.{name}", hint)
    for section, kind in typing.get_type_hints(RunConfig).items()
    for part in (kind, *typing.get_args(kind))
    if dataclasses.is_dataclass(part)
    for name, hint in typing.get_type_hints(part).items()
]


def test_null_and_empty_words_are_refused_by_key(tmp_path: Path) -> None:
    """For every key: null where it is not a value, and an empty word, are refused by the key's name."""
    assert len(KEYS) > 60
    file = tmp_path / "a.yaml"
    for key, hint in KEYS:
        section, name = key.split(".")
        file.write_text(f"{section}: {{{name}: }}\n")
        if not _nullable(hint):
            with pytest.raises(UserError, match=rf"{re.escape(key)}: expected .*, found null"):
                parsed("--config", str(file))
        if hint in (int, float, bool, int | None, bool | None) or typing.get_origin(hint) is typing.Literal:
            with pytest.raises(UserError, match=rf"--{re.escape(key)}: needs a value, found ''"):
                parsed(f"--{key}", "")
    for section in ("data", "optimizer", "train", "mesh", "distributed"):
        for value in ("null", "[]"):
            with pytest.raises(UserError, match=rf"{section}: expected keys and values"):
                parsed(f"--{section}", value)


@pytest.mark.parametrize(
    "key", ["model.path", "model.shape", "lora.init_from", "tokenizer.train_on", "data.train", "output_dir"]
)
def test_an_empty_path_is_refused(key: str) -> None:
    with pytest.raises(UserError, match=rf"{re.escape(key)}.*: the path is empty; give one"):
        parsed(f"--{key}", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--data.train", "{template: chat}"), r"data\.train: \{'template': 'chat'\} has no path"),
        (("--data.train", "{path: a.json, weight: null}"), r"data\.train\.weight: expected a number, found null"),
        (("--train.seed", "-1"), r"train\.seed: -1 must be between 0"),
        (("--train.steps", "9" * 20), r"train\.steps: 9+ must be between 1"),
    ],
)
def test_values_out_of_range_are_refused_by_key(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parsed(*words)


@pytest.mark.parametrize("value", ["5%", "none", "true", "nan", "-1", "1.5", "1.0"])
def test_what_is_not_a_number_of_validation_records_is_refused(value: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    config, _ = parsed("--model", str(tmp_path), "--data.train", str(tmp_path / "a.txt"), f"--data.validation={value}")
    with pytest.raises(UserError, match=r"data\.validation.* must be a number of records .*a share of them"):
        check_config(config)
        check_files([config], first_host=False)


def test_preview_needs_no_number() -> None:
    assert parsed("--preview", "--data.train", "a.json")[1]["preview"] == 3
    assert parsed("--preview", "5")[1]["preview"] == 5


@pytest.mark.parametrize(
    "words", [("train", "--help"), ("evaluate", "--help"), ("train", "--config", "lora", "--print_config")]
)
def test_a_reader_may_take_only_the_beginning(words: tuple[str, ...]) -> None:
    """As `| head` does."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", f"jaxlm.{words[0]}", *words[1:]]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_unknown_key_without_a_value_is_refused_as_unknown() -> None:
    with pytest.raises(UserError, match=r"unknown key 'train\.stps'; did you mean 'train\.steps'"):
        parsed("--train.stps")


def test_config_needs_a_file() -> None:
    with pytest.raises(UserError, match="--config: needs a file"):
        parsed("--config", "")


def test_paths_and_numbers_of_numpy_are_plain_values() -> None:
    config = DataConfig(
        train=(SourceConfig(path=Path("a.json"), weight=np.float32(0.5)),), sequence_length=np.int64(64)
    )  # type: ignore[arg-type]
    plain = to_dict(config)
    assert plain["train"][0]["path"] == "a.json" and type(plain["sequence_length"]) is int
    assert type(plain["train"][0]["weight"]) is float and plain["packing"] is config.packing


def test_a_key_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("data: {train: a.json}\ntrain: {epochs: 2}\ndata: {validation: 5}\n")
    with pytest.raises(UserError, match=r"a\.yaml: not valid YAML in line 3, column 1: the key 'data' stands twice"):
        parsed("--config", str(file))
    with pytest.raises(UserError, match=r"--data\.train: the key 'path' stands twice"):
        parsed("--data.train", "{path: a.json, path: b.json}")
    file.write_text("data: &d {train: a.json, validation: 5}\nstages: [{name: one, data: {<<: *d, validation: 6}}]\n")
    assert data_of("--config", str(file)).validation == 6  # a merge key is none of these


def test_a_stage_alone_needs_the_one_before_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", "quickstart", "--stage", "sft", "--output_dir", str(tmp_path / "out")]
    assert main(words) == 2
    assert "--stage sft: it starts from the stage before, and" in (said := capsys.readouterr().err)
    assert "--stage pretrain" in said and "hub" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--moe.ranges", "{smiles: 3}"], "moe.ranges.smiles: expected a list of 2, found 3"),
        (["--moe.ranges", "{smiles: [3, 4, 5]}"], "moe.ranges.smiles: expected a list of 2, found [3, 4, 5]"),
        (["--moe.top_k", "{text: x}"], "moe.top_k.text: expected a whole number, found 'x'"),
        (["--moe.top_k", "{text:2}"], "found null; put a space behind the colon, {key: value}"),
        (["--data", "{date:x}"], "unknown key 'data.date:x'; put a space behind the colon"),
        (["--moe.top_k", "{5: 1}"], "moe.top_k: the name 5 is not a text; put it in quotation marks"),
        (["--moe.top_k", "3"], "moe.top_k: expected keys and values, {key: value}, found 3"),
        (["--tokenizer.modalities", "[{tags: 3}]"], "tokenizer.modalities.tags: expected a list of 2, found 3"),
        (["--train.steps", "1.5"], "train.steps: expected a whole number, found 1.5"),
        (["--train.steps", "1e3"], "train.steps: expected a whole number, found '1e3'"),
        (["--train.resume", "1"], "train.resume: expected true or false, found 1"),
        (["--optimizer.eps", "1" + "0" * 400], "optimizer.eps: expected a number, found 1000"),
        (
            ["--optimizer.name", "AdamW"],
            "lion, muon, schedule_free, found 'AdamW'; did you mean 'adamw'?",
        ),
        (["--lora.targets", "[q_proj, 2]"], "lora.targets: expected text, found 2"),
        (["--data.packing", "maybe"], "data.packing: expected true or false or one of first_fit, group_texts"),
    ],
)
def test_types_are_said_in_words(words: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parsed(*words)
    assert message in str(caught.value)


def test_no_message_names_a_class() -> None:
    """Whatever is put where something else belongs."""
    for key in all_keys(RunConfig):
        for value in ("{a: 1}", "[[1]]", "x"):
            try:
                parsed(f"--{key}", value)
            except UserError as error:
                assert "<class" not in str(error) and "typing." not in str(error), f"--{key} {value}: {error}"


def test_a_number_or_truth_value_in_quotation_marks_counts_as_one(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "optimizer: {learning_rate: 1e-4, eps: '1e-6'}\n"
        "train: {steps: '20', epochs: 3, resume: 'no', compiler_options: {level: '1'}}\n"
        "lora: {rank_pattern: {a: '3'}, alpha: 16}\n"
        "moe: {ranges: {a: ['1', 2]}}\n"
        "data: {packing: 'true', add_bos: 'null'}\n"
    )
    config, _ = parsed("--config", str(tmp_path / "a.yaml"))
    assert (config.optimizer.learning_rate, config.optimizer.eps) == (1e-4, 1e-6)
    assert (config.train.steps, config.train.resume, config.train.compiler_options) == (20, False, {"level": "1"})
    assert config.lora is not None and config.lora.rank_pattern == {"a": 3}
    assert (type(config.train.epochs), type(config.lora.alpha)) == (float, float)
    assert config.moe is not None and config.moe.ranges == {"a": (1, 2)}
    assert config.data.packing is True and config.data.add_bos is None


def test_a_text_stays_as_it_is(tmp_path: Path) -> None:
    """Also where it looks like a comment, a number or null to YAML."""
    (tmp_path / "a.yaml").write_text("train: {wandb: '# null', sample_prompts: ['# Heading', '1', 'null']}\n")
    config, _ = parsed("--config", str(tmp_path / "a.yaml"))
    assert (config.train.wandb, config.train.sample_prompts) == ("# null", ("# Heading", "1", "null"))


def test_a_switch_of_another_system_sets_a_key_to_a_value() -> None:
    """K2's load_8bit and KnowLM's load_4bit; a switch that is said to be off changes nothing."""
    from jaxlm.cli.generate import ALIASES
    from jaxlm.cli.words import read_words
    from jaxlm.config import GenerateConfig

    def kind(*words: str) -> object:
        values = read_words(words, {}, GenerateConfig, ALIASES).overrides
        return values.get("model", {}).get("quantize")

    assert kind("--load_4bit", "--prompt", "x") == kind("--load_4bit", "true") == kind("--quantize", "nf4") == "nf4"
    assert kind("--load_8bit") == kind("--int8") == kind("--load-8bit=True") == "int8"
    assert kind("--load_4bit", "false", "--prompt", "x") is None


@pytest.mark.parametrize(
    ("word", "way_out"),
    [
        ("--optimizer.lr", "; optimizer has name, learning_rate, "),
        ("--optimiser.learning_rate", "; did you mean 'optimizer'?"),
        ("--lora.learning_rate", "; did you mean 'optimizer.learning_rate'?"),
        ("--data.train.weigt", "; did you mean 'data.train.weight'?"),
    ],
)
def test_the_way_out_of_an_unknown_key_is_a_key(word: str, way_out: str) -> None:
    with pytest.raises(UserError) as refused:
        parsed(word, "1")
    assert way_out in str(refused.value)


def test_epochs_that_were_typed_are_not_without_effect(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: {shape: llama-2-7b}\ndata: {train: [a.json]}\ntrain: {steps: 4}\n")
    with pytest.raises(UserError) as refused:
        parsed("--config", str(file), "--train.epochs", "2")
    assert str(refused.value) == (
        "train.epochs: 2 does nothing where train.steps is 4; add --train.steps null, or leave --train.epochs out "
        f"[train.steps is set in {file}]"
    )
    config, _ = parsed("--config", str(file), "--train.epochs", "2", "--train.steps", "null")
    assert (config.train.epochs, config.train.steps) == (2, None)
