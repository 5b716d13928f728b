"""Steps of `jaxlm prepare`: the same bytes however the work is divided, whatever is killed; what is refused."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from jaxlm.cli.prepare import UNFINISHED, main
from jaxlm.data.prepare import shards, work
from jaxlm.data.prepare.pipeline import Share, UnfinishedError
from jaxlm.errors import UserError
from tests.data.prepare.conftest import config_of, files_of, run


def values(corpus: Path, out: Path, **more: Any) -> dict[str, Any]:
    return {
        "sources": [{"path": str(corpus), "name": "rocks"}],
        "steps": ["filter", "dedup"],
        "output_dir": str(out),
        **more,
    }


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process writes, the files being cut into blocks."""
    out = tmp_path_factory.mktemp("whole")
    run(values(corpus, out, block_bytes=5000))
    return files_of(out)


def test_blocks_of_lines_are_the_file(corpus: Path, whole: dict[str, bytes]) -> None:
    """Every line is in one block, and the cuts do not depend on the number of processes."""
    source = config_of(values(corpus, Path("out"))).sources
    pieces = shards.plan_shards(source, 5000)
    assert len(pieces) > 8
    texts = [document.text for piece in pieces for document in shards.read_documents(piece, shards.Bad(0))]
    assert texts == [
        json.loads(line)["text"] for file in sorted(corpus.iterdir()) for line in file.read_text().splitlines()
    ]


