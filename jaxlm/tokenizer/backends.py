"""The libraries that split texts into tokens, behind one protocol. They are imported when a tokenizer is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxlm.errors import UserError
from jaxlm.jsontext import read_object, read_value
from jaxlm.tokenizer.segments import SPACE, Ids, Segments, cutting_pattern
from jaxlm.tokenizer.settings import AddedToken

Offsets = list[tuple[int, int]]


@dataclass(frozen=True)
class Encoding:
    """Tokens of a text.

    Args:
        ids: token ids, without bos and eos.
        offsets: for each token the characters [begin, end) of the text that it stands for. A space that SentencePiece
            puts in front of the text stands for none. Every byte of a character spelled in bytes has that character.
    """

    ids: list[int]
    offsets: Offsets


class Backend(Protocol):
    """What splits texts and writes them out.

    Attributes:
        size: largest id + 1.
        special_ids: ids that decode(skip_special=True) leaves out.
        opening, closing: ids that its own rule puts in front of a text and behind it; None: it has no such rule.
        opens_answers: `opening` stands between a prompt and its answer, not in front of the prompt.
        rule: what that rule is called.
    """

    size: int
    special_ids: frozenset[int]
    opening: tuple[int, ...] | None
    closing: tuple[int, ...] | None
    opens_answers: bool
    rule: str

    def encode(
        self, texts: Sequence[str], special_tokens: bool | None, continued: Sequence[bool] | None
    ) -> list[Encoding]: ...
    def encode_arrays(
        self,
        texts: Sequence[str],
        special_tokens: bool | None,
        continued: Sequence[bool] | None,
        with_offsets: Sequence[bool],
    ) -> list[Ids]: ...
    def decode(self, ids: Sequence[int], skip_special: bool) -> str: ...
    def token(self, index: int) -> str: ...
    def id_of(self, token: str) -> int | None: ...


class SentencePiece:
    """SentencePiece's own library, plus added tokens that stand beside the model file.

    Args:
        path: the `.model` file.
        added: tokens beyond the file, or other names for pieces in it.
        special: tokens that play a role.
        legacy: SentencePiece puts its space also in front of what follows a special token; false: only where a text
            begins, as Hugging Face's LlamaTokenizer does with `legacy: false`.
    """

    opening: tuple[int, ...] | None = None
    closing: tuple[int, ...] | None = None
    opens_answers = False
    rule = "LLaMA's rule for a SentencePiece model"

    def __init__(self, path: Path, added: Sequence[AddedToken], special: Sequence[str], legacy: bool) -> None:
        self.model = self.read(path)
        trained = self.model.vocab_size()
        self.added = {
            token.content: token.id
            for token in added
            if token.id >= trained or self.model.id_to_piece(token.id) != token.content
        }
        self.names = {index: content for content, index in self.added.items()}
        self.size = max([trained, *(index + 1 for index in self.names)])
        self.control = {
            self.model.id_to_piece(i): i for i in range(trained) if self.model.is_control(i) or self.model.is_unknown(i)
        }
        # Ordinary pieces among them are known by the role they play.
        roles = {token: index for token in special if (index := self.id_of(token)) is not None}
        self.control |= {token: index for token, index in roles.items() if token not in self.added}
        self.special_ids = frozenset(self.control.values()) | {t.id for t in added if t.special} | {*roles.values()}
        self.bos, self.eos, self.unk = (
            index if index >= 0 else None for index in (self.model.bos_id(), self.model.eos_id(), self.model.unk_id())
        )
        self._legacy = legacy
        self._continuing = self.model if legacy else _without_prefix(self.model)
        self._segments = _sentencepiece_segments(self.model)

    def read(self, path: Path) -> Any:
        """The SentencePieceProcessor of the file."""
        return read_sentencepiece(path)

    def encode(
        self, texts: Sequence[str], special_tokens: bool | None, continued: Sequence[bool] | None
    ) -> list[Encoding]:
        names = {**self.added, **self.control} if special_tokens else self.added
        pattern = _any_of(names)
        fragments: list[tuple[int, int, str]] = []  # (text number, first character, fragment)
        specials: list[tuple[int, int, str]] = []
        first: list[bool] = []  # whether a text begins with this fragment
        for number, text in enumerate(texts):
            last = 0
            begins = continued is None or not continued[number]
            for match in pattern.finditer(text):
                fragments.append((number, last, text[last : match.start()]))
                first.append(begins and last == 0)
                specials.append((number, match.start(), match.group()))
                last = match.end()
            fragments.append((number, last, text[last:]))
            first.append(begins and last == 0)
        pieces: list[list[tuple[int, list[int], Offsets]]] = [[] for _ in texts]
        for (number, begin, _), item in zip(fragments, self._encode_plain(fragments, first), strict=True):
            encoding = _encoding(self.model, item)
            pieces[number].append((begin, encoding.ids, [(a + begin, b + begin) for a, b in encoding.offsets]))
        for number, begin, name in specials:
            pieces[number].append((begin, [names[name]], [(begin, begin + len(name))]))
        result = []
        for parts in pieces:
            # An empty fragment may share its place with the special token behind it: it has no ids, so order is free.
            parts.sort(key=lambda part: part[0])
            result.append(Encoding([i for p in parts for i in p[1]], [o for p in parts for o in p[2]]))
        return result

    def encode_arrays(
        self,
        texts: Sequence[str],
        special_tokens: bool | None,
        continued: Sequence[bool] | None,
        with_offsets: Sequence[bool],
    ) -> list[Ids]:
        """As `encode`, by the table of segments where the model has one."""
        if self._segments is None:
            return as_arrays(self.encode(texts, special_tokens, continued))
        names = {**self.added, **self.control} if special_tokens else self.added
        pattern = _any_of(names)
        result = []
        for number, text in enumerate(texts):
            begins = continued is None or not continued[number]
            parts: list[Ids] = []
            last = 0
            for match in pattern.finditer(text) if names else ():
                parts.append(self._fragment(text, last, match.start(), begins, with_offsets[number]))
                place = np.array(match.span(), np.int64)
                parts.append(Ids(np.array([names[match.group()]], np.int32), place[:1], place[1:]))
                last = match.end()
            parts.append(self._fragment(text, last, len(text), begins, with_offsets[number]))
            result.append(parts[0] if len(parts) == 1 else _in_a_row(parts))
        return result

    def _fragment(self, text: str, begin: int, end: int, begins: bool, with_offsets: bool) -> Ids:
        """What stands between two special tokens, by the table of segments."""
        assert self._segments is not None
        prefix = " " if end > begin and (self._legacy or (begins and begin == 0)) else ""
        ids = self._segments.encode(prefix + text[begin:end], bool(prefix), with_offsets)
        if begin == 0 or ids.begin is None or ids.end is None:
            return ids
        return Ids(ids.ids, ids.begin + begin, ids.end + begin)

    def _encode_plain(self, fragments: Sequence[tuple[int, int, str]], first: Sequence[bool]) -> list[Any]:
        result: list[Any] = [None] * len(fragments)
        for model, beginning in ((self.model, True), (self._continuing, False)):
            chosen = [k for k, value in enumerate(first) if value == beginning]
            encoded = model.encode([fragments[k][2] for k in chosen], return_type="offset_mapping") if chosen else []
            for k, item in zip(chosen, encoded, strict=True):
                result[k] = item
        return result

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        # Runs of ordinary pieces are decoded by SentencePiece; special and added tokens are written out between them.
        parts: list[str] = []
        run: list[int] = []
        begins = True  # what comes now begins the text: its first space is the one that SentencePiece put there

        def flush() -> None:
            if run:
                parts.append((self.model if begins else self._continuing).decode(run))
                run.clear()

        for index in ids:
            if index in self.special_ids or index in self.names:
                if run:
                    flush()
                    begins = self._legacy
                elif index != self.bos:
                    begins = self._legacy
                if not (skip_special and index in self.special_ids):
                    parts.append(self.token(index))
            else:
                run.append(index)
        flush()
        return "".join(parts)

    def token(self, index: int) -> str:
        return self.names[index] if index in self.names else str(self.model.id_to_piece(index))

    def id_of(self, token: str) -> int | None:
        if token in self.added:
            return self.added[token]
        index = int(self.model.piece_to_id(token))
        return index if self.model.id_to_piece(index) == token else None


def _encoding(model: Any, encoded: Mapping[str, Any]) -> Encoding:
    """What SentencePiece gives as "offset_mapping"."""
    ids, offsets = list(encoded["ids"]), list(encoded["offsets"])
    # Bytes of one character come as (n, n) … (n, n + 1): give each of them the whole character.
    for k in range(len(ids) - 2, -1, -1):
        begin, end = offsets[k]
        if begin == end == offsets[k + 1][0] and model.is_byte(ids[k]):
            offsets[k] = offsets[k + 1]
    return Encoding(ids, offsets)


@dataclass(frozen=True)
class _PlainSentencePiece:
    """Segments' tokens by SentencePiece."""

    model: Any

    def ids(self, segments: Sequence[str]) -> list[list[int]]:
        result: list[list[int]] = self.model.encode(list(segments), num_threads=1)
        return result

    def offsets(self, segments: Sequence[str]) -> list[Offsets]:
        encoded = self.model.encode(list(segments), return_type="offset_mapping", num_threads=1)
        return [_encoding(self.model, each).offsets for each in encoded]


