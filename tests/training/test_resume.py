"""What may differ between a run and the checkpoint it goes on from: keys that are new, other defaults, other bases."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
import operator
import types
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from jaxlm.config import (
    DataConfig,
    LoraConfig,
    ModalityConfig,
    ModelConfig,
    MoeRunConfig,
    OptimizerConfig,
    RunConfig,
    SourceConfig,
    TokenizerConfig,
    to_dict,
)
from jaxlm.data.loader import Data, build_data
from jaxlm.errors import UserError
from jaxlm.models.version1 import recorded
from jaxlm.spec import DecoderSpec, ExpertsSpec, NormSpec, uniform_decoder
from jaxlm.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from jaxlm.training import resume
from jaxlm.training.resume import Inputs, check_inputs, check_settings
from jaxlm.weights.fingerprint import base_fingerprint

MODEL = uniform_decoder(
    "llama", vocab_size=40, hidden_size=32, intermediate_size=48, num_layers=5, num_heads=4, num_kv_heads=2, head_dim=8
)
SHAPES = {
    "embed_tokens/embedding": (40, 32),
    "layers/self_attn/q_proj/kernel": (5, 32, 4, 8),
    "layers/mlp/down_proj/kernel": (5, 48, 32),
    "layers/input_layernorm/scale": (5, 32),
    "layers/post_attention_layernorm/scale": (5, 32),
    "norm/scale": (32,),
}
CHECKPOINT = Path("out/checkpoints/4")


class Base:
    """A model in memory that counts what is read of it."""

    def __init__(self, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.arrays = {path: random.normal(size=shape).astype(np.float32) for path, shape in SHAPES.items()}
        self.leaves = self.arrays
        self.read_bytes = 0

    def read(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        found = self.arrays[path][index]
        self.read_bytes += found.nbytes
        return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("resume")
    texts = [f"granite {n} and basalt {n * n}" for n in range(60)]
    (made / "text.txt").write_text("\n".join(texts))
    (made / "data.json").write_text(json.dumps([{"text": text} for text in texts]))
    train_sentencepiece([made / "text.txt"], 300, made / "tokenizer")
    return made


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder / "tokenizer")


def config_of(folder: Path, **changes: Any) -> RunConfig:
    data = DataConfig(
        train=(SourceConfig(path=str(folder / "data.json")),), **{"sequence_length": 32, **changes.pop("data", {})}
    )
    return RunConfig(model=ModelConfig(path=str(folder / "base")), data=data, **{"lora": LoraConfig(), **changes})


def data_of(config: RunConfig, tokenizer: Tokenizer) -> Data:
    return build_data(config.data, tokenizer, seed=config.train.seed, vocab_size=1000, max_positions=64)


def inputs_of(config: RunConfig, tokenizer: Tokenizer, base: Base | None = None, model: DecoderSpec = MODEL) -> Inputs:
    return Inputs(config, data_of(config, tokenizer), model, base)


def written(config: RunConfig, inputs: Inputs) -> dict[str, bytes]:
    """The small files of a checkpoint of today."""
    content = {"model": inputs.model.to_dict()}
    run = yaml.safe_dump(to_dict(config)).encode()
    return {"run.yaml": run, "fingerprints.json": inputs.to_json(), "model.json": json.dumps(content).encode()}


def written_by_version_1(config: RunConfig, inputs: Inputs, *absent: str) -> dict[str, bytes]:
    """Those of the first version, worked out as its code did; keys in `absent` did not exist."""
    values = to_dict(config)
    shape = recorded(inputs.model)
    for key in absent:
        section, _, name = key.partition(".")
        del (shape if section == "shape" else values[section])[name]
    data = {**values["data"], "workers": 0, "seed": config.train.seed}
    digest = hashlib.sha256(json.dumps(data, sort_keys=True).encode())
    for examples in (inputs.data.train, inputs.data.validation):
        digest.update((examples.digest() if examples is not None else "none").encode())
    prints = {"data": digest.hexdigest()}
    if inputs.base is not None:
        base = hashlib.sha256(json.dumps(shape, sort_keys=True).encode())
        for leaf in ("norm/scale", "layers/input_layernorm/scale", "layers/post_attention_layernorm/scale"):
            base.update(inputs.base.read(leaf, ()).tobytes())
        prints["base"] = base.hexdigest()
    return {
        "run.yaml": yaml.safe_dump(values).encode(),
        "fingerprints.json": json.dumps(prints).encode(),
        "model.json": json.dumps({"model": shape}).encode(),
    }


def check(files: dict[str, bytes], config: RunConfig, inputs: Inputs) -> None:
    check_settings(files, config, CHECKPOINT)
    check_inputs(files, inputs, CHECKPOINT)


def test_a_checkpoint_of_version_1_goes_on(folder: Path, tokenizer: Tokenizer) -> None:
    config = config_of(folder)
    inputs = inputs_of(config, tokenizer, Base())
    absent = ("optimizer.power", "train.local_every", "data.too_long", "lora.per_expert", "shape.initializer_range")
    for files in (written_by_version_1(config, inputs), written_by_version_1(config, inputs, *absent)):
        check(files, config, inputs)
    changed = dataclasses.replace(config, optimizer=OptimizerConfig(power=2.0))
    with pytest.raises(UserError, match=r"out/checkpoints/4 was .* \(optimizer.power: was 1.0, is 2.0\)"):
        check(files, changed, inputs)
    with pytest.raises(UserError, match=r"the base model at model.path is not what this run began with"):
        check(files, config, inputs_of(config, tokenizer, Base(1)))
    grown = MODEL.with_feed_forward(bias=True)
    with pytest.raises(UserError, match=r"base model .* \(its feed_forward\.bias: was False, is True\)"):
        check(files, config, inputs_of(config, tokenizer, Base(), grown))


def test_a_key_of_today_is_new_tomorrow(folder: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings, data and model get new keys with defaults: nothing changes; those who set them are told."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class NewOptimizer(OptimizerConfig):
        gamma: float = 0.5

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class NewData(DataConfig):
        shuffle_window: int = 7

    @dataclasses.dataclass(frozen=True)
    class NewModel(DecoderSpec):
        logit_cap: float | None = None

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class NewRun(RunConfig):
        optimizer: NewOptimizer = dataclasses.field(default_factory=NewOptimizer)
        data: NewData = dataclasses.field(default_factory=NewData)

    def new(**changes: Any) -> tuple[RunConfig, Inputs]:
        data = NewData(train=old.data.train, sequence_length=32, **changes.pop("data", {}))
        config = NewRun(model=old.model, lora=old.lora, data=data, optimizer=NewOptimizer(**changes))
        return config, inputs_of(
            config,
            tokenizer,
            Base(),
            NewModel(**{item.name: getattr(MODEL, item.name) for item in dataclasses.fields(MODEL)}),
        )

    old = config_of(folder)
    files = written(old, inputs_of(old, tokenizer, Base()))
    monkeypatch.setattr(resume, "RunConfig", NewRun)
    monkeypatch.setattr(resume.typing, "get_type_hints", hints_with(locals()))
    check(files, *new())
    with pytest.raises(UserError, match=r"optimizer.gamma: was 0.5, is 0.25"):
        check(files, *new(gamma=0.25))
    with pytest.raises(UserError, match=r"data.shuffle_window: was 7, is 8"):
        check(files, *new(data={"shuffle_window": 8}))
    # And back: an older version passes over keys it does not know where they had their defaults.
    default, special = (written(*new(**more)) for more in ({}, {"gamma": 0.25}))
    monkeypatch.undo()
    check(default, old, inputs_of(old, tokenizer, Base()))
    with pytest.raises(UserError, match=r"optimizer.gamma: was 0.25, which this version does not know"):
        check(special, old, inputs_of(old, tokenizer, Base()))


def test_a_new_field_in_any_recorded_dataclass_stops_no_run(
    folder: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every dataclass of the run's configuration and of the model's spec grows by a field at once."""
    experts = ExpertsSpec(4, "learned", ("text", "salt"), ((30, 40),), (2, 1))
    model = MODEL.with_feed_forward(experts=experts)
    old = config_of(
        folder,
        moe=MoeRunConfig(experts=4),
        tokenizer=TokenizerConfig(modalities=(ModalityConfig(preset="smiles"),)),
        data={"validation": (SourceConfig(path=str(folder / "data.json")),)},
    )
    files = written(old, inputs_of(old, tokenizer, Base(), model))
    config, spec = Grown(7), Grown(None)
    new, new_model = config.value(old), spec.value(model)
    monkeypatch.setattr(resume, "RunConfig", config.type(RunConfig))
    check(files, new, inputs_of(new, tokenizer, Base(), new_model))
    recorded_classes = {cls.__name__ for cls in (*config.classes, *spec.classes)}
    assert recorded_classes >= {"RunConfig", "SourceConfig", "ModalityConfig", "LoraConfig", "MoeRunConfig"}
    assert recorded_classes >= {"DecoderSpec", "LayerSpec", "AttentionSpec", "RopeSpec", "ExpertsSpec", "NormSpec"}
    # The comparison does see the fields: one that is set is named, wherever it is.
    values = to_dict(new)
    for keys in (["optimizer"], ["lora"], ["moe"], ["tokenizer"], ["tokenizer", "modalities", 0]):
        changed = copy.deepcopy(values)
        section = changed
        for key in keys:
            section = section[key]
        assert section["made_up"] == 7
        section["made_up"] = 8
        other = files | {"run.yaml": yaml.safe_dump(changed).encode()}
        with pytest.raises(UserError, match=rf"{keys[0]}.*made_up: was 8, is 7"):
            check_settings(other, new, CHECKPOINT)


