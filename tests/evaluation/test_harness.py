"""lm-evaluation-harness: a model of jaxlm beside the harness's own `hf`, on the same files."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.numpy import load_file, save_file

from jaxlm.cli.evaluate import main
from tests.e2e.conftest import WORDS

pytestmark = pytest.mark.nightly  # lm-eval is not among what all tests need

CHAT = (
    "{% for message in messages %}<s>[{{ message['role'] }}] {{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>[assistant] {% endif %}"
)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a task of each kind of request, and their data."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'jaxlm[harness]'")
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {
            "question": " ".join(WORDS[n % 5 : n % 5 + 2 + n % 7]),
            "choices": [WORDS[n % 20], f"{WORDS[3 + n % 4]} {WORDS[n % 11]}", WORDS[(n * 7) % 20], "lava rock gas"],
            "answer": n % 4,
        }
        for n in range(24)
    ]
    (folder / "data.json").write_text(json.dumps(rows))
    long = [{"text": " ".join(WORDS[(n * k) % 20] for k in range(40 + 150 * n))} for n in range(4)]
    (folder / "texts.json").write_text(json.dumps(long))
    common = {
        "dataset_path": "json",
        "test_split": "test",
        "fewshot_split": "test",
        "metadata": {"version": 1},
    }
    data = {"dataset_kwargs": {"data_files": {"test": str(folder / "data.json")}}}
    texts = {"dataset_kwargs": {"data_files": {"test": str(folder / "texts.json")}}}
    choice = {
        "output_type": "multiple_choice",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    kinds: dict[str, dict[str, Any]] = {
        "tiny_texts": choice | data | {"doc_to_text": "Question: {{question}}\nAnswer:", "doc_to_choice": "choices"},
        "tiny_letters": choice
        | data
        | {
            "doc_to_text": "{{question}}\n"
            + "".join(f"{letter}. {{{{choices[{n}]}}}}\n" for n, letter in enumerate("ABCD"))
            + "Answer:",
            "doc_to_choice": ["A", "B", "C", "D"],
            "num_fewshot": 2,
            "fewshot_config": {"sampler": "first_n"},
        },
        "tiny_rolling": texts
        | {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "text",
            "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
        },
        "tiny_answers": data
        | {
            "output_type": "generate_until",
            "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_target": "{{choices[answer]}}",
            "generation_kwargs": {"until": ["\n", " gas"], "max_gen_toks": 12, "do_sample": False},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        },
    }
    kinds["tiny_chats"] = kinds["tiny_answers"] | {
        "doc_to_text": "{{question}}",
        "description": "short",
        "num_fewshot": 1,
        "fewshot_config": {"sampler": "first_n"},
    }
    for name, values in kinds.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **common, **values}))
    return folder


@pytest.fixture(scope="module")
def chat_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a tokenizer.json: behind special tokens, transformers and SentencePiece cut a text in different ways.

    It writes no bytes: at the end of an answer `hf` shows those that are no character, and jaxlm's server does not.
    """
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(tiny_model, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT
    (folder / "tokenizer.model").unlink()
    tokenizer.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][[tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in range(256)]] = 0
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


NAMES = ["tiny_texts", "tiny_letters", "tiny_rolling", "tiny_answers", "tiny_chats"]


def by_hf(model: Path, tasks: Path, **more: Any) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    results: dict[str, Any] = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model), "dtype": "float32"},
        device="cpu",
        batch_size=4,
        tasks=NAMES,
        task_manager=TaskManager(include_path=str(tasks)),
        bootstrap_iters=0,
        fewshot_random_seed=1234,
        **more,
    )
    return results


