"""Prompt bytes, roles, chat templates and the messages for unusable records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jaxlm.data.records import Record
from jaxlm.data.templates import Rendered, choose_template, load_template, template_names
from jaxlm.errors import UserError
from jaxlm.tokenizer import Tokenizer, load_tokenizer

BOTH = {"instruction": "Do {this}.", "input": "with\nthat", "output": "Done."}
ALONE = {"instruction": "Do {this}.", "input": "", "output": "Done."}
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)
WITHOUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)
I, N = "### Instruction:\nDo {this}.\n\n### Input:\nwith\nthat\n\n", "### Instruction:\nDo {this}.\n\n"
FRENCH = (
    "Ci-dessous se trouve une instruction qui décrit une tâche, associée à une entrée qui fournit un contexte "
    "supplémentaire. Écrivez une réponse qui complète correctement la demande.\n\n### Instruction:\nDo {this}.\n\n"
    "### Entrée:\nwith\nthat\n\n### Réponse:\n",
    "Ci-dessous se trouve une instruction qui décrit une tâche. Écrivez une réponse qui complète correctement la "
    "demande.\n\n### Instruction:\nDo {this}.\n\n### Réponse:\n",
)
SII = "instruction: Do {this}.If prediction is finished, add </s> at the end of the output., input: "
ONEKE = "[INST] <<SYS>>\nYou are a helpful assistant. 你是一个乐于助人的助手。\n<</SYS>>\n\n"
TASKS = {"smiles2text", "text2smiles"}  # in test_tasks.py
PROMPTS = {
    "alpaca": (f"{WITH_INPUT}{I}### Response:\n", f"{WITHOUT}{N}### Response:\n"),
    "alpaca_legacy": (f"{WITH_INPUT}{I}### Response:", f"{WITHOUT}{N}### Response:"),
    "knowlm_qlora": (f"{WITH_INPUT}{I}### Response: ", f"{WITHOUT}{N}### Response: "),
    "alpaca_short": (f"{I}### Response:\n", f"{N}### Response:\n"),
    "vigogne": FRENCH,
    "darwin": ("instruction: Do {this}., input: with\nthat", "instruction: Do {this}., input: "),
    "darwin_sii": (SII + "with\nthat", SII),
    "oneke": (f"{ONEKE}Do {{this}}.\nwith\nthat [/INST]", f"{ONEKE}Do {{this}}. [/INST]"),
}


def text_of(rendered: Rendered, trained: bool | None = None) -> str:
    spans = [span for segment in rendered.segments for span in segment.spans]
    return "".join(span.text for span in spans if trained is None or span.trained == trained)


@pytest.mark.parametrize("name", PROMPTS)
def test_prompt_templates_write_these_bytes(tokenizer: Tokenizer, name: str) -> None:
    template = load_template(name, tokenizer)
    for data, prompt in zip((BOTH, ALONE), PROMPTS[name], strict=True):
        record = Record("f:1", data)
        rendered = template.render(record)
        assert rendered.text("</s>") == prompt + "Done.</s>"
        assert text_of(rendered, trained=True) == "Done."
        assert template.render_prompt(record).text("</s>") == prompt
        assert template.render_prompt(Record("f:1", {**data, "output": None})).text() == prompt


def test_no_template_is_untested(tokenizer: Tokenizer) -> None:
    assert set(template_names()) == {*PROMPTS, *TASKS, "text", "chat", "vicuna_v1.1", "scimind"}


def test_absent_or_null_input_is_no_input(tokenizer: Tokenizer) -> None:
    template = load_template("alpaca", tokenizer)
    for data in ({"instruction": "Do {this}."}, {"instruction": "Do {this}.", "input": None}):
        assert template.render_prompt(Record("f:1", data)).text() == PROMPTS["alpaca"][1]


def test_the_answer_is_found_in_the_text(tokenizer: Tokenizer) -> None:
    template = load_template("alpaca", tokenizer)
    assert template.response(PROMPTS["alpaca"][0] + " Done. \n### Response: again") == "Done."
    with pytest.raises(UserError, match="does not contain '### Response:'"):
        template.response("nothing")
    assert load_template("darwin", tokenizer).response(" 1.2 \n") == "1.2"
    assert load_template("vicuna_v1.1", tokenizer).response("USER: q ASSISTANT: a") == "a"


VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. "
)
TURNS = [("human", "q1"), ("gpt", "a1"), ("human", "q2"), ("gpt", "a2")]
SHAREGPT = [{"from": role, "value": text} for role, text in TURNS]
OPENAI = [{"role": "user" if role == "human" else "assistant", "content": text} for role, text in TURNS]


@pytest.mark.parametrize(
    "data", [{"conversations": SHAREGPT}, {"messages": OPENAI}, {"conversation": SHAREGPT}], ids=lambda d: next(iter(d))
)
def test_conversation_templates_write_these_bytes(tokenizer: Tokenizer, data: dict[str, Any]) -> None:
    record = Record("f:1", data)
    vicuna, scimind = load_template("vicuna_v1.1", tokenizer), load_template("scimind", tokenizer)
    rendered = vicuna.render(record)
    assert rendered.text("</s>") == VICUNA + "USER: q1 ASSISTANT: a1</s>USER: q2 ASSISTANT: a2</s>"
    assert text_of(rendered, trained=True) == " a1 a2"
    assert vicuna.render_prompt(record).text("</s>") == VICUNA + "USER: q1 ASSISTANT: a1</s>USER: q2 ASSISTANT:"
    assert scimind.render(record).text("</s>") == " [INST]: q1 [/INST]: a1</s>[INST]: q2 [/INST]: a2</s>"
    one = Record("f:1", {"conversation": SHAREGPT[:2]})
    assert scimind.render(one).text("</s>") == " [INST]: q1 [/INST]: a1</s>"
    assert scimind.render_prompt(one).text("</s>") == " [INST]: q1 [/INST]:"


def test_conversation_from_alpaca_columns_and_system_text(tokenizer: Tokenizer) -> None:
    vicuna = load_template("vicuna_v1.1", tokenizer)
    assert vicuna.render(Record("f:1", BOTH)).text("$") == VICUNA + "USER: Do {this}.\n\nwith\nthat ASSISTANT: Done.$"
    messages = [{"role": "system", "content": "Be brief."}, *OPENAI[:2]]
    assert vicuna.render(Record("f:1", {"messages": messages})).text("$") == "Be brief. USER: q1 ASSISTANT: a1$"


def test_auto_goes_by_the_columns(tokenizer: Tokenizer, chat_tokenizer: Tokenizer) -> None:
    def chosen(data: dict[str, Any], chat: bool = False, **columns: str) -> str:
        return choose_template(Record("f:1", data), chat_tokenizer if chat else tokenizer, columns)

    assert chosen({"text": ""}) == "text"
    assert chosen(BOTH, chat=True) == "alpaca"
    assert chosen({"messages": []}, chat=True) == chosen({"conversations": []}, chat=True) == "chat"
    assert chosen({"messages": []}) == chosen({"conversations": []}) == "vicuna_v1.1"
    assert chosen({"conversation": []}, chat=True) == "scimind"
    assert chosen({"question": ""}, instruction="question") == "alpaca"
    with pytest.raises(UserError, match="f:1: no template goes by itself with the columns question, answer; set templ"):
        chosen({"question": "", "answer": ""})


def test_columns_may_be_renamed(tokenizer: Tokenizer) -> None:
    columns = {"instruction": "question", "output": "answer"}
    template = load_template("alpaca_short", tokenizer, columns)
    record = Record("f:1", {"question": "q", "answer": 3.5})
    assert template.render(record).text() == "### Instruction:\nq\n\n### Response:\n3.5"
    with pytest.raises(UserError, match=r"f:7 has no column 'answer', .* alpaca_short needs; columns found: question"):
        template.render(Record("f:7", {"question": "q"}))
    with pytest.raises(UserError, match=r"columns: \{instruction: NAME\}"):
        load_template("alpaca", tokenizer).render(Record("f:7", {"question": "q"}))
    with pytest.raises(UserError, match="has a list in column 'answer'"):
        template.render(Record("f:7", {"question": "q", "answer": ["a"]}))
    with pytest.raises(UserError, match="has no column 'context'"):
        load_template("alpaca", tokenizer, {"input": "context"}).render(Record("f:7", BOTH))
    with pytest.raises(UserError, match="columns names the field 'prompt'"):
        load_template("alpaca", tokenizer, {"prompt": "question"})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (BOTH | {"instruction": None}, "its column 'instruction' is null"),
        ({"input": "x", "output": "y"}, "needs a list of messages"),
        ({"messages": []}, "its column 'messages' is empty, so there is nothing to learn"),
        ({"messages": None}, "its column 'messages' is null, so there is nothing to learn"),
        ({"messages": "hi"}, "its column 'messages' must be a list of messages, .*found 'hi'"),
        ({"messages": "[{'role': 'user'}]"}, "its column 'messages' must be a list of messages, .*JSON text"),
        ({"messages": {"role": "user"}}, "its column 'messages' must be a list of messages"),
        ({"text": "hi"}, "needs a list of messages in one of the columns messages, .*columns found: text"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "message 1 must have a role .* found role 'tool'"),
        ({"messages": [{"role": "user", "content": None}]}, "content of type NoneType"),
        ({"messages": ["hi"]}, "message 1 must have a role"),
        ({"messages": OPENAI[:1]}, "has no message of the assistant"),
        ({"messages": OPENAI[1:3]}, "take turns, but the role of message 1 is assistant"),
    ],
)
def test_bad_conversations_are_refused(tokenizer: Tokenizer, data: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"f:3.*{message}"):
        load_template("vicuna_v1.1", tokenizer).render(Record("f:3", data))


def test_half_a_character_is_refused(tokenizer: Tokenizer) -> None:
    data = json.loads('{"text": "granite \\ud83d", "messages": [{"role": "user", "content": "\\ud83d"}]}')
    for template in ("text", "vicuna_v1.1"):
        with pytest.raises(UserError, match="f:9 holds an incomplete Unicode character"):
            load_template(template, tokenizer).render(Record("f:9", data))


def test_template_files_of_ones_own_are_read_and_checked(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"

    def load(content: Any) -> Any:
        file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return load_template(str(file), tokenizer)

    good = {"prompt_input": "{instruction}|{input}{{}}>", "prompt_no_input": "{instruction}>", "response_split": ">"}
    assert load(good | {"description": "mine"}).render(Record("f:1", BOTH)).text() == "Do {this}.|with\nthat{}>Done."
    with pytest.raises(UserError, match="not valid JSON"):
        load("{")
    with pytest.raises(UserError, match="has the keys prompt_input; it must have either"):
        load({"prompt_input": "{instruction}"})
    with pytest.raises(UserError, match="has the keys none"):
        load([1])
    with pytest.raises(UserError, match="prompt_input may contain"):
        load(good | {"prompt_input": "{question}"})
    with pytest.raises(UserError, match="prompt_no_input may contain"):
        load(good | {"prompt_no_input": "{instruction} {"})
    with pytest.raises(UserError, match="prompt_input must contain"):
        load(good | {"prompt_input": "{instruction}"})
    with pytest.raises(UserError, match="template 'alpacca' is unknown; choose alpaca, alpaca_legacy"):
        load_template("alpacca", tokenizer)
    with pytest.raises(UserError, match="is unknown"):
        load_template(str(tmp_path / "none.json"), tokenizer)
    with pytest.raises(UserError, match="has no chat template; choose another"):
        load_template("chat", tokenizer)


def with_chat_template(original: Tokenizer, directory: Path, source: str) -> Tokenizer:
    original.save(directory)
    (directory / "chat_template.jinja").write_text(source)
    return load_tokenizer(directory)


def test_chat_is_the_tokenizers_template(chat_tokenizer: Tokenizer) -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "a"},  # also found in "assistant"
        {"role": "user", "content": "end"},
        {"role": "assistant", "content": " end \n"},  # the template trims
    ]
    rendered = load_template("chat", chat_tokenizer).render(Record("f:1", {"messages": messages}))
    head = "<|start|>assistant<|end|>\n\n"
    user = "<|start|>user<|end|>\n\n"
    assert rendered.text("EOS") == f"<|begin|>{user}a<|eot_id|>{head}a<|eot_id|>{user}end<|eot_id|>{head}end<|eot_id|>"
    spans = [(span.text, span.trained) for span in rendered.segments[0].spans]
    assert spans[1:3] == [("a", True), ("<|eot_id|>", True)]
    assert text_of(rendered, trained=True) == "a<|eot_id|>end<|eot_id|>"
    assert rendered.has_bos
    prompt = load_template("chat", chat_tokenizer).render_prompt(Record("f:1", {"messages": messages}))
    assert prompt.text() == f"<|begin|>{user}a<|eot_id|>{head}a<|eot_id|>{user}end<|eot_id|>{head}"


def test_generation_blocks_say_what_is_trained(chat_tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'user' %}Q{{ m.content }}{% else %}"
        "{% generation %}<think>{{ m.content | upper }}{% endgeneration %} <|eot_id|>{% endif %}{% endfor %}"
    )
    tokenizer = with_chat_template(chat_tokenizer, tmp_path, source)
    rendered = load_template("chat", tokenizer).render(Record("f:1", {"messages": OPENAI}))
    assert rendered.text("EOS") == "Qq1<think>A1 <|eot_id|>Qq2<think>A2 <|eot_id|>"
    assert text_of(rendered, trained=True) == "<think>A1 <|eot_id|><think>A2 <|eot_id|>"


def test_a_chat_without_an_end_of_turn_ends_with_eos(chat_tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer = with_chat_template(chat_tokenizer, tmp_path, "{% for m in messages %}{{ m.content }}\n{% endfor %}")
    rendered = load_template("chat", tokenizer).render(Record("f:1", {"messages": OPENAI[:2]}))
    assert rendered.text("EOS") == "q1\na1\nEOS"


def test_a_chat_template_that_cuts_answers_is_refused(chat_tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer = with_chat_template(chat_tokenizer, tmp_path, "{% for m in messages %}{{ m.content|upper }}{% endfor %}")
    assert load_template("chat", tokenizer).render(Record("f:1", {"messages": OPENAI}))  # upper() keeps the marks
    tokenizer = with_chat_template(chat_tokenizer, tmp_path, "{{ messages[0].content }}{{ messages[1].content[:1] }}")
    with pytest.raises(UserError, match=r"f:4: the chat template .* changes or leaves out what the assistant"):
        load_template("chat", tokenizer).render(Record("f:4", {"messages": OPENAI}))
    with pytest.raises(UserError, match="noncharacter"):
        load_template("chat", tokenizer).render(
            Record("f:4", {"messages": [OPENAI[0], {"role": "assistant", "content": "\ufdd0"}]})
        )
