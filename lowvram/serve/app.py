"""The server's HTTP paths and what handles them: read the body, submit a job, send the answer; knows no socket."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from importlib import resources
from typing import TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from lowvram.errors import LowvramError
from lowvram.serve.access import AccessMiddleware
from lowvram.serve.detokenizer import Piece, TokenLogprob
from lowvram.serve.errors import answer_error, body_of, json_response, refusal, status_of
from lowvram.serve.limits import MOST_DRAINED, PREPARED_AT_ONCE, Limits
from lowvram.serve.middleware import CLIENT_LEFT, MetricsMiddleware
from lowvram.serve.prompt import ServedModel, make_job
from lowvram.serve.responses import DONE, Body, ChatResponseBuilder, ResponseBuilder, to_event
from lowvram.serve.scheduler import ActiveJob, Event, Failed, Finished, GenerationJob, Scheduler
from lowvram.serve.schemas import ChatRequest, CompletionRequest, GenerationRequest, read_request
from lowvram.serve.workers import CancelCheck, Workers

_PAGE = {
    "/": ("index.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


Result = TypeVar("Result")


@dataclass(frozen=True)
class AccessPolicy:
    """Who may send requests.  api_key: None where no key is needed.  own_names_only: only this machine's own pages."""

    api_key: str | None = None
    own_names_only: bool = True


def build_app(served: ServedModel, scheduler: Scheduler, limits: Limits, access: AccessPolicy) -> Starlette:
    """Return the ASGI application; its caller starts and stops the scheduler."""
    handlers = _Handlers(served, scheduler, limits)
    routes = [
        Route("/v1/chat/completions", handlers.chat, methods=["POST"]),
        Route("/v1/completions", handlers.complete, methods=["POST"]),
        Route("/v1/models", handlers.models),
        Route("/v1/models/{name:path}", handlers.model),
        Route("/health", handlers.health),
        Route("/metrics", handlers.metrics),
        *(Route(path, _page_handler(*page)) for path, page in _PAGE.items()),
    ]
    return Starlette(
        routes=routes,
        middleware=[
            Middleware(MetricsMiddleware, metrics=scheduler.metrics, paths=frozenset(route.path for route in routes)),
            Middleware(AccessMiddleware, api_key=access.api_key, own_names_only=access.own_names_only),
        ],
        exception_handlers={HTTPException: _explain_http, Exception: _explain_crash},
    )


def _page_handler(name: str, kind: str) -> Callable[[Request], Awaitable[Response]]:
    content = resources.files("lowvram.serve").joinpath("page", name).read_bytes()

    async def show(_: Request) -> Response:
        return Response(content, media_type=f"{kind}; charset=utf-8", headers=_PAGE_HEADERS)

    return show


async def _explain_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = {404: f"There is no {request.url.path[:100]} here.", 405: f"{request.method} is not for this path."}
    answer = refusal(error.status_code, message.get(error.status_code, str(error.detail)))
    answer.headers.update(error.headers or {})
    return answer


async def _explain_crash(_request: Request, _error: Exception) -> Response:
    answer = refusal(500, "The server has failed at this request. Its log says more.", "server_error")
    answer.headers["Connection"] = "close"  # as uvicorn does after an exception
    return answer


