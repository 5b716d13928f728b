"""Products with a weight in four bits on TPUs and GPUs, interpreted: the numbers of their plain twin; and programs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import MeshConfig
from jaxlm.devices.mesh import make_mesh, use_mesh
from jaxlm.kernels import nf4_matmul_gpu, nf4_matmul_tpu
from jaxlm.nn import nf4
from jaxlm.nn.nf4 import Nf4Weight, why_plain, why_plain_on_gpu
from jaxlm.nn.rounding import NF4
from jaxlm.nn.weight_types import times
from tests.kernels.ahead_of_time import NO_CUDA_COMPILER, compile_for_tpus, run_for_h200


@pytest.mark.parametrize(
    ("module", "tile", "rows", "blocks"),
    [
        (nf4_matmul_tpu, {"ROWS": 16, "BLOCKS": 2, "OUTPUTS": 128}, 16, 5),
        (nf4_matmul_tpu, {"ROWS": 16, "BLOCKS": 2, "OUTPUTS": 128}, 24, 5),
        (nf4_matmul_gpu, {}, 24, 2),
        (nf4_matmul_gpu, {"ROWS": 16, "FEW": 8}, 24, 4),
        (nf4_matmul_gpu, {"ROWS": 16, "FEW": 8}, 16, 3),
    ],
    ids=["tpu-16", "tpu-24", "gpu-few-rows", "gpu-wide", "gpu-wide-odd"],
)
def test_both_products_are_those_of_the_dense_weight(
    module: Any, tile: dict[str, int], rows: int, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With tiles that do not divide rows, blocks and outputs."""
    for name, size in tile.items():
        monkeypatch.setattr(module, name, size)
    if module is nf4_matmul_gpu:
        stay_within(monkeypatch)
    nf4_product = module.nf4_product
    rng = np.random.default_rng(0)
    weight = jax.tree.map(jnp.asarray, Nf4Weight.of_array(rng.normal(size=(64 * blocks, 200)).astype(np.float32), 1))
    dense = np.asarray(weight.dense(jnp.float32))
    arguments = weight.codes, weight.magnitudes(), NF4
    x, grad = (rng.normal(size=(rows, size)).astype(np.float32) for size in dense.shape)
    found = nf4_product(jnp.asarray(x), *arguments, interpret=True)
    np.testing.assert_allclose(found, x @ dense, rtol=1e-4, atol=1e-4)
    found = nf4_product(jnp.asarray(grad), *arguments, transposed=True, interpret=True)
    np.testing.assert_allclose(found, grad @ dense.T, rtol=1e-4, atol=1e-4)


