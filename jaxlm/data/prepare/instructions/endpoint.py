"""Requests to an endpoint that talks like OpenAI's, several at once, each asked again where the endpoint failed."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from jaxlm.errors import UserError


@dataclasses.dataclass(frozen=True)
class Reply:
    """What the model wrote.

    Args:
        text: behind the prompt.
        is_cut: it is not whole, because it became too long.
        tokens_in, tokens_out: what the endpoint counted.
    """

    text: str
    is_cut: bool
    tokens_in: int
    tokens_out: int


class Endpoint:
    """A client of one endpoint; used within one event loop.

    Args:
        url: its address, e.g. http://127.0.0.1:8000/v1.
        model: a name that it knows; empty: the first that it lists.
        chat: whether prompts are sent as a user's message, for endpoints without /completions.
        key: environment variable that holds its key; one that is not set means that none is needed.
        retries: how often a request is sent again after a failure (refused connections, time-outs, 408, 409, 429, 5xx),
            each time after a longer pause, or the pause that the endpoint asks for.
        timeout: seconds for a reply.
        fields: sent with each request, as they are.
    """

    def __init__(
        self, url: str, model: str, chat: bool, key: str, retries: int, timeout: float, fields: dict[str, Any]
    ) -> None:
        try:
            import openai
        except ModuleNotFoundError:
            raise UserError("asking an endpoint needs openai: pip install 'jaxlm[prepare]'") from None
        self._openai, self.url, self.model, self._chat, self._fields = openai, url, model, chat, fields
        self._key = key
        self._client = openai.AsyncOpenAI(
            base_url=url, api_key=os.environ.get(key, "none"), max_retries=retries, timeout=timeout
        )

    async def find_model(self) -> str:
        """The model's name, asked for where none was given.

        Raises:
            UserError: the endpoint does not answer, or lists no model.
        """
        if not self.model:
            try:
                models = (await self._client.models.list()).data
            except self._openai.OpenAIError as error:
                raise self._told(error) from None
            if not models:
                raise UserError(f"url: {self.url} lists no model; name one with --model")
            self.model = models[0].id
        return self.model

    async def ask(self, prompt: str, seed: int) -> Reply:
        """The reply to a prompt.

        Raises:
            UserError: the endpoint refuses, or still fails after all retries.
        """
        body: dict[str, Any] = {"extra_body": {"seed": seed, **self._fields}}
        answer: Any
        try:
            if self._chat:
                answer = await self._client.chat.completions.create(
                    model=self.model, messages=[{"role": "user", "content": prompt}], **body
                )
                text = answer.choices[0].message.content or ""
            else:
                answer = await self._client.completions.create(model=self.model, prompt=prompt, **body)
                text = answer.choices[0].text
        except self._openai.OpenAIError as error:
            raise self._told(error) from None
        usage = answer.usage
        counts = (0, 0) if usage is None else (usage.prompt_tokens, usage.completion_tokens)
        return Reply(text, answer.choices[0].finish_reason == "length", *counts)

    async def close(self) -> None:
        """Gives the connections up."""
        await self._client.close()

    def _told(self, error: Any) -> UserError:
        """A failure in our words, with the way out."""
        kept = "what was written so far is kept, and the same command goes on"
        if isinstance(error, self._openai.AuthenticationError):
            return UserError(f"url: {self.url} wants a key: set {self._key} (--key names another variable); {kept}")
        if isinstance(error, self._openai.APIStatusError):
            body = error.body if isinstance(error.body, dict) else {}
            why = body.get("message") or body.get("detail") or error.message
            way_out = {
                400: "a smaller --max_tokens or --tasks shortens the request, --fields.NAME null leaves a field out; ",
                404: "name a model that it has with --model, or see whether --url ends with /v1; ",
            }.get(error.status_code, "")
            return UserError(f"url: {self.url} refused a request ({error.status_code}: {why}); {way_out}{kept}")
        if isinstance(error, self._openai.APITimeoutError):
            return UserError(f"url: {self.url} did not answer in time; --timeout gives it longer; {kept}")
        return UserError(
            f"url: {self.url} cannot be reached ({error}); start it, e.g. jaxlm serve --model out/run; {kept}"
        )
