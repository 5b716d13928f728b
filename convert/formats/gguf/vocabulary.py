"""A tokenizer as keys of a GGUF file: tokens with their scores and kinds, merges, and the ids that play a role.

Two kinds are written. `llama`: pieces with scores, of which the best pair is merged first (SentencePiece's BPE).
`gpt2`: byte-level BPE with merges in order, and a name for how a text is cut into words.

Sources: llama.cpp `llama-vocab.cpp` and `conversion/base.py`; gguf `constants.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convert.formats.gguf.pretokenizers import PRETOKENIZERS, changes_text, name_of
from convert.formats.tiktoken import is_tiktoken
from jaxlm.errors import UserError
from jaxlm.tokenizer import Tokenizer, load_tokenizer
from jaxlm.tokenizer.backends import read_fast, read_gpt2, read_sentencepiece
from jaxlm.tokenizer.segments import SPACE

# tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
ADDED_SCORE = -1000.0  # of tokens that are no pieces, so that no merge prefers them
# Rows of an embedding that may have no token: models are padded to a round number.
SPARE_ROWS = 1024


# llama.cpp lets special tokens take the white space behind them where general.name has one of these names.
_PHI3_NAMES = ("phi-3", "phi3")
_PHI3_TOKENS = ("</s>", "<unk>", "<s>", "<|endoftext|>")


@dataclass
class Vocabulary:
    """The keys of a tokenizer.

    Args:
        keys: by their full names.
        notes: what llama.cpp does otherwise, in words.
        strips: special tokens take the white space behind them.
    """

    keys: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    strips: bool = False

    def model_name(self, name: str) -> str:
        """A model's name such that llama.cpp strips white space behind special tokens where the tokenizer does."""
        named = any(each in name.lower() for each in _PHI3_NAMES)
        if self.strips and not named:
            return f"Phi-3 {name}"
        return re.sub(r"(?i)phi-?3", "Phi 3", name) if named and not self.strips else name


