"""Where files are: home directories, paths of a configuration, configurations by name, the base of an adapter."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from jaxlm.cli.parser import parse_config, parse_run
from jaxlm.config import GenerateConfig, PrepareConfig, RunConfig, SourceConfig
from jaxlm.errors import UserError
from jaxlm.locate import at_home, find_base, find_config, on_disk, packaged_configs, record_base

ROOT = Path(__file__).resolve().parents[1]


def run(*words: str) -> RunConfig:
    return parse_run(words, prog="", description="").configs[0]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["--model.path", "~/m"], "model.path"),
        (["--model", "~/m"], "model.path"),
        (["--model.shape", "~/m.json"], "model.shape"),
        (["--output_dir", "~/m"], "output_dir"),
        (["--lora.init_from", "~/m"], "lora.init_from"),
        (["--tokenizer.path", "~/m"], "tokenizer.path"),
        (["--tokenizer.train_on", "~/m"], "tokenizer.train_on.0"),
        (["--tokenizer.modalities", "[{name: x, tokens_file: ~/m}]"], "tokenizer.modalities.0.tokens_file"),
        (["--data.train", "[{path: ~/m}]"], "data.train.0.path"),
        (["--data.train", "[{path: x, template: ~/m.json}]"], "data.train.0.template"),
        (["--data.validation", "[{path: ~/m}]"], "data.validation.0.path"),
        (["--train.local_checkpoints", "~/m"], "train.local_checkpoints"),
        (["--train.compilation_cache", "~/m"], "train.compilation_cache"),
    ],
)
def test_home_is_expanded_on_the_command_line_and_in_files(words: list[str], key: str, home: Path) -> None:
    def at(config: object) -> object:
        for part in key.split("."):
            config = config[int(part)] if isinstance(config, tuple) else getattr(config, part)
        return config

    wanted = str(home / ("m.json" if ".json" in words[1] else "m"))
    assert at(run(*words)) == wanted
    if words[0] != "--model":
        tree: dict[str, object] = {}
        *parents, leaf = words[0][2:].split(".")
        inner = tree
        for parent in parents:
            inner = inner.setdefault(parent, {})  # type: ignore[assignment]
        inner[leaf] = yaml.safe_load(words[1]) if leaf != "train_on" else [words[1]]
        Path("run.yaml").write_text(yaml.safe_dump(tree))
        assert at(run("--config", "run.yaml")) == wanted
        Path("stages.yaml").write_text(yaml.safe_dump({"stages": [{"name": "one", **tree}]}))
        found = at(run("--config", "stages.yaml"))
        assert found == (f"{wanted}/one" if key == "output_dir" else wanted)


def test_home_is_expanded_for_generate(home: Path) -> None:
    words = ["--model", "~/m", "--model.adapter=~/a", "--predict_data", "~/p.json", "--save_file", "~/s.json"]
    words += ["--tokenizer", "~/t", "--template", "~/t.json"]
    config = parse_config(words, GenerateConfig, prog="", description="", aliases={})
    found = (config.model.path, config.model.adapter, config.predict_data, config.save_file)
    assert found == tuple(str(home / name) for name in ("m", "a", "p.json", "s.json"))
    assert (config.tokenizer, config.template) == (str(home / "t"), str(home / "t.json"))


def test_an_unknown_home_is_refused_by_key(home: Path) -> None:
    with pytest.raises(UserError, match=r"output_dir: ~no-such-user/x: .* a file of that name is \./~no-such-user/x"):
        run("--output_dir", "~no-such-user/x")


def test_a_file_whose_name_begins_with_a_tilde(home: Path) -> None:
    """What the message above says to type is read as such, however many times it is expanded."""
    from jaxlm.data.records import check_source

    assert at_home("./~no-such-user/x") == Path("~no-such-user/x")
    assert at_home("~/x") == home / "x"
    Path("~no-such-user").write_text("rock\n")
    check_source(SourceConfig(path="./~no-such-user", template="text", format="text"))


def test_paths_of_a_file_are_looked_for_here_then_beside_it(home: Path) -> None:
    folder = Path("elsewhere")
    (folder / "data").mkdir(parents=True)
    for name in ("a.json", "b.json", "template.json"):
        (folder / "data" / name).write_text("[]")
    (folder / "alpaca").mkdir()
    # A template's name is no path, also where a folder is called like it; what is written is not looked for.
    (folder / "run.yaml").write_text(
        "output_dir: data\ndata:\n  train: [{path: data/a.json, template: alpaca},"
        " {path: 'data/*.json', template: data/template.json}, {path: data/none.json}]\n"
    )
    config = run("--config", "elsewhere/run.yaml")
    assert [source.path for source in config.data.train] == [
        "elsewhere/data/a.json",
        "elsewhere/data/*.json",
        "data/none.json",
    ]
    assert [source.template for source in config.data.train] == ["alpaca", "elsewhere/data/template.json", "auto"]
    assert config.output_dir == "data"
    Path("data").mkdir()
    Path("data/a.json").write_text("[]")
    assert run("--config", "elsewhere/run.yaml").data.train[0].path == "data/a.json"


def test_configurations_by_name(home: Path) -> None:
    assert {"quickstart", "lora", "full", "alpaca/lora", "k2/sft", "pods/7b-v5e-4x4"} <= packaged_configs().keys()
    for name in ("alpaca/lora", "alpaca/lora.yaml", "configs/alpaca/lora.yaml"):
        assert find_config(name).samefile(ROOT / "configs/alpaca/lora.yaml")
    Path("lora").write_text("{}")
    assert find_config("lora") == Path("lora"), "a file that is here comes first"
    with pytest.raises(UserError, match=r"alpaca/lroa: no such file.*did you mean alpaca/lora"):
        find_config("alpaca/lroa")
    with pytest.raises(UserError, match=r"alpaca: is a directory|no configuration of that name"):
        find_config("alpaca")


def test_every_configuration_that_comes_along_can_be_read_from_anywhere(home: Path) -> None:
    for name in packaged_configs():
        if name.startswith("prepare/"):
            parse_config(["--config", name], PrepareConfig, prog="", description="", aliases={})
            continue
        for config in parse_run(["--config", name], prog="", description="").configs:
            shape = config.model.shape or ""
            assert not shape.endswith(".json") or Path(shape).is_file()
    assert all(Path(source.path).is_file() for source in run("--config", "quickstart").data.train)


def test_a_wheel_holds_the_configurations(tmp_path: Path) -> None:
    """Built from a copy, as `pip install .` does it."""
    copy = tmp_path / "copy"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("this is no git checkout")
    for name in filter(None, listed.stdout.decode().split("\0")):
        if not name.startswith("tests/") and (ROOT / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name, follow_symlinks=False)
    code = "import setuptools.build_meta as b, sys; b.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=copy, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {f"jaxlm/{name}" for name in listed.stdout.decode().split("\0") if name.startswith("configs/")}
    assert wanted <= names
    assert "jaxlm/data/templates/alpaca.json" in names and "jaxlm/kernels/tuned.json" in names


def test_messages_name_the_file_that_set_a_value(home: Path) -> None:
    Path("base.yaml").write_text("data: {validation: 2000, sequence_length: 64}\ntrain: {epochs: 2}\n")
    Path("mine.yaml").write_text("data: {sequence_length: 32}\nstages: [{name: a, lora: {rank: 4}}]\n")
    words = ["--config", "base.yaml", "--config", "mine.yaml", "--train.epochs", "3"]
    origins = parse_run(words, prog="", description="").origins
    message = "data.validation is 2000, but there are only 64 records"
    assert origins.explain(message) == f"{message} [data.validation is set in base.yaml]"
    assert "data.sequence_length is set in mine.yaml" in origins.explain("data.sequence_length: 32 is short")
    assert "lora.rank is set in mine.yaml" in origins.explain("lora.rank: 4 is odd")
    # Typed, or not in the message: no note.
    assert origins.explain("train.epochs: 3 is odd") == "train.epochs: 3 is odd"
    assert origins.explain("data.validation_x and my.data.validation") == "data.validation_x and my.data.validation"
    with pytest.raises(UserError, match=r"expected a number, found 'many' \[train.epochs is set in bad.yaml\]"):
        Path("bad.yaml").write_text("train: {epochs: many}\n")
        run("--config", "bad.yaml")
    with pytest.raises(UserError, match=r"found 'heavy' \[data.train.weight is set in bad.yaml\]"):
        Path("bad.yaml").write_text("data: {train: [{path: x.json, weight: heavy}]}\n")
        run("--config", "bad.yaml")


def test_a_base_is_found_where_it_was_and_where_it_went(home: Path) -> None:
    adapter = Path("project/out/mine/checkpoints/4")
    adapter.mkdir(parents=True)
    Path("project/models/llama").mkdir(parents=True)
    content = record_base("project/models/llama", adapter)
    assert content["base"] == str(Path("project/models/llama").absolute())
    os.chdir("/")
    here = home.parent
    assert find_base(content, here / adapter) == here / "project/models/llama"
    (here / "project").rename(here / "moved")
    moved = here / "moved/out/mine/checkpoints/4"
    found = find_base(content, moved)
    assert found is not None and found.samefile(here / "moved/models/llama")
    # As PEFT and earlier versions record it: the path as it was typed.
    for key in ("base", "base_model_name_or_path"):
        assert find_base({key: "models/llama"}, moved) == here / "moved/models/llama"
    assert find_base({"base": "models/other"}, moved) is None
    assert find_base({"base": None}, moved) is None


def test_a_name_of_the_hub_says_how_to_get_it(home: Path) -> None:
    with pytest.raises(UserError) as caught:
        on_disk("meta-llama/Llama-2-7b-hf")
    said = str(caught.value)
    assert said.startswith("meta-llama/Llama-2-7b-hf: no such directory or file (relative paths are looked for in")
    assert "HF_HUB_OFFLINE forbids the network" in said
    assert "run hf download meta-llama/Llama-2-7b-hf --local-dir Llama-2-7b-hf" in said
    for path in ("models", "a/b/c", "/a/b", "../a", "~/a"):
        assert on_disk(path) == at_home(path)
    Path("models").mkdir()
    assert on_disk("models/llama") == Path("models/llama"), "a folder of that name is here, so a folder is meant"
