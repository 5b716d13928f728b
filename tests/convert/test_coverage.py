"""Coverage of experts: against transformers' activations and a plain numpy form, the reports, the commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.analysis.coverage import Coverage, choose_rule, measure, write_coverage
from convert.analysis.distil import DistilledSource
from convert.analysis.observe import walk
from convert.analysis.sample import Sample
from convert.source import open_model
from convert.transforms.experts import MoefiedSource
from jaxlm.nn.routers import experts_of_modalities
from jaxlm.spec import ROUTERS, ExpertsSpec
from jaxlm.weights.leaves import ParamSource
from jaxlm.weights.partition import permutation
from tests.convert.sampled import SALT, write_sample, write_tokenizer
from tests.convert.tiny import make_hf_model

L, D, F, E = 3, 16, 24, 4
T = 9
KINDS = ("text", "salt")


def make_sample(moe: ExpertsSpec) -> Sample:
    """Two chunks of rows: full ones, padded ones, one of two documents, and an empty one."""
    rng = np.random.default_rng(2)
    ids = rng.integers(3, 37, (2, 4, T)).astype(np.int32)
    segments = np.ones_like(ids)
    segments[0, 1, 6:] = 0
    segments[0, 2, 4:] = 2
    segments[1, 3] = 0
    ids[segments == 0] = 0
    positions = np.tile(np.arange(T), (2, 4, 1)).astype(np.int32)
    positions[0, 2, 4:] -= 4
    modality = np.zeros_like(ids)
    for number, (start, stop) in enumerate(moe.ranges, 1):
        modality[(ids >= start) & (ids < stop)] = number
    modality[segments == 0] = -1
    counts = tuple(int((modality == number).sum()) for number in range(len(moe.modalities)))
    return Sample(ids, segments, positions, modality, counts, ("made",))


def make_source(hf_dir: Path, router: str, top_k: tuple[int, ...] = (2, 1), ranges: Any = (SALT,)) -> ParamSource:
    rng = np.random.default_rng(5)
    order = np.stack([permutation(rng.permutation(np.arange(F) % E)) for _ in range(L)])
    names = (*KINDS[: len(top_k)], "never")[: len(top_k)]
    return MoefiedSource(open_model(hf_dir), order, ExpertsSpec(E, router, names, tuple(ranges), top_k))


def with_router(source: ParamSource) -> ParamSource:
    return DistilledSource(source, np.random.default_rng(8).normal(size=(L, D, E)).astype(np.float32))


def observed(source: ParamSource, sample: Sample) -> list[tuple[np.ndarray, np.ndarray]]:
    """(x [N, D], h [N, F]) of every layer."""

    def run(mlp: Any, seen: Any) -> Any:
        return seen.h @ mlp["down_proj"]["kernel"], (seen.x, seen.h)

    return [tuple(map(np.concatenate, zip(*found, strict=True))) for _, _, found in walk(source, sample, run, "")]


def test_what_feed_forward_layers_see(hf_dir: Path) -> None:
    """Their inputs and neurons in transformers' model, document by document."""
    torch = pytest.importorskip("torch")
    source = make_source(hf_dir, "activation")
    sample = make_sample(source.config.experts)  # type: ignore[arg-type]
    model = make_hf_model()  # what hf_dir holds
    seen: dict[str, Any] = {}
    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda _, inputs, __, key=f"x{number}": seen.update({key: inputs[0]}))
        layer.mlp.down_proj.register_forward_hook(lambda _, inputs, __, key=f"h{number}": seen.update({key: inputs[0]}))
    found = observed(source, sample)
    documents = 0
    for chunk, row in np.ndindex(2, 4):
        for segment in range(1, 3):
            where = sample.segment_ids[chunk, row] == segment
            if not where.any():
                continue
            documents += 1
            with torch.no_grad():
                model(torch.tensor(sample.input_ids[chunk, row][where][None].astype(np.int64)))
            at = np.flatnonzero(where) + (chunk * 4 + row) * T
            for layer, (x, h) in enumerate(found):
                np.testing.assert_allclose(x[at], seen[f"x{layer}"][0].numpy(), rtol=2e-4, atol=2e-5)
                expected = seen[f"h{layer}"][0].numpy()[:, source.partition[layer]]  # type: ignore[index]
                np.testing.assert_allclose(h[at], expected, rtol=1e-3, atol=1e-5)
    assert documents == 8


@pytest.fixture(scope="module")
def activations(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[np.ndarray, np.ndarray]]:
    """Those of the model in hf_dir, dense: the same for every router."""
    folder = tmp_path_factory.mktemp("model")
    make_hf_model().save_pretrained(folder)
    source = make_source(folder, "activation")
    return observed(source, make_sample(source.config.experts))  # type: ignore[arg-type]


