"""What every family can do, with a small model of each: the cells of docs/models.md."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.commands.main import main
from convert.source import open_adapter, open_model
from jaxlm.cli.plan import model_shape
from jaxlm.config import Decoding, LoraConfig, MeshConfig, OptimizerConfig
from jaxlm.config.files import load_run_yaml
from jaxlm.devices.chips import parse_topology
from jaxlm.devices.mesh import make_mesh, put_batch, use_mesh
from jaxlm.errors import UserError
from jaxlm.inference.generator import Generator
from jaxlm.inference.model import load_weights, unstack
from jaxlm.models.adapters import resolve_lora
from jaxlm.models.decoder import Decoder, with_saved_modules
from jaxlm.models.families import FAMILIES
from jaxlm.models.unrolled import prefill
from jaxlm.nn.weight_types import Int8Weight, StoredWeight
from jaxlm.planning.compiled import compile_step
from jaxlm.planning.memory import estimate_memory
from jaxlm.spec import DecoderSpec
from jaxlm.training.objectives.cross_entropy import CrossEntropy
from jaxlm.training.optimizer import make_optimizer, make_schedule
from jaxlm.training.setup import set_up
from jaxlm.training.state import Initializer, count
from jaxlm.training.step import make_train_step
from jaxlm.weights.leaves import LeafReader
from jaxlm.weights.native.write import write_adapter
from tests.convert.tiny import make_adapter
from tests.models import matrix
from tests.models.adapted import InMemory
from tests.models.compare import TreeSource, random_tree
from tests.models.parity import check_family, random_model
from tests.models.small import OWN, SMALL, WITH_ENCODER, hf_class, hf_model, small_spec, tree_of

DECODERS = [name for name in FAMILIES if name not in WITH_ENCODER]  # the others are in test_t5.py
every_family = pytest.mark.parametrize("family", DECODERS)
# One that is stored as transformers computes with it, and one with linear layers that are stored as one.
_QUICK = ("llama", "bloom")
# Of most ways to compute something that LLaMA computes otherwise, one family; Gemma 3, the dearest, is slow.
_TELLING = (*_QUICK, "opt", "falcon", "glm", "chatglm_6b")


# Those whose tests are run with each change; what is not a family's own is tried with the others by night.
_OFTEN = (*_TELLING, "gemma3_text", "qwen3_moe")


def _slow_but(names: Sequence[str], often: Sequence[str]) -> pytest.MarkDecorator:
    marked = [
        name if name in names else pytest.param(name, marks=pytest.mark.slow if name in often else pytest.mark.nightly)
        for name in DECODERS
    ]
    return pytest.mark.parametrize("family", marked)


telling_families = _slow_but(_TELLING, DECODERS)
every_family_but_slowly = _slow_but(_QUICK, _OFTEN)
every_family_slowly = _slow_but((), _OFTEN)
Settle = Callable[..., None]


@pytest.fixture
def settle(family: str, request: pytest.FixtureRequest, tmp_path: Path) -> Settle:
    """Called with the capabilities that hold, or with one and the words of a refusal (see `matrix.settle`)."""

    def settled(*capabilities: str, refused: str = "") -> None:
        matrix.settle(request, family, *capabilities, refused=refused.replace(f"{tmp_path}/", ""))

    return settled


def run(*words: object) -> None:
    """A verb of `convert`; UserError with what it says when it fails."""
    import contextlib
    import io

    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        status = main([str(word) for word in words])
    if status:
        raise UserError(said.getvalue().strip().splitlines()[-1])


def plain(family: str) -> str:
    return next(iter({**SMALL, **OWN}[family]))


def tree_from(source: LeafReader) -> dict[str, Any]:
    """All leaves of a source as a tree, float32."""
    tree: dict[str, Any] = {}
    for path in source.leaves:
        *parents, name = path.split("/")
        at = tree
        for parent in parents:
            at = at.setdefault(parent, {})
        at[name] = source.read(path, ()).astype(np.float32)
    return tree


@every_family
def test_files_there_and_back_are_bit_equal(family: str, tmp_path: Path, settle: Settle) -> None:
    """config.json as transformers reads it, and every tensor."""
    hf_model(family, dtype="bfloat16").save_pretrained(tmp_path / "hf")
    run("hf-to-jax", tmp_path / "hf", tmp_path / "jax")
    run("jax-to-hf", tmp_path / "jax", tmp_path / "back")
    theirs, ours = (hf_class(family).from_pretrained(tmp_path / name) for name in ("hf", "back"))
    assert ours.config.to_diff_dict().keys() == theirs.config.to_diff_dict().keys()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert tensor.equal(ours.state_dict()[name]), name
    settle("convert")


def on_a_grid(module: Any) -> Any:
    """The model with every number rounded to a multiple of 1 / 1024, so that float32 holds sums and differences."""
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_((parameter * 1024).round() / 1024 + 0.0)  # -0 and 0 would be two
    return module


def check_deltas_and_verify(family: str, folder: Path) -> None:
    """A delta is PyTorch's difference; with it the base is the tuned model, which `verify` says, and of a change not.

    Raises:
        AssertionError: it is otherwise.
        UserError: a verb refuses.
    """
    torch = pytest.importorskip("torch")
    modules = {name: on_a_grid(hf_model(family, seed=seed)) for seed, name in enumerate(("base", "tuned"))}
    for name, module in modules.items():
        module.save_pretrained(folder / name)
    run("make-delta", folder / "base", folder / "tuned", folder / "delta")
    run("apply-delta", folder / "base", folder / "delta", folder / "back")
    base, tuned, delta, back = (
        hf_class(family).from_pretrained(folder / name, dtype="float32").state_dict()
        for name in ("base", "tuned", "delta", "back")
    )
    assert base.keys() == tuned.keys() == delta.keys() == back.keys()
    for name, tensor in tuned.items():
        assert tensor.equal(back[name]) and delta[name].equal(tensor - base[name]), name
    run("hf-to-jax", folder / "tuned", folder / "jax")
    assert main(["verify", str(folder / "jax"), str(folder / "back")]) == 0
    parameter = next(iter(modules["tuned"].parameters()))
    with torch.no_grad():
        parameter[0, 0] += 0.5
    modules["tuned"].save_pretrained(folder / "other")
    assert main(["verify", "--no-logits", str(folder / "jax"), str(folder / "other")]) == 1


def check_plan_and_inspect(family: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The number of parameters is PyTorch's, with which files it comes is told."""
    module = hf_model(family)
    module.save_pretrained(folder)
    wanted = sum(parameter.numel() for parameter in module.parameters())
    config = load_run_yaml(RUN, "the test")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, shape=None, path=str(folder)))
    setup = set_up(config, model_shape(config), parse_topology("v5e:2x2"))
    initializer = setup.initializer(setup.schedule(10))
    memory = estimate_memory(setup, initializer)
    assert count(initializer.params) == wanted and memory.peak > memory.parameters > 0
    assert main(["inspect", str(folder), "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["parameters"] == wanted
    assert main(["inspect", str(folder)]) == 0
    assert f"\n{FAMILIES[family].architecture}: L " in capsys.readouterr().out


@every_family_but_slowly
def test_plan_and_inspect(family: str, tmp_path: Path, settle: Settle, capsys: pytest.CaptureFixture[str]) -> None:
    check_plan_and_inspect(family, tmp_path, capsys)
    settle("plan")


@every_family_but_slowly
def test_deltas_and_verify(family: str, tmp_path: Path, settle: Settle) -> None:
    check_deltas_and_verify(family, tmp_path)
    settle("deltas", "verify")


@telling_families
def test_logits_gradients_and_greedy_tokens(family: str, settle: Settle) -> None:
    check_family(family, plain(family))
    settle("logits", "gradients", "generate")


def linears_of(module: Any) -> list[str]:
    """The names of the linear layers inside the layers, as PEFT takes them."""
    torch = pytest.importorskip("torch")
    names = [name for name, part in module.named_modules() if isinstance(part, torch.nn.Linear)]
    return sorted({name.split(".")[-1] for name in names if any(part.isdigit() for part in name.split("."))})


@telling_families
def test_an_adapter_of_peft(family: str, tmp_path: Path, settle: Settle) -> None:
    """On every linear layer: its logits, and its files there and back."""
    torch = pytest.importorskip("torch")
    from safetensors.numpy import load_file

    base = hf_model(family)
    base.save_pretrained(tmp_path / "hf")
    spec, params = small_spec(family), tree_of(dict(base.named_parameters()), small_spec(family))
    adapted = make_adapter(base, tmp_path / "peft", target_modules=linears_of(base))
    try:
        run("peft-to-jax", tmp_path / "peft", tmp_path / "jax", "--base", tmp_path / "hf")
    except UserError as error:
        settle("LoRA↔PEFT", refused=str(error))
        return
    run("jax-to-peft", tmp_path / "jax", tmp_path / "back")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "back"))
    assert before.keys() == after.keys()
    assert all(np.array_equal(value, after[name]) for name, value in before.items())
    adapter = open_adapter(tmp_path / "jax", open_model(tmp_path / "hf"))
    ids = np.random.default_rng(1).integers(0, spec.vocab_size, (2, 9)).astype(np.int32)
    with torch.no_grad():
        expected = adapted(torch.from_numpy(ids).long()).logits.numpy()
    model = Decoder(spec, resolve_lora(spec, adapter.lora, adapter.layers))
    found = jax.jit(model.apply)({"params": params, "lora": tree_from(adapter)}, ids)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    assert np.abs(found - jax.jit(Decoder(spec).apply)({"params": params}, ids)).max() > 1e-2
    settle("LoRA↔PEFT")


