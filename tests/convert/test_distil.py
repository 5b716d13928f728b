"""A learned router distilled from the activations: the fit, what is held out, the figures, the command."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from convert.analysis.distil import PENALTY, TEACHERS, DistilledSource, distil, fit_router, held_out
from convert.analysis.observe import walk
from convert.analysis.sample import Sample
from convert.commands import routing as routing_cli
from convert.source import open_model
from convert.transforms.experts import MoefiedSource
from jaxlm.cli.generate import main as generate
from jaxlm.errors import UserError
from jaxlm.spec import ExpertsSpec
from jaxlm.weights.leaves import ParamSource, stored_blocks
from jaxlm.weights.names import hf_entries
from tests.convert.sampled import SALT, write_sample, write_tokenizer
from tests.convert.test_coverage import MOEFY
from tests.convert.tiny import make_hf_model

L, D, F, E = 3, 16, 24, 4
ROUTER = "layers/mlp/router"


def make_sample(rows: int = 64, length: int = 32, seed: int = 0) -> Sample:
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, 37, (rows // 4, 4, length)).astype(np.int32)
    segments = np.ones_like(ids)
    segments[0, 0, length // 2 :] = 0
    modality = np.where(segments == 0, -1, (ids >= SALT[0]).astype(np.int32))
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), ids.shape)
    counts = tuple(int((modality == number).sum()) for number in range(2))
    return Sample(ids, segments, positions, modality, counts, ("made",))


def make_source(hf_dir: Path, router: str = "activation") -> ParamSource:
    moe = ExpertsSpec(E, router, ("text", "salt"), (SALT,), (2, 1))
    return MoefiedSource(open_model(hf_dir), np.tile(np.arange(F, dtype=np.int32), (L, 1)), moe)


def teacher(scores: np.ndarray, k: np.ndarray) -> np.ndarray:
    chosen = np.zeros(scores.shape, np.float32)
    for token, (row, count) in enumerate(zip(scores, k, strict=True)):
        chosen[token, np.argsort(-row)[:count]] = 1
    return chosen


# --- the fit ----------------------------------------------------------------------------------------------------------


def test_fit_finds_a_linear_teacher() -> None:
    """And inputs of very different sizes do not matter; tokens without teacher do not either."""
    rng = np.random.default_rng(0)
    sizes = np.exp2(rng.integers(-8, 9, 12)).astype(np.float32)
    x = rng.normal(size=(1500, 12)).astype(np.float32)
    k = rng.integers(1, 4, 1500)
    chosen = teacher(x @ rng.normal(size=(12, 6)), k)
    trained = chosen * (np.arange(1500) < 1200)[:, None]
    router, loss = fit_router(jnp.asarray(x * sizes), jnp.asarray(trained), 60)
    ours = teacher((x * sizes) @ np.asarray(router), k)
    recall = (ours * chosen)[1200:].sum() / chosen[1200:].sum()
    assert recall > 0.93, recall
    assert loss[0] == pytest.approx(np.log(6), rel=1e-5) and loss[1] < 0.75 * loss[0]
    spoiled = np.where(trained.any(axis=1)[:, None], x * sizes, 1e3)
    again, _ = fit_router(jnp.asarray(spoiled), jnp.asarray(trained), 60)
    np.testing.assert_allclose(again, router, rtol=1e-4, atol=1e-5)


def test_fit_is_at_the_optimum() -> None:
    """The gradient of the penalised cross-entropy, from scratch, is nothing there."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(400, 5)) * np.array([1, 10, 0.1, 3, 1])
    chosen = teacher(rng.normal(size=(400, 4)) + x[:, :4], np.full(400, 2))
    router, loss = fit_router(jnp.asarray(x, jnp.float32), jnp.asarray(chosen), 100)
    w = np.asarray(router, np.float64)
    p = np.exp(x @ w)
    p /= p.sum(axis=1, keepdims=True)
    squares = np.square(x).mean(axis=0)[:, None]  # the penalty is on W times the size of each input
    grad = x.T @ (p - chosen / 2) / 400 + PENALTY * w * squares
    assert np.abs(grad / np.sqrt(squares)).max() < 1e-4
    assert float(loss[1]) == pytest.approx(-(chosen / 2 * np.log(p)).sum() / 400, rel=1e-4)


def test_teachers_are_all_offered() -> None:
    assert routing_cli.TEACHERS == TEACHERS


