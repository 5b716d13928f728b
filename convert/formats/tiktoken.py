"""LLaMA 3's tokenizer from Meta's file to Hugging Face's.

Meta's `tokenizer.model` of LLaMA 3 is tiktoken's: one line per token, its bytes in base64 and its rank, which is its
id; the special tokens follow after the last rank and are in Meta's code only. Hugging Face's `tokenizer.json` wants
the merges instead: a token of several bytes is the merge of any two tokens that make it up, tried in order of ranks.
"""

from __future__ import annotations

import base64
import binascii
import json
from pathlib import Path
from typing import Any

from jaxlm.errors import UserError

# Meta's llama3 `tokenizer.py`; transformers uses the same.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
NUM_SPECIAL = 256
BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"
# Ids after the last rank; the places between are reserved ones, numbered in order.
_NAMED_3 = {0: BEGIN, 1: END, 6: "<|start_header_id|>", 7: "<|end_header_id|>", 9: "<|eot_id|>"}
_NAMED_31 = _NAMED_3 | {4: "<|finetune_right_pad_id|>", 8: "<|eom_id|>", 10: "<|python_tag|>"}
# The published files have 128,000 lines in 2.2 MB.
MAX_BYTES = 64 << 20
MAX_TOKEN_BYTES = 512


def is_tiktoken(path: Path) -> bool:
    """Whether a `tokenizer.model` is tiktoken's text, and not SentencePiece's binary."""
    with path.open("rb") as handle:
        words = handle.readline(1 << 12).split()
    return len(words) == 2 and words[1].isdigit()


def special_tokens(new: bool) -> list[str]:
    """The 256 special tokens of LLaMA 3 in order of their ids; `new` for 3.1 and later, which named more of them."""
    named = _NAMED_31 if new else _NAMED_3
    unused = (f"<|reserved_special_token_{number}|>" for number in range(NUM_SPECIAL))
    return [named.get(place) or next(unused) for place in range(NUM_SPECIAL)]


def read_ranks(path: Path) -> dict[bytes, int]:
    """Token -> id. UserError for a damaged file: the ids must be 0, 1, 2, … and all 256 bytes must be tokens."""
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path}: has {path.stat().st_size} bytes; no tokenizer is as large")
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines()):
        try:
            word, rank = line.split()
            token = base64.b64decode(word, validate=True)
        except (ValueError, binascii.Error):
            raise UserError(
                f"{path}: line {number + 1} is not a token in base64 and its rank; download it again"
            ) from None
        if rank != str(number).encode() or token in ranks or not 0 < len(token) <= MAX_TOKEN_BYTES:
            raise UserError(f"{path}: line {number + 1} has another rank, or a token that was there; download it again")
        ranks[token] = number
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise UserError(f"{path}: not every byte is a token; the file is cut short, download it again")
    return ranks


def write_tokenizer_json(model: Path, directory: Path, vocab_size: int, new: bool) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json` for Meta's `tokenizer.model` of LLaMA 3.

    Args:
        directory: where `model` was copied to.
        vocab_size: V of the model, to which the file must fit.
        new: whether the model is LLaMA 3.1 or later.

    Raises:
        UserError: when the file is damaged or belongs to another model.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    ranks = read_ranks(model)
    if len(ranks) + NUM_SPECIAL != vocab_size:
        raise UserError(
            f"{model}: has {len(ranks)} tokens, with the {NUM_SPECIAL} special ones {len(ranks) + NUM_SPECIAL}, "
            f"but the model has {vocab_size}; it belongs to another model"
        )
    letters = _byte_letters()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges: list[tuple[str, str]] = []
    for token in ranks:  # in the order of ranks
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [(a, b) for a, b in pairs if a in ranks and b in ranks]
        known.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(spell(a), spell(b)) for a, b in known]
    vocabulary = {spell(token): rank for token, rank in ranks.items()}
    # As in tiktoken, a word that is a token is taken whole, whether merges lead there or not.
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, fuse_unk=False, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated", invert=False)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special_tokens(new)])
    template = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B:1", special_tokens=[(BEGIN, len(ranks))]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _byte_letters() -> list[str]:
    """GPT-2's printable stand-in for each byte: itself where it prints, otherwise the next letter from 256 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