def plain(
    source: ParamSource, rule: str, sample: Sample, activations: list[tuple[np.ndarray, np.ndarray]]
) -> dict[str, np.ndarray]:
    """The figures token by token, in float64."""
    moe = source.config.experts
    assert moe is not None
    modality = sample.modality.reshape(-1)
    result = {name: np.zeros((L, len(moe.modalities))) for name in ("chosen", "best", "error", "used")}
    for layer, (xs, hs) in enumerate(activations):
        down = source.read("layers/mlp/down_proj/kernel", ())[layer].astype(np.float64)
        router = source.read("layers/mlp/router", ())[layer] if rule == "learned" else None
        for x, h, kind in zip(xs.astype(np.float64), hs.astype(np.float64), modality, strict=True):
            if kind < 0:
                continue
            k = moe.top_k[kind]
            scores = h.reshape(E, -1).sum(axis=1)
            weights = np.zeros(E)
            if rule == "modality":
                weights[experts_of_modalities(moe)[kind, :k]] = 1
            elif router is not None:
                logits = x @ router
                best = np.argsort(-logits)[:k]
                weights[best] = k * np.exp(logits[best]) / np.exp(logits if k == 1 else logits[best]).sum()
            else:
                weights[np.argsort(-scores)[:k]] = 1
                if rule == "activation_released":
                    for other, first in enumerate(moe.top_k):
                        weights[: first if other != kind else 0] = 1
            sizes = np.abs(h).reshape(E, -1).sum(axis=1)
            used = int((weights > 0).sum())
            dense, sparse = h @ down, (h.reshape(E, -1) * weights[:, None]).reshape(-1) @ down
            for name, value in {
                "used": used,
                "chosen": sizes[weights > 0].sum() / sizes.sum(),
                "best": np.sort(sizes)[::-1][:used].sum() / sizes.sum(),
                "error": np.linalg.norm(sparse - dense) / np.linalg.norm(dense),
            }.items():
                result[name][layer, kind] += value / sample.tokens[kind]
    return result


