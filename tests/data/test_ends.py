"""What is trained of a conversation: every answer, and the end of every turn once; whatever the template leaves off."""

from __future__ import annotations

import itertools
import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxlm.config import DataConfig, SourceConfig
from jaxlm.data.encoding import Example, encode_rendered, resolve_ends
from jaxlm.data.loader import build_data
from jaxlm.data.records import Record
from jaxlm.data.templates import load_template
from jaxlm.errors import UserError
from jaxlm.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece

from .conftest import corpus

START = "{{ '<|im_start|>' + m.role + '\n' + m.content }}"
USER = (
    "{% if m.role != 'assistant' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% else %}<|im_start|>assistant\n"
)
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
LOOP = "{% for m in messages %}"
CHATML = LOOP + START + "{{ '<|im_end|>\n' }}{% endfor %}" + ASK
# Name -> (template, what ends a turn that is not the last, what ends the last). EOS is the tokenizer's own.
CHATS = {
    "chatml": (CHATML, "<|im_end|>", "<|im_end|>"),
    "last left off": (
        LOOP + START + "{% if not loop.last %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}" + ASK,
        "<|im_end|>",
        "<|im_end|>",
    ),
    "newline, last left off": (
        LOOP + START + "{{ '\n' if loop.last else '<|im_end|>\n' }}{% endfor %}" + ASK,
        "<|im_end|>",
        "<|im_end|>",
    ),
    "block": (
        LOOP + USER + "{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>\n{% endif %}{% endfor %}" + ASK,
        "<|im_end|>",
        "<|im_end|>",
    ),
    "block with the end": (
        LOOP + USER + "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n{% endif %}{% endfor %}" + ASK,
        "<|im_end|>",
        "<|im_end|>",
    ),
    "block, last left off": (
        LOOP
        + USER
        + "{% generation %}{{ m.content }}{% endgeneration %}{% if not loop.last %}<|im_end|>\n{% endif %}"
        + "{% endif %}{% endfor %}"
        + ASK,
        "<|im_end|>",
        "<|im_end|>",
    ),
    "space before": (
        LOOP + "{{ 'Q ' + m.content if m.role == 'user' else ' A>' + m.content + ' <|eos|><|begin|>' }}{% endfor %}",
        " <|eos|>",
        " <|eos|>",
    ),
    "words": (
        LOOP + "{{ 'Q ' + m.content + '\n' if m.role == 'user' else 'A>' + m.content + ' [END]\n' }}{% endfor %}",
        " [END]",
        " [END]\n<|eos|>",
    ),
    "none": (LOOP + "{{ m.role + '>' + m.content + '\n' }}{% endfor %}", "", "\n<|eos|>"),
}
TALK = [("user", "what is it"), ("assistant", "a rock"), ("user", "end\n"), ("assistant", "assistant")]


def bytes_with(directory: Path, template: str | None = None, **config: Any) -> Tokenizer:
    """Byte-level BPE that trims its offsets; <|im_start|> and <|im_end|> are not marked as special."""
    import tokenizers
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=380, special_tokens=["<|begin|>", "<|eos|>"], initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator([*corpus(), "a\n\n  b\n    c   d\t\te"] * 2, trainer)
    model.add_tokens([AddedToken(t, special=False, normalized=False) for t in ("<|im_start|>", "<|im_end|>")])
    directory.mkdir(parents=True, exist_ok=True)
    model.save(str(directory / "tokenizer.json"))
    roles = {
        "bos_token": "<|begin|>",
        "eos_token": "<|eos|>",
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(roles | config | {"chat_template": template}))
    return load_tokenizer(directory)


def example_of(template: str, tokenizer: Tokenizer, data: dict[str, Any]) -> Example:
    rendered = load_template(template, tokenizer).render(Record("f:1", data))
    config, _ = resolve_ends(DataConfig(), tokenizer)
    assert config.add_bos is not None and config.add_eos is not None
    (example,) = encode_rendered(
        [rendered], tokenizer, add_bos=config.add_bos, add_eos=config.add_eos, train_on_inputs=False
    )
    return example


def trained(example: Example, tokenizer: Tokenizer) -> list[str]:
    """The text of each run of trained tokens."""
    ids, mask = example.input_ids.tolist(), example.loss_mask
    borders = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(ids)]
    runs = []
    for begin, end in itertools.pairwise(borders):
        if mask[begin]:
            before = tokenizer.decode(ids[:begin], skip_special=False)
            runs.append(tokenizer.decode(ids[:end], skip_special=False)[len(before) :])
    return runs


