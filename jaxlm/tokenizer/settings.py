"""What stands in the small files beside a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxlm.errors import UserError
from jaxlm.jsontext import read_object

# The roles that a token of its own may play, as transformers names them.
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Lists (or, of newer files, objects) of further tokens that are special.
LISTS = ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens")


@dataclass(frozen=True)
class AddedToken:
    """A token beyond the trained vocabulary: `special` ones are left out when decoding."""

    content: str
    id: int
    special: bool


@dataclass(frozen=True)
class Settings:
    """What the settings files say.

    Args:
        roles: role (bos_token, ...) to token.
        special: every token that plays a role, whatever its own flag says: those are special, as in transformers.
        chat_template: the Jinja source.
        add_bos, add_eos: what tokenizer_config.json says; None where it says nothing.
        legacy: LlamaTokenizer's: whether SentencePiece puts its space in front of what follows a special token too.
        end_ids: ids that end an answer by generation_config.json.
        tokenizer_class: transformers' class, without "Fast" at its end; empty where it is not named.
        name: what the tokenizer came from (name_or_path), and where its code lies; empty where it is not named.
        add_prefix_space: GPT2Tokenizer's: whether a space is put in front of a text.
    """

    roles: dict[str, str]
    special: tuple[str, ...]
    chat_template: str | None
    add_bos: bool | None
    add_eos: bool | None
    legacy: bool
    end_ids: tuple[int, ...]
    tokenizer_class: str
    name: str
    add_prefix_space: bool


def _text(value: Any) -> str | None:
    """A token as the files spell it: a text, or an object with `content`."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) and text else None


def read_settings(directory: Path, names: Sequence[str]) -> Settings:
    """Reads those of `names` that tell about a tokenizer.

    Raises:
        UserError: for a broken file.
    """
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if name in names:
            config.update({key: value for key, value in read_object(directory / name).items() if value is not None})
    roles = {key: text for key in ROLES if (text := _text(config.get(key))) is not None}
    # transformers also takes any other text under a name like image_token for a special token.
    special = [*roles.values(), *(t for k, v in config.items() if k.endswith("_token") and (t := _text(v)))]
    for key in LISTS:
        listed = config.get(key) or ()
        special += [t for token in (listed.values() if isinstance(listed, dict) else listed) if (t := _text(token))]
    template = config.get("chat_template")
    if isinstance(template, list):  # several named templates
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    if "chat_template.jinja" in names:
        template = (directory / "chat_template.jinja").read_text(encoding="utf-8")
    flags = {key: config[key] if isinstance(config.get(key), bool) else None for key in _FLAGS}
    ends = _end_ids(directory / "generation_config.json") if "generation_config.json" in names else ()
    return Settings(
        roles=roles,
        special=tuple(dict.fromkeys(special)),
        chat_template=template,
        add_bos=flags["add_bos_token"],
        add_eos=flags["add_eos_token"],
        legacy=flags["legacy"] is not False,
        end_ids=ends,
        tokenizer_class=str(config.get("tokenizer_class") or "").removesuffix("Fast"),
        name=f"{config.get('name_or_path') or ''} {json.dumps(config.get('auto_map') or '')}",
        add_prefix_space=flags["add_prefix_space"] is True,
    )


_FLAGS = ("add_bos_token", "add_eos_token", "legacy", "add_prefix_space")


def _end_ids(path: Path) -> tuple[int, ...]:
    own = read_object(path).get("eos_token_id")
    ids = own if isinstance(own, list) else [own]
    if not all(index is None or type(index) is int for index in ids):
        raise UserError(f"{path}: eos_token_id is {own!r}; it must be a token id or a list of them")
    return tuple(index for index in ids if index is not None)


def added_tokens(directory: Path, names: Sequence[str]) -> list[AddedToken]:
    """Tokens that the settings files add to the vocabulary."""
    tokens: dict[str, AddedToken] = {}
    if "added_tokens.json" in names:
        for content, index in read_object(directory / "added_tokens.json").items():
            tokens[content] = AddedToken(content, int(index), False)
    if "tokenizer_config.json" in names:
        decoder = read_object(directory / "tokenizer_config.json").get("added_tokens_decoder") or {}
        for index, entry in decoder.items():
            tokens[entry["content"]] = AddedToken(entry["content"], int(index), bool(entry.get("special")))
    return list(tokens.values())