def test_a_line_that_begins_where_a_block_does_is_in_it(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.txt", [f"line {number}__" for number in range(10)])  # ten bytes each
    for block in (10, 20, 7, 33):
        pieces = shards.plan_shards(config_of(values(file, Path("out"))).sources, block)
        texts = [document.text for piece in pieces for document in shards.read_documents(piece, shards.Bad(0))]
        assert texts == [f"line {number}__" for number in range(10)], block


def test_a_task_that_is_done_is_not_done_again(corpus: Path, tmp_path: Path) -> None:
    """Not even when two have been given it."""
    run(values(corpus, tmp_path), "filter")

    def never(step: work.Step, number: int) -> work.Mark:
        raise AssertionError

    work.perform(str(tmp_path / "filter"), "filter", never, 0)


def test_two_processes_write_the_same_bytes(corpus: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    run(values(corpus, tmp_path, block_bytes=5000, engine={"workers": 2}))
    assert files_of(tmp_path) == whole


def test_shares_write_the_same_bytes(corpus: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """Each share ends where it needs the others, and is started again, as a scheduler would."""
    waiting = 0
    for _ in range(10):
        for index in range(3):
            try:
                run(values(corpus, tmp_path, block_bytes=5000), "filter", Share(index, 3))
            except UnfinishedError as error:
                assert "of others are not" in str(error)
                waiting += 1
    assert waiting == 2  # the first two, once
    while not (tmp_path / "dedup/report.json").exists():
        for index in (2, 0, 1):
            try:
                run(values(corpus, tmp_path, block_bytes=5000), "dedup", Share(index, 3))
            except UnfinishedError:
                continue
    assert files_of(tmp_path) == whole


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_datatroves_processes_write_the_same_bytes(
    corpus: Path, whole: dict[str, bytes], tmp_path: Path, workers: int
) -> None:
    pytest.importorskip("datatrove", reason="datatrove is not installed (pip install 'jaxlm[cluster]')")
    run(values(corpus, tmp_path, block_bytes=5000, engine={"name": "datatrove", "workers": workers}))
    assert files_of(tmp_path) == whole


@pytest.mark.slow
def test_slurm_writes_the_same_bytes(
    corpus: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through datatrove's own scripts; a stand-in for sbatch runs an array's jobs one after the other."""
    pytest.importorskip("datatrove", reason="datatrove is not installed (pip install 'jaxlm[cluster]')")
    for name, script in (("sbatch", SBATCH), ("scontrol", "#!/bin/bash\necho localhost\n")):
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    options = {"partition": "cpu", "time": "1:00:00", "with_srun": False}
    with pytest.raises(UserError, match=r"Slurm needs time, e\.g\."):
        run(values(corpus, tmp_path / "bad", engine={"name": "slurm", "options": {"partition": "cpu"}}), "filter")
    step = values(corpus, tmp_path / "out", block_bytes=5000, engine={"name": "slurm", "options": options})
    run(step, "filter")
    own = {name: content for name, content in whole.items() if name.startswith("filter")}
    assert files_of(tmp_path / "out") == own


SBATCH = """#!/bin/bash
script="${@: -1}"
last=$(sed -n 's/^#SBATCH --array=0-//p' "$script")
export RUN_OFFSET=0 SLURM_NODELIST=localhost SLURM_CPUS_ON_NODE=1 SLURM_JOB_ID=1 SLURM_NNODES=1 SLURM_NODEID=0
export SLURM_CPUS_PER_TASK=1 SLURM_MEM_PER_CPU=2048 SLURM_PROCID=0
for index in $(seq 0 ${last:-0}); do SLURM_ARRAY_TASK_ID=$index bash "$script" > /dev/null 2>&1; done
echo "Submitted batch job 1"
"""


@pytest.mark.slow
def test_ray_writes_the_same_bytes(corpus: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """A local Ray of two workers; a broken record is said as everywhere."""
    ray = pytest.importorskip("ray", reason="Ray is not installed (pip install 'jaxlm[cluster]')")
    engine = {"name": "ray", "workers": 2}
    try:
        run(values(corpus, tmp_path / "out", block_bytes=5000, engine=engine))
        assert files_of(tmp_path / "out") == whole
        broken = tmp_path / "broken.jsonl"
        broken.write_text('{"text": "a"}\n{"text"\n')
        with pytest.raises(UserError, match=r"broken.jsonl:2: broken JSON"):
            run(values(broken, tmp_path / "bad", engine=engine))
    finally:
        ray.shutdown()


def test_ray_and_datatrove_that_are_missing_are_named(corpus: Path, tmp_path: Path, monkeypatch: Any) -> None:
    for name in ("ray", "datatrove"):
        monkeypatch.setitem(sys.modules, name if name == "ray" else "datatrove.executor", None)
        with pytest.raises(UserError, match=rf"engine.name: {name} is not installed; pip install 'jaxlm\[cluster\]'"):
            run(values(corpus, tmp_path, engine={"name": name}))


def ends(group: int) -> bool:
    """Whether all processes of a group are gone before long."""
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.slow
def test_a_killed_run_is_gone_on_with(corpus: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """SIGKILL at any moment: what is done is not done again, and the result is the same."""
    config = tmp_path / "prepare.json"
    out = tmp_path / "out"
    slow = values(
        corpus, out, block_bytes=5000, engine={"workers": 2}, dedup={"minhash": "numpy"}, filter={"repair": False}
    )
    config.write_text(json.dumps(slow))
    command = [sys.executable, "-m", "jaxlm.prepare", "--config", str(config)]
    kills = 0
    for marks in (1, 12, 30):
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        while process.poll() is None and len(list(out.rglob("marks/*.json"))) < marks:
            time.sleep(0.002)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
        assert ends(process.pid), "its workers"
        before = {file: file.stat().st_mtime_ns for file in out.rglob("marks/*.json")}
        time.sleep(0.05)
    assert kills >= 2
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert all(file.stat().st_mtime_ns == changed for file, changed in before.items())
    assert files_of(out) == whole


def test_compressed_parts_are_read_by_the_next_step(corpus: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    import pyarrow

    run(values(corpus, tmp_path, block_bytes=5000, compression="zst"))
    part = tmp_path / "dedup/part-00000.jsonl.zst"
    with pyarrow.OSFile(str(part)) as file, pyarrow.CompressedInputStream(file, "zstd") as stream:
        assert stream.read() == whole["dedup/part-00000.jsonl"]


def test_sources_may_lie_behind_an_address(corpus: Path, tmp_path: Path, documents: Any) -> None:
    """In blocks and compressed; a file that is replaced between two starts is noticed."""
    import gzip

    import fsspec

    memory = fsspec.filesystem("memory")
    lines = (corpus / "0.jsonl").read_bytes()
    memory.pipe("/prepare/a.jsonl", lines)
    memory.pipe("/prepare/b.jsonl.gz", gzip.compress(lines))
    step = {
        "sources": [{"path": "memory://prepare/*.jsonl*", "name": "m"}],
        "steps": ["filter"],
        "output_dir": str(tmp_path / "out"),
        "block_bytes": 5000,
    }
    with pytest.raises(UnfinishedError):
        run(step, None, Share(0, 2))
    run(step)
    texts = [json.loads(line)["text"] for line in lines.splitlines()]
    assert documents(tmp_path / "out/filter") == texts * 2
    step["output_dir"] = str(tmp_path / "again")
    with pytest.raises(UnfinishedError):
        run(step, None, Share(0, 2))
    memory.pipe("/prepare/a.jsonl", lines[:-5])
    with pytest.raises(UserError, match=r"memory://.*a.jsonl .* was read when the step filter was begun"):
        run(step)
    memory.rm("/prepare/a.jsonl")
    with pytest.raises(UserError, match="does not exist"):
        run({**step, "sources": [{"path": "memory://prepare/a.jsonl"}]})
    with pytest.raises(UserError, match="is an address, and prepare writes to a disk"):
        run({**step, "output_dir": "s3://bucket/out"})


def test_a_run_that_is_complete_does_nothing(corpus: Path, tmp_path: Path, monkeypatch: Any) -> None:
    first = run(values(corpus, tmp_path))
    monkeypatch.setattr(shards, "read_documents", None)
    again = run(values(corpus, tmp_path))
    assert [report.counts.to_dict() for report in again] == [report.counts.to_dict() for report in first]


# What is refused ---------------------------------------------------------------------------------


def write_lines(file: Path, lines: list[str]) -> Path:
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def test_a_broken_line_is_named_by_its_number(tmp_path: Path) -> None:
    """Also deep in a file that is worked on in blocks."""
    lines = [json.dumps({"text": f"text {number}"}) for number in range(5000)]
    lines[4321] = '{"text": "cut'
    file = write_lines(tmp_path / "a.jsonl", lines)
    with pytest.raises(UserError, match=rf"{file}:4322: broken JSON.*--max_bad 10"):
        run(values(file, tmp_path / "out", block_bytes=20_000))
    report = run(values(file, tmp_path / "out", block_bytes=20_000, max_bad=1))[0]
    assert report.extra["bad"] == 1 and report.counts.numbers["rocks"]["read"] == 4999


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"txt": "a"}', "no column 'text' (there are txt); set `text` of the source"),
        (b'{"text": ["a"]}', "column 'text' holds list, not text"),
        (b'["a"]', "a record must be an object with named fields, found list"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"text": "\\ud800"}', "a lone surrogate"),
    ],
)
def test_a_record_that_is_no_document_is_said(tmp_path: Path, line: bytes, words: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(UserError) as error:
        run(values(file, tmp_path / "out"))
    assert words in str(error.value) and f"{file}:2" in str(error.value)


def test_broken_records_of_all_files_are_counted_together(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in "abc":
        write_lines(tmp_path / f"in/{name}.jsonl", ['{"text": "good"}', "{"])
    with pytest.raises(UserError, match="max_bad: 2 are let pass"):
        run(values(tmp_path / "in", tmp_path / "out", max_bad=2))
    assert run(values(tmp_path / "in", tmp_path / "out", max_bad=3), "filter")[0].extra["bad"] == 3


def test_sources_that_take_in_the_output_are_refused(corpus: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", ['{"text": "good"}'])
    run(values(tmp_path / "a.jsonl", tmp_path / "out"))
    with pytest.raises(UserError, match=r"out/dedup/\S+ is within output_dir"):
        run(values(tmp_path / "*" / "*" / "*.jsonl", tmp_path / "out"))
    with pytest.raises(UserError, match=r"output_dir, \S+/new, is within \S+: what this command writes would be read"):
        run(values(tmp_path, tmp_path / "new"))


def test_a_text_may_be_of_several_columns(tmp_path: Path, documents: Any) -> None:
    file = write_lines(
        tmp_path / "a.jsonl", ['{"title": "T", "body": "石英", "n": 3}', '{"title": null, "body": "c", "n": 1}']
    )
    source = {"path": str(file), "text": "{title} ({n}): {body}"}
    run({"sources": [source], "steps": ["filter"], "output_dir": str(tmp_path / "out")})
    assert documents(tmp_path / "out/filter") == ["T (3): 石英", " (1): c"]


def test_a_source_that_vanished_or_changed_is_named(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for file in corpus.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    step = values(folder, tmp_path / "out")
    with pytest.raises(UserError, match="does not exist"):
        run(values(tmp_path / "nothing", tmp_path / "out"))
    with pytest.raises(UnfinishedError):
        run(step, "filter", Share(0, 2))
    content = (folder / "1.jsonl").read_bytes()
    (folder / "1.jsonl").unlink()
    with pytest.raises(UserError, match=r"1\.jsonl \(\d+ bytes\) was read when the step filter was begun"):
        run(step, "filter", Share(1, 2))
    (folder / "1.jsonl").write_bytes(content + b'{"text": "more"}\n')
    with pytest.raises(UserError, match=r"remove .*filter to begin anew, or choose another output_dir"):
        run(step, "filter", Share(1, 2))


@pytest.mark.parametrize("act", ["grows", "vanishes"])
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: Any, act: str) -> None:
    file = write_lines(tmp_path / "a.jsonl", ['{"text": "one"}', '{"text": "two"}'])
    reader = shards._lines

    def touched(path: Path, shard: shards.Shard) -> Any:
        yield from reader(path, shard)
        if act == "vanishes":
            path.unlink()
        else:
            with path.open("a") as stream:
                stream.write('{"text": "three"}\n')

    monkeypatch.setattr(shards, "_lines", touched)
    with pytest.raises(UserError, match="has changed since" if act == "grows" else "has vanished since"):
        run(values(file, tmp_path / "out"))
    assert not list((tmp_path / "out").rglob("part-*"))


def test_a_full_disk_leaves_no_half_part(corpus: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    whole = values(
        corpus, tmp_path / "out", filter={"repair": False}, dedup={"minhash": "numpy"}, engine={"workers": 1}
    )
    config = tmp_path / "c.json"
    config.write_text(json.dumps(whole))
    file_sha256, calls = work.file_sha256, []

    def full(path: Path) -> str:
        calls.append(path)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return file_sha256(path)

    monkeypatch.setattr(work, "file_sha256", full)
    assert main(["--config", str(config)]) == 2
    message = capsys.readouterr().err
    assert "part-00002.jsonl: No space left on device; free some space" in message
    assert sorted(file.name for file in (tmp_path / "out/filter").glob("*part-*")) == [
        "part-00000.jsonl",
        "part-00001.jsonl",
    ]
    assert main(["--config", str(config)]) == 0


def test_nothing_left_is_an_error_that_says_why(corpus: Path, tmp_path: Path) -> None:
    step = values(corpus, tmp_path, filter={"repair": False, "min_characters": 10**6})
    with pytest.raises(UserError, match=r"filter: none of 160 documents is left \(characters: too few: 160\)") as error:
        run(step)
    assert "examples.jsonl" in str(error.value)
    assert not (tmp_path / "filter/report.json").exists() and not (tmp_path / "dedup").exists()


def test_a_folder_that_was_begun_otherwise_is_refused(corpus: Path, tmp_path: Path) -> None:
    run(values(corpus, tmp_path))
    with pytest.raises(
        UserError, match=r"filter.min_characters: was 1 when the step filter was begun, and is 2; remove"
    ):
        run(values(corpus, tmp_path, filter={"repair": False, "min_characters": 2}))
    with pytest.raises(UserError, match=r"dedup.threshold: was 0.8 when the step dedup was begun, and is 0.7"):
        run(values(corpus, tmp_path, dedup={"minhash": "numpy", "threshold": 0.7}))
    with pytest.raises(UserError, match=r"block_bytes: was 32000000 when the step filter was begun, and is 999"):
        run(values(corpus, tmp_path, block_bytes=999))


def test_two_runs_into_one_folder_are_refused(corpus: Path, tmp_path: Path) -> None:
    from jaxlm.lock import Lock

    with (
        Lock(tmp_path / "filter/lock.json", "output_dir", "choose another"),
        pytest.raises(UserError, match=r"output_dir: .*filter is in use: by pid"),
    ):
        run(values(corpus, tmp_path))


def test_a_step_needs_the_one_before_it(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"dedup reads what filter writes, and .* run jaxlm prepare filter first"):
        run(values(corpus, tmp_path), "dedup")
    run(values(corpus, tmp_path), "filter")
    (tmp_path / "filter/part-00001.jsonl").write_text("")
    with pytest.raises(UserError, match=r"part-00001.jsonl: is missing or not what filter wrote"):
        run(values(corpus, tmp_path), "dedup")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"sources": []}, "sources: none is given"),
        ({"steps": ["filter", "filter"]}, "each once"),
        ({"steps": ["split", "filter"]}, "split gives tokens"),
        ({"block_bytes": 0}, "block_bytes: 0"),
        ({"max_bad": -1}, "max_bad: -1"),
        ({"dedup": {"bands": 0}}, "dedup.bands: 0 must be at least 1"),
        ({"dedup": {"threshold": 0.0}}, "dedup.threshold: 0.0"),
        ({"filter": {"harmful_words": "nowhere.txt"}}, "filter.harmful_words: nowhere.txt: no such file"),
        ({"steps": ["split"]}, "tokenizer: split needs one"),
    ],
)
def test_what_does_not_fit_is_said_before_the_work(corpus: Path, tmp_path: Path, more: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        run(values(corpus, tmp_path, **more))
    assert not list(tmp_path.rglob("marks"))


def test_the_command_says_what_it_did(corpus: Path, tmp_path: Path, capsys: Any) -> None:
    config = tmp_path / "c.json"
    config.write_text(json.dumps({**values(corpus, tmp_path / "out"), "filter": {"repair": False}}))
    words = ["--config", str(config), "--engine.workers", "1", "--dedup.minhash", "numpy"]
    assert main(["filter", *words, "--shard", "1/2"]) == UNFINISHED
    assert main(["filter", *words, "--shard", "2/2"]) == 0
    capsys.readouterr()
    assert main(words) == 0
    output = capsys.readouterr().out
    assert "rocks" in output and "equal to an earlier document" in output and "kept share" in output
    assert main(["filtre", *words]) == 2
    assert "did you mean 'filter'?" in capsys.readouterr().err
    assert main([*words, "--shard", "3/2"]) == 2
    assert "expected i/n" in capsys.readouterr().err
