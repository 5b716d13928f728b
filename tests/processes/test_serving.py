"""The serving engine over two processes, each with half of the heads: against one process."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxlm.errors import UserError
from jaxlm.inference.paged import followers
from jaxlm.inference.paged.followers import Orders, packed, together, unpacked
from tests.processes.test_distributed import Memory, run

ENGINE = """
from pathlib import Path
from convert.source import open_adapter
from jaxlm.config import Decoding, MeshConfig
from jaxlm.devices.mesh import make_mesh
from jaxlm.errors import UserError
from jaxlm.inference.embedding import Embedder
from jaxlm.inference.generator import Generator
from jaxlm.inference.loaded import LoadedModel
from jaxlm.inference.model import load_weights
from jaxlm.inference.paged.adapters import Adapters, Places
from jaxlm.inference.paged.beams import Search
from jaxlm.inference.paged.followers import Orders, follow
from jaxlm.inference.paged.programs import longest_served
from jaxlm.inference.paged.requests import Query
from jaxlm.inference.paged.thread import PagedEngine
from jaxlm.models.decoder import Decoder
from tests.inference.test_generation import CONFIG, TreeSource, params

import numpy as np
import threading

def model(seed, devices=None):
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=-1), devices)
    decoder = Decoder(CONFIG)
    return Generator(decoder, load_weights(decoder, mesh, TreeSource(params(seed))), mesh, [2])

def opened(path):
    if me and path.name == "unseen":
        raise UserError(f"{path}: no such directory")
    return open_adapter(path, CONFIG)

def with_first(model, folder):
    source = opened(folder / "first")
    adapters = Adapters(model, Places.holding(model.decoder, {"first": source}, 2))
    adapters.load("first", source)
    return adapters

QUERIES = [
    Query(tuple(range(5, 45)), Decoding(max_new_tokens=24), logprobs=0),
    Query((7, 8, 9), Decoding(max_new_tokens=20, temperature=0.8, seed=3, samples=2)),
    Query((30,), Decoding(max_new_tokens=22, repetition_penalty=1.3), logit_bias=((4, 1.0),)),
    Query((20, 21) * 6, Decoding(max_new_tokens=30)),
    Query((5, 6, 7), Decoding(max_new_tokens=12, num_beams=3, samples=2)),
    Query((5, 6, 7), Decoding(max_new_tokens=12), adapter="first"),
    Query((5, 6, 7), Decoding(max_new_tokens=12), adapter="second"),
]
TEXTS = [list(range(5, 45)), [7, 8, 9], [3] * 60]

def answers(model, judge, folder, orders=None):
    adapters = with_first(model, folder)
    engine = PagedEngine(model, 4, context=128, chunk=16, adapters=adapters, speculate=2, orders=orders)
    embedder = Embedder(model, engine.max_length, orders=orders)
    judge = judge.in_all(orders)
    if orders is not None:
        adapters.lead(orders)
        try:
            adapters.load("third", opened(folder / "unseen"))
        except UserError as error:
            print("REFUSED", error)
    adapters.load("second", opened(folder / "second"))
    ids, left, done = {}, sum(query.options.samples for query in QUERIES), threading.Event()
    def deliver(number, piece):
        nonlocal left
        if isinstance(piece, Exception):
            raise piece
        ids.setdefault((number, piece.sample), []).extend(piece.ids)
        if piece.finish is not None:
            left -= 1
            if not left:
                done.set()
    for number, query in enumerate(QUERIES):
        engine.submit(query, lambda piece, number=number: deliver(number, piece))
    # Meanwhile, from another thread than the engine's and the search's.
    embedded, rewards = embedder(TEXTS), judge.of_answers([(text, [4], True) for text in TEXTS])
    assert done.wait(120)
    engine.drain()
    return dict(sorted(ids.items())), embedded, rewards, engine.stats().accepted_total
