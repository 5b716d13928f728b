"""Adapters of linear layers that Hugging Face stores as one, against PEFT: training, files, merging."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from convert.commands.main import main
from convert.source import open_adapter, open_model
from convert.transforms.merge import MergedSource
from jaxlm.config import LoraConfig
from jaxlm.errors import UserError
from jaxlm.models.adapters import hf_linears, linears_of, resolve_lora
from jaxlm.models.decoder import Decoder
from jaxlm.nn.lora import LoraSpec
from jaxlm.spec import DecoderSpec
from jaxlm.weights.names import adapter_shapes, fused_factors, peft_entries
from jaxlm.weights.native.write import write_adapter
from tests.models import small
from tests.models.adapted import InMemory
from tests.models.compare import assert_trees_close

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file  # noqa: E402

# The adapters by the name that a fused matrix has in the family.
ADAPTERS: dict[str, Callable[[str], dict[str, Any]]] = {
    "lora": lambda _: {},
    "rslora": lambda fused: {
        "use_rslora": True,
        "rank_pattern": {fused: 3},
        "alpha_pattern": {rf".*\.1\..*\.{fused}": 5},
    },
    "dora": lambda fused: {"use_dora": True, "rank_pattern": {rf".*\.2\..*\.{fused}": 4}},
}
FAMILY = "phi3"
CASES = [
    (FAMILY, "rslora"),
    ("bloom", "dora"),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in [(FAMILY, "lora"), (FAMILY, "dora")]),
    *(pytest.param(name, "dora", marks=pytest.mark.slow) for name in ("falcon", "glm")),
]
IDS = np.random.default_rng(1).integers(0, 37, (2, 12)).astype(np.int32)


def build(family: str, name: str, directory: Path) -> Any:
    """A PEFT model in which every factor matters, saved with its base."""
    base = small.hf_model(family)
    linears = hf_linears(small.small_spec(family)).values()
    fused = next(linear.hf_module.rpartition(".")[2] for linear in linears if linear.fused is not None)
    base.save_pretrained(directory / "base")
    torch.manual_seed(1)
    values = {"r": 2, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | ADAPTERS[name](fused)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, peft.LoraConfig(**values))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(directory / "peft")
    return model.eval()


def factors(model: Any, spec: DecoderSpec, specs: dict[str, LoraSpec], grad: bool = False) -> dict[str, Any]:
    """The factors of a PEFT model (or their gradients) as the collection `lora`."""
    arrays = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            usual = name.replace(".default", "").replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
            arrays[usual] = (parameter.grad if grad else parameter).detach().numpy()
    for fused in fused_factors(spec, specs):
        whole = arrays.pop(fused.name)
        groups = whole.reshape(fused.repeats, sum(fused.rows), *whole.shape[1:])
        parts = np.split(groups, np.cumsum(fused.rows)[:-1], axis=1)
        arrays |= {e.name: p.reshape(-1, *whole.shape[1:]) for e, p in zip(fused.parts, parts, strict=True)}
    leaves = {path: np.zeros(shape, np.float32) for path, shape in adapter_shapes(spec, specs).items()}
    for entry in peft_entries(spec, specs):
        value = arrays.pop(entry.name).reshape(entry.layout.view).transpose(entry.layout.perm)
        leaves[entry.path][(entry.layer, *(slice(0, size) for size in value.shape))] = value
    assert not arrays
    return traverse_util.unflatten_dict(leaves, sep="/")


def base_tree(directory: Path) -> Any:
    source = open_model(directory / "base")
    return traverse_util.unflatten_dict({path: source.read(path, ()) for path in source.leaves}, sep="/")


def torch_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model(torch.from_numpy(IDS).long()).logits.float().numpy())


def logits(spec: DecoderSpec, specs: dict[str, LoraSpec], base: Any, lora: Any) -> np.ndarray:
    variables = {"params": base, "lora": lora} if lora else {"params": base}
    return np.asarray(jax.jit(Decoder(spec, specs).apply)(variables, IDS))


def run(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


@pytest.mark.parametrize(("family", "name"), CASES)
def test_a_training_step_is_that_of_peft(family: str, name: str, tmp_path: Path) -> None:
    """Logits, and the gradients of the shared factor, of each part's own one, and of DoRA's magnitudes."""
    model = build(family, name, tmp_path)
    opened = open_adapter(tmp_path / "peft", open_model(tmp_path / "base"))
    spec, specs = opened.config, resolve_lora(opened.config, opened.lora, opened.layers)
    lora = factors(model, spec, specs)
    tokens = torch.from_numpy(IDS).long()
    expected = model(tokens).logits
    flat = expected[:, :-1].reshape(-1, expected.shape[-1])
    torch.nn.functional.cross_entropy(flat, tokens[:, 1:].reshape(-1), reduction="sum").backward()
    base, decoder = base_tree(tmp_path), Decoder(spec, specs, remat="none")

    def loss(lora: Any) -> tuple[jax.Array, jax.Array]:
        logits = decoder.apply({"params": base, "lora": lora}, IDS)
        log_probs = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.take_along_axis(log_probs, IDS[:, 1:, None], -1).sum(), logits

    (_, found), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(lora)
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=0, atol=2e-5)
    assert_trees_close(grads, factors(model, spec, specs, grad=True), 1e-4)
    whole = next(linear for linear in hf_linears(spec).values() if linear.fused is not None)
    layers = grads["layers"][whole.path.split("/")[0]]
    assert set(layers[whole.name]) == {"lora_A"}
    assert not any("lora_A" in layers[row.linear] for row in whole.rows)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_files_there_and_back_and_merged(family: str, name: str, tmp_path: Path) -> None:
    model = build(family, name, tmp_path)
    run("peft-to-jax", tmp_path / "peft", tmp_path / "jax", "--base", tmp_path / "base")
    run("jax-to-peft", tmp_path / "jax", tmp_path / "back")
    before, after = (load_file(tmp_path / each / "adapter_model.safetensors") for each in ("peft", "back"))
    assert before.keys() == after.keys() and all(torch.equal(value, after[key]) for key, value in before.items())
    configs = [json.loads((tmp_path / each / "adapter_config.json").read_text()) for each in ("peft", "back")]
    assert configs[0] == configs[1]
    # As after training: without the configuration that the adapter came with.
    (tmp_path / "jax" / "jaxlm" / "adapter_config.json").unlink()
    run("jax-to-peft", tmp_path / "jax", tmp_path / "fresh")
    loaded = peft.PeftModel.from_pretrained(small.hf_model(family), tmp_path / "fresh").eval()
    np.testing.assert_allclose(torch_logits(loaded), torch_logits(model), rtol=0, atol=1e-6)
    for adapter in ("peft", "jax"):
        run("merge", tmp_path / "base", tmp_path / adapter, tmp_path / f"merged-{adapter}")
    a, b = (load_file(tmp_path / f"merged-{each}" / "model.safetensors") for each in ("peft", "jax"))
    assert all(torch.equal(value, b[key]) for key, value in a.items())
    for key, value in model.merge_and_unload().state_dict().items():
        if key in a or key != "lm_head.weight":  # a tied head is not stored
            assert torch.allclose(a[key], value, atol=1e-6, rtol=0), key


PARTS: dict[str, LoraConfig] = {
    "some": LoraConfig(rank=2, alpha=6.0, targets=("q_proj", "v_proj", "up_proj", "o_proj")),
    "ranks": LoraConfig(
        rank=2,
        alpha=6.0,
        targets=("q_proj", "k_proj", "down_proj"),
        rank_pattern={"k_proj": 1, "layers.1.self_attn.q_proj": 4},
        alpha_pattern={"layers.0.self_attn.k_proj": 1.5, "down_proj": 2.0},
    ),
    "rslora": LoraConfig(rank=3, alpha=4.0, targets=("k_proj", "v_proj"), rslora=True),
    "dora": LoraConfig(rank=2, alpha=6.0, targets=("gate_proj", "up_proj", "o_proj"), dora=True),
    "layers": LoraConfig(rank=2, alpha=6.0, targets=("layers.1.self_attn.q_proj", "layers.2.self_attn.v_proj")),
}


@pytest.mark.parametrize(
    ("family", "name"),
    [
        (FAMILY, "some"),
        (FAMILY, "rslora"),
        ("bloom", "ranks"),
        *(pytest.param(FAMILY, name, marks=pytest.mark.slow) for name in ("ranks", "dora", "layers")),
    ],
)
def test_an_adapter_of_parts_is_one_of_the_whole_to_peft(family: str, name: str, tmp_path: Path) -> None:
    """Another linear layer of PEFT's, of all ranks together, which computes the same; merging gives the same too."""
    small.hf_model(family).save_pretrained(tmp_path / "base")
    base, spec = base_tree(tmp_path), small.small_spec(family)
    adapter = InMemory(spec, PARTS[name])
    (tmp_path / "jax").mkdir()
    write_adapter(adapter, tmp_path / "jax", str(tmp_path / "base"), lambda _: None)
    expected = logits(spec, adapter.specs, base, adapter.tree)
    assert np.abs(expected - logits(spec, {}, base, None)).max() > 0.03
    run("jax-to-peft", tmp_path / "jax", tmp_path / "peft")
    loaded = peft.PeftModel.from_pretrained(small.hf_model(family), tmp_path / "peft").eval()
    np.testing.assert_allclose(torch_logits(loaded), expected, rtol=0, atol=2e-5)
    source = open_model(tmp_path / "base")
    opened = open_adapter(tmp_path / "peft", source)
    assert not any(linears_of(spec)[target].part_of for target in resolve_lora(spec, opened.lora, opened.layers))
    merged = [MergedSource(source, each) for each in (opened, open_adapter(tmp_path / "jax", source))]
    for path in source.leaves:
        np.testing.assert_allclose(merged[0].read(path, ()), merged[1].read(path, ()), rtol=0, atol=1e-6)
    if name == "some":
        # One scale: alpha / rank as written, to the bit.
        scales = resolve_lora(spec, opened.lora)["qkv_proj"]
        assert scales.ranks == (4, 4, 4) and scales.scales == adapter.specs["q_proj"].scales


