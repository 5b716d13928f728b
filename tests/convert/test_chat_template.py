"""Prompt templates as Jinja chat templates: transformers asks what jaxlm asks, to the character and the token."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from convert.formats.chat_template import to_jinja
from jaxlm.data.records import Record
from jaxlm.data.templates import DIRECTORY, ConversationTemplate, Rendered, for_questions, load_template
from jaxlm.inference.prompts import Prompter
from jaxlm.tokenizer import Tokenizer, load_tokenizer
from tests.convert.tiny import make_adapter, make_hf_model

transformers = pytest.importorskip("transformers")

NAMES = sorted(path.stem for path in DIRECTORY.glob("*.json"))
ODD = [
    "What is granite?",
    "quotes \" and ' and \\n, {{ braces }} {% if x %} {instruction} {input} </s>",
    "  spaces\n\nand lines\t\n",
    "Gr\u00fc\u00dfe \U0001f30b \u5c71 e\u0301 \x7f \u2028",
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer as transformers saves one."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    path = tmp_path_factory.mktemp("tokenizer")
    fast = tokenizers.Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<s>", "</s>", "<unk>"]
    )
    fast.train_from_iterator(["Below is an instruction that describes a task."] * 3, trainer)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(path)
    return path


def conversation(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def rendered_by(directory: Path, jinja: str, messages: list[dict[str, str]], ask: bool) -> str:
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    found: str = tokenizer.apply_chat_template(messages, chat_template=jinja, tokenize=False, add_generation_prompt=ask)
    return found


def text_of(rendered: Rendered, bos: bool) -> str:
    return ("<s>" if bos else "") + rendered.text("</s>")


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_every_template_asks_the_same(name: str, bos: bool, directory: Path) -> None:
    tokenizer = load_tokenizer(directory)
    template = for_questions(load_template(name, tokenizer))
    jinja = to_jinja(template, tokenizer, bos)
    assert jinja is not None
    for number, question in enumerate(ODD):
        answer = ODD[number - 1]
        if isinstance(template, ConversationTemplate):
            for messages in (
                conversation(question),
                conversation(question, system=answer),
                conversation(question, answer, question),
                conversation(question, "", answer, system=""),
            ):
                asked = template.render_prompt(Record("r", {"messages": messages}))
                assert rendered_by(directory, jinja, messages, True) == text_of(asked, bos)
            whole = conversation(question, answer, answer, question, system=answer)
            trained = template.render(Record("r", {"messages": whole}))
            assert rendered_by(directory, jinja, whole, False) == text_of(trained, bos)
            continue
        for extra in ("", answer):
            record = {"instruction": question, "input": extra, "output": answer}
            user = {"role": "user", "content": question} | ({"input": extra} if extra else {})
            asked = template.render_prompt(Record("r", record))
            assert rendered_by(directory, jinja, [user], True) == text_of(asked, bos)
            both = [user, {"role": "assistant", "content": answer}]
            trained = template.render(Record("r", record))
            assert rendered_by(directory, jinja, both, False) == text_of(trained, bos)


@pytest.mark.parametrize(
    ("name", "messages"),
    [
        ("alpaca", conversation("a", "b", "c")),
        ("alpaca", conversation("a", system="s")),
        ("vicuna_v1.1", [{"role": "assistant", "content": "a"}]),
        ("vicuna_v1.1", [*conversation("a"), {"role": "user", "content": "b"}]),
        ("vicuna_v1.1", [{"role": "tool", "content": "a"}]),
    ],
)
def test_what_was_never_trained_is_refused(name: str, messages: list[dict[str, str]], directory: Path) -> None:
    tokenizer = load_tokenizer(directory)
    jinja = to_jinja(load_template(name, tokenizer), tokenizer, True)
    assert jinja is not None
    with pytest.raises(Exception, match=r"single questions|take turns"):
        rendered_by(directory, jinja, messages, True)


def test_what_cannot_be_said(tmp_path: Path, directory: Path) -> None:
    tokenizer = load_tokenizer(directory)
    own = {"prompt_input": "{instruction:5} {input}", "prompt_no_input": "{instruction}", "response_split": ""}
    (tmp_path / "own.json").write_text(json.dumps(own))
    assert to_jinja(load_template(str(tmp_path / "own.json"), tokenizer), tokenizer, True) is None
    assert to_jinja(load_template("text", tokenizer), tokenizer, True) is None


@pytest.fixture
def tuned(hf_dir: Path, directory: Path, tmp_path: Path, run: Callable[..., str]) -> Path:
    """A jaxlm model that was trained with a template."""
    for file in directory.iterdir():
        shutil.copyfile(file, hf_dir / file.name)
    run("hf-to-jax", hf_dir, tmp_path / "tuned")
    return tmp_path / "tuned"


def record_prompt(path: Path, **content: Any) -> None:
    (path / "jaxlm" / "prompt.json").write_text(json.dumps(content))


def ids(tokenizer: Tokenizer, template: str, question: str, add_bos: bool | None = None) -> list[int]:
    return Prompter(template, tokenizer, add_bos=add_bos).question(question)


@pytest.mark.parametrize("name", ["alpaca", "vicuna_v1.1", "scimind", "template.json"])
def test_exported(name: str, tuned: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    """Without being told anything, transformers and jaxlm ask the exported model as it was trained."""
    own = tuned / "jaxlm" / "template.json"
    own.write_bytes((DIRECTORY / "vigogne.json").read_bytes())
    record_prompt(tuned, template=name, add_bos=True)
    said = run("jax-to-hf", tuned, tmp_path / "out")
    assert "written as chat_template.jinja; an answer ends at 1" in said and "no place" not in said
    before = load_tokenizer(tuned / "jaxlm" / "tokenizer")
    question = "What is {{ granite }}?"
    want = ids(before, str(own) if name == "template.json" else name, question, add_bos=True)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    found = theirs.apply_chat_template(conversation(question), add_generation_prompt=True, return_dict=False)
    assert found == want
    assert ids(load_tokenizer(tmp_path / "out"), "chat", question) == want
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    ends = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    assert ends[0] == 1 and json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] in ends
    # Older versions look into the settings, which may have had another template.
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == (tmp_path / "out" / "chat_template.jinja").read_text()
    assert "files are as they were written" in run("verify", tmp_path / "out")


def test_adapters_too(tuned: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    make_adapter(make_hf_model(), tmp_path / "peft")
    run("peft-to-jax", tmp_path / "peft", tmp_path / "adapter", "--base", tuned)
    record_prompt(tmp_path / "adapter", template="alpaca")
    shutil.copytree(tuned / "jaxlm" / "tokenizer", tmp_path / "adapter" / "jaxlm" / "tokenizer", dirs_exist_ok=True)
    run("jax-to-peft", tmp_path / "adapter", tmp_path / "out")
    run("merge", tuned, tmp_path / "adapter", tmp_path / "merged", "--format", "hf")
    want = ids(load_tokenizer(tuned / "jaxlm" / "tokenizer"), "alpaca", "What is granite?")
    for name in ("out", "merged"):
        assert ids(load_tokenizer(tmp_path / name), "chat", "What is granite?") == want


def test_the_tokenizers_own_stays(tuned: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    own = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (tuned / "jaxlm" / "tokenizer" / "chat_template.jinja").write_text(own)
    record_prompt(tuned, template="chat")
    assert "the tokenizer's own chat template" in run("jax-to-hf", tuned, tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == own
    (tuned / "jaxlm" / "prompt.json").unlink()
    assert "template" not in run("jax-to-hf", tuned, tmp_path / "out2")
    record_prompt(tuned, template="text")
    assert "text, not written as chat_template.jinja: it has no form" in run("jax-to-hf", tuned, tmp_path / "out3")
    record_prompt(tuned, template="gone.json")
    assert "not written as chat_template.jinja: template 'gone.json'" in run("jax-to-hf", tuned, tmp_path / "out4")
    assert "--template vicuna_v1.1 there" in (record_prompt(tuned, template="vicuna_v1.1") or "") + run(
        "jax-to-mindspore", tuned, tmp_path / "ms"
    )
