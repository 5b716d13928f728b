"""A model whose layers differ, through the commands: windows of two lengths, dense layers and experts by turns."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest

import jaxlm
from jaxlm.cli.plan import main as plan
from jaxlm.cli.train import main as train
from jaxlm.models.decoder import Decoder, abstract_variables
from jaxlm.spec import DecoderSpec, ExpertsSpec, uniform_decoder
from jaxlm.weights.leaves import LeafInfo
from jaxlm.weights.native.write import write_model
from tests.e2e.conftest import write_config
from tests.models.compare import random_tree


class InMemory:
    """A fresh model as a source of leaves."""

    path, tokenizer_files, prompt_files, hf_config, partition = Path("memory"), [], [], None, None

    def __init__(self, spec: DecoderSpec) -> None:
        self.config = spec
        tree = random_tree(nn.unbox(abstract_variables(Decoder(spec)))["params"], 0)
        paths = jax.tree_util.tree_leaves_with_path(tree)
        self._arrays = {
            jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in paths
        }
        self.leaves = {path: LeafInfo(array.shape, array.dtype) for path, array in self._arrays.items()}

    def read(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        return self._arrays[path][index]


def spec_of(num_layers: int = 5) -> DecoderSpec:
    spec = uniform_decoder(
        "llama",
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_layers=num_layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
    )
    (layer,) = spec.period
    replace = dataclasses.replace
    local = replace(layer, attention=replace(layer.attention, window=8))
    experts = ExpertsSpec(4, "learned", top_k=(2,))
    routed = replace(layer, feed_forward=replace(layer.feed_forward, experts=experts))
    return replace(spec, period=(local, routed))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("period") / "model"
    directory.mkdir()
    write_model(InMemory(spec_of()), directory, lambda _: None)  # type: ignore[arg-type]
    return directory


@pytest.mark.slow
def test_it_is_trained_asked_and_planned(
    model: Path, base_config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dict(base_config, model={"path": str(model)})
    file = write_config(tmp_path, config, train={"steps": 3, "global_batch_size": 8})
    run = tmp_path / "run"
    assert train(["--config", str(file), "--output_dir", str(run)]) == 0
    losses = [json.loads(line).get("loss") for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len([loss for loss in losses if loss is not None]) == 3
    loaded = jaxlm.load(run)
    (answer,) = loaded.generate([[1, 5, 9, 30, 7, 8, 100, 20, 21, 22, 23]], max_new_tokens=6)
    # Greedy ids are those of the logits of all tokens at once, beyond the window of the local layers too.
    ids = [1, 5, 9, 30, 7, 8, 100, 20, 21, 22, 23]
    for token in answer.ids:
        assert int(np.argmax(loaded.logits(ids)[-1])) == token
        ids.append(token)
    capsys.readouterr()
    assert plan(["--config", str(file), "--topology", "cpu:1", "--output_dir", str(tmp_path / "plan"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["memory"]["parameters"] > 0
