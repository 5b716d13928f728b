"""The small JSON files of jaxlm's own directories, edited by hand or damaged: refused by file and field."""

from __future__ import annotations

import copy
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from convert.formats.chat_template import trained_template_or_name
from convert.formats.peft import peft_config_for
from convert.source import is_adapter, open_adapter, open_model
from jaxlm.errors import UserError
from jaxlm.spec import ExpertsSpec
from jaxlm.tokenizer import load_tokenizer
from jaxlm.weights.hf import hf_config_for
from tests.convert.test_experts import E
from tests.convert.test_hf_experts import MODALITIES, make_moe, make_order
from tests.convert.tiny import make_adapter, make_hf_model

PROMPT = {"template": "alpaca", "add_bos": True}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model, one of experts, and an adapter, each with every small file that there is."""
    from convert.commands.main import main

    folder = tmp_path_factory.mktemp("small")
    base = make_hf_model(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0})
    base.save_pretrained(folder / "hf")
    make_adapter(base, folder / "peft", rank_pattern={"v_proj": 1}, alpha_pattern={"q_proj": 3})
    assert main(["hf-to-jax", str(folder / "hf"), str(folder / "model")]) == 0
    assert main(["peft-to-jax", str(folder / "peft"), str(folder / "adapter"), "--base", str(folder / "hf")]) == 0
    make_moe(folder / "hf", folder / "experts", make_order(), ExpertsSpec(E, "learned", **MODALITIES))
    for name in ("model", "experts", "adapter"):
        (folder / name / "jaxlm" / "prompt.json").write_text(json.dumps(PROMPT))
    return {name: folder / name for name in ("model", "experts", "adapter")}


def use(path: Path) -> None:
    """What the commands do with these files."""
    source: Any = open_adapter(path) if is_adapter(path) else open_model(path)
    if is_adapter(path):
        peft_config_for(source, path / "adapter_config.json")
    else:
        hf_config_for(source)
    trained_template_or_name(source)


WRONG: tuple[Any, ...] = (None, "x", -1, 0, 1.5, True, [], ["x"], [-1], {}, {"x": "y"}, 10**400, float("nan"))


def changes(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """(place, value) of every place in a JSON value, with values of every kind."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield from (((*path, key), wrong) for wrong in WRONG)
        yield from changes(value, (*path, key))