def messages(turns: list[tuple[str, str]]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.mark.parametrize("name", CHATS)
def test_every_turn_is_ended_once(tmp_path: Path, name: str) -> None:
    template, middle, last = CHATS[name]
    tokenizer = bytes_with(tmp_path, template)
    example = example_of("chat", tokenizer, messages(TALK))
    assert trained(example, tokenizer) == ["a rock" + middle, "assistant" + last]
    assert len(example.ends) == (2 if "<|" in middle else 1)
    assert trained(example_of("chat", tokenizer, messages(TALK[:2])), tokenizer) == ["a rock" + last]
    # A conversation that ends with a question has nothing behind it.
    asked = example_of("chat", tokenizer, messages(TALK[:3]))
    assert trained(asked, tokenizer) == ["a rock" + middle]
    # An answer that speaks of the end does not take its place.
    said = example_of("chat", tokenizer, messages([TALK[0], ("assistant", "it ends with <|eos|>")]))
    if not name.startswith("block"):
        assert trained(said, tokenizer) == ["it ends with <|eos|>" + last]


def test_the_end_is_the_one_that_generation_config_names(tmp_path: Path) -> None:
    """Openings only, as GLM's: the next question's opening ends an answer, if it is known as an end."""
    template = LOOP + "{{ '<|im_start|>' if m.role == 'user' else '<|im_end|>' }}{{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}<|im_end|>{% endif %}"
    tokenizer = bytes_with(tmp_path, template)
    assert trained(example_of("chat", tokenizer, messages(TALK[:2])), tokenizer) == ["a rock<|eos|>"]
    index = tokenizer.id_of("<|im_start|>")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, index]}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.end_ids == (1, index)
    for turns in (TALK, TALK[:2]):
        assert trained(example_of("chat", tokenizer, messages(turns)), tokenizer)[-1].endswith("<|im_start|>")
    # No eos_token at all: what generation_config.json names.
    no_eos = bytes_with(tmp_path, CHATS["none"][0], eos_token=None)
    assert trained(example_of("chat", no_eos, messages(TALK[:2])), no_eos) == ["a rock\n<|eos|>"]


def test_a_message_of_weight_0_is_not_trained(tmp_path: Path) -> None:
    tokenizer = bytes_with(tmp_path, CHATML)
    for key, value in (("weight", 0), ("train", False), ("training", False)):
        data = messages(TALK)
        data["messages"][1][key] = value
        data["messages"][3][key] = not value
        for template, end in (("chat", "<|im_end|>"), ("vicuna_v1.1", "<|eos|>")):
            example = example_of(template, tokenizer, data)
            assert [text.strip() for text in trained(example, tokenizer)] == [f"assistant{end}"]
            assert len(example.ends) == 1
    data["messages"][1]["weight"] = 0.5
    with pytest.raises(UserError, match=r"f:1: weight of message 2 is 0.5; it must be 1"):
        example_of("chat", tokenizer, data)


QWEN = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>user\n<out>{{ m.content }}</out><|im_end|>\n"
    "{% elif m.role != 'assistant' or not m.tool_calls %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% else %}<|im_start|>assistant{% if m.content %}\n{{ m.content }}{% endif %}{% for call in m.tool_calls %}"
    "{% if call.function %}{% set call = call.function %}{% endif %}"
    '{{ "\n" }}<call>{"name": "{{ call.name }}", "arguments": {{ call.arguments | tojson }}}</call>{% endfor %}'
    "<|im_end|>\n{% endif %}{% endfor %}" + ASK
)