def test_an_adapter_of_gate_and_up_follows_the_neurons_into_experts(tmp_path: Path) -> None:
    """`moefy` moves neurons, which are rows of the second factor: there and back, and merged, it is PEFT's."""
    model = build(FAMILY, "dora", tmp_path)
    options = ["--experts", 4, "--router", "activation", "--top-k", "text=4"]
    run("moefy", tmp_path / "base", tmp_path / "moe", *options)
    run("peft-to-jax", tmp_path / "peft", tmp_path / "jax", "--base", tmp_path / "moe")
    run("jax-to-peft", tmp_path / "jax", tmp_path / "back")
    before, after, moved = (
        load_file(tmp_path / "peft" / "adapter_model.safetensors"),
        load_file(tmp_path / "back" / "adapter_model.safetensors"),
        open_adapter(tmp_path / "jax").read("layers/mlp/up_proj/lora_B", ()),
    )
    assert before.keys() == after.keys() and all(torch.equal(value, after[key]) for key, value in before.items())
    assert not np.array_equal(
        moved, open_adapter(tmp_path / "peft", open_model(tmp_path / "base")).read("layers/mlp/up_proj/lora_B", ())
    )
    adapter = open_adapter(tmp_path / "jax")
    lora = traverse_util.unflatten_dict({path: adapter.read(path, ()) for path in adapter.leaves}, sep="/")
    source = open_model(tmp_path / "moe")
    moe = traverse_util.unflatten_dict({path: source.read(path, ()) for path in source.leaves}, sep="/")
    specs = resolve_lora(source.config, adapter.lora, adapter.layers)
    np.testing.assert_allclose(logits(source.config, specs, moe, lora), torch_logits(model), rtol=0, atol=2e-5)
    run("merge", tmp_path / "moe", tmp_path / "jax", tmp_path / "merged")
    run("demoefy", tmp_path / "merged", tmp_path / "dense", "--format", "hf")
    merged = load_file(tmp_path / "dense" / "model.safetensors")
    for key, value in model.merge_and_unload().state_dict().items():
        assert torch.allclose(merged[key], value, atol=1e-6, rtol=0), key