@pytest.mark.parametrize("router", ROUTERS)
def test_figures(router: str, hf_dir: Path, activations: list[tuple[np.ndarray, np.ndarray]]) -> None:
    source = make_source(hf_dir, router)
    source = with_router(source) if router == "learned" else source
    sample = make_sample(source.config.experts)  # type: ignore[arg-type]
    found = measure(source, sample)
    assert found.rule == router and found.present == [0, 1]
    expected = plain(source, router, sample, activations)
    for name in ("chosen", "best", "error"):
        np.testing.assert_allclose(getattr(found, name), expected[name], rtol=2e-4, atol=1e-5)
    np.testing.assert_allclose(found.used, expected["used"].mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(found.chance, found.used / E)
    if router != "activation_released":
        np.testing.assert_allclose(found.used, [2, 1])
    # There is something to tell apart: the best experts have more than the chosen, these more than nothing.
    assert (found.best >= found.chosen - 1e-6).all() and (found.best.mean(axis=0) > found.chosen.mean(axis=0)).any()
    assert (found.error > 0.05).all() and (found.chosen > 0.05).all()


@pytest.mark.parametrize("router", ["learned", "modality"])
def test_all_experts_cover_everything(router: str, hf_dir: Path) -> None:
    source = make_source(hf_dir, router, (E, E))
    found = measure(source, make_sample(source.config.experts))  # type: ignore[arg-type]
    for values in (found.chosen, found.best, found.chance):
        np.testing.assert_allclose(values, 1, rtol=1e-6)
    assert (found.error < 1e-5).all()


def test_which_rule(hf_dir: Path) -> None:
    """A learned router that is zero chooses nothing: the activations stand in for it, and that is said."""
    source = make_source(hf_dir, "learned")
    assert choose_rule(source) == "activation"
    assert choose_rule(with_router(source)) == "learned"
    routers = np.zeros((L, D, E), np.float32)
    routers[2, 3, 1] = 1e-3
    assert choose_rule(DistilledSource(source, routers)) == "learned"
    found = measure(source, make_sample(source.config.experts))  # type: ignore[arg-type]
    assert found.rule == "activation" and found.to_dict()["rule"] == "activation"
    expected = measure(make_source(hf_dir, "activation"), make_sample(source.config.experts))  # type: ignore[arg-type]
    np.testing.assert_array_equal(found.chosen, expected.chosen)


def test_report_of_many_layers(tmp_path: Path) -> None:
    """Nothing of a modality that is not there, and no NaN in the file."""
    moe = ExpertsSpec(8, "activation", ("text", "a", "b"), ((1, 2), (2, 3)), (4, 2, 1))
    values = np.random.default_rng(0).uniform(0.2, 0.9, (32, 3))
    values[:, 1] = np.nan
    write_coverage(
        Coverage(moe, "activation", (10, 0, 5), np.array([4, np.nan, 1]), values, values, values),
        tmp_path,
        {"model": "m"},
    )
    found = json.loads((tmp_path / "coverage.json").read_text(), parse_constant=pytest.fail)
    assert found["modalities"]["a"] is None and found["model"] == "m"
    assert len(found["modalities"]["b"]["error"]) == 32 and found["modalities"]["b"]["chance"] == 0.125
    assert (tmp_path / "coverage.png").read_bytes()[:4] == b"\x89PNG"


# --- the commands -----------------------------------------------------------------------------------------------------

MOEFY = ["--experts", E, "--top-k", "text=2,salt=1", "--range", f"salt={SALT[0]}:{SALT[1]}"]


@pytest.fixture
def model(hf_dir: Path) -> Path:
    write_tokenizer(hf_dir)
    return hf_dir


def test_commands(model: Path, tmp_path: Path, run: Callable[..., str], refused: Callable[..., str]) -> None:
    data = write_sample(tmp_path / "data.jsonl", 40)
    said = run("moefy", model, tmp_path / "moe", *MOEFY, "--sample", data, "--sample-tokens", 300)
    assert "activation, as the learned router is still zero" in said and "2/4 = 50.0%" in said and "mean" in said
    report = json.loads((tmp_path / "moe-coverage" / "coverage.json").read_text())
    assert report["sample"] == [str(data)] and report["experts"] == E and report["router"] == "learned"
    kinds = report["modalities"]
    assert 300 <= sum(kind["tokens"] for kind in kinds.values()) < 340 and kinds["salt"]["k"] == 1
    assert (tmp_path / "moe-coverage" / "coverage.png").is_file()
    # The model's own files are those of its manifest.
    assert "later" not in run("verify", tmp_path / "moe")
    message = refused("coverage", tmp_path / "moe", "--sample", data)
    assert "moe-coverage" in message and "exists already" in message
    # The same again; and of text only.
    run("coverage", tmp_path / "moe", "--sample", data, "--sample-tokens", 300, "--out", tmp_path / "again")
    assert json.loads((tmp_path / "again" / "coverage.json").read_text())["modalities"] == kinds
    text = write_sample(tmp_path / "text.jsonl", 20, SALT[0])
    said = run("coverage", tmp_path / "moe", "--sample", text, "--out", tmp_path / "text")
    assert "absent       salt" in said and "nan" not in said.lower()
    assert json.loads((tmp_path / "text" / "coverage.json").read_text())["modalities"]["salt"] is None


def test_several_files_and_their_columns(model: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    """As many tokens of each file; a template and columns of one's own."""
    files = []
    for name, words in (("a", "w3 w4"), ("b", "w31 w32")):
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps([{"question": words, "answer": f"{words} {words}"}] * 400))
    options = [part for file in files for part in ("--sample", file)]
    options += ["--sample-columns", "instruction=question,output=answer", "--sample-template", "alpaca_short"]
    run("moefy", model, tmp_path / "moe", *MOEFY, *options, "--sample-tokens", 8000, "--method", "order")
    report = json.loads((tmp_path / "moe-coverage" / "coverage.json").read_text())
    kinds = report["modalities"]
    assert report["sample"] == [str(file) for file in files]
    assert 8000 <= sum(kind["tokens"] for kind in kinds.values()) < 8100
    # The prompt's words are unknown to the tokenizer, so the salt of b.json is six tokens of each of its records.
    per_record = sum(kind["tokens"] for kind in kinds.values()) / (kinds["salt"]["tokens"] / 6) / 2
    assert 10 < per_record < 40


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--sample", "missing.json"], ["--sample: missing.json", "does not exist"]),
        (["--sample", "DATA", "--sample-tokens", 0], ["--sample-tokens 0"]),
        (["--sample", "DATA", "--sample", "DATA", "--sample-tokens", 1], ["--sample-tokens 1", "of each file"]),
        (["--sample", "DATA", "--sample-template", "nope"], ["'nope'", "unknown"]),
        (["--sample", "DATA", "--sample-columns", "text"], ["--sample-columns text", "NAME=VALUE"]),
        (["--sample", "DATA", "--sample-columns", "text=body"], ["--sample: ", "--sample-template", "columns text"]),
        (["--sample-tokens", 9], ["--sample-tokens 9", "--sample FILE"]),
    ],
)
def test_mistakes_in_the_sample(
    options: list[Any], words: list[str], model: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    """Before anything is written."""
    data = write_sample(tmp_path / "data.jsonl", 3)
    given = [data if option == "DATA" else option for option in options]
    message = refused("moefy", model, tmp_path / "moe", *MOEFY, *given)
    assert all(word in message for word in words), message


def test_wrong_models(hf_dir: Path, tmp_path: Path, run: Callable[..., str], refused: Callable[..., str]) -> None:
    data = write_sample(tmp_path / "data.jsonl", 3)
    for verb in (["coverage", hf_dir], ["distil-router", hf_dir, tmp_path / "out"]):
        message = refused(*verb, "--sample", data)
        assert "is a dense model" in message and "convert moefy" in message
    for file in hf_dir.glob("generation_config.json"):
        file.unlink()
    run("moefy", hf_dir, tmp_path / "moe", *MOEFY)
    for verb in (["coverage", tmp_path / "moe"], ["distil-router", tmp_path / "moe", tmp_path / "out"]):
        message = refused(*verb, "--sample", data)
        assert "no tokenizer" in message and str(tmp_path / "moe" / "jaxlm" / "tokenizer") in message
    message = refused("moefy", hf_dir, tmp_path / "out", *MOEFY, "--sample", data)
    assert "no tokenizer" in message