class _Handlers:
    """One method for each path."""

    def __init__(self, served: ServedModel, scheduler: Scheduler, limits: Limits) -> None:
        self.served, self.scheduler, self.limits = served, scheduler, limits
        # Parsing, normalising and tokenising take time, in which the event loop must serve the other clients.
        self.workers = Workers(PREPARED_AT_ONCE, scheduler.explain_stop)
        self.started_at = int(time.time())

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, ChatRequest)

    async def complete(self, request: Request) -> Response:
        return await self._answer(request, CompletionRequest)

    async def models(self, _: Request) -> Response:
        return json_response({"object": "list", "data": [self._describe()]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name == self.served.name:
            return json_response(self._describe())
        return refusal(404, f"This server has {self.served.name!r} alone.", code="model_not_found", param="model")

    def _describe(self) -> Body:
        return {
            "id": self.served.name,
            "object": "model",
            "created": self.started_at,
            "owned_by": "lowvram",
            "speaks": self.served.encode_chat is not None,
            "max_context": self.served.max_context,
            "max_output_tokens": self.limits.output_tokens,
        }

    async def health(self, _: Request) -> Response:
        unavailable = self.scheduler.explain_unavailable()
        body = {"status": str(unavailable or "ok"), "model": self.served.name, **self._gauges()}
        return json_response(body, 503 if unavailable else 200)

    async def metrics(self, _: Request) -> Response:
        text = self.scheduler.metrics.show(self._gauges())
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    def _gauges(self) -> dict[str, int]:
        scheduler = self.scheduler
        return {"running": scheduler.running, "waiting": scheduler.waiting, "slots": scheduler.decoder.slots}

    async def _answer(self, request: Request, kind: type[ChatRequest] | type[CompletionRequest]) -> Response:
        """Answer one request; however that ends, its job does not stay in the scheduler."""
        submission = _Submission(self.scheduler)
        try:
            body = await read_body(request, self.limits)
            submission.watch(request.receive)
            if (full_queue := self.scheduler.explain_full_queue(self.workers.waiting)) is not None:
                raise full_queue
            parsed, job, builder = await submission.run_unless_disconnected(
                self.workers.run(partial(self._parse, kind, body))
            )
            submission.submit(job)
            if not parsed.stream:
                return await self._answer_whole(submission, builder)
            # Until the first token is sent, a failure can still be an HTTP status.
            first = await submission.next_event()
            response = _Stream(submission, first, builder, request)
            submission = _Submission(self.scheduler)  # the stream closes the one that it was given
            return response
        except LowvramError as error:
            return answer_error(error)
        except ClientDisconnect:
            return Response(status_code=CLIENT_LEFT)
        finally:
            submission.close()

    def _parse(
        self, kind: type[GenerationRequest], body: bytes, check_cancelled: CancelCheck
    ) -> tuple[GenerationRequest, GenerationJob, ResponseBuilder]:
        parsed: GenerationRequest = read_request(kind, body)
        check_cancelled()
        job = make_job(parsed, self.served, self.limits, check_cancelled)
        builder_class = ChatResponseBuilder if kind is ChatRequest else ResponseBuilder
        return parsed, job, builder_class(self.served, len(job.ids), job.top is not None, parsed.wants_usage)

    async def _answer_whole(self, submission: _Submission, builder: ResponseBuilder) -> Response:
        texts, token_logprobs = list[str](), list[TokenLogprob]()
        while not isinstance(event := await submission.next_event(), Finished):
            texts.append(event.text)
            token_logprobs += event.token_logprobs
        if not token_logprobs:
            return json_response(builder.whole("".join(texts), token_logprobs, event))
        # Twenty log-probabilities for each of thousands of tokens are megabytes of JSON.
        return await submission.run_unless_disconnected(
            self.workers.run(lambda _: json_response(builder.whole("".join(texts), token_logprobs, event)))
        )


class _Submission:
    """One request's job in the scheduler: passes its events to the event loop, and notices that the client left."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()
        self._active_job: ActiveJob | None = None
        self._watch: asyncio.Task[None] | None = None

    def watch(self, receive: Receive) -> None:
        """Begin to watch whether the client disconnects; its whole body must have been received."""
        self._watch = asyncio.create_task(self._watch_client(receive))

    def submit(self, job: GenerationJob) -> None:
        """Submit the job; raises QueueFullError or NotServingError as the scheduler does."""
        loop = asyncio.get_running_loop()

        def deliver(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has been stopped by force
                loop.call_soon_threadsafe(self._events.put_nowait, event)

        self._active_job = self._scheduler.submit(job, deliver)

    async def _watch_client(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._events.put_nowait(None)

    async def run_unless_disconnected(self, work: Coroutine[None, None, Result]) -> Result:
        """Return the result of `work`; if the client disconnects before, cancel it and raise ClientDisconnect."""
        assert self._watch is not None
        task = asyncio.create_task(work)
        try:
            await asyncio.wait({task, self._watch}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ClientDisconnect
            return task.result()
        finally:
            task.cancel()

    async def next_event(self) -> Piece | Finished:
        """Return the next event; raises the error of an answer that failed, ClientDisconnect if the client left."""
        event = await self._events.get()
        if event is None:
            raise ClientDisconnect
        if isinstance(event, Failed):
            raise event.error
        return event

    def close(self) -> None:
        """Cancel the job, whether or not the answer is finished."""
        if self._watch is not None:
            self._watch.cancel()
        if self._active_job is not None:
            self._scheduler.cancel(self._active_job)
        self._watch = self._active_job = None


class _Stream(StreamingResponse):
    """An answer as server-sent events; whatever ends it, its job is cancelled."""

    def __init__(
        self, submission: _Submission, first: Piece | Finished, builder: ResponseBuilder, request: Request
    ) -> None:
        super().__init__(
            self._events(first, builder), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
        )
        self._submission, self._request = submission, request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._request.state.outcome = CLIENT_LEFT
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._submission.close()

    async def _events(self, event: Piece | Finished, builder: ResponseBuilder) -> AsyncIterator[bytes]:
        try:
            for body in builder.opening():
                yield to_event(body)
            while not isinstance(event, Finished):
                if event.text or event.token_logprobs:
                    yield to_event(builder.chunk(event.text, event.token_logprobs))
                event = await self._submission.next_event()
            for body in (builder.chunk("", (), event.reason), *builder.usage(event)):
                yield to_event(body)
            self._request.state.outcome = 200
            yield DONE
        except LowvramError as error:
            self._request.state.outcome = status_of(error)
            yield to_event(body_of(error))
        except ClientDisconnect:
            return  # nobody would read an error


async def read_body(request: Request, limits: Limits) -> bytes:
    """Return the body; raises HTTPException 413 above the limit, 408 where it does not arrive in time."""
    pieces, size = list[bytes](), 0
    try:
        async with asyncio.timeout(limits.body_wait_s):
            async for piece in request.stream():
                size += len(piece)
                if size <= limits.body_bytes:
                    pieces.append(piece)
                else:
                    pieces.clear()
                    if size > MOST_DRAINED * limits.body_bytes:
                        break
    except TimeoutError as error:
        raise HTTPException(408, f"The body did not come within {limits.body_wait_s:g} s. Send it again.") from error
    if size > limits.body_bytes:
        why = f"The body has more than {limits.body_bytes} bytes. This server reads no more; shorten it."
        raise HTTPException(413, why)
    return b"".join(pieces)