@dataclass(frozen=True)
class _PlainFast:
    """Segments' tokens by the model of a tokenizer.json alone."""

    model: Any

    def ids(self, segments: Sequence[str]) -> list[list[int]]:
        return [each.ids for each in self.model.encode_batch_fast(_written(segments), add_special_tokens=False)]

    def offsets(self, segments: Sequence[str]) -> list[Offsets]:
        return [each.offsets for each in self.model.encode_batch(_written(segments), add_special_tokens=False)]


def _written(segments: Sequence[str]) -> list[str]:
    return [segment.replace(" ", SPACE) for segment in segments]


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    """What matches any of the names: longest first, so that a token which begins another does not win."""
    return re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) or r"(?!)")


def _in_a_row(parts: Sequence[Ids]) -> Ids:
    """One text's tokens; with offsets where all parts have them."""
    ids = np.concatenate([part.ids for part in parts])
    begins = [part.begin for part in parts if part.begin is not None]
    ends = [part.end for part in parts if part.end is not None]
    if len(begins) < len(parts):
        return Ids(ids)
    return Ids(ids, np.concatenate(begins), np.concatenate(ends))


def as_arrays(encodings: Sequence[Encoding]) -> list[Ids]:
    """Encodings as arrays, their offsets too."""
    result = []
    for encoding in encodings:
        places = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        result.append(Ids(np.array(encoding.ids, np.int32), places[:, 0], places[:, 1]))
    return result