@pytest.mark.parametrize("chat", [False, True])
def test_results_are_those_of_hf(chat: bool, tiny_model: Path, chat_model: Path, tasks: Path, tmp_path: Path) -> None:
    """All kinds of requests; few-shot, as text and as turns of a conversation; texts longer than the context."""
    model = chat_model if chat else tiny_model
    theirs = by_hf(model, tasks, apply_chat_template=chat, fewshot_as_multiturn=chat)
    words = ["--harness", ",".join(NAMES), "--model", str(model), "--output", str(tmp_path), "--batch_size", "4"]
    words += ["--options.include_path", str(tasks), "--options.bootstrap_iters", "0"]
    words += ["--options.apply_chat_template", str(chat).lower(), "--compilation_cache", "none"]
    assert main(words) == 0
    ours = json.loads((tmp_path / "harness" / "results.json").read_text())
    assert "bos <s>" in ours["bos"] and ours["first_request"]["ids"]
    for name in NAMES:
        rows = [json.loads(line) for line in (tmp_path / "harness" / f"samples_{name}.jsonl").read_text().splitlines()]
        others = sorted(theirs["samples"][name], key=lambda row: row["doc_id"])
        assert [row["arguments"] for row in rows] == json.loads(json.dumps([row["arguments"] for row in others]))
        for row, other in zip(rows, others, strict=True):
            if name in ("tiny_answers", "tiny_chats"):
                assert row["resps"] == other["resps"]
            elif name == "tiny_rolling":
                assert float(row["resps"][0][0]) == pytest.approx(float(other["resps"][0][0]), abs=1e-3)
            else:
                mine, hf = ([(float(a), str(b)) for a, b in each["filtered_resps"]] for each in (row, other))
                assert [hit for _, hit in mine] == [hit for _, hit in hf]
                assert [value for value, _ in mine] == pytest.approx([value for value, _ in hf], abs=1e-4)
                assert (row["acc"], row["acc_norm"]) == (other["acc"], other["acc_norm"])
        for key, value in theirs["results"][name].items():
            if isinstance(value, float):
                assert ours["results"][name][key] == pytest.approx(value, rel=1e-5)
    if chat:
        _chats_of_a_server_agree(model, tasks, theirs)
    else:
        _a_server_agrees(model, tasks, theirs)
        _task_of_jaxlm_agrees(model, tasks, theirs, tmp_path)
        _model_named_jaxlm_agrees(model, tasks, theirs)


