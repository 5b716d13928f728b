"""What `jaxlm evaluate --harness` prints; what it measures: tests/evaluation/test_harness.py."""

from __future__ import annotations

import pytest

from jaxlm.cli.harness import show_results


def test_results_are_a_table_as_of_other_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    show_results(
        {
            "results": {
                "mmlu": {"alias": "mmlu", "acc,none": 0.25, "acc_stderr,none": 0.0125, "sample_len": 1200},
                "rocks": {
                    "name": "rocks",
                    "exact_match,strict": 0.5,
                    "exact_match_stderr,strict": "N/A",
                    "acc,none": 0.75,
                },
            },
            "n-samples": {"rocks": {"original": 1500, "effective": 1200}},
            "n-shot": {"rocks": 5},
        }
    )
    head, rule, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["task", "figure", "value", "stderr", "n", "shots"] and set(rule) == {"─"}
    assert [row.split() for row in rows] == [
        ["mmlu", "acc", "0.2500", "0.0125"],
        ["rocks", "acc", "0.7500", "1,200", "5"],
        ["exact_match", "(strict)", "0.5000", "1,200", "5"],
    ]