"""


def test_orders_are_read_as_they_were_given_and_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(followers, "BLOCK", 2)
    service = Memory(3)
    leader, *others = (Orders(service, process, 3) for process in range(3))
    for number in range(9):
        leader.send(f"order{number}", [np.arange(number), np.bool_(True)])
        for other in others:
            name, arrays = other.receive()
            assert name == f"order{number}"
            np.testing.assert_array_equal(arrays[0], np.arange(number))
            assert arrays[1].shape == () and arrays[1]
    assert sum("/order/" in key for key in service.stored) <= 3 * followers.BLOCK


def test_an_act_of_all_is_told_and_a_problem_of_one_is_said_by_the_first() -> None:
    service = Memory(2)
    leader, other = (Orders(service, process, 2) for process in range(2))
    acted = together(leader, "act", lambda array: array + 1)(np.arange(3))
    assert acted.tolist() == [1, 2, 3]
    name, (array,) = other.receive()
    assert name == "act" and array.tolist() == [0, 1, 2]
    other.answer("see", "no such file")
    with pytest.raises(UserError, match="process 1: no such file"):
        leader.ask("see", [packed(["a", 3])])
    other.answer("see")
    leader.ask("see", [packed(["b", 3])])  # of this time, not of the one before
    assert [unpacked(other.receive()[1][0]) for _ in range(2)] == [["a", 3], ["b", 3]]
    leader.end()
    with pytest.raises(UserError, match="about to end"):
        leader.lead("act", [], lambda: None)


def write_adapter(path: Path, seed: int) -> None:
    """A LoRA adapter in PEFT's format for the model of these tests."""
    rng = np.random.default_rng(seed)
    tensors = {
        f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{part}.weight": rng.normal(0, 1, shape)
        for layer in range(2)
        for part, shape in (("A", (2, 32)), ("B", (32, 2)))
    }
    path.mkdir()
    save_file({name: value.astype(np.float32) for name, value in tensors.items()}, path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}
    (path / "adapter_config.json").write_text(json.dumps(settings))


@pytest.mark.slow
def test_two_processes_answer_as_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Answers, guessed ones too, beams, adapters that were there and that come, embeddings and rewards, all at once."""
    monkeypatch.setenv("XLA_FLAGS", "")  # one device each
    for seed, name in enumerate(("first", "second", "unseen")):
        write_adapter(tmp_path / name, seed)
    body = f"""
{ENGINE}
import jax
folder = Path({str(tmp_path)!r})
shared = model(0)
assert shared.mesh.size == 2
judge = LoadedModel(model(5), None)
judge = judge.judge(judge.spec, 3)
orders = Orders(hosts.coordination, me, 2)
if me:
    hosts.coordination.wait("alone")  # a collective would wait for 30 s and no longer
    adapters = with_first(shared, folder)
    def acts(shape):
        embedder = Embedder(shared, longest_served(CONFIG, shape, 128))
        beside = adapters.acts(opened, orders)
        return {{**embedder.acts(), **Search(shared).acts(), **beside, **judge.acts()}}
    follow(shared, orders, acts)
else:
    own = LoadedModel(model(5, jax.local_devices()), None)
    alone = answers(model(0, jax.local_devices()), own.judge(own.spec, 3), folder)
    hosts.coordination.put("alone", "")
    found = answers(shared, judge, folder, orders)
    print("ANSWERS", found[0] == alone[0], [len(ids) for ids in found[0].values()], found[3] > 0)
    print("EMBEDDED", np.abs(found[1] - alone[1]).max() < 1e-5, found[1].shape)
    print("REWARDS", np.abs(found[2] - alone[2]).max() < 1e-4, np.unique(found[2]).shape)
    print("ADAPTERS", len({{tuple(found[0][number, 0]) for number in (4, 5, 6)}}))
"""
    (status, output), (other, other_output) = run(2, body, timeout=240)
    assert status == other == 0, f"process 0 ({status}):\n{output}\nprocess 1 ({other}):\n{other_output}"
    for words in (
        "REFUSED process 1: ",
        "ANSWERS True [24, 20, 20, 22",
        "EMBEDDED True (3, 32)",
        "REWARDS True (3,)",
        "ADAPTERS 3",
    ):
        assert words in output, output
