"""Verdicts of another model over answers, by an endpoint that talks like OpenAI's, each asked for once."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from jaxlm.errors import UserError
from jaxlm.evaluation.metrics.text import needs_extra
from jaxlm.screen import Bars


@dataclasses.dataclass(frozen=True)
class Judge:
    """A model that judges answers.

    Args:
        url: of the endpoint, e.g. http://localhost:8000/v1.
        model: its name there.
        verdicts: file in which verdicts are kept: what stands there is not asked again, so that a run that was killed
            goes on, and answers can be scored again without the endpoint.
        key: environment variable that holds the endpoint's key; one that is not set means that none is needed.
    """

    url: str
    model: str
    verdicts: Path
    key: str = "OPENAI_API_KEY"

    def ask(self, prompts: list[str]) -> list[str]:
        """What the model writes to each prompt, at temperature 0.

        Raises:
            UserError: when the endpoint cannot be reached or refuses, or the file holds something else. What was asked
                before is kept.
        """
        known = self._read()
        keys = [hashlib.sha256(json.dumps([self.model, prompt]).encode()).hexdigest() for prompt in prompts]
        missing = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in known}
        if missing:
            from rich.console import Console

            client = self._client()
            self.verdicts.parent.mkdir(parents=True, exist_ok=True)
            bar = Bars(console=Console(stderr=True), transient=True)
            with self.verdicts.open("a", encoding="utf-8") as file, bar:
                for key, prompt in bar.track(missing.items(), description="asking the judge"):
                    known[key] = self._complete(client, prompt)
                    line = {"key": key, "model": self.model, "prompt": prompt, "verdict": known[key]}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                    file.flush()
        return [known[key] for key in keys]

    def _read(self) -> dict[str, str]:
        if not self.verdicts.exists():
            return {}
        content = self.verdicts.read_text(encoding="utf-8")
        whole, newline, rest = content.rpartition("\n")  # not splitlines, which also parts inside of texts
        if rest:  # a line that was being written when the run was killed
            self.verdicts.write_text(whole + newline, encoding="utf-8")
        try:
            lines = [json.loads(line) for line in whole.split("\n") if line]
            return {line["key"]: line["verdict"] for line in lines}
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"options.judge_verdicts: {self.verdicts} is not a file of verdicts; name another, or move it away"
            ) from None

    def _client(self) -> Any:
        with needs_extra("judge"):
            import openai
        return openai.OpenAI(base_url=self.url, api_key=os.environ.get(self.key, "none"))

    def _complete(self, client: Any, prompt: str) -> str:
        import openai

        try:
            reply = client.chat.completions.create(
                model=self.model, messages=[{"role": "user", "content": prompt}], temperature=0
            )
        except openai.OpenAIError as error:
            raise UserError(
                f"options.judge: {self.url} did not answer ({error}); verdicts so far are in {self.verdicts}, and the "
                "same command goes on with them"
            ) from None
        return str(reply.choices[0].message.content or "")
