"""The files of a tokenizer, of the keys of a GGUF file: `tokenizer.model` or `tokenizer.json`, and their settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.formats.gguf.pretokenizers import ALIASES, PRETOKENIZERS, as_json
from convert.formats.gguf.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from jaxlm.tokenizer.segments import SPACE

_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def write_tokenizer_files(values: Mapping[str, Any], directory: Path) -> str | None:
    """Writes the tokenizer that the keys of a file describe.

    Args:
        values: the keys by their full names.

    Returns:
        None, or why there is nothing to write, in words.
    """
    model, tokens = values.get("tokenizer.ggml.model"), values.get("tokenizer.ggml.tokens")
    kinds = values.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens or ())
    if not isinstance(tokens, list) or len(kinds) != len(tokens):
        return "the file has no tokenizer"
    # Names that fill up an embedding's rows are no tokens.
    while tokens and kinds[-1] == UNUSED and tokens[-1].startswith("[PAD"):
        tokens, kinds = tokens[:-1], kinds[:-1]
    if model == "llama":
        own = _num_pieces(kinds)
        _write_sentencepiece(values, tokens[:own], kinds[:own], directory / "tokenizer.model")
    elif model == "gpt2":
        pre = values.get("tokenizer.ggml.pre")
        if ALIASES.get(str(pre), pre) not in PRETOKENIZERS:
            return f"tokenizer.ggml.pre is {pre!r}; known are {', '.join((*PRETOKENIZERS, *ALIASES))}"
        content = _tokenizer_json(values, tokens, kinds, str(pre))
        text = json.dumps(content, ensure_ascii=False, indent=1)
        (directory / "tokenizer.json").write_text(text + "\n", encoding="utf-8")
    else:
        return f"tokenizer.ggml.model is {model!r}; known are llama and gpt2"
    _write_settings(values, tokens, kinds, directory)
    return None


def _num_pieces(kinds: list[int]) -> int:
    """Number of tokens up to the last piece: those behind it were added to a SentencePiece model."""
    return max((index for index, kind in enumerate(kinds) if kind in (NORMAL, BYTE)), default=-1) + 1


def _role_ids(values: Mapping[str, Any]) -> dict[str, int]:
    ids = {name: values.get(f"tokenizer.ggml.{role}_token_id") for name, role in _ROLES.items()}
    return {name: index for name, index in ids.items() if isinstance(index, int)}


def _write_settings(values: Mapping[str, Any], tokens: list[str], kinds: list[int], directory: Path) -> None:
    """tokenizer_config.json, the chat template, and generation_config.json where more than eos ends an answer."""
    roles = {name: index for name, index in _role_ids(values).items() if index < len(tokens)}
    pieces = values["tokenizer.ggml.model"] == "llama"
    add_bos = values.get("tokenizer.ggml.add_bos_token", pieces)
    settings: dict[str, Any] = {
        "tokenizer_class": "LlamaTokenizer" if pieces else "PreTrainedTokenizerFast",
        "add_bos_token": bool(add_bos),
        "add_eos_token": bool(values.get("tokenizer.ggml.add_eos_token", False)),
        **{name: tokens[index] for name, index in roles.items()},
        "clean_up_tokenization_spaces": False,
    }
    if pieces:
        settings["legacy"] = True
        added = {
            str(index): {"content": token, "special": kind == CONTROL, "normalized": False}
            for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind in (CONTROL, USER_DEFINED) and index >= _num_pieces(kinds)
        }
        settings["added_tokens_decoder"] = added
    _write_json(directory / "tokenizer_config.json", settings)
    template = values.get("tokenizer.chat_template")
    if isinstance(template, str):
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    ends = [values.get(f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot", "eom")]
    ids = [index for index in dict.fromkeys(ends) if isinstance(index, int)]
    if len(ids) > 1:
        _write_json(directory / "generation_config.json", {"eos_token_id": ids})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _write_sentencepiece(values: Mapping[str, Any], tokens: list[str], kinds: list[int], path: Path) -> None:
    from sentencepiece import sentencepiece_model_pb2 as messages

    proto: Any = messages.ModelProto()  # type: ignore[attr-defined]
    scores = values.get("tokenizer.ggml.scores") or [0.0] * len(tokens)
    for token, kind, score in zip(tokens, kinds, scores, strict=False):
        piece = proto.pieces.add()
        piece.piece = token.replace(" ", SPACE) if kind == USER_DEFINED else token
        piece.score, piece.type = score, kind
    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type = messages.TrainerSpec.BPE  # type: ignore[attr-defined]
    trainer.vocab_size = len(proto.pieces)
    trainer.byte_fallback = BYTE in kinds
    roles = _role_ids(values)
    unknown = roles.get("unk_token", kinds.index(UNKNOWN) if UNKNOWN in kinds else 0)
    proto.pieces[unknown].type = UNKNOWN
    trainer.unk_id, trainer.unk_piece = unknown, proto.pieces[unknown].piece
    for name in ("bos", "eos", "pad"):
        index = roles.get(f"{name}_token", -1)
        is_own = 0 <= index < len(tokens) and kinds[index] == CONTROL
        setattr(trainer, f"{name}_id", index if is_own else -1)
        if is_own:
            setattr(trainer, f"{name}_piece", proto.pieces[index].piece)
    rules.name = "identity"
    rules.add_dummy_prefix = bool(values.get("tokenizer.ggml.add_space_prefix", True))
    rules.remove_extra_whitespaces = bool(values.get("tokenizer.ggml.remove_extra_whitespaces", False))
    rules.escape_whitespaces = True
    path.write_bytes(proto.SerializeToString())


def _tokenizer_json(values: Mapping[str, Any], tokens: list[str], kinds: list[int], pre: str) -> dict[str, Any]:
    rules = as_json(pre)
    merges = [pair.split(" ", 1) for pair in values.get("tokenizer.ggml.merges") or ()]
    # Added tokens keep an id among those of the pieces only where they are pieces too.
    vocabulary = {
        token: index
        for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind == NORMAL or (kind in (CONTROL, USER_DEFINED) and index < _num_pieces(kinds))
    }
    added = [
        {"id": index, "content": token, "special": kind == CONTROL, "normalized": False}
        | {"single_word": False, "lstrip": False, "rstrip": False}
        for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (CONTROL, USER_DEFINED)
    ]
    bos, eos = (_role_ids(values).get(f"{name}_token") for name in ("bos", "eos"))
    around: list[dict[str, Any]] = [{"Sequence": {"id": "A", "type_id": 0}}]
    special: dict[str, Any] = {}
    for index, wanted, place in (
        (bos, values.get("tokenizer.ggml.add_bos_token", rules["ignore_merges"]), 0),
        (eos, values.get("tokenizer.ggml.add_eos_token"), len(around) + 1),
    ):
        if wanted and index is not None and index < len(tokens):
            name = tokens[index]
            around.insert(place, {"SpecialToken": {"id": name, "type_id": 0}})
            special[name] = {"id": name, "ids": [index], "tokens": [name]}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    processors: list[dict[str, Any]] = [byte_level]
    if special:
        processors.append({"type": "TemplateProcessing", "single": around, "pair": around, "special_tokens": special})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": rules["normalizer"],
        "pre_tokenizer": rules["pre_tokenizer"],
        "post_processor": {"type": "Sequence", "processors": processors},
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": rules["ignore_merges"],
            "vocab": vocabulary,
            "merges": merges,
        },
    }
