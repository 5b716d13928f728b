"""`jaxlm report`: one file that needs nothing else."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from jaxlm.cli.report import main
from jaxlm.runs.overview import Observer
from jaxlm.runs.svg import Curve, chart, ticks
from tests.runs.runs import write_run


class Page(HTMLParser):
    """The tags, attributes and words of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "action", "srcset")]
        if tag not in ("meta", "line", "polyline", "circle"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line", "polyline", "circle"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_a_report_holds_what_the_run_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "my run", end={"step": 60, "complete": False, "stopped_by": "SIGTERM"})
    assert main([str(run)]) == 0
    target = run / "report.html"
    assert capsys.readouterr().out == f"{target}\n"
    text = target.read_text()
    page = Page(text)
    assert not page.open, "every tag is closed"
    words = " ".join(" ".join(page.words).split())
    for part in (
        "The run was stopped (SIGTERM) at step 60 of 100.",
        "It trains 70 (1.00%): LoRA rank 8 on q_proj of models/geo: 7,000 parameters, 2 layers.",
        "The validation loss went from 3.0000 to 2.4000, its lowest.",
        "mdp/accuracy 0.25 (step 0) 0.55 ± 0.02 (step 60)",
        "a&b.json 4,800 80.0% 0.50",
        "host memory 3.0 GiB",
        f"jaxlm train --config '{run}'/config.yaml",
        f"convert merge 'my models/geo' '{run}' '{run}-merged'",
        "Warning: <script>alert(1)</script>",
        "train <i>a</i>",
        "jax 0.10.2",
    ):
        assert part in words, part
    # The step of the best checkpoint that is kept, not of the best loss.
    assert "checkpoints/60" not in text and words.count("SIGTERM") == 3


def test_a_report_asks_the_network_for_nothing_and_runs_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert main([str(run)]) == 0
    text = (run / "report.html").read_text()
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object"}.intersection(page.tags)
    assert page.links == [] and not re.search(r"url\(|@import|https?://", text)
    # Written again over its own, and not over what is another's.
    assert main([str(run)]) == 0
    (run / "mine.html").write_text("<p>notes</p>")
    assert main([str(run), "--to", str(run / "mine.html")]) == 2
    assert (run / "mine.html").read_text() == "<p>notes</p>"
    assert main([str(run), "--to", str(run / "report.txt")]) == 2
    assert main([str(run), "--to", str(run / "none" / "a.html")]) == 2


def test_stages_stand_in_one_report(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_run(tmp_path / name, end={"step": 100, "complete": True})
    assert main([str(tmp_path), "--to", str(tmp_path / "all.html")]) == 0
    assert Page((tmp_path / "all.html").read_text()).links == ["#run-1", "#run-2"]


def test_a_run_of_an_older_version_is_reported_by_its_metrics(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "events.jsonl").unlink()
    assert main([str(run)]) == 0
    assert "kept no events" in (run / "report.html").read_text()
    (run / "metrics.jsonl").write_text("")
    assert main([str(run)]) == 2


def test_the_best_checkpoint_is_one_that_is_kept(tmp_path: Path) -> None:
    assert Observer(write_run(tmp_path / "run")).look().best_checkpoint() == (40, 2.6)


def test_charts_show_every_point_in_its_place() -> None:
    svg = str(chart([Curve("a <b>", [(0, 0.0), (10, 5.0), (20, 10.0)], "train", dots=True)], "y <&>"))
    assert "<b>" not in svg and "y &lt;&amp;&gt; by step" in svg
    centres = [(float(x), float(y)) for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', svg)]
    (x0, y0), (x1, y1), (x2, y2) = centres
    assert x0 < x1 < x2 and y0 > y1 > y2 and x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert chart([], "y") == "" and "circle" in chart([Curve("a", [(1, 1.0)], "train")], "y")
    assert ticks(0, 10, 5) == [0, 2, 4, 6, 8, 10] and ticks(0.5, 3.2, 3, whole=True) == [1, 2, 3]
    assert ticks(-0.3, 0.31, 3) == [-0.2, 0.0, 0.2] or len(ticks(-0.3, 0.31, 3)) >= 2
