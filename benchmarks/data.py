"""Tokenising into a store beside `datasets` and datatrove, starts with a warm store, and memory.

    python benchmarks/data.py tokenise --tokenizer llama/tokenizer.model --chinese texts.txt --peers ~/peers/bin/python
    python benchmarks/data.py start --tokenizer llama/tokenizer.model --millions 1,10,100
    python benchmarks/data.py memory --gb 2

Every run is a process of its own, on one core, in turn; times are processor seconds, so that other work on the machine
counts little. The English texts are documentation of the installed packages, each once. The Chinese ones are drawn
from the pairs of characters of the given file, as no large text is at hand.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

# This file's folder comes first on the path, where its own name would hide the package.
sys.path[:] = [folder for folder in sys.path if Path(folder or ".").resolve() != Path(__file__).resolve().parent]

from jaxlm.config import DataConfig, SourceConfig  # noqa: E402
from jaxlm.data.batches import BatchSource  # noqa: E402
from jaxlm.data.loader import build_data  # noqa: E402
from jaxlm.data.order import EpochOrder  # noqa: E402
from jaxlm.data.planner import PACKING_VERSION, Documents, Planner  # noqa: E402
from jaxlm.data.report import SourceReport  # noqa: E402
from jaxlm.data.store.build import Work, join, make_parts, open_parts, reports_of  # noqa: E402
from jaxlm.data.store.cache import Cache  # noqa: E402
from jaxlm.data.store.columns import Digests  # noqa: E402
from jaxlm.data.store.manifest import Manifest, values_of  # noqa: E402
from jaxlm.data.store.stored import StoredTokens, write_store  # noqa: E402
from jaxlm.tokenizer import load_tokenizer  # noqa: E402

CHARACTERS = 4_000_000  # of each language

# Both peers take a tokenizer.json, which transformers makes of the .model.
MAKE_JSON = """
import sys
from transformers import LlamaTokenizer
LlamaTokenizer.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[1])
"""
PEER_DATASETS = """
import json, sys, time
from datasets import load_dataset
from transformers import AutoTokenizer
file, tokenizer, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(tokenizer)
data = load_dataset("json", data_files=file, split="train", cache_dir=out)
begin = time.process_time()
done = data.map(lambda rows: {"input_ids": tokenizer(rows["text"])["input_ids"]}, batched=True,
                remove_columns=["text"], num_proc=None, cache_file_name=out + "/tokens.arrow")
seconds = time.process_time() - begin
print(json.dumps([seconds, sum(map(len, done["input_ids"]))]))
"""
PEER_DATATROVE = """
import json, sys, time
from loguru import logger
logger.remove()
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
from pathlib import Path
file, tokenizer, out = sys.argv[1:]
file = Path(file)
steps = [JsonlReader(str(file.parent), glob_pattern=file.name),
         DocumentTokenizer(out, tokenizer + "/tokenizer.json", eos_token="</s>", shuffle_documents=False)]
begin = time.process_time()
LocalPipelineExecutor(steps, tasks=1, workers=1, logging_dir=out + "/logs").run()
seconds = time.process_time() - begin
tokens = sum(path.stat().st_size for path in Path(out).glob("*.ds")) // 2
print(json.dumps([seconds, tokens]))
"""


def main() -> None:
    """Runs one of the comparisons."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["tokenise", "start", "memory", "own", "open", "batches"])
    parser.add_argument("words", nargs="*")
    parser.add_argument("--tokenizer", default="")
    parser.add_argument("--chinese", nargs="*", default=[])
    parser.add_argument("--peers", default=sys.executable, help="a Python with datatrove, datasets and transformers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--millions", default="1,10")
    parser.add_argument("--gb", type=float, default=2.0)
    parser.add_argument("--length", type=int, default=1000, help="tokens of a document, for memory")
    parser.add_argument("--dir", default=tempfile.gettempdir())
    options = parser.parse_args()
    {"tokenise": tokenise, "start": start, "memory": memory, "own": own, "open": opened, "batches": batches}[
        options.what
    ](options)