@contextlib.contextmanager
def _serving(model: Path) -> Iterator[str]:
    """The address of `jaxlm serve` with a model that it calls `tiny`."""
    pytest.importorskip("tenacity", reason="lm-eval's clients are not installed: pip install 'jaxlm[peers]'")
    words = ["--model", str(model), "--name", "tiny", "--port", "0", "--rows", "4", "--compilation_cache", "none"]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}  # as on a user's machine
    command = [sys.executable, "-m", "jaxlm.serve", *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    try:
        lines: list[str] = []
        while not lines or (lines[-1] and not lines[-1].startswith("serving")):
            lines.append(process.stderr.readline())
        url = re.search(r"http://127.0.0.1:\d+", lines[-1])
        assert url is not None, "".join(lines)
        yield url[0]
    finally:
        process.terminate()
        process.communicate()


def _asked_by_its_client(
    client: str, url: str, names: list[str], tasks: Path, settings: dict[str, Any], **more: Any
) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    results: dict[str, Any] = simple_evaluate(
        model=client,
        model_args={"model": "tiny", "max_retries": 30, "base_url": url, **settings},
        tasks=names,
        task_manager=TaskManager(include_path=str(tasks)),
        bootstrap_iters=0,
        fewshot_random_seed=1234,
        **more,
    )
    return results


def _a_server_agrees(model: Path, tasks: Path, theirs: dict[str, Any]) -> None:
    """The harness's own client of completions, as docs/serving.md says how."""
    names = ["tiny_texts", "tiny_letters"]
    settings = {"max_length": 256, "add_bos_token": True, "tokenizer": str(model)}
    with _serving(model) as url:
        found = _asked_by_its_client("local-completions", f"{url}/v1/completions", names, tasks, settings)
    for name in names:
        mine, others = (sorted(each["samples"][name], key=lambda row: row["doc_id"]) for each in (found, theirs))
        for row, other in zip(mine, others, strict=True):
            values, hf = ([float(value) for value, _ in each["filtered_resps"]] for each in (row, other))
            assert values == pytest.approx(hf, abs=1e-4)
            assert (row["acc"], row["acc_norm"]) == (other["acc"], other["acc_norm"])


def _chats_of_a_server_agree(model: Path, tasks: Path, theirs: dict[str, Any]) -> None:
    """The harness's client of chats: it sends turns, the server writes them in the model's template."""
    names = ["tiny_answers", "tiny_chats"]
    with _serving(model) as url:
        found = _asked_by_its_client(
            "local-chat-completions", f"{url}/v1/chat/completions", names, tasks, {"num_concurrent": 4},
            apply_chat_template=True, fewshot_as_multiturn=True,
        )  # fmt: skip
    for name in names:
        mine, others = (sorted(each["samples"][name], key=lambda row: row["doc_id"]) for each in (found, theirs))
        assert [row["resps"] for row in mine] == [row["resps"] for row in others]
        assert len({row["resps"][0][0] for row in others}) > 1
        assert [row["exact_match"] for row in mine] == [row["exact_match"] for row in others]


def _task_of_jaxlm_agrees(model: Path, tasks: Path, theirs: dict[str, Any], tmp_path: Path) -> None:
    words = ["--task", "multiple_choice", "--model", str(model), "--data", str(tasks / "data.json")]
    words += ["--options.answers", "texts", "--output", str(tmp_path), "--compilation_cache", "none"]
    assert main(words) == 0
    figures = json.loads((tmp_path / "multiple_choice" / "scores.json").read_text())["figures"]
    for name in ("acc", "acc_norm"):
        assert figures[name]["value"] == pytest.approx(theirs["results"]["tiny_texts"][f"{name},none"])


def _model_named_jaxlm_agrees(model: Path, tasks: Path, theirs: dict[str, Any]) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    import jaxlm.harness  # noqa: F401  (registers it)

    results: Any = simple_evaluate(
        model="jaxlm",
        model_args=f"path={model},dtype=float32",
        tasks=["tiny_texts"],
        batch_size=4,
        task_manager=TaskManager(include_path=str(tasks)),
        bootstrap_iters=0,
    )
    assert results["results"]["tiny_texts"]["acc,none"] == theirs["results"]["tiny_texts"]["acc,none"]


def test_the_task_files_that_come_along_run(
    tiny_model: Path,
    tasks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for name in ("questions", "examples"):
        shutil.copyfile(tasks / "data.json", f"{name}.json")
    shutil.copyfile(tasks / "texts.json", "texts.json")
    Path("asked.json").write_text(json.dumps([{"question": "rock", "answer": "sand"}]))
    names = ["local_letters", "local_texts", "local_answers", "local_perplexity"]
    words = ["--harness", ",".join(names), "--model", str(tiny_model), "--output", "out", "--limit", "2"]
    words += ["--options.bootstrap_iters", "0", "--options.gen_kwargs", "{max_gen_toks: 4}"]
    assert main([*words, "--compilation_cache", "none"]) == 0
    results = json.loads(Path("out/harness/results.json").read_text())["results"]
    assert set(results) == set(names) and results["local_texts"]["acc_norm,none"] >= 0
    screen = capsys.readouterr().err
    assert "log-likelihoods" in screen and "answers" in screen  # jaxlm's bars, and none of the harness's
    assert not [noise for noise in ("it/s", "Tokenizing inputs", "Checking cached requests") if noise in screen]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--harness", "nothing_there"], "'nothing_there' is not a task of lm_eval"),
        (["--harness", ","], "no task is named"),
        (["--harness", "local_texts", "--task", "qa"], "leave --task, --data and --predictions out"),
        (["--harness", "local_texts", "--options.shots", "1"], "unknown key 'shots'"),
    ],
)
def test_mistakes_are_named(words: list[str], message: str, tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--model", "nowhere"]) == 2
    assert message in capsys.readouterr().err


def test_a_run_that_was_killed_goes_on(
    tiny_model: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jaxlm.evaluation import likelihood

    words = ["--harness", "tiny_texts", "--model", str(tiny_model), "--output", str(tmp_path), "--batch_size", "4"]
    words += ["--options.include_path", str(tasks), "--options.bootstrap_iters", "0", "--compilation_cache", "none"]
    original, asked = likelihood.scores, list[int]()

    def scores(model: Any, batch: Any, rows: int) -> Any:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(len(batch))
        return original(model, batch, rows)

    monkeypatch.setattr(likelihood, "scores", scores)
    assert main(words) == 130
    monkeypatch.setattr(likelihood, "scores", lambda *args: asked.append(len(args[1])) or original(*args))
    assert main(words) == 0
    distinct = {row["question"] for row in json.loads((tasks / "data.json").read_text())}
    assert sum(asked) == len(distinct) and len(asked) > 3
    assert not list((tmp_path / "harness").glob("answers-*"))
