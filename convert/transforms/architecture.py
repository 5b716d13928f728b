"""A model under another architecture that computes the same: ChatGLM3 as GLM, InternLM2 or Baichuan-7B as LLaMA."""

from __future__ import annotations

import dataclasses

from convert.transforms.experts import dense_first
from jaxlm.errors import UserError
from jaxlm.models.families import FAMILIES, architectures, write_config
from jaxlm.weights.leaves import DerivedSource, ParamSource, main_dtype


class RenamedSource(DerivedSource):
    """A model with the names and the `config.json` of another architecture.

    Args:
        architecture: of `config.json`, or the family's name: 'LlamaForCausalLM', 'llama'.

    Raises:
        UserError: there is no such architecture, it has no place for something that the model has, or the model has
            experts, whose layouts have an architecture of their own.
    """

    def __init__(self, source: ParamSource, architecture: str) -> None:
        super().__init__(source)
        named = [family for family in FAMILIES.values() if architecture in (family.architecture, family.name)]
        if not named:
            raise UserError(
                f"--architecture: {architecture!r} is not supported; supported: {', '.join(architectures())}"
            )
        if source.config.experts is not None:
            raise UserError(
                f"--architecture {architecture}: {source.path} is a model of experts; {dense_first(source)}"
            )
        self.config = dataclasses.replace(source.config, family=named[0].name)
        if self.config.family != source.config.family:
            self.hf_config = None  # it says the other one
        try:
            write_config(self.config, main_dtype(self.leaves))
        except UserError as error:
            raise UserError(f"--architecture {architecture}: {str(error).removeprefix('config.json: ')}") from None
