"""What a family's file consists of: its Hugging Face names, its config.json in and out, the rows of its name table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxlm.spec import ENCODER, DecoderSpec, LayerSpec


def always(_: DecoderSpec, __: LayerSpec) -> bool:
    """For rows of tensors that every model has."""
    return True


@dataclass(frozen=True)
class Row:
    """One tensor of the name table: the leaf, and the name and layout that it has in Hugging Face's files.

    Layouts are written in the project's letters (D model, H query heads, K kv heads, h head dim, F feed-forward, V
    vocabulary, E experts; N learned positions, U buckets of distances, Q = H h, M = K h, W dims of an embedding).
    Parentheses join dims that the file stores as one: HF keeps `q_proj` as a matrix `(H h) D`, jaxlm as `D H h`. A
    linear layer's stored matrix is [outputs, inputs].

    Args:
        path: of the leaf; in a layer, below the layer's stack (see `DecoderSpec.stacks`). An encoder's begin with
            'encoder/'.
        hf: name in Hugging Face's files; '{}' is the number of the layer, and says that the row is one of a layer's.
        dims: of the leaf, without the stack.
        hf_dims: of the tensor in HF's files.
        when: whether there is such a tensor, given the model and the layer (outside of the layers:
            the first one): one of the encoder's where the row is.
    """

    path: str
    hf: str
    dims: str
    hf_dims: str
    when: Callable[[DecoderSpec, LayerSpec], bool] = always

    @property
    def in_layer(self) -> bool:
        """Whether every layer has one."""
        return "{}" in self.hf

    @property
    def in_encoder(self) -> bool:
        """Whether it belongs to an encoder."""
        return self.path.startswith(ENCODER)

    @property
    def linear(self) -> str:
        """'q_proj' where the row is the matrix of a layer's linear layer, else empty.

        The second ones of a model with an encoder have their place in front: 'cross_attn/q_proj', 'encoder/q_proj'.
        """
        if not (self.in_layer and self.path.endswith("/kernel")):
            return ""
        *_, parent, name, _ = self.path.split("/")
        return f"{ENCODER if self.in_encoder else ''}{'cross_attn/' if parent == 'cross_attn' else ''}{name}"

    @property
    def hf_module(self) -> str:
        """HF's name of the module that holds the tensor, which is what PEFT calls a linear layer by."""
        return self.hf.rpartition(".")[0]


@dataclass(frozen=True)
class Fused:
    """One stored tensor that holds several leaves: its rows are those of the leaves' own tensors, in turn.

    Args:
        hf: its name, as in `Row`.
        dims: as in `Row.hf_dims`, with a sum of one term for each leaf in the first group: '(H h + K h + K h) D' for q,
            k and v below each other, '(H (1 + 1 + 1) h) D' for the three of each head together (BLOOM),
            '(K (G + 1 + 1) h) D' for each kv head with its G = H / K query heads (Falcon).
        paths: the leaves, each with a row of its own, whose `hf` names what the part is called by itself.
    """

    hf: str
    dims: str
    paths: tuple[str, ...]


@dataclass(frozen=True)
class PerExpert:
    """How files hold the matrices of a layer that is divided into experts: each expert's by itself.

    Args:
        names: path of the layer's linear layer ('mlp/up_proj') -> name of an expert's matrix, with '{}' for the number
            of the layer and for that of the expert.
        stacked: what files of some versions have instead: a tensor [E, rows, columns] of all experts of a layer, by its
            name -> the linear layers whose rows it holds for each expert, in turn.
    """

    names: Mapping[str, str]
    stacked: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """Decoders of one Hugging Face architecture.

    Args:
        name: `DecoderSpec.family`, and `model_type` in config.json unless that is another.
        architecture: in config.json.
        model_type: in config.json, where another family has it too.
        is_config: whether a config.json is this family's, where another has the same names.
        defaults: what a key that is not in a config.json means, where transformers' configuration class says so.
        read: config.json, with the defaults, to the spec.
        write: the keys that config.json has beyond those of every family.
        rows: the name table, in the order of HF's files.
        fused: the stored tensors that hold several leaves.
        experts: how files hold experts, in a family whose models come with them; their config.json says which.
        aliases: other names of the architecture, and of `model_type` in lower case.
        refused: architectures that are not read, though a part of them may be of this family -> why, and the way out.
        keys: key of config.json that most families share -> what this family calls it; empty where it has none.
        old_keys: what files of some versions call a key -> the key that most families share.
        reads: keys of `common.UNREAD` that this family's `read` honours.
        renamed: pattern of a tensor's name that files of some versions have -> the name in `rows` (for `re.sub`).
        in_transformers: whether transformers has the architecture; else it comes with code in its repository.
        copies: tensors that files may have -> those that they repeat.
        unused: patterns of tensors that files may have and nothing is computed with.
        head_by_tensors: whether the head is tied is told by the tensors, whatever config.json says: it has one of its
            own where the files have one that differs from the embedding.
        shapes: published models by name.
    """

    name: str
    architecture: str
    defaults: Mapping[str, Any]
    read: Callable[[dict[str, Any]], DecoderSpec]
    write: Callable[[DecoderSpec], dict[str, Any]]
    rows: tuple[Row, ...]
    fused: tuple[Fused, ...] = ()
    experts: PerExpert | None = None
    aliases: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)
    old_keys: Mapping[str, str] = field(default_factory=dict)
    reads: frozenset[str] = frozenset()
    renamed: Mapping[str, str] = field(default_factory=dict)
    in_transformers: bool = True
    copies: Mapping[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    head_by_tensors: bool = False
    shapes: Mapping[str, DecoderSpec] = field(default_factory=dict)
    model_type: str = ""
    is_config: Callable[[Mapping[str, Any]], bool] = lambda _: True

    @property
    def linears(self) -> dict[str, Row]:
        """The matrices of a layer's linear layers by the layer's name."""
        return {row.linear: row for row in self.rows if row.linear}