def english() -> Iterator[str]:
    """Documents of about 2,000 characters of the installed packages' documentation, without repetition."""
    root = Path(sysconfig.get_path("purelib"))
    seen: set[str] = set()
    for pattern in ("*.md", "*.rst", "*.txt", "METADATA", "*.py"):
        for file in sorted(root.rglob(pattern)):
            if file.stat().st_size > 400_000:
                continue
            text = file.read_text(encoding="utf-8", errors="replace")
            if pattern == "*.py":
                text = "\n\n".join(part for part in text.split('"""')[1::2] if len(part) > 200)
            for at in range(0, len(text), 2000):
                document = text[at : at + 2000]
                letters = sum(c.isascii() and (c.isalpha() or c == " ") for c in document)
                if len(document) > 100 and letters > 0.8 * len(document) and document[:100] not in seen:
                    seen.add(document[:100])
                    yield document


def chinese(files: list[str]) -> Iterator[str]:
    """Documents of 600 characters: a walk along the pairs of characters of the files' lines with Chinese in them."""
    lines = [line for file in files for line in Path(file).read_text(encoding="utf-8").split("\n")]
    text = "".join(line for line in lines if sum("\u4e00" <= c <= "\u9fff" for c in line) > len(line) // 3)
    following = defaultdict(list)
    for one, two in itertools.pairwise(text):
        following[one].append(two)
    drawn, here = random.Random(0), text[0]
    while True:
        letters = []
        for _ in range(600):
            here = drawn.choice(following[here] or text)
            letters.append(here)
        yield "".join(letters)


def write_texts(path: Path, documents: Iterator[str], characters: int) -> int:
    """JSON lines; returns the number of documents."""
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for document in documents:
            file.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")
            count, characters = count + 1, characters - len(document)
            if characters <= 0:
                return count
    return count


def run(command: list[str]) -> Any:
    """The last line that a process on one core prints, as JSON."""
    environment = os.environ | {
        "RAYON_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "JAX_PLATFORMS": "cpu",
    }
    pinned = ["taskset", "-c", "0", *command] if shutil.which("taskset") else command
    done = subprocess.run(pinned, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command[:4]} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def tokenise(options: argparse.Namespace) -> None:
    """Tokens a second of one core, from JSON lines to what each writes."""
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        folder = Path(name)
        (folder / "tokenizer").mkdir()
        shutil.copy(options.tokenizer, folder / "tokenizer/tokenizer.model")
        subprocess.run([options.peers, "-c", MAKE_JSON, str(folder / "tokenizer")], check=True)
        (folder / "tokenizer/tokenizer.model").rename(folder / "tokenizer.model")
        for language, documents in (("English", english()), ("Chinese", chinese(options.chinese))):
            if language == "Chinese" and not options.chinese:
                continue
            file = folder / f"{language}.jsonl"
            count = write_texts(file, documents, CHARACTERS)
            me = [sys.executable, __file__, "own", str(file)]
            commands = {
                "jaxlm, tokenizer.model": [*me, str(folder / "tokenizer.model")],
                "jaxlm, tokenizer.json": [*me, str(folder / "tokenizer")],
                "datasets.map": [options.peers, "-c", PEER_DATASETS, str(file), str(folder / "tokenizer")],
                "datatrove": [options.peers, "-c", PEER_DATATROVE, str(file), str(folder / "tokenizer")],
            }
            rates: dict[str, list[float]] = {name: [] for name in commands}
            for _ in range(options.rounds):
                for who, command in commands.items():
                    shutil.rmtree(folder / "out", ignore_errors=True)
                    (folder / "out").mkdir()
                    seconds, tokens = run([*command, str(folder / "out")])[:2]
                    rates[who].append(tokens / seconds)
            better = [max(pair) for pair in zip(rates["datasets.map"], rates["datatrove"], strict=True)]
            print(f"{language}, {count:,} documents, {tokens:,} tokens:")
            for who, each in rates.items():
                ratio = statistics.median(mine / theirs for mine, theirs in zip(each, better, strict=True))
                print(f"  {who}: {statistics.median(each) / 1e6:.2f} M tokens/s, {ratio:.2f} of the better peer")


def work_of(file: str, tokenizer: str) -> Work:
    """A store of one file of texts."""
    source = SourceConfig(path=file, template="text")
    config = DataConfig(train=(source,), sequence_length=2048, add_bos=True, add_eos=True)
    return Work((source,), config, load_tokenizer(tokenizer))


def own(options: argparse.Namespace) -> None:
    """A whole build in this process: seconds of processor time, tokens, MiB."""
    file, tokenizer, out = options.words
    work = work_of(file, tokenizer)
    begin = time.process_time()
    number = make_parts(work, Path(out) / "parts")
    parts = open_parts(Path(out) / "parts", number)
    assert parts is not None
    join(work, Path(out) / "store", parts, reports_of(parts), {})
    seconds = time.process_time() - begin
    print(json.dumps([seconds, sum(part.tokens for part in parts), peak()]))


def peak() -> float:
    """Peak resident memory of this process, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def start(options: argparse.Namespace) -> None:
    """Seconds from a configuration to data that can be trained on: without a store, with one, by size."""
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        folder = Path(name)
        texts = list(english())
        for millions in [0.02, *map(float, options.millions.split(","))]:
            file = folder / f"{millions}.jsonl"
            repeated = (f"{number} {text}" for number in range(10**9) for text in texts)
            write_texts(file, repeated, int(millions * 3.3e6))
            command = [sys.executable, __file__, "open", str(file), options.tokenizer, str(folder / "cache")]
            cold, size, memory = run(command)
            warm = [run(command) for _ in range(options.rounds)]
            seconds = statistics.median(each[0] for each in warm)
            print(
                f"{size / 1e6:.2f} M tokens: first start {cold:.1f} s ({size / cold / 1e6:.2f} M tokens/s), "
                f"{memory:.0f} MiB; then {seconds:.2f} s, {warm[0][2]:.0f} MiB"
            )
            file.unlink()


def opened(options: argparse.Namespace) -> None:
    """Opens the data of a run by way of the cache."""
    file, tokenizer, cache = options.words
    loaded = load_tokenizer(tokenizer)
    config = DataConfig(train=(SourceConfig(path=file, template="text"),), sequence_length=2048)
    begin = time.perf_counter()
    data = build_data(config, loaded, seed=0, vocab_size=32000, max_positions=4096, cache=Cache(Path(cache), True))
    seconds = time.perf_counter() - begin
    print(json.dumps([seconds, int(data.train.offsets[-1]), peak()]))


class Synthetic:
    """Random documents of one length, as columns."""

    with_encoder = False

    def __init__(self, examples: int, length: int) -> None:
        self.examples, self.length = examples, length

    def column(self, name: str) -> Iterator[np.ndarray]:
        """Blocks of 1,000 examples."""
        random = np.random.default_rng(0)
        for first in range(0, self.examples, 1000):
            count = min(1000, self.examples - first)
            if name == "tokens":
                yield random.integers(0, 32000, self.length * count, np.uint16)
            elif name == "mask":
                yield np.ones(self.length * count, np.bool_)
            else:
                value = {"lengths": self.length, "begins": 1, "source": 0}[name]
                yield np.full(count, value, np.int32)


def memory(options: argparse.Namespace) -> None:
    """Peak memory of writing, opening and reading a large store, and batches a second."""
    examples = int(options.gb * 1e9 / 2 / options.length)

    def manifest(sums: Digests, first: np.ndarray) -> Manifest:
        report = values_of(SourceReport("synthetic", "text"))
        counts = (examples, sums.documents, sums.tokens, sums.trained, None, sums.largest)
        counts += (sums.contents.hexdigest(), sums.as_source)
        return Manifest("uint16", *counts, "", "", 32000, (report,), {}, "")

    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        begin = time.perf_counter()
        write_store(Path(name) / "store", [Synthetic(examples, options.length)], np.dtype(np.uint16), manifest)
        seconds = time.perf_counter() - begin
        size = sum(file.stat().st_size for file in (Path(name) / "store").iterdir())
        print(f"{size / 1e9:.2f} GB written in {seconds:.0f} s; peak {peak():.0f} MiB")
        assert peak() < 600, peak()
        seconds, rate, most = run([sys.executable, __file__, "batches", str(Path(name) / "store")])
        print(f"opened in {seconds:.2f} s; {rate / 1e6:.1f} M tokens/s of batches; peak {most:.0f} MiB")
        assert most < 1024, most


def batches(options: argparse.Namespace) -> None:
    """Opens a store, plans a pass, and reads half of it in batches, packed, in a shuffled order."""
    begin = time.perf_counter()
    stored = StoredTokens(Path(options.words[0]))
    seconds = time.perf_counter() - begin
    planner = Planner(Documents(stored, 2048), (1.0,), "first_fit", 2048, seed=0, version=PACKING_VERSION)
    source = BatchSource(stored, EpochOrder(planner, 64), 2048, rows=64)
    steps = len(source) // 2
    begin = time.process_time()
    tokens = sum(int((source[step]["segment_ids"] > 0).sum()) for step in range(steps))
    print(json.dumps([seconds, tokens / (time.process_time() - begin), peak()]))


if __name__ == "__main__":
    main()
