"""The serve command as a user runs it: a run and an adapter beside it, asked by OpenAI's client until SIGTERM."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import openai
import pytest

from jaxlm.cli.serve import main as serve
from tests.e2e.test_generate import models

__all__ = ["models"]  # a fixture
pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.xdist_group("generate")]


def test_a_plan_for_scripts(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", str(models / "base"), "--rows", "4", "--plan", "--json"]
    command = [sys.executable, "-m", "jaxlm", "serve", *words]
    # One device, as on a user's machine.
    environment = {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "PATH": "", "HOME": str(tmp_path)}
    plan = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, env=environment).stdout)
    assert plan["programs"] == 1 + len(plan["steps"])
    assert plan["steps"][0] == {"rows": 4, "prompts": 0, "prompt_tokens": 0}
    assert {"rows": 4, "prompts": 8, "prompt_tokens": 256} in plan["steps"]
    assert plan["rows"] == 4 and plan["page_tokens"] == 16
    assert plan["pages_bytes"] % plan["pages"] == 0 and plan["longest_text_pages"] <= plan["pages"]
    assert serve(["--model", "x", "--json"]) == 2
    assert "--json: it is --plan's answer" in capsys.readouterr().err


def test_a_run_and_its_adapter_are_served_until_sigterm(models: Path, tmp_path: Path) -> None:
    words = ["--model", str(models / "base"), "--adapter", f"rock={models / 'lora-peft'}", "--port", "0", "--rows", "2"]
    # One device, as on a user's machine.
    command = [sys.executable, "-m", "jaxlm", "serve", *words, "--name", "tiny", "--compilation_cache", "none"]
    environment = {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "PATH": "", "HOME": str(tmp_path)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if line.startswith("serving"):
                break
        match = re.search(r"tiny, tiny:rock at (http://127.0.0.1:\d+)", lines[-1])
        assert match is not None, "".join(lines)
        client = openai.OpenAI(base_url=f"{match[1]}/v1", api_key="none", max_retries=60)
        asked = [{"role": "user", "content": "rock sand"}]
        answers = []
        for model in ("tiny", "tiny:rock"):
            reply = client.chat.completions.create(
                model=model,
                messages=asked,
                temperature=0,
                max_tokens=8,
                logprobs=True,  # type: ignore[arg-type]
            )
            assert reply.choices[0].logprobs is not None and reply.choices[0].logprobs.content
            answers.append([token.logprob for token in reply.choices[0].logprobs.content])
        assert answers[0] != answers[1]
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
        assert process.wait(20) == 0 and "every answer was given" in rest
    finally:
        process.kill()