def read_vocabulary(
    directory: Path, num_rows: int, chat_template: str | None = None, stops: tuple[int, ...] = ()
) -> Vocabulary:
    """The keys of the tokenizer in a directory.

    Args:
        num_rows: V of the embedding: rows without a token get a name that no text has.
        chat_template: the template that the model was trained with; None: the tokenizer's own.
        stops: ids that end an answer.

    Raises:
        UserError: there is no tokenizer, it has no form in GGUF, or it has other tokens than the embedding has rows.
    """
    tokenizer = load_tokenizer(directory)
    size = tokenizer.vocab_size
    if size > num_rows or num_rows - size > max(SPARE_ROWS, num_rows // 16):
        raise UserError(
            f"{directory}: the tokenizer has {size:,} tokens and the model's embedding {num_rows:,} rows; the "
            "tokenizer is another model's, or tokens were added to one of the two only (convert extend-vocab adds them "
            "to both)"
        )
    model = directory / "tokenizer.model"
    if model.is_file() and not is_tiktoken(model):
        vocabulary = _sentencepiece(model, tokenizer)
    else:
        vocabulary = _tokenizer_json(directory, tokenizer)
    keys = vocabulary.keys
    tokens: list[str] = keys["tokenizer.ggml.tokens"]
    kinds, scores = keys["tokenizer.ggml.token_type"], keys.get("tokenizer.ggml.scores")
    for index in range(size, num_rows):
        tokens.append(f"[PAD{index}]")
        kinds.append(UNUSED)
        if scores is not None:
            scores.append(ADDED_SCORE)
    _check_unique(directory, tokens)
    _add_roles(vocabulary, tokenizer, stops)
    _note_stripping(vocabulary, directory)
    template = chat_template or tokenizer.chat_template
    if template is not None:
        keys["tokenizer.chat_template"] = template
    return vocabulary


def _check_unique(where: Path, tokens: list[str]) -> None:
    seen: dict[str, int] = {}
    for index, token in enumerate(tokens):
        if seen.setdefault(token, index) != index:
            raise UserError(
                f"{where}: tokens {seen[token]} and {index} are both {token!r}, which GGUF has no place for"
            )


def _note_stripping(vocabulary: Vocabulary, directory: Path) -> None:
    """Finds out whether special tokens take the white space behind them."""
    path = directory / "tokenizer.json"
    added = read_fast(path).get("added_tokens", ()) if path.is_file() else ()
    stripping = [token["content"] for token in added if token.get("rstrip") and token.get("special")]
    if stripping and set(_PHI3_TOKENS) <= set(vocabulary.keys["tokenizer.ggml.tokens"]):
        vocabulary.strips = True
    elif stripping:
        vocabulary.notes.append(
            f"{', '.join(stripping[:3])} take the white space behind them; llama.cpp leaves it there"
        )


def _add_roles(vocabulary: Vocabulary, tokenizer: Tokenizer, stops: tuple[int, ...]) -> None:
    """Adds the ids that play a role, and whether bos and eos are put around a text."""
    keys = vocabulary.keys
    ends = [index for index in dict.fromkeys((*stops, *tokenizer.end_ids)) if index != tokenizer.eos_id]
    roles = {
        "bos": tokenizer.bos_id,
        "eos": tokenizer.eos_id,
        "eot": ends[0] if ends else None,
        "unknown": tokenizer.unk_id,
        "padding": tokenizer.pad_id,
    }
    keys |= {f"tokenizer.ggml.{role}_token_id": index for role, index in roles.items() if index is not None}
    # These are llama.cpp's names of the other ids that end an answer, which it knows by their texts.
    known = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>")
    left = [tokenizer.token(index) for index in ends[1:]]
    unknown = [token for token in left if token not in known]
    if unknown:
        vocabulary.notes.append(f"an answer ends at {', '.join(unknown)} too, which GGUF has no key for")
    plain = tokenizer.opening == (tokenizer.bos_id,)
    if tokenizer.adds_bos and not plain:
        opening = " ".join(map(tokenizer.token, tokenizer.opening))
        vocabulary.notes.append(f"a text begins with {opening}, which llama.cpp puts there by a chat template only")
    keys["tokenizer.ggml.add_bos_token"] = tokenizer.adds_bos and plain
    keys["tokenizer.ggml.add_eos_token"] = tokenizer.adds_eos


# --- pieces with scores -----------------------------------------------------------------------------------------------


def _sentencepiece(path: Path, tokenizer: Tokenizer) -> Vocabulary:
    """The keys of a SentencePiece model, with the tokens that stand beside it."""
    from sentencepiece import sentencepiece_model_pb2 as messages

    proto: Any = messages.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(read_sentencepiece(path).serialized_model_proto())
    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type != messages.TrainerSpec.BPE or not trainer.byte_fallback:  # type: ignore[attr-defined]
        kind = messages.TrainerSpec.ModelType.Name(trainer.model_type)  # type: ignore[attr-defined]
        raise UserError(
            f"{path}: is a SentencePiece model of type {kind}, byte_fallback {str(trainer.byte_fallback).lower()}; "
            "llama.cpp merges pieces (BPE) and spells in bytes what is no piece"
        )
    if trainer.treat_whitespace_as_suffix:
        raise UserError(f"{path}: puts spaces behind words (treat_whitespace_as_suffix), which llama.cpp does not do")
    # A SentencePiece's kinds are numbered as GGUF's.
    tokens = [piece.piece for piece in proto.pieces]
    scores = [float(piece.score) for piece in proto.pieces]
    kinds = [int(piece.type) for piece in proto.pieces]
    vocabulary = _with_added(tokenizer, tokens, scores, kinds, bool(rules.add_dummy_prefix))
    if rules.precompiled_charsmap or rules.remove_extra_whitespaces:
        vocabulary.notes.append(
            f"{path.name} changes texts before it splits them ({rules.name or 'its own rules'}, "
            f"remove_extra_whitespaces {str(rules.remove_extra_whitespaces).lower()}), which llama.cpp does not do"
        )
    return vocabulary


def _with_added(
    tokenizer: Tokenizer, tokens: list[str], scores: list[float], kinds: list[int], add_prefix: bool
) -> Vocabulary:
    """The keys of pieces, with the tokens that the tokenizer has beyond them or under other names."""
    for index in range(tokenizer.vocab_size):
        is_new = index >= len(tokens)
        if is_new:
            tokens.append(f"[PAD{index}]")
            scores.append(ADDED_SCORE)
            kinds.append(UNUSED)
        token = tokenizer.token(index)
        if token and token != tokens[index]:
            tokens[index], scores[index], kinds[index] = token, ADDED_SCORE, USER_DEFINED
        if index in tokenizer.special_ids and kinds[index] != UNKNOWN:
            kinds[index] = CONTROL
        if kinds[index] == USER_DEFINED:
            tokens[index] = tokens[index].replace(SPACE, " ")  # it is looked for in texts as they come
    keys = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.add_space_prefix": add_prefix,
    }
    return Vocabulary(keys)


# --- merges in order --------------------------------------------------------------------------------------------------