@every_family_slowly
def test_beams_and_int8(family: str, settle: Settle) -> None:
    """A search with penalties gives transformers' tokens; int8 gives the logits of the weights it stands for."""
    torch = pytest.importorskip("torch")
    module, spec, params = random_model(family, plain(family))
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    model = Decoder(spec)
    weights = jax.tree.map(jnp.asarray, unstack({"params": params}, spec))
    prompts = [[5, 9, 30, 7], [11, 3, 6, 20]]
    options: dict[str, Any] = dict(max_new_tokens=6, num_beams=3, repetition_penalty=1.2, length_penalty=0.5)
    answers = Generator(model, weights, mesh, [2]).generate(prompts, Decoding(**options))
    tokens = torch.tensor(prompts)
    more = dict(do_sample=False, eos_token_id=2, pad_token_id=0, early_stopping=False)
    with torch.no_grad():
        wanted = module.generate(tokens, attention_mask=torch.ones_like(tokens), **options, **more)[:, 4:].tolist()
    cut = [row[: row.index(2)] if 2 in row else row for row in wanted]
    assert [[*answer.ids] for (answer,) in answers] == cut
    settle("beams")

    small = load_weights(model, mesh, TreeSource(params), None, Int8Weight)
    rounded = jax.tree.map(
        lambda leaf: leaf.dense(jnp.float32) if isinstance(leaf, StoredWeight) else leaf,
        small,
        is_leaf=lambda leaf: isinstance(leaf, StoredWeight),
    )
    inputs = (jnp.asarray(prompts), jnp.array([4, 4]), 16)
    found, exact, float32 = (prefill(model, given, *inputs)[0] for given in (small, rounded, weights))
    np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-4 * np.abs(exact).max())
    assert 0 < np.abs(found - float32).max() < 0.2 * np.abs(float32).max()
    settle("int8")