def test_dora_of_some_parts_is_not_written_to_peft(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small.hf_model(FAMILY).save_pretrained(tmp_path / "base")
    adapter = InMemory(small.small_spec(FAMILY), LoraConfig(rank=2, targets=("q_proj", "v_proj"), dora=True))
    (tmp_path / "jax").mkdir()
    write_adapter(adapter, tmp_path / "jax", str(tmp_path / "base"), lambda _: None)
    assert main(["jax-to-peft", str(tmp_path / "jax"), str(tmp_path / "peft")]) != 0
    message = capsys.readouterr().err
    assert "DoRA on q_proj, v_proj, not on k_proj" in message and "qkv_proj as a whole" in message


def test_parts_that_share_an_adapter_drop_the_same_inputs_and_start_from_one_factor() -> None:
    spec = small.small_spec(FAMILY)
    specs = resolve_lora(spec, LoraConfig(rank=2, dropout=0.5, targets=("all-linear",)))
    assert list(specs) == list(hf_linears(spec)) == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    dropped = []

    class Counted(nn.Module):
        rate: float

        def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
            dropped.append(self.path)
            return x

    decoder = Decoder(spec, specs, remat="none")
    variables = nn.unbox(jax.jit(decoder.init)(jax.random.key(0), IDS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxlm.nn.linear.nn.Dropout", Counted)
        jax.eval_shape(lambda v: decoder.apply(v, IDS, deterministic=False), variables)
    assert sorted(path[-2] for path in set(dropped)) == sorted(specs)
    lora = variables["lora"]["layers"]
    first = np.asarray(lora["self_attn"]["qkv_proj"]["lora_A"])
    assert first.shape == (3, 24, 2)
    assert 0.15 < np.abs(first).max() <= 24**-0.5  # kaiming_uniform(a=sqrt(5)): 1 / sqrt(D)
    assert not np.array_equal(first[0], first[1])
    assert not np.any(lora["self_attn"]["q_proj"]["lora_B"])


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (("fc1",), r"'fc1' is not a linear layer of .*\(qkv_proj, o_proj, gate_up_proj, down_proj\)"),
        (("gate_up_prj",), "did you mean 'gate_up_proj'"),
        (("qkv_proj", "q_proj"), "q_proj is a part of qkv_proj, which is targeted too"),
        (("layers.3.self_attn.qkv_proj",), "'layers.3.self_attn.qkv_proj' is not a linear layer"),
    ],
)
def test_targets_that_are_refused(targets: tuple[str, ...], words: str) -> None:
    with pytest.raises(UserError, match=words):
        resolve_lora(small.small_spec(FAMILY), LoraConfig(targets=targets))
