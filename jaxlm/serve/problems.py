"""What a request is refused with: a status, and a body as OpenAI's clients read it."""

from __future__ import annotations

import re

from starlette.responses import JSONResponse

from jaxlm.errors import UserError

KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class Problem(Exception):
    """A request that is not answered.

    Args:
        message: the field, its value, what is expected.
        status: of HTTP.
        param: the field.
        code: a word that programs may ask for.
        headers: of the reply.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code, self.headers = message, status, param, code, headers

    def body(self) -> dict[str, object]:
        """OpenAI's error object."""
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


def of_user_error(error: UserError, param: str | None = None) -> Problem:
    """A mistake that a part below found; a message that begins with a key names the field by it."""
    message = str(error).removeprefix("data: ")
    named = re.match(r"([a-z_]+): ", message)
    return Problem(message, 400, param or (named[1] if named else None))