def test_tool_calls_are_trained_as_the_template_writes_them(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = bytes_with(tmp_path, QWEN, tokenizer_class="PreTrainedTokenizerFast")
    tools = [{"type": "function", "function": {"name": "weigh", "description": "weighs", "parameters": {}}}]
    call = {"type": "function", "function": {"name": "weigh", "arguments": {"what": "rock"}}}
    turns = [
        {"role": "user", "content": "how much"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "name": "weigh", "content": "3 kg"},
        {"role": "assistant", "content": "3 kg"},
    ]
    written = '<call>{"name": "weigh", "arguments": {"what": "rock"}}</call><|im_end|>'
    for shape in (tools, json.dumps(tools)):
        example = example_of("chat", tokenizer, {"messages": turns, "tools": shape})
        assert trained(example, tokenizer) == [written, "3 kg<|im_end|>"]
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        text = theirs.apply_chat_template(turns, tools=tools, tokenize=False)
        assert tokenizer.decode(example.input_ids, skip_special=False) == text
    # Older ways to write the same.
    sharegpt = [
        {"from": "human", "value": "how much"},
        {"from": "function_call", "value": json.dumps(call["function"])},
        {"from": "observation", "value": "3 kg"},
        {"from": "gpt", "value": "3 kg"},
    ]
    first = {"role": "assistant", "content": None, "function_call": call["function"]}
    for talk in (sharegpt, [turns[0], first, *turns[2:]]):
        assert trained(example_of("chat", tokenizer, {"messages": talk}), tokenizer) == [written, "3 kg<|im_end|>"]
    sharegpt[1]["value"] = "weigh(rock)"
    with pytest.raises(UserError, match=r"message 2 must call a function as .*found 'weigh\(rock\)'"):
        example_of("chat", tokenizer, {"messages": sharegpt})
    with pytest.raises(UserError, match="message 2 has no text but tool_calls"):
        example_of("vicuna_v1.1", tokenizer, {"messages": turns[:2]})
    silent = bytes_with(tmp_path, CHATML.replace("m.content", "(m.content or '')"))
    with pytest.raises(UserError, match=r"message 2 has no text but tool_calls, .* does not write the tool_calls"):
        example_of("chat", silent, {"messages": turns[:2]})


@pytest.mark.parametrize("opening", ["<|im_start|>", "<|im_start|>assistant\n"])
def test_tool_calls_behind_an_opening_that_is_not_kept_are_trained(tmp_path: Path, opening: str) -> None:
    """DeepSeek's templates ask for a thought, but write none into a turn that calls tools."""
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}<|begin|>{{ m.content }}{% else %}OPEN"
        "{% for call in m.tool_calls or [] %}<tool>{{ call.name }}</tool>{% endfor %}"
        "{{ m.content or '' }}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}OPEN{{ '<think>\n' }}{% endif %}"
    ).replace("OPEN", "{{ '" + opening.replace("\n", "\\n") + "' }}")
    tokenizer = bytes_with(tmp_path, template)
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [{"name": "weigh"}]}]
    example = example_of("chat", tokenizer, {"messages": turns})
    assert trained(example, tokenizer) == ["<tool>weigh</tool><|im_end|>"]


THINKING = (
    LOOP
    + "{% set said = m.content %}"
    + "{% if m.role == 'assistant' and not loop.last %}"
    + "{% set said = m.content.split('</think>')[-1].lstrip() %}{% endif %}"
    + "<|im_start|>{{ m.role }}\n{{ said }}<|im_end|>\n{% endfor %}"
)


@pytest.mark.parametrize("opening", ["", "<think>\n"])
def test_thoughts_are_trained_where_the_template_keeps_them(tmp_path: Path, opening: str) -> None:
    """Templates leave the thoughts of earlier turns out, and may open a thought where an answer is asked for."""
    tokenizer = bytes_with(tmp_path, THINKING + ASK.replace("assistant\n", f"assistant\n{opening}"))
    turns = [("user", "q1"), ("assistant", "<think>\nhm\n</think>\n\none"), ("user", "q2")]
    turns.append(("assistant", "<think>\nwell\n</think>\n\ntwo"))
    last = turns[-1][1].removeprefix(opening) + "<|im_end|>"
    assert trained(example_of("chat", tokenizer, messages(turns)), tokenizer) == ["one<|im_end|>", last]
    plain = messages([("user", "q1"), ("assistant", "one")])
    assert trained(example_of("chat", tokenizer, plain), tokenizer) == ["one<|im_end|>"]


def run(path: Path, tokenizer: Tokenizer, records: list[dict[str, Any]], template: str, **options: Any) -> Any:
    (path / "data.json").write_text(json.dumps(records))
    source = SourceConfig(path=str(path / "data.json"), template=template)
    config = DataConfig(train=(source,), sequence_length=64, **options)
    return build_data(config, tokenizer, seed=0, vocab_size=tokenizer.vocab_size, max_positions=64)


