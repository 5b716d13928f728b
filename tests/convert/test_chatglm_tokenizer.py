"""ChatGLM2's and ChatGLM3's tokenizer against what their repositories' code does, and as transformers reads it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxlm.data.chat import ChatTemplate
from jaxlm.data.encoding import encode_rendered
from jaxlm.data.records import Record
from jaxlm.errors import UserError
from jaxlm.tokenizer import Tokenizer, load_tokenizer
from tests.convert.tiny import make_hf_model
from tests.models.small import hf_model

transformers = pytest.importorskip("transformers")
sentencepiece = pytest.importorskip("sentencepiece")

LINES = [
    "granite is a rock and basalt is a rock",
    "the sophist's density, 12 and 34",
    "石英和长石是矿物。",
    "问: 石英的密度?",
] * 10
TEXTS = [
    "granite is a rock",
    " two  spaces ",
    "石英 and 长石, 🪨",
    "a sophist and <|user|> and </s> and [gMASK]",
    "lines\n\nand 1234",
    "ﬁ é",
]
# Behind the pieces, by the code of the two repositories.
SPECIAL = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
TALK = [
    {"role": "system", "content": "You are a geologist."},
    {"role": "user", "content": "石英 is what?"},
    {"role": "assistant", "content": "granite\nand basalt"},
    {"role": "user", "content": " two  spaces"},
]


class Oracle:
    """Their code in short."""

    def __init__(self, path: Path) -> None:
        self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.ids = {token: self.model.vocab_size() + number for number, token in enumerate(SPECIAL)}
        self.prefix = [self.ids["[gMASK]"], self.ids["sop"]]

    def message(self, role: str, metadata: str, content: str) -> list[int]:
        return [self.ids[f"<|{role}|>"], *self.model.encode(f"{metadata}\n"), *self.model.encode(content)]

    def chat(self, messages: list[dict[str, Any]]) -> list[int]:
        ids = list(self.prefix)
        for message in messages:
            content = message["content"]
            if message["role"] == "system" and "tools" in message:
                content += "\n" + json.dumps(message["tools"], indent=4, ensure_ascii=False)
            ids += self.message(message["role"], message.get("metadata", ""), content)
        return [*ids, self.ids["<|assistant|>"]]

    def rounds(self, questions: list[str], answers: list[str]) -> list[int]:
        text = ""
        for number, (question, answer) in enumerate(zip(questions, [*answers, None], strict=True), 1):
            text += f"[Round {number}]\n\n问：{question}\n\n答：" + ("" if answer is None else f"{answer}\n\n")
        return [*self.prefix, *self.model.encode(text)]


def save(directory: Path, name: str = "THUDM/chatglm3-6b", rule: str = "identity", **settings: Any) -> Oracle:
    directory.mkdir(exist_ok=True)
    with (directory / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(LINES),
            model_writer=file,
            model_type="bpe",
            vocab_size=360,
            byte_fallback=True,
            normalization_rule_name=rule,
            remove_extra_whitespaces=rule != "identity",
            minloglevel=2,
        )
    values = {"name_or_path": name, "remove_space": False, "tokenizer_class": "ChatGLMTokenizer"}
    (directory / "tokenizer_config.json").write_text(json.dumps(values | settings))
    return Oracle(directory / "tokenizer.model")


@pytest.fixture(scope="module", params=["identity", "nmt_nfkc"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Oracle]:
    """A model with ChatGLM3's tokenizer, with both ways in which SentencePiece may treat characters and spaces."""
    directory = tmp_path_factory.mktemp("chatglm")
    oracle = save(directory, rule=request.param)
    make_hf_model(vocab_size=400, eos_token_id=2, pad_token_id=0).save_pretrained(directory)
    return directory, oracle


def ids_of(tokenizer: Tokenizer, messages: list[dict[str, Any]]) -> list[int]:
    return tokenizer.encode(tokenizer.render_chat(messages, add_generation_prompt=True), special_tokens=True).ids


def test_texts_and_conversations_are_those_of_the_repository(saved: tuple[Path, Oracle]) -> None:
    directory, oracle = saved
    tokenizer = load_tokenizer(directory)
    assert tokenizer.vocab_size == len(oracle.model) + 9 and tokenizer.adds_bos
    assert [*tokenizer.opening] == oracle.prefix and "ChatGLM" in tokenizer.adds_why
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.bos_id) == (2, 0, None)
    assert tokenizer.end_ids == (2, oracle.ids["<|user|>"], oracle.ids["<|observation|>"])
    for text in TEXTS:
        ids = oracle.model.encode(text)
        assert tokenizer.encode(text).ids == ids, text
        assert tokenizer.decode([*oracle.prefix, *ids, 2]) == oracle.model.decode(ids)
    assert ids_of(tokenizer, TALK) == oracle.chat(TALK)
    tools = [{"name": "density", "parameters": {"of": "石英"}}]
    called = [
        {"role": "system", "content": "Use:", "tools": tools},
        {"role": "user", "content": "density?"},
        {"role": "assistant", "metadata": "density", "content": "tool_call(of='石英')"},
        {"role": "observation", "content": "2.65"},
        {"role": "assistant", "content": ""},
    ]
    assert ids_of(tokenizer, called) == oracle.chat(called)


