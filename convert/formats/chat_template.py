"""A prompt template of jaxlm as the Jinja chat template that everybody else asks with, and the ids that end an answer.

Conversations become what they are. A prompt template (Alpaca's and its kin) is one question: its instruction is the
user's message, its input an optional key `input` beside the message's content. What such a model was never trained on
(a second question, a system message) is refused by the template, as jaxlm refuses it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

from jaxlm.data.templates import ConversationTemplate, PromptTemplate, Template, for_questions, load_template
from jaxlm.errors import UserError
from jaxlm.jsontext import read_object
from jaxlm.tokenizer import Tokenizer, load_tokenizer, main_file
from jaxlm.weights.leaves import LeafSource
from jaxlm.weights.native.prompt_json import read_prompt_json

FILE = "chat_template.jinja"
_GENERATION, _SETTINGS = "generation_config.json", "tokenizer_config.json"


@dataclass(frozen=True)
class TrainedTemplate:
    """The template that a model was trained with.

    Args:
        name: the template's, or the user's own file.
        jinja: the chat template; None where there is none to write, or it cannot be expressed.
        own: the template is the chat template that the tokenizer has already.
        stops: ids that end an answer.
        lacks: why there is no chat template to write, where there is none.
        template: what is rendered, where it is not the tokenizer's own.
    """

    name: str
    jinja: str | None
    own: bool
    stops: tuple[int, ...]
    lacks: str = "it has no form as a chat template"
    template: Template | None = None


def find_trained_template(source: LeafSource) -> TrainedTemplate | None:
    """What a model or adapter records of it; None when it records nothing.

    Raises:
        UserError: prompt.json cannot be read, or the template file that it names is not a template.
    """
    files = {file.name: file for file in source.prompt_files}
    if "prompt.json" not in files:
        return None
    prompt = read_prompt_json(files["prompt.json"])
    if prompt.template is None:
        return None
    name = str(files.get(prompt.template, prompt.template))  # a user's own lies beside it
    directory = getattr(source, "tokenizer_dir", None)
    if main_file([file.name for file in source.tokenizer_files]) is None:
        return TrainedTemplate(name, None, False, (), "there is no tokenizer beside the model")
    tokenizer = load_tokenizer(directory or source.tokenizer_files[0].parent)
    ends = [index for index in (tokenizer.eos_id, *prompt.stop_ids) if index is not None]
    stops = tuple(dict.fromkeys(ends))
    if name == "chat":
        return TrainedTemplate(name, None, True, stops)
    template = for_questions(load_template(name, tokenizer))
    add_bos = tokenizer.adds_bos if prompt.add_bos is None else prompt.add_bos
    return TrainedTemplate(name, to_jinja(template, tokenizer, add_bos), False, stops, template=template)


def to_jinja(template: Template, tokenizer: Tokenizer, add_bos: bool) -> str | None:
    """The chat template; None for a template that has no messages (text, chat), or that Jinja's few means cannot say,
    or that speaks to a tokenizer whose opening stands in front of an answer.

    Args:
        tokenizer: whose bos and eos are written.
        add_bos: bos comes first.
    """
    if tokenizer.opens_answers:
        return None
    bos = _token(tokenizer, tokenizer.bos_id) if add_bos else None
    eos = _token(tokenizer, tokenizer.eos_id)
    if isinstance(template, ConversationTemplate):
        return _conversation(template, bos, eos)
    if isinstance(template, PromptTemplate):
        return _prompt(template, bos, eos)
    return None


def _conversation(template: ConversationTemplate, bos: str | None, eos: str | None) -> str:
    separator, asked = _text(template.separator), _text(f"{template.assistant}:")
    return "".join(
        [
            f"{{{{- {bos} -}}}}" if bos else "",
            "{%- if messages and messages[0]['role'] == 'system' -%}",
            "{%- set system = messages[0]['content'] -%}{%- set turns = messages[1:] -%}",
            f"{{%- else -%}}{{%- set system = {_text(template.system)} -%}}",
            "{%- set turns = messages -%}{%- endif -%}",
            f"{{{{- system + {separator} -}}}}",
            "{%- for message in turns -%}",
            "{%- if message['role'] == 'user' and loop.index0 % 2 == 0 -%}",
            f"{{{{- {_text(f'{template.user}: ')} + message['content'] + {separator} -}}}}",
            "{%- elif message['role'] == 'assistant' and loop.index0 % 2 == 1 -%}",
            f"{{{{- {asked} + ' ' + message['content']{f' + {eos}' if eos else ''} -}}}}",
            "{%- else -%}{{- raise_exception('user and assistant take turns, the user first') -}}{%- endif -%}",
            "{%- endfor -%}",
            f"{{%- if add_generation_prompt -%}}{{{{- {asked} -}}}}{{%- endif -%}}",
        ]
    )


def _prompt(template: PromptTemplate, bos: str | None, eos: str | None) -> str | None:
    forms = [_form(text) for text in (template.prompt_input, template.prompt_no_input)]
    if None in forms:
        return None
    return "".join(
        [
            "{%- if not messages or messages[0]['role'] != 'user' or messages | length > 2 or "
            "(messages | length == 2 and messages[1]['role'] != 'assistant') -%}"
            "{{- raise_exception('this model was trained on single questions: one message of the user, no system "
            "message') -}}{%- endif -%}",
            f"{{{{- {bos} -}}}}" if bos else "",
            "{%- set instruction = messages[0]['content'] -%}{%- set input = messages[0]['input'] -%}",
            f"{{%- if input -%}}{{{{- {forms[0]} -}}}}{{%- else -%}}{{{{- {forms[1]} -}}}}{{%- endif -%}}",
            "{%- if messages | length == 2 -%}"
            f"{{{{- messages[1]['content']{f' + {eos}' if eos else ''} -}}}}{{%- endif -%}}",
        ]
    )


def _form(text: str) -> str | None:
    """A text with {instruction} and {input} as a sum in Jinja; None for anything more than these names."""
    parts = []
    for literal, name, form, conversion in Formatter().parse(text):
        if literal:
            parts.append(_text(literal))
        if name is not None:
            if name not in ("instruction", "input") or form or conversion:
                return None
            parts.append(name)
    return " + ".join(parts) or "''"


def _text(text: str) -> str:
    """A text as a literal of Jinja, which knows the escapes of JSON."""
    return json.dumps(text, ensure_ascii=False)


def _token(tokenizer: Tokenizer, index: int | None) -> str | None:
    return None if index is None else _text(tokenizer.token(index))


def write_chat_template(template: TrainedTemplate, directory: Path) -> None:
    """Writes the chat template and the ids that end an answer into a Hugging Face or PEFT directory.

    The tokenizer's settings get the template too, for transformers before 4.43.
    """
    settings = directory / _SETTINGS
    if template.jinja is not None:
        (directory / FILE).write_text(template.jinja, encoding="utf-8")
        if settings.is_file():
            _update(settings, {"chat_template": template.jinja})
        if (directory / "chat_template.json").is_file():
            _update(directory / "chat_template.json", {"chat_template": template.jinja})
    generation = directory / _GENERATION
    if template.stops and ((directory / "config.json").is_file() or generation.is_file()):
        known = read_object(generation) if generation.is_file() else {}
        config = read_object(directory / "config.json") if (directory / "config.json").is_file() else {}
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if known.get(key) is None and config.get(key) is not None:
                known[key] = config[key]
        before = known.get("eos_token_id")
        ids = [*template.stops, *(before if isinstance(before, list) else [before])]
        unique = list(dict.fromkeys(index for index in ids if index is not None))
        known["eos_token_id"] = unique[0] if len(unique) == 1 else unique
        generation.write_text(json.dumps(known, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _update(file: Path, values: dict[str, Any]) -> None:
    content = json.dumps(read_object(file) | values, indent=2, ensure_ascii=False) + "\n"
    file.write_text(content, encoding="utf-8")


def trained_template_or_name(source: LeafSource) -> TrainedTemplate | None:
    """`find_trained_template`; where tokenizer or template cannot be loaded, only the recorded name, and why."""
    try:
        return find_trained_template(source)
    except UserError as error:
        files = {file.name: file for file in source.prompt_files}
        prompt = read_prompt_json(files["prompt.json"])
        assert prompt.template is not None
        return TrainedTemplate(str(files.get(prompt.template, prompt.template)), None, False, (), str(error))
