"""The tokenizer of ChatGLM2-6B and ChatGLM3-6B: a SentencePiece model, and special tokens that stand in code only.

What their repositories say in tokenization_chatglm.py: behind the pieces [MASK] [gMASK] [sMASK] sop eop, and for
ChatGLM3 the marks of the four roles (whose rows ChatGLM2 has, unused); every text begins with [gMASK] sop; eos is the
model's own, pad its unk. `sop` and `eop` are called <sop> and <eop> here, as by GLM-4, so that a "sophist" is none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from jaxlm.tokenizer.backends import SentencePiece
from jaxlm.tokenizer.settings import AddedToken, Settings

CLASS = "ChatGLMTokenizer"
OPENING = ("[gMASK]", "<sop>")
ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
TOKENS = ("[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", *ROLES)
# Those that end an answer of ChatGLM3 besides eos: another one is to speak.
ENDS = ("<|user|>", "<|observation|>")

# Each message is a role, its metadata and "\n" as one text, and its content as another, in front of which the model
# puts a space: the one that stands here.
WITH_ROLES = (
    "[gMASK]<sop>{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' + (message['metadata'] or '') + '\n' -}}"
    "{{- ' ' + message['content'] if message['content'] else '' -}}"
    "{%- if message['role'] == 'system' and message['tools'] -%}"
    "{{- '\n' + message['tools'] | tojson(indent=4) -}}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
WITH_ROUNDS = (
    "[gMASK]<sop>{%- for message in messages -%}"
    "{%- if message['role'] == 'user' and loop.index0 % 2 == 0 -%}"
    "{{- '[Round ' + (loop.index0 // 2 + 1) | string + ']\n\n问：' + message['content'] + '\n\n答：' -}}"
    "{%- elif message['role'] == 'assistant' and loop.index0 % 2 == 1 -%}"
    "{{- message['content'] + ('' if loop.last else '\n\n') -}}"
    "{%- else -%}{{- raise_exception('user and assistant take turns, the user first; there is no system message') -}}"
    "{%- endif -%}{%- endfor -%}"
)


class ChatGLM(SentencePiece):
    """Reads the `tokenizer.model`; the special tokens count in a text where they are asked for, as SentencePiece's own.

    Args:
        path: the `tokenizer.model`.
        added: tokens that other files add; those at the ids of the special tokens are passed over.
    """

    closing: tuple[int, ...] | None = ()
    rule = "ChatGLM's rule"

    def __init__(self, path: Path, added: Sequence[AddedToken]) -> None:
        super().__init__(path, [], [], legacy=True)
        first = self.size
        own = {token: first + number for number, token in enumerate(TOKENS)}
        self.added = {token.content: token.id for token in added if token.id >= first + len(TOKENS)}
        self.control |= own
        self.names = {index: token for token, index in (own | self.added).items()}
        self.size = max(self.names) + 1
        self.special_ids |= {*own.values(), *(token.id for token in added if token.special)}
        self.opening = tuple(own[token] for token in OPENING)
        self.bos, self.pad = None, self.unk

    def id_of(self, token: str) -> int | None:
        return self.control[token] if token in self.control else super().id_of(token)


def chat_settings(settings: Settings, backend: ChatGLM) -> Settings:
    """The settings with the chat template of the model that tokenizer_config.json names, and what ends its answers.

    A template of its own is taken, with the names of the tokens that are used here.
    """
    template = settings.chat_template
    if template is not None:
        template = template.replace("[gMASK]sop", "".join(OPENING))
    else:
        named = settings.name.lower()
        template = WITH_ROLES if "chatglm3" in named else WITH_ROUNDS if "chatglm2" in named else None
    has_roles = template is not None and "<|" in template
    ends = tuple(backend.control[token] for token in ENDS) if has_roles else ()
    return dataclasses.replace(settings, chat_template=template, end_ids=(*settings.end_ids, *ends))