def test_held_out() -> None:
    rows = np.zeros((40, 5), np.int32)
    rows[20:30] = -1
    found = held_out(rows, 3)
    assert len(found) == 4 and not np.isin(found, np.arange(20, 30)).any() and (np.diff(found) > 0).all()
    np.testing.assert_array_equal(found, held_out(rows, 3))
    assert any(list(held_out(rows, seed)) != list(found) for seed in range(4, 8))
    assert len(held_out(rows[:2], 0)) == 1
    rows[1:] = -1
    with pytest.raises(UserError, match=r"--sample: 5 tokens are one row of 5.*--sample-tokens"):
        held_out(rows, 0)


# --- a model ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind_of_teacher", ["activation", "magnitude"])
def test_figures(kind_of_teacher: str, hf_dir: Path) -> None:
    """Far above chance where there is enough to learn from; and what is reported, token by token in numpy."""
    source, sample = make_source(hf_dir), make_sample()
    found = distil(source, sample, 60, 0, kind_of_teacher)
    size = np.abs if kind_of_teacher == "magnitude" else np.asarray
    assert found.routers.shape == (L, D, E) and found.routers.dtype == np.float32
    assert (found.losses[:, 1] < found.losses[:, 0] - 0.05).all()
    test = held_out(sample.modality.reshape(64, 32), 0)
    assert sum(found.tokens) == (sample.modality.reshape(64, 32)[test] >= 0).sum()
    # The teacher's walk: every layer with the experts of the highest sums.
    flat = sample.modality.reshape(-1)
    rows = np.isin(np.arange(64), test).repeat(32)
    for layer, (x, h) in enumerate(walked(source, sample, kind_of_teacher)):
        down = source.read("layers/mlp/down_proj/kernel", ())[layer]
        for kind, k in enumerate((2, 1)):
            mine = rows & (flat == kind)
            count = np.full(mine.sum(), k)
            expected = teacher(size(h[mine]).reshape(-1, E, F // E).sum(axis=-1), count)
            logits = x[mine] @ found.routers[layer]
            ours = teacher(logits, count)
            assert found.after[layer, kind] == pytest.approx((ours * expected).sum() / k / mine.sum(), abs=1e-6)
            assert found.before[layer, kind] == pytest.approx(expected[:, :k].sum() / k / mine.sum(), abs=1e-6)
            powers = np.exp(logits) * ours
            whole = np.exp(logits) if k == 1 else powers  # a single expert's share is that of all
            weights = k * powers / whole.sum(axis=1, keepdims=True)
            by_expert = h[mine].reshape(-1, E, F // E)
            right, wrong = ((by_expert * w[..., None]).reshape(-1, F) @ down for w in (expected, weights))
            error = np.linalg.norm(wrong - right, axis=1) / np.linalg.norm(right, axis=1)
            assert found.error[layer, kind] == pytest.approx(error.mean(), rel=1e-3)
    chance = np.array([2 / E, 1 / E])
    assert (found.after.mean(axis=0) > chance + 0.1).all(), found.after
    assert (found.after.mean(axis=0) > found.before.mean(axis=0) + 0.1).all()


def walked(source: ParamSource, sample: Sample, kind: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """(x, h) of every layer when each uses the most active experts."""
    moe = source.config.experts
    assert moe is not None
    k = np.array([*moe.top_k, 0])

    def run(mlp: Any, seen: Any) -> Any:
        h = jnp.abs(seen.h) if kind == "magnitude" else seen.h
        order = jnp.argsort(-h.reshape(-1, E, F // E).sum(axis=-1), axis=1)
        live = (jnp.argsort(order, axis=1) < jnp.asarray(k)[seen.modality][:, None]).astype(jnp.float32)
        h = (seen.h.reshape(-1, E, F // E) * live[..., None]).reshape(-1, F)
        return h @ mlp["down_proj"]["kernel"], (seen.x, seen.h)

    return [tuple(map(np.concatenate, zip(*parts, strict=True))) for _, _, parts in walk(source, sample, run, "")]


def test_held_out_rows_are_not_trained_on(hf_dir: Path) -> None:
    source, sample = make_source(hf_dir), make_sample(16, 16)
    found = distil(source, sample, 8, 5)
    test = held_out(sample.modality.reshape(16, 16), 5)
    ids = sample.input_ids.reshape(16, 16).copy()
    ids[test] = 3
    other = distil(source, dataclasses.replace(sample, input_ids=ids.reshape(sample.input_ids.shape)), 8, 5)
    np.testing.assert_array_equal(found.routers, other.routers)
    train = np.setdiff1d(np.arange(1, 16), test)[:1]
    ids[train] = 3
    other = distil(source, dataclasses.replace(sample, input_ids=ids.reshape(sample.input_ids.shape)), 8, 5)
    assert (found.routers != other.routers).any()


def test_a_trained_router_is_what_it_is_compared_with(hf_dir: Path) -> None:
    source, sample = make_source(hf_dir, "learned"), make_sample(16, 16)
    first = distil(source, sample, 10, 0)
    second = distil(DistilledSource(source, first.routers), sample, 10, 0)
    np.testing.assert_array_equal(second.routers, first.routers)
    np.testing.assert_array_equal(second.before, first.after)
    assert (first.before != first.after).any()


def test_slices_and_blocks_of_the_result(hf_dir: Path) -> None:
    routers = np.random.default_rng(0).normal(size=(L, D, E)).astype(np.float32)
    source = make_source(hf_dir)
    result = DistilledSource(source, routers)
    assert list(result.leaves) == list(make_source(hf_dir, "learned").leaves)
    assert result.config.experts == dataclasses.replace(source.config.experts, router="learned")  # type: ignore[type-var]
    index = (slice(1, None), slice(None, None, 2), slice(1, 3))
    np.testing.assert_array_equal(result.read(ROUTER, index), routers[index])
    for entry in hf_entries(result.config):
        found = np.concatenate(list(stored_blocks(result, entry)))
        if entry.path == ROUTER:
            expected = routers[entry.layer].T
        else:
            expected = np.concatenate(list(stored_blocks(source, entry)))
        np.testing.assert_array_equal(found, expected)
    assert any(entry.path == ROUTER for entry in hf_entries(result.config))


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("router", ["learned", "activation"])
def test_command(
    router: str,
    tmp_path: Path,
    run: Callable[..., str],
    refused: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The same seed gives the same bytes, nothing but the router differs, and the result writes."""
    make_hf_model(dtype="bfloat16").save_pretrained(tmp_path / "hf")
    write_tokenizer(tmp_path / "hf")
    run("moefy", tmp_path / "hf", tmp_path / "moe", *MOEFY, "--router", router)
    data = write_sample(tmp_path / "data.jsonl", 60)
    options = ["--sample", data, "--sample-tokens", 800, "--steps", 10]
    said = run("distil-router", tmp_path / "moe", tmp_path / "out", *options)
    assert "2/4 = 50.0%" in said and "held out" in said and "nan" not in said
    a, b = open_model(tmp_path / "moe"), open_model(tmp_path / "out")
    assert b.config.experts == dataclasses.replace(a.config.experts, router="learned")  # type: ignore[type-var]
    assert a.leaves.keys() | {ROUTER} == b.leaves.keys()
    for path in b.leaves.keys() - {ROUTER}:
        assert a.leaves[path] == b.leaves[path] and a.read(path, ()).tobytes() == b.read(path, ()).tobytes()
    np.testing.assert_array_equal(a.partition, b.partition)
    trained = b.read(ROUTER, ())
    assert trained.dtype.name == "bfloat16" and trained.any(axis=(1, 2)).all()
    names = ("tokenizer.json", "tokenizer_config.json")
    for name in names:
        assert (b.tokenizer_dir / name).read_bytes() == (a.tokenizer_dir / name).read_bytes()
    message = refused("distil-router", tmp_path / "moe", tmp_path / "out", *options)
    assert "exists already" in message
    ask = ["--prompt", "w5 w31 w7", "--max_new_tokens", "3", "--compilation_cache", "none", "--template", "text"]
    assert generate(["--model", str(tmp_path / "out"), *ask]) == 0
    assert "3 written" in capsys.readouterr().err
    if router == "learned":
        run("distil-router", tmp_path / "moe", tmp_path / "again", *options)
        assert open_model(tmp_path / "again").read(ROUTER, ()).tobytes() == trained.tobytes()
        text = write_sample(tmp_path / "text.jsonl", 60, SALT[0])
        options[1] = text
        said = run("distil-router", tmp_path / "moe", tmp_path / "text", *options, "--teacher", "magnitude")
        assert "experts by magnitude" in said and "absent       salt" in said and "nan" not in said
        for bad, words in ((["--steps", 0], "--steps 0"), (["--seed", -1], "--seed -1")):
            assert words in refused("distil-router", tmp_path / "moe", tmp_path / "x", *options, *bad)
        short = ["--sample", data, "--sample-tokens", 20]
        assert "one row" in refused("distil-router", tmp_path / "moe", tmp_path / "x", *short)