def test_a_run_that_learns_no_end_is_refused(tmp_path: Path) -> None:
    tokenizer = bytes_with(tmp_path)
    records = [{"instruction": "what", "output": "rock"}]
    with pytest.raises(UserError, match=r"nothing that ends an answer is trained.*\(data.add_eos is false\)"):
        run(tmp_path, tokenizer, records, "alpaca_short", add_eos=False)
    assert run(tmp_path, tokenizer, records, "alpaca_short", add_eos=False, allow_no_end=True).report.train[0].ends == 0
    assert run(tmp_path, tokenizer, [{"text": "rock is"}], "text", add_eos=False).report.train[0].ends == 0
    bare = bytes_with(tmp_path, eos_token=None)
    with pytest.raises(UserError, match="names no eos_token"):
        run(tmp_path, bare, records, "alpaca_short")
    assert len(run(tmp_path, bare, [{"text": "rock is"}], "text").train) == 1
    long = [{"instruction": "what", "output": "rock " * 100}]
    with pytest.raises(UserError, match=r"all ends are cut off by data\.sequence_length"):
        run(tmp_path, tokenizer, long, "alpaca_short")
    data = run(tmp_path, tokenizer, [*records, *long], "alpaca_short")
    assert data.report.train[0].ends == 1 and data.report.train[0].end_ids == {tokenizer.eos_id}


def test_bos_is_put_where_the_tokenizer_puts_it(tmp_path: Path) -> None:
    from jaxlm.inference.prompts import Prompter

    records = [{"instruction": "what", "output": "rock"}]
    for adds in (False, True):
        tokenizer = bytes_with(tmp_path, add_bos_token=adds)
        data = run(tmp_path, tokenizer, records, "alpaca_short")
        prompter = Prompter("alpaca_short", tokenizer)
        for ids in (data.train.input_ids.tolist(), prompter.question("what")):
            assert (ids[0] == tokenizer.bos_id) == adds
        assert data.config.add_bos is adds and data.config.add_eos is True
        said = (
            f"{'bos <|begin|>' if adds else 'no bos'} first (tokenizer_config.json, add_bos_token: {str(adds).lower()}"
        )
        assert said in data.report.remarks()[0] and said in prompter.beginning
        other = run(tmp_path, tokenizer, records, "alpaca_short", add_bos=not adds)
        assert (other.train.input_ids[0] == tokenizer.bos_id) != adds
        assert (Prompter("alpaca_short", tokenizer, add_bos=not adds).question("what")[0] == tokenizer.bos_id) != adds


