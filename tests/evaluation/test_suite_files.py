"""The task files of lm-evaluation-harness: their figures are those of `jaxlm evaluate --task`."""

from __future__ import annotations

import importlib
import json
import math
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

import jaxlm.evaluation
from jaxlm.cli.evaluate import main
from jaxlm.errors import UserError
from jaxlm.evaluation import suites
from jaxlm.evaluation.job import read_job
from jaxlm.evaluation.registry import get_task
from jaxlm.evaluation.task import Answer, Answers
from tests.evaluation.test_geobench import AP, NPEE, sample
from tests.evaluation.test_ie import OLD, TRIPLES, new
from tests.evaluation.test_lpm24_tasks import RECORD as LPM24
from tests.evaluation.test_molinstructions import record
from tests.evaluation.test_regression import DEVICE, METAL, STEEL
from tests.evaluation.test_sii import RECORD as SII

FILES = {path.stem: path for path in (Path(jaxlm.evaluation.__file__).parent / "lm_eval").glob("jaxlm_*.yaml")}
PROSE = "the ice forms"
# Task file -> what its data file holds, and answers to it.
ASKED: dict[str, tuple[Any, list[str]]] = {
    "jaxlm_geobench_subjective": (
        {
            kind: {"question": ["moraine", "till"], "answer": ["Debris of ice.", "ice"]}
            for kind in ("noun", "completion", "discussion")
        },
        ["Debris", "ice", PROSE, "", "ice of debris", "x"],
    ),
    "jaxlm_sii": (
        [SII] * 3,
        [SII["output"], "\n".join(SII["output"].split("\n")[:9]), SII["output"].replace("Unknown", "ITO 300")],
    ),
    "jaxlm_mdp": (
        [DEVICE, DEVICE | {"output": DEVICE["output"].replace("1.05", "1.2").replace("20.1", "25")}, DEVICE],
        [DEVICE["output"], "JV default Voc: 1.5\nJV default Jsc: none", "JV default PCE: 3\nJV default Jsc: 7"],
    ),
    "jaxlm_matbench": (
        [STEEL, STEEL, STEEL | {"output": "900.5"}, METAL, METAL],
        ["1000", "none", "800", "Yes, it is.", "No."],
    ),
    "jaxlm_ie": ([OLD, OLD, OLD], ["(A,r,B)", "(A,q,C)(A,r,D)", "nothing"]),
    "jaxlm_molinstructions": (
        [
            *[record("[C][C][O]", "retrosynthesis")] * 3,
            *[record("The molecule is an alcohol.", "molecular description generation")] * 2,
            *[record("0.5", "property prediction")] * 2,
            *[record("It binds ATP.", "protein function")] * 2,
            *[record("a, b", "chemical entity recognition")] * 2,
            *[record("(a, b)", "chemical protein interaction extraction")] * 2,
            *[record("(B) is right", "multi choice question")] * 2,
            *[record("Yes, it is.", "true or false question"), record("No, no.", "true or false question")],
            *[record("Water boils at noon.", "open question")] * 2,
        ],
        [
            "[C][C][O]",
            "[C][O]",
            "none",
            "The molecule is an acid.",
            "An alcohol.",
            "0.7",
            "none",
            "It binds.",
            "ATP",
            "a, c",
            "b",
            "(a, b)(c, d)",
            "none",
            "(B)",
            "A",
            "Yes, so.",
            "yes, no",
            "Water boils.",
            "at noon it boils",
        ],
    ),
    "jaxlm_lpm24_captions": ([LPM24] * 3, [LPM24["caption"], "The molecule is an acid.", "none"]),
    "jaxlm_lpm24_molecules": ([LPM24] * 3, ["CCO", "CCC", "none)"]),
}


class Loader(yaml.SafeLoader):
    """As the harness reads a task file."""