def test_training_ends_every_answer_as_the_next_turn_begins(saved: tuple[Path, Oracle]) -> None:
    """Also the last one, where the repository's script puts eos; its `chat` stops at both."""
    directory, oracle = saved
    tokenizer = load_tokenizer(directory)
    talk = [*TALK[1:], {"role": "assistant", "content": "rock"}]
    record = ChatTemplate({}, tokenizer).render(Record("record 1", {"messages": talk}))
    (example,) = encode_rendered([record], tokenizer, add_bos=True, add_eos=True, train_on_inputs=False)
    assert [*example.input_ids] == [*oracle.chat(talk)[:-1], oracle.ids["<|user|>"]]
    trained = [int(i) for i, flag in zip(example.input_ids, example.loss_mask, strict=True) if flag]
    # The space that SentencePiece puts behind a trained token stands for no character, and goes with it.
    trained = [index for index in trained if index != oracle.model.piece_to_id("▁")]
    answers = [oracle.model.encode(talk[number]["content"]) for number in (1, 3)]
    assert trained == [*answers[0], oracle.ids["<|user|>"], *answers[1], oracle.ids["<|user|>"]]


def test_transformers_reads_what_a_conversion_writes(
    saved: tuple[Path, Oracle], tmp_path: Path, run: Callable[..., str]
) -> None:
    directory, oracle = saved
    run("hf-to-jax", directory, tmp_path / "jax")
    run("jax-to-hf", tmp_path / "jax", tmp_path / "hf")
    names = {file.name for file in (tmp_path / "hf").iterdir()}
    assert {"tokenizer.json", "chat_template.jinja"} < names and "tokenizer.model" not in names
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf"), load_tokenizer(tmp_path / "hf")
    before = load_tokenizer(directory)
    assert ours.vocab_size == before.vocab_size == len(theirs) and ours.opening == before.opening
    assert ours.special_ids == before.special_ids and ours.end_ids == before.end_ids
    assert (theirs.eos_token_id, theirs.pad_token_id) == (2, 0)
    for text in TEXTS:
        if "<|user|>" not in text:  # there a special token in a text counts, as for every tokenizer.json
            assert theirs(text).input_ids == [*oracle.prefix, *oracle.model.encode(text)], text
            assert ours.encode(text).ids == oracle.model.encode(text)
    prompt = theirs.apply_chat_template(TALK, add_generation_prompt=True)
    assert prompt["input_ids"] == ids_of(ours, TALK) == oracle.chat(TALK)
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [*before.end_ids] and generation["pad_token_id"] == 0


def test_tokens_behind_the_special_ones_go_along(
    saved: tuple[Path, Oracle], tmp_path: Path, run: Callable[..., str]
) -> None:
    directory, _ = saved
    run("extend-vocab", directory, tmp_path / "more", "--tokens", "<mol>,rock5")
    more, size = load_tokenizer(tmp_path / "more"), load_tokenizer(directory).vocab_size
    assert [more.id_of(token) for token in ("<mol>", "rock5", "[gMASK]")] == [size, size + 1, more.opening[0]]
    assert {size, size + 1} < {*more.encode("a<mol>rock5").ids}


def test_chatglm2_asks_in_rounds(tmp_path: Path) -> None:
    oracle = save(tmp_path, "THUDM/chatglm2-6b")
    tokenizer = load_tokenizer(tmp_path)
    questions, answers = ["石英 is what?", "and?"], ["a rock"]
    messages = [{"role": "user", "content": questions[0]}, {"role": "assistant", "content": answers[0]}]
    talk = [*messages, {"role": "user", "content": questions[1]}]
    assert ids_of(tokenizer, talk) == oracle.rounds(questions, answers)
    assert tokenizer.end_ids == (2,)
    with pytest.raises(UserError, match="no system message"):
        tokenizer.render_chat(TALK)


def test_whose_template_it_is(tmp_path: Path) -> None:
    """One of its own is taken; a name that tells nothing gives none."""
    own = "[gMASK]sop{% for m in messages %}<|{{ m['role'] }}|>\n {{ m['content'] }}{% endfor %}<|assistant|>"
    oracle = save(tmp_path, "out", chat_template=own)
    assert ids_of(load_tokenizer(tmp_path), TALK) == oracle.chat(TALK)
    save(tmp_path, "out", auto_map={"AutoTokenizer": ["out/ChatGLM3--tokenization_chatglm.ChatGLMTokenizer", None]})
    assert ids_of(load_tokenizer(tmp_path), TALK) == oracle.chat(TALK)
    save(tmp_path, "out")
    with pytest.raises(UserError, match="no chat template"):
        load_tokenizer(tmp_path).render_chat(TALK)


def test_under_its_own_architecture_it_stays_as_it_is(tmp_path: Path, run: Callable[..., str]) -> None:
    """The code of that repository reads it; transformers' GLM does not."""
    save(tmp_path / "own")
    hf_model("chatglm", padded_vocab_size=400).save_pretrained(tmp_path / "own")
    run("hf-to-jax", tmp_path / "own", tmp_path / "jax")
    run("jax-to-hf", tmp_path / "jax", tmp_path / "back")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "own" / name).read_bytes()
    run("jax-to-hf", tmp_path / "jax", tmp_path / "glm", "--architecture", "GlmForCausalLM")
    assert (tmp_path / "glm" / "tokenizer.json").is_file() and not (tmp_path / "glm" / "tokenizer.model").exists()
