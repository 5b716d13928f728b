"""Two SentencePiece models as one: pieces of the second behind those of the first, as Chinese-LLaMA merges them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxlm.errors import UserError
from jaxlm.jsontext import read_object
from jaxlm.tokenizer import Tokenizer, find_tokenizer_files
from jaxlm.tokenizer.backends import read_sentencepiece

MODEL, FAST = "tokenizer.model", "tokenizer.json"


@dataclass(frozen=True)
class MergedPieces:
    """A SentencePiece model with pieces of another one.

    Args:
        content: the merged model, as a file has it.
        first: the id of the first appended piece: the number of pieces before.
        pieces: the appended pieces, in the order of their ids.
        splits: for each of them the ids that the first model splits it into.
    """

    content: bytes
    first: int
    pieces: tuple[str, ...]
    splits: tuple[tuple[int, ...], ...]


def merge_sentencepiece(path: Path, other_path: Path) -> MergedPieces:
    """Pieces of the other model that the first does not have, behind it in their order, as ordinary ones of score 0.

    All else of the first model stays, `trainer_spec.vocab_size` too. An id is the place of its piece. SentencePiece
    joins the pair with the highest score first, among equal ones the leftmost, so new pieces come before old ones.

    Raises:
        UserError: a file is not a SentencePiece model, the first is not of the kind BPE, or there is nothing to append.
    """
    import sentencepiece

    merged, other = _read_proto(path), _read_proto(other_path)
    if merged.trainer_spec.model_type != merged.trainer_spec.BPE:
        raise UserError(
            f"--merge-spm {other_path}: {path} is not a BPE model; in one of another kind the score 0 of the new "
            "pieces would be a probability of 1 for each; add them with --tokens"
        )
    first = len(merged.pieces)
    known = {piece.piece for piece in merged.pieces}
    pieces = tuple(piece.piece for piece in other.pieces if piece.piece not in known)
    if not pieces:
        raise UserError(f"--merge-spm {other_path}: has no piece that {path} does not have")
    # A piece is split as it stands: no space is put in front of it, and none of its own is taken away.
    plain = _read_proto(path)
    plain.normalizer_spec.add_dummy_prefix = plain.normalizer_spec.remove_extra_whitespaces = False
    splitter = sentencepiece.SentencePieceProcessor(model_proto=plain.SerializeToString())
    splits = tuple(tuple(ids) for ids in splitter.encode(list(pieces)))
    for piece in pieces:
        merged.pieces.add(piece=piece, score=0.0)
    return MergedPieces(merged.SerializeToString(), first, pieces, splits)


def _read_proto(path: Path) -> Any:
    from sentencepiece import sentencepiece_model_pb2 as messages

    read_sentencepiece(path)  # says what is wrong with a file
    proto: Any = messages.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(path.read_bytes())
    return proto


def write_merged(files: Sequence[Path], tokenizer: Tokenizer, merged: MergedPieces, directory: Path) -> list[Path]:
    """Copies a tokenizer's files to a directory with the merged tokenizer.model, and returns the copies.

    A tokenizer.json among them gets the pieces too, and the pairs that make them.

    Raises:
        UserError: tokens stand behind the pieces, or tokenizer.json was not made of the model.
    """
    if tokenizer.vocab_size != merged.first:
        raise UserError(
            f"--merge-spm: {tokenizer.path} has {tokenizer.vocab_size} tokens, but {merged.first} pieces in {MODEL}: "
            f"tokens like {tokenizer.token(tokenizer.vocab_size - 1)!r} stand where new pieces would; merge into the "
            "model that does not have them yet, and add them to the result with --tokens"
        )
    for file in files:
        shutil.copyfile(file, directory / file.name)
    (directory / MODEL).write_bytes(merged.content)
    if (directory / FAST).is_file():
        _add_to_fast(directory / FAST, merged)
    return find_tokenizer_files(directory)


def _add_to_fast(file: Path, merged: MergedPieces) -> None:
    """The pieces and their pairs in tokenizer.json, in the order of the pieces' ids, as transformers orders them.

    An old piece may be made of new ones too: these pairs follow its old ones.
    """
    content = read_object(file)
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    other = (
        f"--merge-spm: {file.name} was not made of the {MODEL} beside it ({{}}); in a copy of the model without it, "
        f"{MODEL} is the tokenizer"
    )
    if not (isinstance(model, dict) and isinstance(vocabulary, dict) and isinstance(model.get("merges"), list)):
        raise UserError(other.format("it has no vocabulary with merges"))
    proto = _parsed(merged.content)
    if vocabulary != {piece: index for index, piece in enumerate(proto[: merged.first])}:
        raise UserError(other.format("its vocabulary is another one"))
    pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    made: dict[str, list[tuple[str, ...]]] = {}
    for pair in pairs:
        made.setdefault("".join(pair), []).append(pair)
    order = [vocabulary.get("".join(pair), -1) for pair in pairs]
    if order != sorted(order):
        raise UserError(other.format("its merges are not in the order of ids"))
    vocabulary |= {piece: merged.first + number for number, piece in enumerate(merged.pieces)}
    merges: list[tuple[str, ...]] = []
    for piece, index in vocabulary.items():
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        merges += made.get(piece, ())
        merges += [
            (left, right)
            for left, right in splits
            if left in vocabulary
            and right in vocabulary
            and max(index, vocabulary[left], vocabulary[right]) >= merged.first
        ]
    model["merges"] = [list(pair) for pair in merges]
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _parsed(content: bytes) -> list[str]:
    """The pieces of a model, in the order of their ids."""
    from sentencepiece import sentencepiece_model_pb2 as messages

    proto: Any = messages.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(content)
    return [piece.piece for piece in proto.pieces]