def _tokenizer_json(directory: Path, tokenizer: Tokenizer) -> Vocabulary:
    """The keys of a tokenizer.json, or of GPT-2's two files."""
    path = directory / "tokenizer.json"
    if path.is_file():
        content = read_fast(path)
    elif (directory / "vocab.json").is_file():
        path = directory / "vocab.json"
        content = read_gpt2(path, directory / "merges.txt", False)
    else:
        raise UserError(
            f"{directory}: has neither tokenizer.model nor tokenizer.json, of which GGUF's tokenizer is made"
        )
    model = content["model"]
    if model.get("type", "BPE") != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise UserError(
            f"{path}: its model is {model.get('type')}; in GGUF's form are BPE models without marks at words"
        )
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model.get("merges", ())]
    if model.get("byte_fallback"):
        return _pieces_by_merges(path, content, merges, tokenizer)
    where = str(path)
    normal_form, pre = changes_text(content, where), name_of(content, where)
    added = {token["id"]: token for token in content.get("added_tokens", ())}
    pieces = {index: piece for piece, index in model["vocab"].items()}
    tokens, kinds = [], []
    for index in range(tokenizer.vocab_size):
        token = tokenizer.token(index)
        special = index in tokenizer.special_ids
        kinds.append(
            CONTROL if special else NORMAL if token and index in pieces and index not in added else USER_DEFINED
        )
        if not token:
            kinds[-1] = UNUSED
        tokens.append(token or f"[PAD{index}]")
    keys = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
    }
    notes = []
    if normal_form:
        notes.append(
            "the tokenizer puts texts into Unicode's form NFC first, llama.cpp does not: é written as e and an accent "
            "is split otherwise"
        )
    if PRETOKENIZERS[pre].by_case:
        notes.append(f"llama.cpp's code for {pre!r} takes É for a small letter too: aÉ is one word to it")
    return Vocabulary(keys, notes)


_PREPENDED = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
    ],
}
_REPLACED = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}


def _pieces_by_merges(
    path: Path, content: Mapping[str, Any], merges: list[tuple[str, ...]], tokenizer: Tokenizer
) -> Vocabulary:
    """The keys of a tokenizer.json that was made of a SentencePiece model, which is not there any more.

    A piece's score is the place of its first merge. That is the same order where all merges that give one piece stand
    together, and each pair of pieces that makes up a piece is one of them: as they do when they come from scores.
    """
    normalizer, words, model = content.get("normalizer"), content.get("pre_tokenizer"), content["model"]
    metaspace = isinstance(words, dict) and words.get("type") == "Metaspace" and not words.get("split", True)
    if not ((normalizer in (_PREPENDED, _REPLACED) and words is None) or (normalizer is None and metaspace)):
        # Gemma's splits at spaces that its normalizer has taken away: nothing is left to split at.
        gemma = isinstance(words, dict) and words.get("type") == "Split" and words.get("pattern") == {"String": " "}
        if not (normalizer == _REPLACED and gemma):
            raise UserError(
                f"{path}: spells in bytes what is no piece, but cuts texts in its own way; put its "
                "tokenizer.model beside it"
            )
    vocabulary: dict[str, int] = model["vocab"]
    order: dict[str, int] = {}
    last = ""
    for place, pair in enumerate(merges):
        piece = "".join(pair)
        if piece != last and piece in order:
            raise UserError(
                f"{path}: merges that give {piece!r} do not stand together, so they did not come from scores, which "
                "GGUF has; put tokenizer.model beside it"
            )
        order.setdefault(piece, place)
        last = piece
    known = set(merges)
    for piece in order:
        pairs = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        missing = next((p for p in pairs if p[0] in vocabulary and p[1] in vocabulary and p not in known), None)
        if missing is not None:
            raise UserError(
                f"{path}: {missing[0]!r} and {missing[1]!r} are tokens and make up {piece!r}, but are not merged: "
                "merges did not come from scores, which GGUF has; put tokenizer.model beside it"
            )
    size = max(vocabulary.values()) + 1
    tokens, scores, kinds = [f"[PAD{i}]" for i in range(size)], [ADDED_SCORE] * size, [UNUSED] * size
    for piece, index in vocabulary.items():
        is_byte = len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")
        tokens[index], kinds[index] = piece, BYTE if is_byte else NORMAL
        scores[index] = -float(order[piece]) if piece in order else 0.0 if is_byte else -1e9
    added = {token["id"]: token for token in content.get("added_tokens", ())}
    for index, token in added.items():
        if index < size:
            scores[index], kinds[index] = ADDED_SCORE, CONTROL if token["special"] else USER_DEFINED
    unknown = vocabulary.get(model.get("unk_token") or "")
    if unknown is not None:
        kinds[unknown] = UNKNOWN
    prefix = normalizer == _PREPENDED or (metaspace and words.get("prepend_scheme", "always") != "never")  # type: ignore[union-attr]
    return _with_added(tokenizer, tokens, scores, kinds, prefix)
