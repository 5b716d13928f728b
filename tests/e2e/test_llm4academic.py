"""LLM4Academic's comparison: the published settings of each base, and the script that does it in small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlm.cli.parser import parse_run
from jaxlm.errors import UserError
from jaxlm.evaluation.metrics.zbench import read_lines
from jaxlm.models.families import load_shape

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "configs/llm4academic"
BASES = ("bloomz-7b1-mt", "flan-t5-xxl", "galactica-6.7b", "glm-4-9b", "llama-7b")


def test_every_base_has_a_file_and_a_small_shape() -> None:
    assert {file.stem for file in FOLDER.glob("*.yaml")} == {*BASES, "mix", "small"}
    assert {file.stem for file in (FOLDER / "small").glob("*.json")} == {*BASES}


@pytest.mark.parametrize("base", BASES)
def test_settings_are_the_published_ones(base: str) -> None:
    """Four devices, each 4 rows × 8 (Flan-T5: 1 × 32), 3 epochs, 2e-5, cosine, warm-up 0.03, bfloat16."""
    words = [word for name in ("mix", base) for word in ("--config", f"llm4academic/{name}")]
    (config,) = parse_run([*words, "--model.path", base], prog="", description="").configs
    train, optimizer = config.train, config.optimizer
    assert (train.epochs, train.global_batch_size, train.save_every, train.keep) == (3, 4 * 4 * 8, 2000, 1)
    assert train.micro_batch_size == (1 if base.startswith("flan") else 4)
    assert (optimizer.learning_rate, optimizer.schedule, optimizer.warmup_ratio) == (2e-5, "cosine", 0.03)
    assert (optimizer.weight_decay, config.model.dtype, config.lora) == (0.0, "bfloat16", None)
    assert (config.data.sequence_length, config.data.packing, config.data.train_on_inputs) == (512, False, False)
    assert {source.template for source in config.data.train} == {"alpaca_legacy"} and len(config.data.train) == 4


def test_questions_are_the_instructions_in_other_words() -> None:
    records = json.loads((FOLDER / "instructions.json").read_text(encoding="utf-8"))
    questions = json.loads((FOLDER / "questions.json").read_text(encoding="utf-8"))
    assert len(records) == 40
    asked = {(record["instruction"], record["input"]) for record in records}
    assert len(asked) == 40 and not asked & {(item["instruction"], item["input"]) for item in questions}
    answers = {record["output"] for record in records}
    assert all(item["output"] in answers or item["input"] for item in questions)


def test_questions_of_the_table_are_the_questions() -> None:
    lines = [line.values() for line in read_lines(FOLDER / "zbench.csv")]
    questions = json.loads((FOLDER / "questions.json").read_text(encoding="utf-8"))
    asked = [[question["instruction"], question["output"]] for question in questions if not question["input"]]
    assert [line[1:3] for line in lines[1:]] == asked


def test_an_answer_is_right_where_it_is_the_reference(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(
        "编号,Prompt,tiny 答案评分,tiny,参考回答,任务类型\n1,a?,,Au ,Au,x\n2,b?,,NaCl.,NaCl,x\n", encoding="utf-8"
    )
    assert table("--rate", str(tmp_path / "a.csv"), "tiny", str(tmp_path / "b.csv")).returncode == 0
    rated = [line.values() for line in read_lines(tmp_path / "b.csv")]
    assert [line[2] for line in rated[1:]] == ["正确", "错误"]
    assert [line[3:] for line in rated[1:]] == [["Au ", "Au", "x"], ["NaCl.", "NaCl", "x"]]


def table(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / "table.py"), *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_family_that_is_not_there_is_left_out_by_name(tmp_path: Path) -> None:
    (tmp_path / "new.json").write_text(json.dumps({"architectures": ["NewForCausalLM"], "model_type": "new"}))
    done = table("--left-out", str(tmp_path / "new.json"))
    assert done.returncode == 0 and "left out: new: config.json: architecture 'NewForCausalLM'" in done.stdout
    done = table("--left-out", str(FOLDER / "small/llama-7b.json"))
    assert (done.returncode, done.stdout) == (1, "")


@pytest.mark.e2e
@pytest.mark.nightly
def test_every_base_in_small(tmp_path: Path) -> None:
    words = {
        "XLA_FLAGS": "",  # one device, as on a laptop
        "TRAIN": "--train.steps 4",
        "EVALUATE": "--options.max_new_tokens 4",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    command = ["bash", "configs/llm4academic/small.sh", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | words, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    supported = []
    for base in BASES:
        try:
            load_shape(str(FOLDER / f"small/{base}.json"))
            supported.append(base)
        except UserError:
            assert f"left out: {base}: " in done.stdout
    lines = done.stdout.strip().splitlines()
    (head,) = (number for number, line in enumerate(lines) if line.split()[:2] == ["base", "parameters"])
    assert [line.split()[0] for line in lines[head + 1 : head + 2 + len(supported)]] == ["before", *supported]
    assert all(line.endswith(" of 22") for line in lines[head + 1 : head + 2 + len(supported)])
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["metrics"][0]["chance"] == pytest.approx(26 / 22**2)
    header = (tmp_path / "zbench.csv").read_text(encoding="utf-8").splitlines()[0].split(",")
    assert header[:2] == ["编号", "Prompt"] and header[-2:] == ["参考回答", "任务类型"]
    assert header[3:-2:2] == ["before", *supported]