def function(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Any:
    module, _, name = str(loader.construct_scalar(node)).rpartition(".")
    return getattr(importlib.import_module(module), name)


Loader.add_constructor("!function", function)


def task_file(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.load(FILES[name].read_text(), Loader)  # noqa: S506  (a SafeLoader)
    return content


def written(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def check_figures(task: dict[str, Any], rows: Sequence[dict[str, Any]], data: Path, answers: list[Answers]) -> None:
    """The file's metrics, aggregated as it says, are the suite's figures, with their standard errors and directions."""
    suite = get_task(task["metadata"]["suite"])
    job = read_job(suite, data, task["metadata"].get("options") or {})
    expected = {name: figure for name, figure in job.score(answers).items() if figure.n}
    listed = {entry["metric"]: entry for entry in task["metric_list"]}
    assert {name for row in rows for name in row} == set(expected) and set(expected) <= set(listed)
    for name, figure in expected.items():
        values = [row[name] for row in rows if name in row]
        assert listed[name]["higher_is_better"] is figure.higher_is_better, name
        if listed[name]["aggregation"] != "mean":
            assert listed[name]["aggregation"](values) == pytest.approx(figure.value, nan_ok=True), name
            continue
        assert statistics.fmean(values) == pytest.approx(figure.value), name
        assert len(values) == figure.n
        if len(values) > 1:
            error = statistics.stdev(values) / math.sqrt(len(values))
            assert error == pytest.approx(figure.stderr, abs=1e-12), name


@pytest.mark.parametrize("name", sorted(ASKED))
def test_figures_of_written_answers(name: str, tmp_path: Path) -> None:
    task = task_file(name)
    content, texts = ASKED[name]
    data = written(tmp_path / "data.json", content)
    docs = task["custom_dataset"](**(task["metadata"] | {"data": str(data)}))["test"]
    assert len(docs) == len(texts) and docs[0]["prompt"].endswith("### Response:\n")
    rows = [task["process_results"](doc, [f" {text}\n\ufffd"]) for doc, text in zip(docs, texts, strict=True)]
    check_figures(task, rows, data, [{"answer": Answer(texts=(text,))} for text in texts])
    settings = task["generation_kwargs"]
    assert settings["max_gen_toks"] == get_task(task["metadata"]["suite"]).options().max_new_tokens


def test_answers_about_parts_of_a_schema_are_put_together(tmp_path: Path) -> None:
    """Figures over all documents need all of them, in whatever order they are asked for."""
    data = written(tmp_path / "data.json", [new("1", ["r"], TRIPLES), new("1", ["q"], TRIPLES), new("2", ["r"], [])])
    texts = ['{"r": [{"head": "A", "tail": "B"}]}', '{"q": [{"head": "A", "tail": "D"}]}', "none"]
    task = task_file("jaxlm_ie")
    docs = suites.read("ie", str(data))["test"]
    rows = [suites.score_text(doc, [text]) for doc, text in zip(docs, texts, strict=True)]
    check_figures(task, rows, data, [{"answer": Answer(texts=(text,))} for text in texts])


@pytest.mark.parametrize(("name", "content"), [("jaxlm_geobench_npee", NPEE), ("jaxlm_geobench_apstudy", AP)])
@pytest.mark.parametrize("ending", ["wa", "woa"])
def test_figures_of_labels(name: str, content: Any, ending: str, tmp_path: Path) -> None:
    """A line break that is counted with every label changes nothing."""
    task = task_file(name)
    data = written(tmp_path / "data.json", content)
    metadata = task["metadata"] | {"data": str(data), "ending": ending}
    docs = task["custom_dataset"](**metadata)["test"]
    answers: list[Answers] = [{} for _ in range(len(read_job(get_task("geobench"), data, {}).records))]
    rows = []
    for number, doc in enumerate(docs):
        count = len(doc["choices"]) // 2
        assert doc["choices"] == [f" {label}" for label in doc["choices"][count:]] + doc["choices"][count:]
        assert doc["prompt"].endswith("The answer is:\n" if ending == "wa" else "### Response:\n")
        log_probs = [math.log((1 + (place * 7 + number) % 5) / 40) for place in range(2 * count)]
        rows.append(task["process_results"](doc, [(value - 3.5, False) for value in log_probs]))
        answers[number] = {f"{ending}:spaced+plain": Answer(log_probs=tuple(log_probs))}
    check_figures(task, rows, data, answers)


def test_templates_and_options(tmp_path: Path) -> None:
    data = str(written(tmp_path / "data.json", [STEEL, METAL]))
    docs = suites.read("matbench", data, template="text")["test"]
    assert docs["prompt"][:] == ["Strength? ->\n\n Fe0.8C0.2\n", "Is composition metal? ->"]
    (tmp_path / "own.json").write_text(
        json.dumps(
            {"prompt_input": "{instruction} {input}=", "prompt_no_input": "{instruction}=", "response_split": ""}
        )
    )
    docs = suites.read("matbench", data, template=str(tmp_path / "own.json"))["test"]
    assert docs["prompt"][1] == "Is composition metal? ->="
    with pytest.raises(UserError, match="chat belongs to a tokenizer"):
        suites.read("matbench", data, template="chat")


@pytest.mark.parametrize(
    ("suite", "more", "message"),
    [
        ("zbench", {}, "'zbench' cannot be asked by lm_eval"),
        ("sii", {}, r"data\.json:1: .*--task sii expects"),
        ("matbench", {"options": {"as_published": True}}, "use `jaxlm evaluate --task matbench --options.as_published"),
        ("matbench", {"options": {"max_new_tokens": 9}}, r"--options\.gen_kwargs '\{max_gen_toks: N\}'"),
        ("matbench", {"options": {"shots": 9}}, "unknown key 'shots'"),
        ("lpm24_molecules", {"options": {"fcd": True}}, "is not for the harness"),
        ("geobench", {}, "is not a question of GeoBench"),
        ("geobench", {"ending": "no"}, "'no' must be one of wa, woa"),
        ("geobench", {"template": "alpaca"}, "metadata.template: has no meaning for geobench"),
        ("matbench", {"ending": "wa"}, "metadata.ending: has no meaning for matbench"),
        ("matbench", {"template": 5}, "metadata.template: expected a text, found 5"),
        ("matbench", {"options": 5}, "metadata.options: expected {NAME: VALUE}, found 5"),
    ],
)
def test_what_cannot_be_meant(suite: str, more: dict[str, Any], message: str, tmp_path: Path) -> None:
    data = written(tmp_path / "data.json", AP if "ending" in more else [{"instruction": "Do.", "output": "1"}])
    with pytest.raises(UserError, match=message):
        suites.read(suite, str(data), **more)


# --- beside the commands ----------------------------------------------------------------------------------------------


def figures_of_both(
    model: Path, folder: Path, tasks: dict[str, str], data: dict[str, Path], words: list[str], *more: str
) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """For each task file its figures by the harness, and those of its suite.

    Args:
        tasks: suite by task file.
        data: data file by task file.
    """
    (folder / "tasks").mkdir()
    for name, path in data.items():  # one file each, with its own data
        content = FILES[name].read_text()
        default = task_file(name)["metadata"]["data"]
        assert f"data: {default}," in content
        (folder / "tasks" / f"{name}.yaml").write_text(content.replace(f"data: {default},", f"data: {path},"))
    common = ["--model", str(model), "--output", str(folder / "out"), "--compilation_cache", "none"]
    harness = ["--harness", ",".join(tasks), "--options.include_path", str(folder / "tasks"), *more]
    assert main([*common, *harness]) == 0
    given = [word for name, suite in tasks.items() for word in ("--data", f"{suite}={data[name]}")]
    assert main([*common, "--task", ",".join(tasks.values()), *given, *words]) == 0
    results = json.loads((folder / "out/harness/results.json").read_text())["results"]
    figures = {
        suite: json.loads((folder / "out" / suite / "scores.json").read_text())["figures"] for suite in tasks.values()
    }
    return [(name, results[name], figures[suite]) for name, suite in tasks.items()]


@pytest.mark.nightly
def test_the_harness_gives_the_figures_of_the_suites(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'jaxlm[harness]'")
    short = [{"instruction": "rock?", "output": "1.5"}, {"instruction": "sand", "output": "Yes, so."}]
    contents: dict[str, Any] = {
        "jaxlm_geobench_subjective": {"noun": {"question": ["rock", "lava"], "answer": ["sand rock", "iron"]}},
        "jaxlm_matbench": short,
        "jaxlm_ie": [{"instruction": "rock", "input": "A B", "output": "(A,r,B)"}],
        "jaxlm_molinstructions": [record("rock sand", "protein function"), record("iron", "open question")],
        "jaxlm_lpm24_molecules": [{"molecule": "C", "caption": "rock"}, {"molecule": "CC", "caption": "iron"}],
    }
    data = {name: written(tmp_path / f"{name}.json", content) for name, content in contents.items()}
    tasks = {name: task_file(name)["metadata"]["suite"] for name in contents}
    words = ["--template", "alpaca", "--options.max_new_tokens", "6"]
    more = ["--options.gen_kwargs", "{max_gen_toks: 6}"]
    for name, ours, expected in figures_of_both(tiny_model, tmp_path, tasks, data, words, *more):
        for figure, value in expected.items():
            if value["n"] and not figure.endswith("_perplexity"):
                assert ours[f"{figure},none"] == pytest.approx(value["value"]), (name, figure)
        rows = (tmp_path / f"out/harness/samples_{name}.jsonl").read_text().splitlines()
        answers = [json.loads(row)["resps"][0][0].rstrip("\ufffd").strip() for row in rows]
        lines = (tmp_path / "out" / tasks[name] / "predictions.jsonl").read_text().splitlines()
        assert answers == [json.loads(line)["answers"]["answer"]["texts"][0] for line in lines]
    assert "Custom kwargs" not in capsys.readouterr().err  # advice about the harness's own command line


@pytest.mark.nightly
@pytest.mark.parametrize(("name", "content"), [("jaxlm_geobench_npee", NPEE), ("jaxlm_geobench_apstudy", AP)])
def test_the_harness_asks_for_k2s_tokens(name: str, content: Any, tiny_model: Path, tmp_path: Path) -> None:
    """With LLaMA's tokenizer a label behind a space is the token of K2's tables."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'jaxlm[harness]'")
    from tests.e2e.conftest import SHAPE
    from tests.models.small import hf_model

    tokenizer = sample("llama_tokenizer.model")
    model = tmp_path / "model"
    shape = {key: value for key, value in SHAPE.items() if key not in ("architectures", "model_type")}
    hf_model("llama", **shape | {"vocab_size": 32000, "max_position_embeddings": 512}).save_pretrained(model)
    shutil.copyfile(tokenizer, model / "tokenizer.model")
    shutil.copyfile(tiny_model / "tokenizer_config.json", model / "tokenizer_config.json")
    data = {name: written(tmp_path / "data.json", content)}
    ((_, ours, expected),) = figures_of_both(model, tmp_path, {name: "geobench"}, data, [])
    compared = [figure for figure in expected if "_woa_" not in figure]
    assert any("_k2_" in figure for figure in compared)
    for figure in compared:
        value = ours[f"{figure.replace('_k2_', '_spaced_')},none"]
        assert value == pytest.approx(expected[figure]["value"], abs=1e-4), figure


@pytest.mark.nightly
def test_data_of_another_suite_are_refused_before_a_model_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'jaxlm[harness]'")
    data = written(tmp_path / "data.json", [STEEL])
    words = ["--harness", "jaxlm_sii", "--model", "nowhere", "--options.metadata", f"{{data: {data}}}"]
    assert main(words) == 2
    message = capsys.readouterr().err
    assert "data.json:1" in message and "--task sii expects" in message
    assert main([*words, "--options.num_fewshot", "2"]) == 2
    assert "is asked without examples" in capsys.readouterr().err
    assert main([*words[:-1], "{dta: x}"]) == 2
    assert "'dta' is not a key of jaxlm_sii; known: data, template" in capsys.readouterr().err
