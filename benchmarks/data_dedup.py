"""MinHash of documents of 300 words: jaxlm beside datatrove and datasketch, and the whole step `dedup`.

From a text to the hashes of its 14 bands of 8 rows, in seconds of a core, all sides in turn in every round. datatrove
and datasketch split words at spaces here, which is the fastest that they can. Then the step itself, reading and writing
files, with a tenth of the documents copies and a tenth copies with a word changed.

    python benchmarks/data_dedup.py [--documents 1000] [--rounds 5] [--step 10000,40000]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from jaxlm.config.prepare import DedupConfig, DocumentsConfig, EngineConfig, PrepareConfig
from jaxlm.data.prepare import minhash
from jaxlm.data.prepare.pipeline import Share, run_steps

WORDS, BANDS, ROWS, NGRAM = 300, 14, 8, 5


def make_texts(number: int, seed: int = 0) -> list[str]:
    """English-like texts: word frequencies as 1 / rank, of 20,000 words."""
    rng = random.Random(seed)
    vocabulary = ["".join(rng.choices("etaoinshrdlucmf", k=rng.randint(2, 9))) for _ in range(20_000)]
    weights = [1 / rank for rank in range(1, len(vocabulary) + 1)]
    texts: list[str] = []
    for _ in range(number):
        draw = rng.random()
        words = rng.choices(vocabulary, weights, k=WORDS)
        if texts and draw < 0.2:
            words = rng.choice(texts[-1000:]).split(" ")
            if draw < 0.1:
                words[rng.randrange(WORDS)] = "changed"
        texts.append(" ".join(words))
    return texts


def own(method: str) -> Callable[[Sequence[str]], None]:
    """jaxlm's hashes, in batches as the step makes them."""

    def run(texts: Sequence[str]) -> None:
        for at in range(0, len(texts), 256):
            sets = [minhash.ngram_hashes(text, NGRAM) for text in texts[at : at + 256]]
            signature = minhash.signatures(*minhash.flatten(sets), BANDS * ROWS, method)
            minhash.band_hashes(signature, BANDS, ROWS)

    return run


def datatrove_side() -> Callable[[Sequence[str]], None]:
    """datatrove's signatures."""
    from datatrove.pipeline.dedup import minhash as theirs

    class Spaces:
        def word_tokenize(self, text: str) -> list[str]:
            return text.split()

    theirs.load_word_tokenizer = lambda _: Spaces()  # its English one is a model that has to be downloaded
    step = theirs.MinhashDedupSignature(tempfile.mkdtemp(), theirs.MinhashConfig(n_grams=NGRAM))
    hash_bytes = step._hash_func
    step._hash_func = lambda text: hash_bytes(text.encode())  # datatrove 0.10 gives text, which xxhash 4 refuses

    def run(texts: Sequence[str]) -> None:
        for text in texts:
            step.get_signature(step.get_shingles(text))

    return run


def datasketch_side() -> Callable[[Sequence[str]], None]:
    """datasketch's signatures."""
    from datasketch import MinHash

    def run(texts: Sequence[str]) -> None:
        for text in texts:
            words = text.lower().split()
            sketch = MinHash(BANDS * ROWS)
            sketch.update_batch([" ".join(words[at : at + NGRAM]).encode() for at in range(len(words) - NGRAM + 1)])

    return run


def time_step(number: int) -> tuple[float, float]:
    """Seconds of the step on one process, and the share that it keeps."""
    with tempfile.TemporaryDirectory() as folder:
        texts = make_texts(number)
        for file in range(8):
            lines = (json.dumps({"text": text}) for text in texts[file::8])
            Path(folder, f"{file}.jsonl").write_text("\n".join(lines) + "\n")
        config = PrepareConfig(
            sources=(DocumentsConfig(path=f"{folder}/*.jsonl", name="texts"),),
            steps=("dedup",),
            output_dir=f"{folder}/out",
            dedup=DedupConfig(min_kept=0.0),
            engine=EngineConfig(workers=1),
        )
        started = time.process_time()
        report = run_steps(config, None, Share(), lambda *_: None)[0]
        numbers = report.counts.numbers["texts"]
        return time.process_time() - started, numbers["kept"] / numbers["read"]


def main() -> None:
    """Prints milliseconds a document, and ratios of rounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--step", default="10000,40000")
    options = parser.parse_args()
    sides = {"jaxlm, rensa": own("rensa"), "jaxlm, numpy": own("numpy")}
    for name, make in (("datatrove", datatrove_side), ("datasketch", datasketch_side)):
        try:
            sides[name] = make()
        except ImportError:
            print(f"{name} is not installed")
    texts = make_texts(options.documents)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        side(texts[:50])
    for _ in range(options.rounds):
        for name, side in sides.items():
            started = time.process_time()
            side(texts)
            times[name].append((time.process_time() - started) / len(texts) * 1e3)
    for name, values in times.items():
        ratio = statistics.median(b / a for a, b in zip(times["jaxlm, rensa"], values, strict=True))
        print(f"{name:13} {statistics.median(values):.3f} ms a document, {ratio:.2f} times the first")
    for number in map(int, filter(None, options.step.split(","))):
        seconds, share = time_step(number)
        print(f"step dedup, {number:,} documents: {seconds / number * 1e3:.3f} ms a document, {share:.1%} stay")


if __name__ == "__main__":
    main()
