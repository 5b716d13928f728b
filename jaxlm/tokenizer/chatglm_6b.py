"""The tokenizer of ChatGLM-6B, ice_text.model: a SentencePiece model, with white space spelled in tokens of its own.

What its repository says in tokenization_chatglm.py: a line break is <n>, a tab <|tab|>, 2 to 80 spaces are
<|blank_2|> … <|blank_80|>; ids begin behind those of the image tokens, 20,000 in its first files and none in later
ones; [gMASK] <sop> stand behind a prompt and in front of its answer, <eop> ends it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxlm.errors import UserError
from jaxlm.jsontext import read_object
from jaxlm.tokenizer.backends import Encoding, Offsets, SentencePiece, as_arrays, read_sentencepiece
from jaxlm.tokenizer.segments import Ids
from jaxlm.tokenizer.settings import AddedToken, Settings

FILE = "ice_text.model"
CLASSES = ("ChatGLMTokenizer", "")
IMAGE_TOKENS = 20_000  # where tokenizer_config.json does not say
OPENING = ("[gMASK]", "<sop>")
TOKENS = ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")
MOST_BLANKS = 80
BLANKS = tuple(f"<|blank_{count}|>" for count in range(2, MOST_BLANKS + 1))
# What the settings of its first revisions call <sop> and <eop>; `eos` and `</s>` stood for the end of a document.
_OLD_ROLES = {"bos_token": ("sop",), "eos_token": ("eop", "eos", "</s>")}

# One question stands by itself; rounds are counted, from 0, as soon as there are two. Only the last answer is one that
# the model wrote behind [gMASK] <sop>: the others are part of its prompt.
WITH_ROUNDS_FROM_0 = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' and loop.index0 % 2 == 0 -%}"
    "{{- '[Round ' + (loop.index0 // 2) | string + ']\n问：' if messages | length > 2 else '' -}}"
    "{{- message['content'] -}}{{- '\n答：' if messages | length > 2 else '' -}}"
    "{%- elif message['role'] == 'assistant' and loop.index0 % 2 == 1 -%}"
    "{%- if loop.last -%}"
    "{{- '[gMASK]<sop>' -}}{%- generation -%}{{- message['content'] + '<eop>' -}}{%- endgeneration -%}"
    "{%- else -%}{{- message['content'] + '\n' -}}{%- endif -%}"
    "{%- else -%}{{- raise_exception('user and assistant take turns, the user first; there is no system message') -}}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '[gMASK]<sop>' -}}{%- endif -%}"
)


class IceText:
    """Reads the `ice_text.model`; a `Backend`.

    Args:
        path: the ice_text.model.
        added: tokens that settings files add.
        settings: what they say.

    Raises:
        UserError: they name another class of tokenizer, or ask for something that this one does not do.
    """

    closing: tuple[int, ...] | None = ()
    opens_answers = True
    rule = "ChatGLM-6B's rule"

    def __init__(self, path: Path, added: Sequence[AddedToken], settings: Settings) -> None:
        if settings.tokenizer_class not in CLASSES:
            raise UserError(
                f"{path}: tokenizer_class is {settings.tokenizer_class!r}; an {FILE} is read as {CLASSES[0]}'s alone"
            )
        self._first = _image_tokens(path.parent)
        moved = [dataclasses.replace(token, id=token.id - self._first) for token in added]
        self._text = _Pieces(path, moved, [*TOKENS, *settings.special], legacy=True)
        text = self._text
        self.size = self._first + text.size
        self.special_ids = frozenset(index + self._first for index in text.special_ids)
        opening = [self.id_of(token) for token in (*OPENING, "<eop>")]
        if None in opening:
            raise UserError(f"{path}: has no {' or '.join((*OPENING, '<eop>'))}; copy the file of ChatGLM-6B again")
        *front, self.eos = (index for index in opening if index is not None)
        self.opening: tuple[int, ...] | None = tuple(front)
        self.bos = front[-1]
        self.unk = None if text.unk is None else text.unk + self._first
        self.pad = self.id_of("<pad>")

    def encode(
        self, texts: Sequence[str], special_tokens: bool | None, continued: Sequence[bool] | None
    ) -> list[Encoding]:
        spelled = [_spell(text) for text in texts]
        encoded = self._text.encode([text for text, _, _ in spelled], special_tokens, continued)
        return [
            Encoding([index + self._first for index in item.ids], _places(item.offsets, begins, ends))
            for item, (_, begins, ends) in zip(encoded, spelled, strict=True)
        ]

    def encode_arrays(
        self,
        texts: Sequence[str],
        special_tokens: bool | None,
        continued: Sequence[bool] | None,
        with_offsets: Sequence[bool],
    ) -> list[Ids]:
        return as_arrays(self.encode(texts, special_tokens, continued))

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        # Image tokens stand for no text.
        text = self._text.decode([index - self._first for index in ids if index >= self._first], skip_special)
        return _SPELLED.sub(_white_space, text)

    def token(self, index: int) -> str:
        return self._text.token(index - self._first) if index >= self._first else f"<image_{index}>"

    def id_of(self, token: str) -> int | None:
        if image := re.fullmatch(r"<image_(\d+)>", token):
            return int(image[1]) if int(image[1]) < self._first else None
        index = self._text.id_of(token)
        return None if index is None else index + self._first


class _Pieces(SentencePiece):
    """The pieces of the file; of its first revision also those that the code put behind them."""

    def read(self, path: Path) -> Any:
        model = read_sentencepiece(path)
        if model.id_to_piece(model.piece_to_id(OPENING[0])) == OPENING[0]:
            return model
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2 as messages

        proto: Any = messages.ModelProto()  # type: ignore[attr-defined]
        proto.ParseFromString(model.serialized_model_proto())
        kind = messages.ModelProto.SentencePiece  # type: ignore[attr-defined]
        known = {piece.piece for piece in proto.pieces}
        byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
        for names, of_kind in (
            (TOKENS, kind.CONTROL),
            (("<|tab|>", *BLANKS), kind.USER_DEFINED),
            (byte_pieces, kind.BYTE),
        ):
            proto.pieces.extend(kind(piece=name, score=0.0, type=of_kind) for name in names if name not in known)
        proto.trainer_spec.byte_fallback = True
        return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


def first_chat_settings(settings: Settings) -> Settings:
    """The settings with the chat template of ChatGLM-6B where they have none, and its names of <sop> and <eop>."""
    roles = dict(settings.roles)
    for role, token in (("bos_token", "<sop>"), ("eos_token", "<eop>")):
        if roles.get(role) in _OLD_ROLES[role]:
            roles[role] = token
    template = settings.chat_template or WITH_ROUNDS_FROM_0
    return dataclasses.replace(settings, roles=roles, chat_template=template)


def _image_tokens(directory: Path) -> int:
    """The number of ids in front of the pieces."""
    file = directory / "tokenizer_config.json"
    said = read_object(file) if file.is_file() else {}
    for key in ("do_lower_case", "remove_space"):
        if said.get(key):
            raise UserError(f"{file}: {key} is {said[key]!r}; only false is read of ChatGLM-6B's tokenizer")
    count = said.get("num_image_tokens", IMAGE_TOKENS)
    if type(count) is not int or count < 0:
        raise UserError(f"{file}: num_image_tokens is {count!r}; expected a number of tokens, 0 or {IMAGE_TOKENS}")
    return count


_WHITE_SPACE = re.compile(rf"\n|\t| {{2,{MOST_BLANKS}}}")
_SPELLED = re.compile(rf"<n>|<\|tab\|>|{'|'.join(map(re.escape, BLANKS))}")
_NAMES = {"\n": "<n>", "\t": "<|tab|>"} | {" " * count: blank for count, blank in enumerate(BLANKS, 2)}
_MEANINGS = {name: space for space, name in _NAMES.items()}


def _white_space(match: re.Match[str]) -> str:
    return _MEANINGS[match.group()]


def _spell(text: str) -> tuple[str, list[int], list[int]]:
    """A text with its white space spelled, and where each character of the result begins and ends in the text."""
    parts: list[str] = []
    begins: list[int] = []
    ends: list[int] = []
    at = 0
    for match in [*_WHITE_SPACE.finditer(text), None]:
        start, stop = (len(text), len(text)) if match is None else match.span()
        parts.append(text[at:start])
        begins += range(at, start)
        ends += range(at + 1, start + 1)
        if match is not None:
            name = _NAMES[match.group()]
            parts.append(name)
            begins += [start] * len(name)
            ends += [stop] * len(name)
        at = stop
    return "".join(parts), begins, ends


def _places(offsets: Offsets, begins: Sequence[int], ends: Sequence[int]) -> Offsets:
    """Places in the spelled text as those in the text."""
    total = ends[-1] if ends else 0
    return [
        (begins[begin], ends[end - 1]) if begin < end else (begins[begin] if begin < len(begins) else total,) * 2
        for begin, end in offsets
    ]