@every_family_slowly
def test_experts(family: str, tmp_path: Path, settle: Settle) -> None:
    """Divided, with all experts in use: the dense model's logits, up to the order of sums; and dense again."""
    base = hf_model(family)
    base.save_pretrained(tmp_path / "hf")
    try:
        run("moefy", tmp_path / "hf", tmp_path / "moe", "--experts", "4", "--top-k", "text=4")
    except UserError as error:
        settle("experts", refused=str(error))
        return
    source = open_model(tmp_path / "moe")
    ids = np.random.default_rng(1).integers(0, 37, (2, 9)).astype(np.int32)
    spec = small_spec(family)
    dense = jax.jit(Decoder(spec).apply)({"params": tree_of(dict(base.named_parameters()), spec)}, ids)
    divided = jax.jit(Decoder(source.config, experts="loop").apply)({"params": tree_from(source)}, ids)
    np.testing.assert_allclose(divided, dense, rtol=1e-4, atol=1e-4)
    run("demoefy", tmp_path / "moe", tmp_path / "dense")
    before, after = open_model(tmp_path / "hf"), open_model(tmp_path / "dense")
    assert all(np.array_equal(before.read(path, ()), after.read(path, ())) for path in before.leaves)
    settle("experts")


STEPS = 5
# Of the optimizer below: where a gradient is near 0, rounding of 1e-6 moves a parameter by RATE / EPS of it at each
# step; a gradient that is wrong moves it by RATE.
RATE, EPS = 2e-2, 1e-4
BY_ROUNDING = STEPS * 1e-6 * RATE / EPS


@functools.cache
def trained(family: str, **sizes: int) -> tuple[list[float], Any]:
    """Losses of steps on one batch, and the parameters behind them.

    Args:
        sizes: of the mesh's axes.
    """
    return steps_on_one_batch(small_spec(family), None, None, {"fsdp": 1, **sizes})


