"""configs/pods/: each recipe goes with its model and devices, and the table beside them says what is reckoned now."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from jaxlm.errors import UserError
from jaxlm.models.families import load_shape
from jaxlm.training.setup import set_up

_before = dict(os.environ)
from benchmarks import recipes  # noqa: E402

os.environ.clear()
os.environ.update(_before)  # as a program it chooses the CPU; other tests are not to

# Each needs seconds when the model's activations are asked of JAX, and recipes for chips of one kind share the answer:
# these take the least. `python benchmarks/recipes.py` looks at all.
RECKONED = [one for one in recipes.PODS if one.name.startswith(("7b-v5e", "70b-v"))]


def test_every_recipe_is_in_the_table() -> None:
    files = {path.stem for path in (recipes.ROOT / "configs/pods").glob("*.yaml")}
    assert files == {one.name for one in recipes.PODS}
    shown = "\n".join(recipes.written())
    assert [one.name for one in recipes.ALL if one.name not in shown] == []


OTHERS = [one for one in recipes.ALL if one not in RECKONED]


@pytest.mark.parametrize("recipe", OTHERS, ids=lambda one: one.name)
def test_goes_with_its_model_and_devices(recipe: recipes.Recipe) -> None:
    setup = set_up(recipe.config, load_shape(recipe.model), recipe.topology)
    # What the file says is what happens: no rows fewer at a time than it asks for.
    assert setup.micro_batch == recipe.config.train.micro_batch_size
    setup.initializer(setup.schedule(1000))  # the mesh divides every parameter


@pytest.mark.parametrize("recipe", RECKONED, ids=lambda one: one.name)
def test_the_table_says_what_is_reckoned_now(recipe: recipes.Recipe) -> None:
    assert recipes.row(recipe, recipes.read_compiled()) in recipes.written(), "python benchmarks/recipes.py --write"


def test_compiled_figures_are_of_these_recipes_and_fit() -> None:
    assert recipes.stale() == [], "python benchmarks/recipes.py --compile NAME"
    assert recipes.compilers(recipes.read_compiled()) in recipes.written(), "python benchmarks/recipes.py --write"
    compiled = recipes.read_compiled()
    for one in recipes.PODS:
        found = compiled[one.name]
        assert found["refused"] is None and found["bytes"] <= one.topology.chip.memory, one.name
        assert found["involuntary"] == 0, one.name


def test_a_recipe_that_changed_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipes.PODS[0]
    text = (recipes.ROOT / f"configs/{recipe.file}.yaml").read_text()
    before = recipe.digest()
    monkeypatch.setattr(recipes, "ROOT", tmp_path)
    copy = tmp_path / f"configs/{recipe.file}.yaml"
    copy.parent.mkdir(parents=True)
    copy.write_text("# a comment\n" + text)
    assert recipe.digest() == before
    copy.write_text(text.replace("4096", "2048"))
    assert recipe.digest() != before
    assert recipes.stale([recipe]) == [recipe.name]
    assert dataclasses.replace(recipe, devices="v5e:4x8").digest() != before


def test_check_and_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "README.md"
    monkeypatch.setattr(recipes, "README", table)
    monkeypatch.setattr(recipes, "tables", lambda: ["| a | 1 |"])
    monkeypatch.setattr(recipes, "stale", lambda: [])
    table.write_text("no place for it\n")
    assert recipes.main([]) == 2
    assert "are missing" in capsys.readouterr().err
    table.write_text(f"before\n{recipes.BEGIN}\n{recipes.END}\nafter\n")
    assert recipes.main([]) == 1
    assert "+| a | 1 |" in capsys.readouterr().out
    assert recipes.main(["--write"]) == 0 and recipes.main([]) == 0
    assert table.read_text() == f"before\n{recipes.BEGIN}\n| a | 1 |\n{recipes.END}\nafter\n"
    assert recipes.main(["--compile", "8b"]) == 2
    assert "no recipe '8b'; there are 7b-v5e-4x4" in capsys.readouterr().err
    with pytest.raises(UserError, match="unknown chip"):
        _ = dataclasses.replace(recipes.PODS[0], devices="v9:4x4").topology