def _sentencepiece_segments(model: Any) -> Segments | None:
    """A table of segments for a model that merges pieces and leaves texts as they are; None for others.

    Without bytes for what is not in the vocabulary, several unknown characters are one token, across cuts.
    """
    from sentencepiece import sentencepiece_model_pb2 as messages

    proto: Any = messages.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(model.serialized_model_proto())
    rules, trainer = proto.normalizer_spec, proto.trainer_spec
    changes_text = rules.precompiled_charsmap or rules.remove_extra_whitespaces or not rules.escape_whitespaces
    merges = trainer.model_type == messages.TrainerSpec.BPE and trainer.byte_fallback  # type: ignore[attr-defined]
    kinds = messages.ModelProto.SentencePiece  # type: ignore[attr-defined]
    if changes_text or not merges or trainer.treat_whitespace_as_suffix or not rules.add_dummy_prefix:
        return None
    if any(piece.type == kinds.USER_DEFINED for piece in proto.pieces):
        return None
    pattern = cutting_pattern(p.piece for p in proto.pieces if p.type in (kinds.NORMAL, kinds.UNUSED))
    if pattern is None:
        return None
    return Segments(pattern, _PlainSentencePiece(_without_prefix(model)), 0)


def read_sentencepiece(path: Path) -> Any:
    """The SentencePieceProcessor of a `.model` file; UserError for what is none."""
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"{path} is not a SentencePiece model ({error}); copy the file again. LLaMA 3's tokenizer.model from "
            "Meta is of another kind: convert meta-to-hf or meta-to-jax make a tokenizer.json of it"
        ) from None


