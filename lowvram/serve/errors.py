"""From what went wrong to an HTTP status and OpenAI's form of an error; knows no requests."""

from __future__ import annotations

from starlette.responses import Response

from lowvram.errors import LowvramError
from lowvram.serve.responses import Body, error_body, to_json
from lowvram.serve.scheduler import NotServingError, QueueFullError
from lowvram.serve.schemas import RequestError

_RETRY_AFTER_S = 2  # about as long as a short answer takes
_NOT_FOUND = "model_not_found"


def refusal(
    status: int, message: str, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None
) -> Response:
    """Return an error as a response."""
    return json_response(error_body(message, kind, param, code), status)


def json_response(body: Body, status: int = 200) -> Response:
    """Return a body as a response."""
    return Response(to_json(body), status, media_type="application/json")


def status_of(error: LowvramError) -> int:
    """Return the status that stands for an error: the client's, too many, or ours."""
    if isinstance(error, QueueFullError):
        return 429
    if isinstance(error, NotServingError):
        return 503
    return 404 if isinstance(error, RequestError) and error.code == _NOT_FOUND else 400


def body_of(error: LowvramError) -> Body:
    """Return an error in OpenAI's form."""
    if isinstance(error, QueueFullError):
        return error_body(str(error), "rate_limit_error", code="queue_full")
    if isinstance(error, NotServingError):
        return error_body(str(error), "server_error", code="not_serving")
    param, code = (error.param, error.code) if isinstance(error, RequestError) else (None, None)
    return error_body(str(error), "invalid_request_error", param, code)


def answer_error(error: LowvramError) -> Response:
    """Return an error as a response, with the time to wait where waiting helps."""
    response = json_response(body_of(error), status_of(error))
    if response.status_code in (429, 503):
        response.headers["Retry-After"] = str(_RETRY_AFTER_S)
    return response