def stay_within(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers that are read or written behind the ends of an array become NaN: the interpreter leaves them out."""
    load, store = nf4_matmul_gpu._load, nf4_matmul_gpu._store

    def fine(ref: Any, row: Any, column: Any, inside: Any) -> jax.Array:
        within = (row[:, None] < ref.shape[0]) & (column[None, :] < ref.shape[1])
        mask = nf4_matmul_gpu._mask(row, column, inside)
        return within if mask is None else within | ~mask

    def read(ref: Any, row: Any, column: Any, *inside: Any) -> jax.Array:
        values = load(ref, row, column, *inside)
        return values if values.dtype == jnp.uint8 else jnp.where(fine(ref, row, column, inside), values, jnp.nan)

    def write(ref: Any, row: Any, column: Any, values: Any, *inside: Any) -> None:
        store(ref, row, column, jnp.where(fine(ref, row, column, inside).all(), values, jnp.nan), *inside)

    monkeypatch.setattr(nf4_matmul_gpu, "_load", read)
    monkeypatch.setattr(nf4_matmul_gpu, "_store", write)


@pytest.mark.parametrize(
    ("mesh", "axes", "dims", "in_dims", "platform"),
    [
        ({"fsdp": 2, "sequence": 2, "tensor": 2}, ("embed", "mlp"), (128, 512), 1, "tpu"),
        ({"expert": 2, "fsdp": 2, "tensor": 2}, ("mlp", "embed"), (256, 128), 1, "tpu"),
        ({"data": 2, "tensor": 4}, ("heads", "head_dim", "embed"), (8, 32, 128), 2, "tpu"),
        ({"data": 2, "tensor": 4}, ("embed", "kv_heads", "head_dim"), (128, 1, 128), 1, "tpu"),  # all have the head
        ({"fsdp": 4, "tensor": 2}, ("mlp", "embed"), (256, 128), 1, "gpu"),
    ],
    ids=["up", "down", "o", "k", "down-gpu"],
)
def test_devices_multiply_with_their_parts(
    mesh: dict[str, int], axes: tuple[str, ...], dims: Any, in_dims: int, platform: nf4.Platform
) -> None:
    rng, is_split = np.random.default_rng(0), axes[0] != "embed"
    weight = jax.tree.map(jnp.asarray, Nf4Weight.of_array(rng.normal(size=dims).astype(np.float32), in_dims))
    devices = make_mesh(MeshConfig(**{"data": 1, "fsdp": 1, **mesh}), jax.devices(), 4 if "expert" in mesh else None)
    ins, outs = dims[:in_dims], dims[in_dims:]
    x, grad = (jnp.asarray(rng.normal(size=(4, 8, *size)), jnp.float32) for size in (ins, outs))
    with use_mesh(devices):
        for transposed, rows, plain in ((False, x, weight.times), (True, grad, weight.transposed_times)):

            def run(rows: jax.Array, weight: Any, transposed: bool = transposed) -> jax.Array:
                return weight.gathered(axes).by_kernel(rows, jnp.float32, axes, transposed, platform, interpret=True)

            compiled = jax.jit(run).lower(rows, weight).compile()
            np.testing.assert_allclose(
                compiled(rows, weight), plain(rows, jnp.float32), rtol=1e-4, atol=1e-4 * float(np.sqrt(np.prod(dims)))
            )
            # Parts of a sum are added where what is summed over is split, and nowhere else.
            has_sum = "all-reduce(" in compiled.as_text()
            assert has_sum == (is_split if not transposed else "mlp" in axes[1:]), (transposed, axes)


def test_a_program_for_tpus_has_the_kernel_on_a_mesh_too() -> None:
    """Both ways, through the weight's own gradient; on CPUs the same trace is the plain product."""
    weight = jax.tree.map(jnp.asarray, Nf4Weight.of_array(np.ones((256, 128), np.float32), 1))
    devices = make_mesh(MeshConfig(fsdp=2, sequence=2, tensor=2), jax.devices())

    def loss(x: jax.Array) -> jax.Array:
        return times(weight, x, 1, jnp.bfloat16, ("mlp", "embed")).astype(jnp.float32).sum()

    with use_mesh(devices):
        traced = jax.jit(jax.value_and_grad(loss)).trace(jnp.ones((2, 16, 256), jnp.bfloat16))
        assert traced.lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call") == 2
        assert "tpu_custom_call" not in traced.lower(lowering_platforms=("cpu",)).as_text()


def test_the_kernel_is_what_a_tpu_runs_and_the_reasons_against_it() -> None:
    weight = jax.tree.map(jnp.asarray, Nf4Weight.of_array(np.ones((128, 256), np.float32), 1))
    x = jnp.ones((2, 16, 128), jnp.bfloat16)

    def loss(x: jax.Array) -> jax.Array:
        return times(weight, x, 1, jnp.bfloat16).astype(jnp.float32).sum()

    traced = jax.jit(jax.value_and_grad(loss)).trace(x)
    text = {name: traced.lower(lowering_platforms=(name,)).as_text() for name in ("tpu", "cpu")}
    assert "nf4_product" in text["tpu"] and "nf4_product" not in text["cpu"]
    for mesh in ({"tensor": 2, "fsdp": 4}, {"tensor": 4, "expert": 2, "sequence": 2}):
        assert why_plain(mesh, "bfloat16", 11008, "mlp", (4, 8) if "expert" not in mesh else (2, 8)) is None
    assert why_plain({}, "bfloat16", 128) is None and why_plain({"fsdp": 8, "data": 2}, "bfloat16", 128) is None
    for arguments, said in (
        (({}, "float32", 128), "multiplies bfloat16"),
        (({}, "bfloat16", 96), "96 inputs"),
        (({"tensor": 2, "fsdp": 4}, "bfloat16", 128), "not known on mesh tensor 2"),
        (({"tensor": 8}, "bfloat16", 11008, "mlp"), "172 blocks of inputs are not shared evenly on mesh tensor 8"),
        (({"data": 4}, "bfloat16", 128, "embed", (6,)), "not shared evenly"),
        (({"sequence": 4}, "bfloat16", 128, "embed", (4,)), "not shared evenly"),
    ):
        assert said in (why_plain(*arguments) or "")


def test_a_gpu_runs_its_kernel_for_few_rows_and_the_reasons_against_it(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = jax.tree.map(jnp.asarray, Nf4Weight.of_array(np.ones((128, 256), np.float32), 1))

    def kernels(*rows: int) -> int:
        """How many a forward and a backward product have, those for TPUs among them."""

        def loss(x: jax.Array) -> jax.Array:
            return times(weight, x, 1, jnp.bfloat16).astype(jnp.float32).sum()

        traced = jax.jit(jax.value_and_grad(loss)).trace(jnp.ones((*rows, 128), jnp.bfloat16))
        return str(traced.jaxpr).count("= pallas_call[")

    assert (kernels(2, 16), kernels(2, 257)) == (4, 2)
    monkeypatch.setattr(nf4, "_capability", lambda: "8.9")
    assert kernels(2, 257) == 4
    assert why_plain_on_gpu(512, None) is None and why_plain_on_gpu(1, "10.0") is None
    for rows, capability, said in (
        (513, None, "513 rows"),
        (2048, "9.0", "2,048 rows"),
        (1, "7.5", "this GPU has 7.5"),
        (1, "gfx942", "this GPU has gfx942"),
    ):
        assert said in (why_plain_on_gpu(rows, capability) or "")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert why_plain_on_gpu(1, "9.0") == "this JAX has no Triton"


FOR_GPUS = """
import sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from jaxlm.kernels.nf4_matmul_gpu import nf4_product
from jaxlm.nn.nf4 import Nf4Weight
from jaxlm.nn.rounding import NF4

jax.devices("cpu")
small = {"major: 9": "major: 8 minor: 9", "optin: 232448": "optin: 101376", "per_core: 233472": "per_core: 102400"}
other = sys.argv[1]
for old, new in small.items():
    assert old in other
    other = other.replace(old, new)
for name, target in (("h200", sys.argv[1]), ("rtx4090", other)):
    gpu = topologies.get_topology_desc(platform="cuda", topology_name=name, target_config=target, topology="1x1x1")
    place = SingleDeviceSharding(gpu.devices[0])
    placed = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
    weight = jax.tree.map(placed, Nf4Weight.of_shape((4096, 11008), 1))

    def say(what, rows, transposed, run):
        x = placed(jax.ShapeDtypeStruct((rows, 11008 if transposed else 4096), jnp.bfloat16))
        compiled = jax.jit(run).trace(x, weight).lower(lowering_platforms=("cuda",)).compile()
        kernels = compiled.as_text().count("__gpu$xla.gpu.triton")
        print("compiled", name, what, rows, kernels, compiled.memory_analysis().temp_size_in_bytes, flush=True)

    for transposed in (False, True):
        say("chosen", 2048, transposed, lambda x, w: (w.transposed_times if transposed else w.times)(x, jnp.bfloat16))
        say("kernel", 2048, transposed, lambda x, w: w.by_kernel(x, jnp.bfloat16, None, transposed, "gpu"))
    say("chosen", 16, False, lambda x, w: w.times(x, jnp.bfloat16))
"""


@pytest.mark.slow
@pytest.mark.skipif(NO_CUDA_COMPILER, reason="needs JAX's CUDA plug-in and ptxas (nvidia-cuda-nvcc), no GPU")
def test_the_kernel_compiles_for_gpus_and_writes_no_dense_weight() -> None:
    dense, magnitudes = 4096 * 11008 * 2, 64 * 11008 * 4
    lines = run_for_h200(FOR_GPUS).splitlines()
    assert len(lines) == 10
    for line in lines:
        _, _, what, rows, kernels, temporaries = line.split()
        by_kernel = what == "kernel" or rows == "16"
        assert int(kernels) == by_kernel
        assert int(temporaries) <= magnitudes if by_kernel else int(temporaries) >= dense, line


# An up and a down projection with the gradient of their input, split over the chips of a slice.
ON_MESHES = """
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxlm.config import MeshConfig
from jaxlm.devices.mesh import make_mesh, use_mesh
from jaxlm.nn.nf4 import Nf4Weight
from jaxlm.nn.weight_types import times

def loss(x, up, down):
    hidden = times(up, x, 1, jnp.bfloat16, ("embed", "mlp"))
    return times(down, hidden, 1, jnp.bfloat16, ("mlp", "embed")).astype(jnp.float32).sum()

for sizes in ({"fsdp": 2, "tensor": 2}, {"fsdp": 1, "sequence": 2, "tensor": 2}):
    mesh = make_mesh(MeshConfig(**sizes), topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices)
    def placed(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, P()))
    weights = [jax.tree.map(placed, Nf4Weight.of_shape(dims, 1)) for dims in ((1024, 2048), (2048, 1024))]
    x = placed(jax.ShapeDtypeStruct((2, 512, 1024), jnp.bfloat16))
    with use_mesh(mesh):
        lowered = jax.jit(jax.value_and_grad(loss)).trace(x, *weights).lower(lowering_platforms=("tpu",))
    text = lowered.compile(compiler_options=least_effort()).as_text()
    print("compiled", "-".join(sizes), text.count('custom_call_target="tpu_custom_call"'), text.count("all-reduce") > 0)
"""


@pytest.mark.nightly
def test_the_kernel_compiles_for_tpus_on_meshes() -> None:
    """Two products and two of the gradient; the sums over `tensor` are between the chips."""
    assert compile_for_tpus(ON_MESHES) == [[name, "4", "True"] for name in ("fsdp-tensor", "fsdp-sequence-tensor")]
