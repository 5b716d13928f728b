"""ChatGLM2's and ChatGLM3's tokenizer as Hugging Face's `glm` reads one: tokenizer.json and a chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxlm.errors import UserError
from jaxlm.jsontext import read_object
from jaxlm.tokenizer import Tokenizer, load_tokenizer
from jaxlm.tokenizer.chatglm import CLASS, OPENING, TOKENS
from jaxlm.tokenizer.training import sentencepiece_merges

MODEL, FAST, SETTINGS, GENERATION = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
)


def is_chatglm(directory: Path) -> bool:
    """Whether the tokenizer in a directory is such a one, and has no tokenizer.json."""
    settings = directory / SETTINGS
    if (directory / FAST).exists() or not ((directory / MODEL).is_file() and settings.is_file()):
        return False
    return read_object(settings).get("tokenizer_class") == CLASS


def rewrite_tokenizer(directory: Path) -> None:
    """Puts tokenizer.json in the place of the `tokenizer.model`, whose special tokens stand in its repository's code.

    tokenizer_config.json gets what transformers asks it for, chat_template.jinja the template, generation_config.json
    the ids that end an answer.

    Raises:
        UserError: the model is not of the kind BPE.
    """
    tokenizer = load_tokenizer(directory)
    _write_fast(directory / MODEL, tokenizer, directory / FAST)
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "</s>",
        "pad_token": "<unk>",
        "unk_token": "<unk>",
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if tokenizer.chat_template is not None:
        (directory / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
        settings["chat_template"] = tokenizer.chat_template  # for transformers before 4.43
    _write(directory / SETTINGS, settings)
    generation = read_object(directory / GENERATION) if (directory / GENERATION).is_file() else {}
    ends = list(tokenizer.end_ids)
    generation |= {"eos_token_id": ends[0] if len(ends) == 1 else ends, "pad_token_id": tokenizer.pad_id}
    _write(directory / GENERATION, generation)
    for name in (MODEL, "added_tokens.json", "special_tokens_map.json"):
        (directory / name).unlink(missing_ok=True)


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_fast(model: Path, tokenizer: Tokenizer, file: Path) -> None:
    from sentencepiece import sentencepiece_model_pb2 as messages
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, processors
    from tokenizers import Tokenizer as Fast

    proto: Any = messages.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(model.read_bytes())
    if proto.trainer_spec.model_type != proto.trainer_spec.BPE:
        raise UserError(f"{model}: is not a BPE model, as ChatGLM2's and ChatGLM3's are; copy the file again")
    vocabulary = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    kind = next(iter(proto.pieces))
    ordinary = {piece.piece: piece.score for piece in proto.pieces if piece.type in (kind.NORMAL, kind.USER_DEFINED)}
    merges = sentencepiece_merges(ordinary, vocabulary)
    fast = Fast(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    rules = proto.normalizer_spec
    steps: list[Any] = [normalizers.Precompiled(rules.precompiled_charsmap)] if rules.precompiled_charsmap else []
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    steps += [normalizers.Prepend("▁")] if rules.add_dummy_prefix else []
    fast.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    control = [piece.piece for piece in proto.pieces if piece.type in (kind.CONTROL, kind.UNKNOWN)]
    fast.add_special_tokens([AddedToken(token, normalized=False) for token in [*control, *TOKENS]])
    defined = [piece.piece for piece in proto.pieces if piece.type == kind.USER_DEFINED]
    fast.add_tokens([AddedToken(token, normalized=False) for token in defined])
    for index in range(len(proto.pieces) + len(TOKENS), tokenizer.vocab_size):
        added = AddedToken(tokenizer.token(index), normalized=False, special=index in tokenizer.special_ids)
        fast.add_tokens([added])
    opening = " ".join(OPENING)
    ids = [(token, fast.token_to_id(token)) for token in OPENING]
    fast.post_processor = processors.TemplateProcessing(
        single=f"{opening} $A", pair=f"{opening} $A $B:1", special_tokens=ids
    )
    fast.save(str(file))
