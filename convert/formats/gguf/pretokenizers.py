"""How byte-level tokenizers cut a text into words, by the names that llama.cpp has for it (`tokenizer.ggml.pre`).

A tokenizer.json says it as a list of steps. llama.cpp has code for each name, so what is in no row here is refused:
with another name texts would be split otherwise, and the model would see tokens that it was not trained on.

Source: llama.cpp `llama-vocab.cpp`, whose comments hold the patterns of the tokenizer.json files that it was made for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from convert.formats.tiktoken import PATTERN as LLAMA3
from jaxlm.errors import UserError

# A step as one text: a pattern, or the name of one.
_BYTES, _GPT2, _DIGITS = "bytes", "GPT-2's words, bytes", "single digits"
_QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_QWEN35 = _QWEN2.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"


def _cased(ending: str, digits: str) -> str:
    """Words by capital and small letters."""
    begin = r"[^\r\n\p{L}\p{N}]?"
    return f"{begin}{_UPPER}*{_LOWER}+{ending}|{begin}{_UPPER}+{_LOWER}*{ending}|{digits}|{_REST}"


@dataclass(frozen=True)
class PreTokenizer:
    """How words are cut.

    Args:
        steps: one after the other.
        ignores_merges: a word that is a token is taken whole, whether merges lead there or not.
        normal_form: texts are brought into Unicode's form NFC first, which llama.cpp leaves out.
        by_case: words end where capitals begin; llama.cpp takes letters other than a to z and A to Z for both.
    """

    steps: tuple[str, ...]
    ignores_merges: bool = False
    normal_form: bool = False
    by_case: bool = False


PRETOKENIZERS: dict[str, PreTokenizer] = {
    "llama-bpe": PreTokenizer((LLAMA3, _BYTES), ignores_merges=True),
    "dbrx": PreTokenizer((LLAMA3, _BYTES)),
    "qwen2": PreTokenizer((_QWEN2, _BYTES), normal_form=True),
    "qwen35": PreTokenizer((_QWEN35, _BYTES), normal_form=True),
    "gpt-2": PreTokenizer((_GPT2,)),
    "smollm": PreTokenizer((_DIGITS, _GPT2)),
    "bloom": PreTokenizer((r" ?[^(\s|[.,!?…。，、।۔،])]+", _BYTES)),
    "tekken": PreTokenizer((_cased("", r"\p{N}"), _BYTES), ignores_merges=True, by_case=True),
    "gpt-4o": PreTokenizer((_cased(_ENDING, r"\p{N}{1,3}"), _BYTES), by_case=True),
}
# Other names of the same code.
ALIASES: dict[str, str] = {
    **dict.fromkeys(("llama3", "llama-v3", "falcon3", "pixtral", "glm4", "smollm3"), "llama-bpe"),
    **dict.fromkeys(("smaug-bpe", "chatglm-bpe"), "dbrx"),
    **dict.fromkeys(("deepseek-r1-qwen", "megrez"), "qwen2"),
    **dict.fromkeys(("phi-2", "olmo", "mpt"), "gpt-2"),
    **dict.fromkeys(("starcoder", "refact", "command-r", "codeshell"), "smollm"),
    "llama4": "gpt-4o",
}


def name_of(content: Mapping[str, Any], where: str) -> str:
    """The name of the pre-tokenizer of a tokenizer.json.

    Args:
        where: the file, for errors.

    Raises:
        UserError: llama.cpp has no code for it.
    """
    steps, ignores = _steps(content.get("pre_tokenizer"), where), bool(content["model"].get("ignore_merges"))
    names = [name for name, known in PRETOKENIZERS.items() if known.steps == steps]
    for name in names:
        if PRETOKENIZERS[name].ignores_merges == ignores:
            return name
    if names:
        raise UserError(
            f"{where}: ignore_merges is {str(ignores).lower()}, but what llama.cpp has for this pre_tokenizer "
            f"({', '.join(names)}) goes by the other value"
        )
    raise UserError(
        f"{where}: its pre_tokenizer is not one that llama.cpp is known to have code for ({', '.join(PRETOKENIZERS)}): "
        f"{' then '.join(steps)}"
    )


def changes_text(content: Mapping[str, Any], where: str) -> bool:
    """Whether a tokenizer.json puts texts into Unicode's form NFC.

    Raises:
        UserError: it changes them in another way, which GGUF has no key for.
    """
    normalizer = content.get("normalizer")
    steps = (normalizer or {}).get("normalizers", [normalizer] if normalizer else [])
    if any(step.get("type") != "NFC" for step in steps):
        kinds = ", ".join(str(step.get("type")) for step in steps)
        raise UserError(f"{where}: its normalizer changes texts ({kinds}), which llama.cpp does not do; none or NFC")
    return bool(steps)


def _steps(pre_tokenizer: Any, where: str) -> tuple[str, ...]:
    """The steps of a pre_tokenizer; those that no row has are shown as they are."""
    if not isinstance(pre_tokenizer, dict):
        return ("none",)
    kind = pre_tokenizer.get("type")
    if kind == "Sequence":
        return tuple(step for each in pre_tokenizer.get("pretokenizers", ()) for step in _steps(each, where))
    if kind == "ByteLevel":
        if pre_tokenizer.get("add_prefix_space"):
            return ("a space in front", _GPT2 if pre_tokenizer.get("use_regex", True) else _BYTES)
        return (_GPT2 if pre_tokenizer.get("use_regex", True) else _BYTES,)
    if kind == "Digits" and pre_tokenizer.get("individual_digits"):
        return (_DIGITS,)
    pattern = pre_tokenizer.get("pattern")
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    isolated = pre_tokenizer.get("behavior") == "Isolated" and not pre_tokenizer.get("invert")
    removed = pre_tokenizer.get("behavior") == "Removed" and pre_tokenizer.get("invert")
    # "Removed" and inverted keeps what matches, which is the same where everything matches.
    if kind == "Split" and regex is not None and (isolated or removed):
        return (str(regex),)
    return (str(pre_tokenizer),)


def as_json(name: str) -> dict[str, Any]:
    """What a tokenizer.json has of a pre-tokenizer: `normalizer`, `pre_tokenizer` and the model's `ignore_merges`.

    Raises:
        KeyError: the name is not known.
    """
    known = PRETOKENIZERS[ALIASES.get(name, name)]
    steps: list[dict[str, Any]] = []
    for step in known.steps:
        if step in (_BYTES, _GPT2):
            plain = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
            steps.append(plain | {"use_regex": step == _GPT2})
        elif step == _DIGITS:
            steps.append({"type": "Digits", "individual_digits": True})
        else:
            steps.append({"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated", "invert": False})
    return {
        "normalizer": {"type": "NFC"} if known.normal_form else None,
        "pre_tokenizer": steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps},
        "ignore_merges": known.ignores_merges,
    }