def test_the_end_of_a_document_one_token_too_long_is_trained(tmp_path: Path) -> None:
    tokenizer = bytes_with(tmp_path)
    text = "rock" * 63
    length = len(tokenizer.encode(text).ids) + 1
    for room in (length - 1, length // 2, length // 3, 7):
        if length % room != 1:
            continue
        (tmp_path / "data.json").write_text(json.dumps([{"text": text}]))
        config = DataConfig(train=(SourceConfig(path=str(tmp_path / "data.json")),), sequence_length=room)
        data = build_data(config, tokenizer, seed=0, vocab_size=tokenizer.vocab_size, max_positions=4096)
        assert data.train.loss_mask[-1] and data.train.input_ids[-1] == tokenizer.eos_id
        assert data.report.train[0].tokens == length and data.report.train[0].ends == 1


def test_pieces_with_nothing_to_learn_are_counted(tmp_path: Path) -> None:
    tokenizer = bytes_with(tmp_path)
    data = run(tmp_path, tokenizer, [{"instruction": "what " * 60, "output": "rock"}], "alpaca_short", too_long="split")
    (report,) = data.report.train
    assert report.split == 1 and report.dropped_pieces >= 1 and report.ends == 1
    whole = len(tokenizer.encode("### Instruction:\n" + "what " * 60 + "\n\n### Response:\nrock").ids) + 1
    assert report.tokens + report.tokens_dropped == whole
    assert (
        f"{report.dropped_pieces} pieces with nothing to learn dropped ({report.tokens_dropped} tokens)"
        in report.line()
    )


def test_the_space_that_sentencepiece_puts_in_front_of_an_answer_is_trained(
    all_tokenizers: dict[str, Tokenizer],
) -> None:
    """Behind a special token an answer begins with a piece that stands for no character of it."""
    source = all_tokenizers["model"]
    directory = source.path.parent / "direct"
    source.save(directory)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config["chat_template"] = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    names = {f"<|{role}|>": source.vocab_size + number for number, role in enumerate(("user", "assistant"))}
    (directory / "added_tokens.json").write_text(json.dumps(names))
    tokenizer = load_tokenizer(directory)
    example = example_of("chat", tokenizer, messages([("user", "石"), ("assistant", "🪨")]))
    pieces = [tokenizer.token(int(index)) for index in example.input_ids[example.loss_mask]]
    assert pieces == ["▁", "<0xF0>", "<0x9F>", "<0xAA>", "<0xA8>", "</s>"]


@pytest.mark.parametrize("kind", ["not legacy", "first", "json"])
def test_rounds_are_split_as_the_whole_conversation_is(all_tokenizers: dict[str, Tokenizer], kind: str) -> None:
    """Behind an eos a round goes on: no space is put in front of it where only the beginning of a text gets one."""
    transformers = pytest.importorskip("transformers")
    tokenizer = all_tokenizers[kind]
    config_file = tokenizer.path / "tokenizer_config.json"
    config = json.loads(config_file.read_text())
    if kind == "not legacy":
        config |= {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
    config_file.write_text(json.dumps(config))
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer.path)
    template = load_template("vicuna_v1.1", tokenizer)
    text = template.render(Record("f:1", messages(TALK))).text("</s>")
    assert example_of("vicuna_v1.1", tokenizer, messages(TALK)).input_ids.tolist() == theirs(text).input_ids


# Every template with every tokenizer ----------------------------------------------------------------------------------

SPACES = [" ", "  ", "\t", "\n", "\n\n", "\r\n", "\u00a0", "\u3000", "\u200b", "def f():\n    return"]
LETTERS = ["🪨", "👩\u200d🔬", "石英", "e\u0301", "\u00e9", "\ufb01", "\u00f6", "o\u0308"]
ALPHABET = st.sampled_from([*"ab.:<>{}|#\\", *SPACES, *LETTERS])
TEXTS = st.lists(ALPHABET, min_size=1, max_size=12).map("".join)
NAMES = ["alpaca", "alpaca_legacy", "knowlm_qlora", "darwin", "vicuna_v1.1", "scimind", "chat"]


@pytest.fixture(scope="module")
def all_tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    from tokenizers import Tokenizer as Library
    from tokenizers import normalizers, pre_tokenizers

    path = tmp_path_factory.mktemp("all")
    (path / "corpus.txt").write_text("\n".join(corpus()), encoding="utf-8")
    template = {"chat_template": CHATS["last left off"][0]}
    trained = path / "trained"
    train_sentencepiece([path / "corpus.txt"], 420, trained)
    config = json.loads((trained / "tokenizer_config.json").read_text()) | template
    (trained / "tokenizer_config.json").write_text(json.dumps(config))
    made = {"bytes": bytes_with(path / "bytes", template["chat_template"]), "json": load_tokenizer(trained)}
    for name, more in (("model", {}), ("not legacy", {"legacy": False})):
        (path / name).mkdir()
        (path / name / "tokenizer.model").write_bytes((trained / "tokenizer.model").read_bytes())
        (path / name / "tokenizer_config.json").write_text(json.dumps(config | more))
        made[name] = load_tokenizer(path / name)
    for name in ("first", "composed"):
        made["json" if name == "first" else "bytes"].save(path / name)
        library = Library.from_file(str(path / name / "tokenizer.json"))
        if name == "first":
            library.normalizer = None
            library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        else:
            library.normalizer = normalizers.NFC()
        library.save(str(path / name / "tokenizer.json"))
        made[name] = load_tokenizer(path / name)
    return made


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(question=TEXTS, answers=st.lists(TEXTS, min_size=1, max_size=2))
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["bytes", "json", "model", "not legacy", "first", "composed"])
def test_what_is_trained_is_the_answer_and_its_end(
    all_tokenizers: dict[str, Tokenizer], kind: str, name: str, question: str, answers: list[str]
) -> None:
    tokenizer = all_tokenizers[kind]
    if kind == "composed":  # its text is another then
        question, *answers = (unicodedata.normalize("NFC", text) for text in (question, *answers))
    if name in ("vicuna_v1.1", "scimind", "chat"):
        data = messages([turn for answer in answers for turn in (("user", question), ("assistant", answer))])
    else:
        answers = answers[:1]
        data = {"instruction": question, "output": answers[0]}
    example = example_of(name, tokenizer, data)
    eos = tokenizer.token(tokenizer.eos_id or 0)
    # The others have no such tokens: there the template's words are trained, and eos.
    end = eos if name != "chat" else "<|im_end|>" if kind in ("bytes", "composed") else f"<|im_end|>{eos}"
    lead = " " if name in ("vicuna_v1.1", "scimind") else ""  # trained with the first word of the answer
    runs = trained(example, tokenizer)
    assert len(example.ends) == (1 if name == "chat" and end.endswith(eos) else len(answers))
    text = "".join(runs)
    assert text.endswith(f"{lead}{answers[-1]}{end}")
    # A token across the border belongs to the answer; nothing else of the prompt is trained.
    middle = end.removesuffix(eos) or eos
    surplus = len(text) - sum(len(f"{lead}{answer}{middle}") for answer in answers)
    assert 0 <= surplus <= 8 * len(answers)
