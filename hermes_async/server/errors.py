"""Errors as HTTP answers, in the form of OpenAI's API."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from jinja2 import TemplateError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from hermes_async.errors import (
    CheckpointError,
    ContextLengthError,
    DeadlineExceededError,
    EngineClosedError,
    EngineError,
    HermesError,
    MemoryBudgetError,
    QueueFullError,
    RequestError,
)

logger = logging.getLogger(__name__)

_MAX_MESSAGE = 2000
"""Characters of an error's text: it may quote a part of the request."""


class ErrorDetail(BaseModel):
    """What went wrong.

    Attributes:
        type: The kind of error, such as "invalid_request_error".
        param: The field at fault.
        code: A short name for programs.
    """

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorDetail


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": description}
    for status, description in {
        400: "The request cannot be served; the text says why.",
        401: "The key is missing or wrong.",
        404: "There is no such model.",
        409: "A request with this id has not ended.",
        413: "The body is too large.",
        421: "The host is not one that the server answers to.",
        422: "A field is unknown, not supported, or has a value that is not allowed.",
        429: "As many requests wait as may.",
        503: "The engine cannot answer now.",
        504: "The request did not end in time.",
    }.items()
}
"""What each route may answer besides its result, for the OpenAPI schema."""


def error_body(message: str, *, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's API sends it."""
    return ErrorBody(error=ErrorDetail(message=message[:_MAX_MESSAGE], type=kind, param=param, code=code)).model_dump()


def error_response(
    status: int,
    message: str,
    *,
    kind: str = "invalid_request_error",
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """An answer that is an error."""
    body = error_body(message, kind=kind, param=param, code=code)
    return JSONResponse(body, status, headers=None if headers is None else dict(headers))


class FieldError(RequestError):
    """A field of a request that cannot be served.

    Attributes:
        param: The field's name.
        status: Of the answer.
    """

    def __init__(self, message: str, *, param: str, status: int = 422, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.status = status
        self.code = code


def answer_to(error: HermesError) -> JSONResponse:
    """The answer to a request that ended with `error`.

    Texts of errors that are about the request go to the client. Others may name files of the server, and stay in its
    log.
    """
    if isinstance(error, FieldError):
        return error_response(error.status, str(error), param=error.param, code=error.code)
    if isinstance(error, QueueFullError):
        return error_response(429, str(error), kind="rate_limit_error", code="queue_full", headers={"retry-after": "5"})
    if isinstance(error, DeadlineExceededError):
        return error_response(504, str(error), kind="timeout_error", code="deadline_exceeded")
    if isinstance(error, RequestError | MemoryBudgetError):
        code = "context_length_exceeded" if isinstance(error, ContextLengthError) else None
        code = "memory_budget_exceeded" if isinstance(error, MemoryBudgetError) else code
        return error_response(400, _public_text(error), code=code)
    # An engine that is not open is no fault: the server stops, or starts.
    level = logging.WARNING if isinstance(error, EngineClosedError) else logging.ERROR
    logger.log(level, "a request failed: %s: %s", type(error).__name__, error)
    if isinstance(error, CheckpointError):
        return error_response(400, "the checkpoint's settings do not allow this; the server's log says why")
    if isinstance(error, EngineError):
        return error_response(503, "the engine is not open", kind="server_error", code="engine_not_open")
    return error_response(503, "the weights could not be read; try again", kind="server_error", code="read_failed")


def error_in_stream(error: HermesError) -> dict[str, Any]:
    """The body that `answer_to` gives, for a stream that has begun."""
    body: dict[str, Any] = json.loads(bytes(answer_to(error).body))
    return body


def _public_text(error: HermesError) -> str:
    """The text of an error, without that of another library's error, which may hold paths and addresses.

    What a chat template says of the messages is for the client.
    """
    text = str(error)
    cause = error.__cause__
    if cause is not None and not isinstance(cause, (HermesError, TemplateError)):
        text = text.partition(": ")[0]
        logger.info("a request failed: %s: %s", type(cause).__name__, cause)
    return text


def add_error_handlers(app: FastAPI) -> None:
    """Makes every error of `app` an answer in the form of OpenAI's API."""

    @app.exception_handler(HermesError)
    async def of_ours(request: Request, error: HermesError) -> JSONResponse:
        return answer_to(error)

    @app.exception_handler(RequestValidationError)
    async def of_a_field(request: Request, error: RequestValidationError) -> JSONResponse:
        return validation_response(error)

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> JSONResponse:
        try:
            phrase = HTTPStatus(error.status_code).phrase
        except ValueError:
            phrase = "error"
        return error_response(error.status_code, str(error.detail or phrase), headers=error.headers)

    @app.exception_handler(ClientDisconnect)
    async def of_a_client_that_left(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nobody reads it

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        # Starlette raises the error again, and the server logs it with its traceback.
        return error_response(500, "an error that was not expected; the server's log has it", kind="server_error")


def validation_response(error: RequestValidationError) -> JSONResponse:
    """The answer to a body that is no JSON, or has a field that is unknown or has a wrong value."""
    first = error.errors()[0]
    place = _place(first["loc"], error.body)
    if first["type"] == "json_invalid":
        return error_response(400, "the body is not JSON", code="invalid_json")
    if not place:
        return error_response(422, f"the body: {_said(first)}")
    param = ".".join(map(str, place))[:200]
    if first["type"] == "extra_forbidden":
        return error_response(
            422, f"{param}: the field is not known, or not supported", param=param, code="unknown_field"
        )
    return error_response(422, f"{param}: {_said(first)}", param=param, code="invalid_value")


def _said(error: Mapping[str, Any]) -> str:
    """What is wrong with a value, without the name of Python's error for it."""
    return str(error["msg"]).removeprefix("Value error, ")


def _place(location: Sequence[int | str], body: Any) -> list[int | str]:
    """Where in the request a value is wrong, without the names of alternative types that pydantic puts in between."""
    source, *parts = location
    if source != "body":
        return [*parts]
    place: list[int | str] = []
    for part in parts:
        of_list = isinstance(body, list) and isinstance(part, int) and part < len(body)
        if of_list or (isinstance(body, dict) and part in body):
            body = body[part]
            place.append(part)
        elif isinstance(body, dict) and part is parts[-1]:  # a field that is missing
            place.append(part)
    return place
