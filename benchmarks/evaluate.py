"""Five-choice questions on a 110 M LLaMA: jaxlm beside lm-evaluation-harness's `hf`, on this machine.

Both sides are asked through the harness's own interface, `loglikelihood` of a list of (context, continuation), with the
same texts, tokenizer and random weights in float32. Each is a process of its own; they take turns, and the ratio of
each round is taken. A side is timed twice in its process: with compilation (cold), and without (warm). Seconds are
those of the clock; where other programs take the processor, those that the side itself computed (CPU) say more.

    python benchmarks/evaluate.py --data questions.json --tokenizer DIR_OR_FILE [--questions 200] [--answers texts]

The file is what `--task multiple_choice` reads; questions that it would refuse are left out. Without a file, questions
are made of random words.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from train_cpu import SHAPE, peak_memory

# lm_eval imports a package of this script's name.
sys.path.remove(str(Path(__file__).parent.resolve()))

BATCH = 16


def make_model(folder: Path, tokenizer: Path | None) -> None:
    """A Hugging Face directory with random weights; the tokenizer, or one that is trained on random words."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from jaxlm.tokenizer import train_sentencepiece

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(folder)
    if tokenizer is None:
        corpus = folder / "corpus.txt"
        corpus.write_text("\n".join(record["question"] for record in random_questions(4000)))
        train_sentencepiece([corpus], 2000, folder)
        corpus.unlink()
    elif tokenizer.is_dir():
        shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    else:
        shutil.copyfile(tokenizer, folder / f"tokenizer{tokenizer.suffix}")
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}
    if not (folder / "tokenizer_config.json").exists():
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def random_questions(count: int) -> list[dict[str, Any]]:
    """Questions of 12 to 60 words with five answers of 1 to 8 words."""
    rng = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]

    def words(low: int, high: int) -> str:
        return " ".join("".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(rng.randint(low, high)))

    return [
        {"question": words(12, 60), "choices": [words(1, 8) for _ in range(5)], "answer": rng.randrange(5)}
        for _ in range(count)
    ]


def pairs_of(data: Path | None, count: int, answers: str, shots: int) -> list[list[tuple[str, str]]]:
    """For each question its (context, continuation) pairs."""
    from jaxlm.evaluation.job import read_job
    from jaxlm.evaluation.tasks.multiple_choice import TASK, Options

    records = random_questions(count + shots) if data is None else json.loads(data.read_text(encoding="utf-8"))
    records = [record for record in records if TASK.check(record, Options()) is None]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "questions.json"
        file.write_text(json.dumps([{key: each[key] for key in each if key != "id"} for each in records]))
        job = read_job(TASK, file, {"answers": answers, "shots": shots, "examples": str(file)})
        tokenizer: Any = None  # the task's requests are texts
        requests: Any = TASK.requests(job.records, job.options, tokenizer)
    return [[(each.context, text) for text in each.continuations] for each in requests[shots : shots + count]]


def side(name: str, model: Path, questions: list[list[tuple[str, str]]]) -> None:
    """Answers twice, and prints a line of JSON."""
    from lm_eval.api.instance import Instance

    pairs = [pair for question in questions for pair in question]
    instances = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    if name == "hf":
        from lm_eval.models.huggingface import HFLM

        lm: Any = HFLM(pretrained=str(model), dtype="float32", device="cpu", batch_size=BATCH)
    else:
        from rich.console import Console

        from jaxlm.cli.harness import make_model as load
        from jaxlm.config import InferenceModelConfig

        lm = load(InferenceModelConfig(path=str(model), dtype="float32"), Console(stderr=True), batch_size=BATCH)
    seconds, computed = [], []
    for _ in range(2):
        started, used = time.perf_counter(), time.process_time()
        values = lm.loglikelihood(instances, disable_tqdm=True)
        seconds.append(time.perf_counter() - started)
        computed.append(time.process_time() - used)
    print(
        json.dumps(
            {
                "seconds": seconds,
                "computed": computed,
                "memory": peak_memory(),
                "values": [value for value, _ in values],
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--answers", choices=["texts", "letters"], default="texts")
    parser.add_argument("--shots", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", nargs=2, metavar=("NAME", "DIR"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    questions = pairs_of(args.data, args.questions, args.answers, args.shots)
    if args.side:
        side(args.side[0], Path(args.side[1]), questions)
        return
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder) / "model", args.tokenizer)
        rounds = []
        for number in range(args.rounds):
            found = {}
            for name in ("hf", "jaxlm"):
                command = [sys.executable, *sys.argv, "--side", name, str(Path(folder) / "model")]
                out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                found[name] = json.loads(out.splitlines()[-1])
            ratios = [
                h / j
                for key in ("seconds", "computed")
                for h, j in zip(found["hf"][key], found["jaxlm"][key], strict=True)
            ]
            shown = (
                f"{name} {each['seconds'][0]:.1f} s, {each['seconds'][1]:.1f} s (CPU {each['computed'][0]:.1f} s, "
                f"{each['computed'][1]:.1f} s), {each['memory'] / 2**30:.2f} GiB"
                for name, each in found.items()
            )
            print(f"round {number + 1}: {'; '.join(shown)}", flush=True)
            rounds.append((ratios, found))
    cold, warm, cold_cpu, warm_cpu = (statistics.median(ratios[at] for ratios, _ in rounds) for at in range(4))
    hf, ours = rounds[-1][1]["hf"]["values"], rounds[-1][1]["jaxlm"]["values"]
    same, at = 0, 0
    for question in questions:
        scores = [values[at : at + len(question)] for values in (hf, ours)]
        same += len({each.index(max(each)) for each in scores}) == 1
        at += len(question)
    largest = max(abs(a - b) for a, b in zip(hf, ours, strict=True))
    memory = statistics.median(found["jaxlm"]["memory"] / found["hf"]["memory"] for _, found in rounds)
    print(
        f"{len(questions)} questions, {len(hf)} continuations ({args.answers}, {args.shots} shots): "
        f"{warm:.2f} times as fast as lm_eval's hf, {cold:.2f} with compilation (CPU {warm_cpu:.2f}, {cold_cpu:.2f}); "
        f"{same} of {len(questions)} choices "
        f"the same, log-likelihoods within {largest:.1e}; memory {memory:.2f} times"
    )


if __name__ == "__main__":
    main()