def steps_on_one_batch(
    spec: DecoderSpec, lora: LoraConfig | None, params: Any, sizes: dict[str, int]
) -> tuple[list[float], Any]:
    """Losses of steps on one batch, and what was trained.

    Args:
        lora: what is trained; None: everything.
        params: the model's parameters; None: random ones.
        sizes: of the mesh's axes.
    """
    mesh = make_mesh(MeshConfig(**sizes), jax.devices()[: math.prod(sizes.values())])
    model = Decoder(spec, {} if lora is None else resolve_lora(spec, lora), attention="reference")
    # Where a gradient is 0 but for rounding (a bias of k), a small eps would make whole steps of it.
    options = OptimizerConfig(learning_rate=RATE, schedule="constant", eps=EPS)
    schedule = make_schedule(options, 10)
    initializer = Initializer(model, lora, mesh, functools.partial(make_optimizer, options, schedule))
    params = random_tree(initializer.params, 1, 0.2) if params is None else params
    params = jax.device_put(params, initializer.params_shardings)
    trainable = {"params": params} if lora is None else {"lora": initializer.init_lora(params, 0)}
    state = initializer.new_state(trainable, 0)
    step = make_train_step(CrossEntropy(model), initializer.optimizer, schedule, 1.0)
    ids = np.random.default_rng(0).integers(0, spec.vocab_size, (1, 8, 12)).astype(np.int32)
    segments = np.broadcast_to(np.repeat([1, 2, 0], [5, 5, 2]), ids.shape).astype(np.int32)
    positions = np.broadcast_to(np.r_[0:5, 0:5, 0:2], ids.shape).astype(np.int32)
    batch = dict(input_ids=ids, loss_mask=segments > 0, segment_ids=segments, positions=positions)
    if spec.experts is not None:
        batch["modality_ids"] = np.where(segments > 0, 0, -1).astype(np.int8)
    if spec.encoder is not None:
        batch |= {"encoder_ids": ids[:, ::-1].copy(), "encoder_segment_ids": segments}
    losses = []
    frozen = {} if lora is None else {"params": params}
    with use_mesh(mesh):
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(initializer.state_shardings, None))
        for _ in range(STEPS):
            state, found = jitted(state, frozen, put_batch(batch, mesh))
            losses.append(float(found["loss"]))
    return losses, jax.device_get(state.trainable)


def check_lora_training(family: str, folder: Path, saved: tuple[str, ...] = ()) -> None:
    """An adapter of all linear layers is trained; what PEFT makes of its files computes the same.

    Args:
        saved: modules that are trained whole.
    """
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    spec, base = small_spec(family), hf_model(family)
    base.save_pretrained(folder / "hf")
    lora = LoraConfig(rank=2, alpha=8.0, targets=("all-linear",), modules_to_save=saved)
    params = tree_of(dict(base.named_parameters()), spec)
    losses, trained_tree = steps_on_one_batch(spec, lora, params, {"fsdp": 1})
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 1e-3, losses
    adapter = InMemory(spec, lora, trained_tree["lora"])
    (folder / "jax").mkdir()
    write_adapter(adapter, folder / "jax", str(folder / "hf"), lambda _: None)
    run("jax-to-peft", folder / "jax", folder / "peft")
    loaded = peft.PeftModel.from_pretrained(base, folder / "peft").eval()
    ids = np.random.default_rng(1).integers(0, spec.vocab_size, (2, 9)).astype(np.int32)
    tokens = torch.from_numpy(ids).long()
    inputs = {} if spec.encoder is None else {"encoder_ids": ids[:, ::-1].copy()}
    theirs: dict[str, Any] = {"input_ids": tokens}
    if inputs:
        theirs = {"input_ids": tokens.flip(1), "decoder_input_ids": tokens}
    with torch.no_grad():
        expected = loaded(**theirs).logits.numpy()
    model = Decoder(spec, resolve_lora(spec, lora))
    found = jax.jit(model.apply)(with_saved_modules(params, trained_tree["lora"]), ids, **inputs)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    assert np.abs(found - jax.jit(Decoder(spec).apply)({"params": params}, ids, **inputs)).max() > 1e-3


@every_family_but_slowly
def test_lora_training(family: str, tmp_path: Path, settle: Settle) -> None:
    check_lora_training(family, tmp_path)
    settle("LoRA training")


@every_family_slowly
def test_training(family: str, settle: Settle) -> None:
    losses, _ = trained(family)
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.97 * losses[0], losses
    settle("train")


@every_family_slowly
def test_eight_devices_are_one(family: str, settle: Settle) -> None:
    try:
        losses, params = trained(family, data=2, fsdp=2, tensor=2)
    except UserError as error:
        settle("sharded", refused=str(error))
        return
    wanted, expected = trained(family)
    np.testing.assert_allclose(losses, wanted, rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=BY_ROUNDING), params, expected)
    settle("sharded")


RUN = """
model: {shape: made up, dtype: bfloat16, remat: full}
data: {train: [{path: text.jsonl, template: text}], sequence_length: 16}
train: {global_batch_size: 8, micro_batch_size: 2, epochs: 1}
output_dir: out
"""


@every_family_slowly
def test_a_step_for_tpus(family: str, settle: Settle) -> None:
    pytest.importorskip("libtpu")
    try:
        found = compile_step(load_run_yaml(RUN, "the test"), small_spec(family), parse_topology("v5e:2x2"), quick=True)
    except UserError as error:
        settle("TPU compile", refused=str(error))
        return
    assert found.refused is None and found.program is not None and found.arguments > 0
    settle("TPU compile")
