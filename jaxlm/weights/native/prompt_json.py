"""`jaxlm/prompt.json`: how training asked, so that whoever uses the model asks in the same way."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from jaxlm.jsonfields import build, check_version
from jaxlm.jsontext import read_object
from jaxlm.locate import at_home
from jaxlm.weights.native.layout import SMALL_FILES

VERSION = 1
PROMPT_JSON, TEMPLATE_JSON = PROMPT_FILES = ("prompt.json", "template.json")


@dataclass(frozen=True)
class PromptFile:
    """The fields of prompt.json.

    Args:
        template: name of a template; 'template.json' is the file beside it; None: not recorded.
        add_bos: whether bos comes first; None: as the tokenizer has it.
        add_eos: whether eos ends an answer; None: not recorded.
        stop_ids: tokens that ended the answers.
        version: of the file's format; files before version 1 had no such field.
    """

    template: str | None = None
    add_bos: bool | None = None
    add_eos: bool | None = None
    stop_ids: tuple[int, ...] = ()
    version: int = VERSION

    def files(self) -> dict[str, bytes]:
        """What is written: prompt.json and, where the template is a file, a copy of that, by name."""
        if self.template is None or not self.template.endswith(".json"):
            return {PROMPT_JSON: json.dumps(asdict(self)).encode()}
        own = json.dumps(asdict(replace(self, template=TEMPLATE_JSON)))
        return {PROMPT_JSON: own.encode(), TEMPLATE_JSON: at_home(self.template).read_bytes()}


def read_prompt_json(file: Path) -> PromptFile:
    """prompt.json; UserError for a newer version, an unknown field or a value that does not fit."""
    content = read_object(file)
    check_version(content, VERSION, file)
    return build(PromptFile, content, f"{file}:")


def trained_prompt(directory: Path) -> PromptFile:
    """How training asked, with a template of its own as the path of its file; empty where nothing is recorded."""
    file = directory / SMALL_FILES / PROMPT_JSON
    recorded = read_prompt_json(file) if file.is_file() else PromptFile()
    if recorded.template is None or not recorded.template.endswith(".json"):
        return recorded
    return replace(recorded, template=str(file.parent / recorded.template))