def changed(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    content = copy.deepcopy(content)
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return content


ATTENTION = ("model", "period", 0, "attention")
EXPERTS = ("model", "period", 0, "feed_forward", "experts")
FILES = [
    ("model", "jaxlm/model.json"),
    ("model", "jaxlm/hf_config.json"),
    ("model", "jaxlm/prompt.json"),
    ("experts", "jaxlm/model.json"),
    ("adapter", "jaxlm/model.json"),
    ("adapter", "jaxlm/adapter_config.json"),
    ("adapter", "model/_METADATA"),
]


@pytest.mark.parametrize(("name", "file"), FILES)
def test_any_value_is_read_or_refused_by_name(
    name: str, file: str, directories: dict[str, Path], tmp_path: Path
) -> None:
    """Every value replaced by one of every kind, taken out, and something unknown put in; the same for the rest."""
    shutil.copytree(directories[name], tmp_path / name)
    where = tmp_path / name / file
    good = json.loads(where.read_text())
    use(tmp_path / name)
    refused = 0
    every = 7 if file == "model/_METADATA" else 2  # each opens all arrays
    for path, value in itertools.islice(changes(good), 0, None, every):
        where.write_text(json.dumps(changed(good, path, value)))
        try:
            use(tmp_path / name)
        except UserError as error:
            refused += 1
            assert where.name in str(error) or file == "model/_METADATA", (path, value, error)
    assert refused > 5


@pytest.mark.parametrize(
    ("name", "path", "value", "words"),
    [
        ("model", ("model", "vocab_sice"), 4, ["model.vocab_sice", "no such field", "'vocab_size'", "jaxlm 0"]),
        ("model", (*ATTENTION, "rope", "foo"), 4, ["model.period[0].attention.rope.foo", "no such field"]),
        ("experts", (*EXPERTS, "foo"), 4, ["feed_forward.experts.foo", "no such field"]),
        ("adapter", ("lora", "foo"), 4, ["lora.foo", "no such field"]),
        ("model", ("foo",), 4, ["foo: no such field", "a newer jaxlm", "written by jaxlm 0"]),
        ("model", ("model", "num_layers"), "3", ["model.num_layers is '3'", "a whole number"]),
        ("model", ("model", "num_layers"), True, ["model.num_layers is True", "a whole number"]),
        ("model", (*ATTENTION, "num_kv_heads"), 0, ["num_kv_heads is 0", "positive"]),
        ("model", ("model", "norm", "eps"), "1e-5", ["model.norm.eps is '1e-5'", "a number"]),
        ("model", ("model", "tied_head"), 0, ["tied_head is 0", "true or false"]),
        ("model", ("model", "family"), "gpt2", ["model.family is 'gpt2'", "llama"]),
        ("model", (*ATTENTION, "rope", "rope_type"), "x", ["rope_type 'x'"]),
        ("model", (*ATTENTION, "rope"), 3, ["attention.rope is 3"]),
        ("experts", (*EXPERTS, "top_k"), [1, 2, 3], ["3 numbers for the modalities"]),
        ("experts", (*EXPERTS, "ranges"), [[1, 2, 3]], ["feed_forward.experts.ranges"]),
        ("adapter", ("lora", "rank"), "8", ["lora.rank is '8'", "a whole number"]),
        ("adapter", ("lora", "targets"), "q_proj", ["lora.targets is 'q_proj'", "a list of a text"]),
        ("adapter", ("lora", "rank_pattern"), {"(": 2}, ["lora.rank_pattern", "not a regular expression"]),
        ("adapter", ("layers",), [7], ["layers is [7]", "0 to 2"]),
        ("adapter", ("base",), 3, ["base is 3"]),
    ],
)
def test_model_json(
    name: str, path: tuple[Any, ...], value: Any, words: list[str], directories: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(directories[name], tmp_path / name)
    where = tmp_path / name / "jaxlm" / "model.json"
    where.write_text(json.dumps(changed(json.loads(where.read_text()), path, value)))
    with pytest.raises(UserError) as error:
        use(tmp_path / name)
    assert all(word in str(error.value) for word in [str(where), *words]), error.value


@pytest.mark.parametrize("name", ["model", "experts", "adapter"])
def test_missing_fields(name: str, directories: dict[str, Path], tmp_path: Path) -> None:
    """Those without a default are named; nothing else ends in a traceback."""
    shutil.copytree(directories[name], tmp_path / name)
    where = tmp_path / name / "jaxlm" / "model.json"
    good = json.loads(where.read_text())
    sections: list[tuple[Any, ...]] = [(key,) for key in good] + [("model", key) for key in good["model"]]
    sections += [("lora", key) for key in good["lora"] or {}]
    layer = good["model"]["period"][0]
    sections += [(*ATTENTION, key) for key in layer["attention"]]
    sections += [(*EXPERTS, key) for key in layer["feed_forward"]["experts"] or {}]
    for path in sections:
        content = copy.deepcopy(good)
        place = content
        for key in path[:-1]:
            place = place[key]
        del place[path[-1]]
        where.write_text(json.dumps(content))
        needed = path[-1] in ("format", "version", "model", "family", "vocab_size", "head_dim", "num_experts", "router")
        try:
            use(tmp_path / name)
            assert not needed, path
        except UserError as error:
            assert str(where) in str(error) or path[0] == "lora" or not needed, (path, error)


def test_as_a_user_sees_it(directories: dict[str, Path], tmp_path: Path, refused: Callable[..., str]) -> None:
    shutil.copytree(directories["model"], tmp_path / "model")
    where = tmp_path / "model" / "jaxlm" / "model.json"
    where.write_text(json.dumps(changed(json.loads(where.read_text()), ("model", "hidden"), 1)))
    message = refused("jax-to-hf", tmp_path / "model", tmp_path / "out")
    assert f"{where}: model.hidden: no such field; did you mean 'hidden_size'?" in message
    (tmp_path / "model" / "jaxlm" / "prompt.json").write_text('{"template": 3}')
    where.write_text(
        json.dumps(
            changed(
                json.loads(where.read_text()),
                ("model",),
                json.loads((directories["model"] / "jaxlm" / "model.json").read_text())["model"],
            )
        )
    )
    message = refused("jax-to-hf", tmp_path / "model", tmp_path / "out")
    assert "prompt.json: template is 3" in message
    (tmp_path / "model" / "jaxlm" / "prompt.json").write_text('{"template": "alpaca", "version": 2}')
    message = refused("jax-to-hf", tmp_path / "model", tmp_path / "out")
    assert "prompt.json: its version is 2; this jaxlm reads versions up to 1" in message


MODALITY = {
    "name": "smiles", "delimiters": ["{", "}"], "pieces": ["C", "N"], "pattern": None, "tags": ["<a>", "</a>"],
    "tag_tokens": False, "strip": False, "fallback": "error", "first": 3,
}  # fmt: skip


def test_modalities(tmp_path: Path) -> None:
    import tokenizers

    model = tokenizers.models.WordLevel({"a": 0, "b": 1, "[UNK]": 2, "{C}": 3, "{N}": 4}, "[UNK]")
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    where = tmp_path / "modalities.json"
    where.write_text(json.dumps({"modalities": [MODALITY]}))
    load_tokenizer(tmp_path)
    for path, value in [*changes({"modalities": [MODALITY]}), (("modalities", 0, "pattern"), "(")]:
        where.write_text(json.dumps(changed({"modalities": [MODALITY]}, path, value)))
        try:
            load_tokenizer(tmp_path)
        except UserError as error:
            assert "modalities" in str(error), (path, value, error)