def _without_prefix(model: Any) -> Any:
    """The same SentencePiece model, but no space is put in front of a text."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2 as messages

    proto: Any = messages.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(model.serialized_model_proto())
    proto.normalizer_spec.add_dummy_prefix = False
    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


def _has(content: Any, key: str, value: Any) -> bool:
    """Whether an object with this value under this key stands anywhere in JSON."""
    if isinstance(content, dict):
        return content.get(key) == value or any(_has(inner, key, value) for inner in content.values())
    return isinstance(content, list) and any(_has(inner, key, value) for inner in content)


def read_fast(path: Path) -> dict[str, Any]:
    """A tokenizer.json; UserError for what is none."""
    content = read_value(path)
    # The library raises the bare Exception for whatever it dislikes, so look before asking it.
    if not (isinstance(content, dict) and isinstance(content.get("model"), dict)):
        raise UserError(f"{path} is not a tokenizer.json: it has no 'model'; copy the file again")
    return content


def read_gpt2(vocabulary: Path, merges: Path, add_prefix_space: bool) -> dict[str, Any]:
    """vocab.json and merges.txt of a GPT2Tokenizer as a tokenizer.json: byte-level BPE with GPT-2's split into words.

    Raises:
        UserError: a file is damaged, or they do not belong together.
    """
    ids = read_object(vocabulary)
    if not all(type(index) is int and index >= 0 for index in ids.values()):
        raise UserError(f"{vocabulary}: expected tokens with their ids; copy the file again")
    pairs = []
    for number, line in enumerate(merges.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        pair = line.rstrip("\r").split(" ")
        if len(pair) != 2 or any(token not in ids for token in (*pair, "".join(pair))):
            raise UserError(
                f"{merges}: line {number} is {line!r}; expected two tokens which, as one, are a token of "
                f"{vocabulary.name} too; the files do not belong together, or one is damaged"
            )
        pairs.append(pair)
    byte_level = {"type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": ids, "merges": pairs, "fuse_unk": False, "byte_fallback": False},
    }


class Fast:
    """The `tokenizers` library.

    Args:
        path: the file that the tokenizer is loaded from, for messages.
        content: what a tokenizer.json holds.
        added: tokens that other files add.
        special: tokens that play a role.
    """

    opening: tuple[int, ...] | None
    closing: tuple[int, ...] | None
    opens_answers = False
    rule = "the post_processor of tokenizer.json"

    def __init__(
        self, path: Path, content: Mapping[str, Any], added: Sequence[AddedToken], special: Sequence[str]
    ) -> None:
        import tokenizers

        self.model = tokenizers.Tokenizer.from_str(json.dumps(content))
        self.model.no_truncation()
        self.model.no_padding()
        for token in sorted(added, key=lambda item: item.id):
            if self.model.token_to_id(token.content) is None:
                new = tokenizers.AddedToken(token.content, special=token.special, normalized=False)
                self.model.add_tokens([new])
                if self.model.token_to_id(token.content) != token.id:
                    raise UserError(
                        f"{path.parent}: the added token {token.content!r} should have id {token.id}, "
                        f"but {path.name} leaves {self.model.token_to_id(token.content)} for it"
                    )
        self._make_special([*special, *(token.content for token in added if token.special)])
        decoder = self.model.get_added_tokens_decoder()
        self.special_ids = frozenset(index for index, token in decoder.items() if token.special)
        self.size = max(self.model.get_vocab(with_added_tokens=True).values()) + 1
        self.opening, self.closing = self._surroundings()
        # Where only the beginning of a text gets a space, a special token in front tells that this is not one.
        plain = [t.content for t in decoder.values() if t.special and not t.rstrip]
        self._lead = plain[0] if plain and _has(content.get("pre_tokenizer"), "prepend_scheme", "first") else None
        # Its work is done here: what it still does is to cut white space off the offsets (trim_offsets).
        self.model.post_processor = None
        self._always_prefixed = content.get("pre_tokenizer") is None
        self._segments = _fast_segments(content)
        names = [[t.content for t in decoder.values() if not (t.special and ignored)] for ignored in (False, True)]
        # A name that is normalised meets texts whose spaces are written as ▁.
        self._added = [re.compile(re.sub(rf"\\ |{SPACE}", f"[ {SPACE}]", _any_of(each).pattern)) for each in names]

    def _make_special(self, tokens: Sequence[str]) -> None:
        """Tokens that play a role are special, whatever their flag says, as in transformers."""
        import tokenizers

        known = self.model.get_added_tokens_decoder()
        for token in dict.fromkeys(tokens):
            index = self.model.token_to_id(token)
            if index is None or (index in known and known[index].special):
                continue
            old = known.get(index)
            kept = {key: getattr(old, key) for key in ("single_word", "lstrip", "rstrip")} if old is not None else {}
            self.model.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False, **kept)])

    def _surroundings(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What the post-processor puts in front of a text and behind it."""
        for text in ("a", "0", ".", " "):
            plain = self.model.encode(text, add_special_tokens=False).ids
            whole = self.model.encode(text, add_special_tokens=True).ids
            place = next((k for k in range(len(whole)) if whole[k : k + len(plain)] == plain), None)
            if plain and place is not None:
                return tuple(whole[:place]), tuple(whole[place + len(plain) :])
        return (), ()

    def encode(
        self, texts: Sequence[str], special_tokens: bool | None, continued: Sequence[bool] | None
    ) -> list[Encoding]:
        self.model.encode_special_tokens = special_tokens is False
        encoded = self.model.encode_batch(list(texts), add_special_tokens=False)
        result = [Encoding(item.ids, item.offsets) for item in encoded]
        if continued is None or not any(continued) or self._lead is None or special_tokens is False:
            return result
        lead = self._lead
        numbers = [number for number, value in enumerate(continued) if value]
        behind = self.model.encode_batch([lead + texts[number] for number in numbers], add_special_tokens=False)
        for number, item in zip(numbers, behind, strict=True):
            shifted = [(begin - len(lead), end - len(lead)) for begin, end in item.offsets[1:]]
            result[number] = Encoding(item.ids[1:], shifted)
        return result

    def encode_arrays(
        self,
        texts: Sequence[str],
        special_tokens: bool | None,
        continued: Sequence[bool] | None,
        with_offsets: Sequence[bool],
    ) -> list[Ids]:
        """As `encode`, by the table of segments where the model has one and a text no added token."""
        result: list[Ids | None] = [None] * len(texts)
        plain: list[int] = []
        for number, text in enumerate(texts):
            begins = continued is None or not continued[number]
            if self._segments is None or not begins or self._added[special_tokens is False].search(text):
                plain.append(number)
                continue
            # Metaspace puts no second space in front of one; Prepend does.
            prefix = " " if text and (self._always_prefixed or text[0] not in f" {SPACE}") else ""
            result[number] = self._segments.encode(prefix + text, bool(prefix), with_offsets[number])
        if plain:
            behind = None if continued is None else [continued[number] for number in plain]
            if any(with_offsets[number] for number in plain) or (behind is not None and any(behind)):
                encoded = as_arrays(self.encode([texts[number] for number in plain], special_tokens, behind))
            else:
                self.model.encode_special_tokens = special_tokens is False
                fast = self.model.encode_batch_fast([texts[number] for number in plain], add_special_tokens=False)
                encoded = [Ids(np.array(item.ids, np.int32)) for item in fast]
            for number, ids in zip(plain, encoded, strict=True):
                result[number] = ids
        return [ids for ids in result if ids is not None]

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        return str(self.model.decode(list(ids), skip_special_tokens=skip_special))

    def token(self, index: int) -> str:
        return self.model.id_to_token(index) or ""

    def id_of(self, token: str) -> int | None:
        index: int | None = self.model.token_to_id(token)
        return index


def _fast_segments(content: Mapping[str, Any]) -> Segments | None:
    """A table of segments for a tokenizer.json of LLaMA's two kinds, where a text is one word; None for others."""
    import tokenizers

    model, normalizer, words = content["model"], content.get("normalizer"), content.get("pre_tokenizer")
    merges = model.get("type") == "BPE" and model.get("byte_fallback") and not model.get("ignore_merges")
    special = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    if not merges or any(model.get(key) for key in special):
        return None
    prepended = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": SPACE},
            {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        ],
    }
    metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}
    if (normalizer, words) not in ((prepended, None), (None, metaspace)):
        return None
    vocabulary = model["vocab"]
    byte_names = {f"<0x{byte:02X}>" for byte in range(256)}
    added = {token["content"] for token in content.get("added_tokens", ())}
    pattern = cutting_pattern(vocabulary.keys() - byte_names - added)
    if pattern is None or not byte_names <= vocabulary.keys():
        return None
    bare = {"version": "1.0", "added_tokens": [], "model": dict(model)}
    return Segments(pattern, _PlainFast(tokenizers.Tokenizer.from_str(json.dumps(bare))), 1)