class Grown:
    """Makes subclasses of dataclasses that have one field more, `made_up`, at every level."""

    def __init__(self, default: int | None) -> None:
        self.default = default
        self.classes: dict[type, type] = {}

    def type(self, cls: Any) -> Any:
        if cls not in self.classes:
            hints, fields = typing.get_type_hints(cls), []
            for field in dataclasses.fields(cls):
                options: dict[str, Any] = {"compare": field.compare}
                if field.default_factory is not dataclasses.MISSING:
                    factory: Any = field.default_factory
                    options["default_factory"] = self.type(factory) if dataclasses.is_dataclass(factory) else factory
                elif field.default is not dataclasses.MISSING:
                    options["default"] = self.value(field.default)
                fields.append((field.name, self._hint(hints[field.name]), dataclasses.field(**options)))
            made_up = ("made_up", int | None, dataclasses.field(default=self.default))
            names = [field.name for field in dataclasses.fields(cls)]

            def equal(mine: Any, other: Any) -> bool:  # as if the field had been added to the class itself
                return isinstance(other, cls) and all(getattr(mine, name) == getattr(other, name) for name in names)

            namespace = {"__eq__": equal, "__hash__": cls.__hash__}
            self.classes[cls] = dataclasses.make_dataclass(
                cls.__name__, [*fields, made_up], bases=(cls,), namespace=namespace, frozen=True, kw_only=True, eq=False
            )
        return self.classes[cls]

    def value(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(self.value, value))
        if not dataclasses.is_dataclass(value):
            return value
        values = {field.name: self.value(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return self.type(type(value))(**values)

    def _hint(self, hint: Any) -> Any:
        if dataclasses.is_dataclass(hint):
            return self.type(hint)
        inner = tuple(map(self._hint, typing.get_args(hint)))
        if typing.get_origin(hint) in (typing.Union, types.UnionType):
            return functools.reduce(operator.or_, inner)
        return tuple[inner] if typing.get_origin(hint) is tuple else hint


def hints_with(names: dict[str, Any]) -> Any:
    """`typing.get_type_hints` that finds classes of a function too."""
    import typing

    original = typing.get_type_hints
    return lambda cls, **more: original(cls, localns=names, **more)


def test_tokens_decide_and_not_how_they_were_asked_for(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = config_of(folder)
    inputs = inputs_of(config, tokenizer)
    # The same file by another way, and a setting that makes no difference to these records: the same tokens.
    copy = tmp_path / "data.json"
    copy.write_bytes((folder / "data.json").read_bytes())
    moved = dataclasses.replace(
        config, data=dataclasses.replace(config.data, train=(SourceConfig(path=str(copy)),), too_long="split")
    )
    for files in (written(config, inputs), written_by_version_1(config, inputs)):
        check(files, moved, inputs_of(moved, tokenizer))
        unended = dataclasses.replace(config, data=dataclasses.replace(config.data, add_eos=False))
        with pytest.raises(
            UserError, match=r"the training data are not .* \(data.add_eos: was (?:True|None), is False\)"
        ):
            check(files, unended, inputs_of(unended, tokenizer))
        longer = dataclasses.replace(config, data=dataclasses.replace(config.data, sequence_length=40))
        with pytest.raises(UserError, match=r"data.sequence_length: was 32, is 40"):
            check(files, longer, inputs_of(longer, tokenizer))
        twice = dataclasses.replace(config.data.train[0], weight=2.0)
        weighted = dataclasses.replace(config, data=dataclasses.replace(config.data, train=(twice,)))
        with pytest.raises(UserError, match=r"data.train.weights: was \[1.0\], is \[2.0\]"):
            check(files, weighted, inputs_of(weighted, tokenizer))
    text = json.loads(copy.read_text())
    text[3]["text"] += " tuff"
    copy.write_text(json.dumps(text))
    with pytest.raises(UserError, match=r"the training data are not .* \(data.too_long.*data.train\[0\].path"):
        check(files, moved, inputs_of(moved, tokenizer))


def test_paths_may_be_written_otherwise(
    folder: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))
    relative = dataclasses.replace(config_of(folder), model=ModelConfig(path="base"), lora=None)
    files = written(relative, inputs_of(relative, tokenizer))
    for path in (str(folder / "base"), "~/base", "./base"):
        config = dataclasses.replace(relative, model=ModelConfig(path=path))
        check(files, config, inputs_of(config, tokenizer))
    config = dataclasses.replace(relative, model=ModelConfig(path="other"))
    with pytest.raises(UserError, match=r"model.path: was 'base', is 'other'"):
        check(files, config, inputs_of(config, tokenizer))
    # Of an adapter's base the weights are compared: where they lie is the user's affair.
    adapter = dataclasses.replace(relative, lora=LoraConfig())
    files = written(adapter, inputs_of(adapter, tokenizer, Base()))
    config = dataclasses.replace(adapter, model=ModelConfig(path="other"))
    check(files, config, inputs_of(config, tokenizer, Base()))
    with pytest.raises(UserError, match=r"base model .* \(model.path: was 'base', is 'other'\)"):
        check(files, config, inputs_of(config, tokenizer, Base(1)))


@pytest.mark.parametrize("path", SHAPES)
def test_base_fingerprint_sees_every_leaf(path: str) -> None:
    one = Base()
    known = base_fingerprint(MODEL, one)
    assert base_fingerprint(MODEL, Base()) == known
    other = Base()
    # As an adapter of rank 1 that is merged, or training, changes a tensor.
    other.arrays[path] += np.float32(1e-3) * np.ones(SHAPES[path], np.float32)
    assert base_fingerprint(MODEL, other) != known
    assert base_fingerprint(dataclasses.replace(MODEL, norm=NormSpec(1e-6)), one) != known


def test_base_fingerprint_reads_little() -> None:
    """Of 65 billion parameters too: a few blocks of each leaf, and the norms."""

    class Huge:
        leaves = {path: np.broadcast_to(np.float32(1), shape) for path, shape in HUGE.items()}  # noqa: RUF012
        read_bytes = 0

        def read(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
            found = np.ascontiguousarray(self.leaves[path][index])
            self.read_bytes += found.nbytes
            return found

    huge = Huge()
    base_fingerprint(MODEL, huge)
    assert huge.read_bytes < 500_000


HUGE = {
    "embed_tokens/embedding": (32000, 8192),
    "layers/self_attn/q_proj/kernel": (80, 8192, 64, 128),
    "layers/mlp/up_proj/kernel": (80, 8192, 22016),
    "layers/input_layernorm/scale": (80, 8192),
    "norm/scale": (8192,),
}
