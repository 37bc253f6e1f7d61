"""The server's paths, and one request's way: body, order, job, answer; knows no command line and no socket."""

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
from lowvram.serve.workers import GoOn, Workers

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
    """Who may come in.  api_key: None where none is asked for.  own_names_only: only this machine's own pages."""

    api_key: str | None = None
    own_names_only: bool = True


def build_app(served: ServedModel, batcher: Scheduler, limits: Limits, door: AccessPolicy) -> Starlette:
    """Return the ASGI application; whoever runs it starts and stops the batcher."""
    handlers = _Handlers(served, batcher, limits)
    routes = [
        Route("/v1/chat/completions", handlers.chat, methods=["POST"]),
        Route("/v1/completions", handlers.complete, methods=["POST"]),
        Route("/v1/models", handlers.models),
        Route("/v1/models/{name:path}", handlers.model),
        Route("/health", handlers.health),
        Route("/metrics", handlers.metrics),
        *(Route(path, _page_of(*page)) for path, page in _PAGE.items()),
    ]
    return Starlette(
        routes=routes,
        middleware=[
            Middleware(MetricsMiddleware, metrics=batcher.metrics, paths=frozenset(route.path for route in routes)),
            Middleware(AccessMiddleware, api_key=door.api_key, own_names_only=door.own_names_only),
        ],
        exception_handlers={HTTPException: _explain_http, Exception: _explain_crash},
    )


def _page_of(name: str, kind: str) -> Callable[[Request], Awaitable[Response]]:
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
    answer = refusal(500, "The server made a mistake.  Its log says more.", "server_error")
    answer.headers["Connection"] = "close"  # as uvicorn does after a mistake
    return answer


class _Handlers:
    """What stands behind each path."""

    def __init__(self, served: ServedModel, batcher: Scheduler, limits: Limits) -> None:
        self.served, self.batcher, self.limits = served, batcher, limits
        # Parsing, normalising and tokenising are work; no other client must wait for it.
        self.workers = Workers(PREPARED_AT_ONCE, batcher.explain_stop)
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
        absence = self.batcher.explain_absence()
        body = {"status": str(absence or "ok"), "model": self.served.name, **self._gauges()}
        return json_response(body, 503 if absence else 200)

    async def metrics(self, _: Request) -> Response:
        text = self.batcher.metrics.show(self._gauges())
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    def _gauges(self) -> dict[str, int]:
        batcher = self.batcher
        return {"running": batcher.running, "waiting": batcher.waiting, "slots": batcher.decoder.slots}

    async def _answer(self, request: Request, kind: type[ChatRequest] | type[CompletionRequest]) -> Response:
        """Answer one request, whatever becomes of it, and leave the batcher again."""
        visit = _Visit(self.batcher)
        try:
            body = await read_body(request, self.limits)
            visit.watch(request.receive)
            if (crowd := self.batcher.explain_crowd(self.workers.waiting)) is not None:
                raise crowd
            ask, order, reply = await visit.unless_it_leaves(self.workers.run(partial(self._understand, kind, body)))
            visit.open(order)
            if not ask.stream:
                return await self._whole(visit, reply)
            # Before the first token is there, a failure can still be a status.
            first = await visit.next_event()
            response = _Stream(visit, first, reply, request)
            visit = _Visit(self.batcher)  # the stream closes its own
            return response
        except LowvramError as error:
            return answer_error(error)
        except ClientDisconnect:
            return Response(status_code=CLIENT_LEFT)
        finally:
            visit.close()

    def _understand(
        self, kind: type[GenerationRequest], body: bytes, go_on: GoOn
    ) -> tuple[GenerationRequest, GenerationJob, ResponseBuilder]:
        ask: GenerationRequest = read_request(kind, body)
        go_on()
        order = make_job(ask, self.served, self.limits, go_on)
        form = ChatResponseBuilder if kind is ChatRequest else ResponseBuilder
        return ask, order, form(self.served, len(order.ids), order.top is not None, ask.wants_usage)

    async def _whole(self, visit: _Visit, reply: ResponseBuilder) -> Response:
        texts, said = list[str](), list[TokenLogprob]()
        while not isinstance(event := await visit.next_event(), Finished):
            texts.append(event.text)
            said += event.said
        if not said:
            return json_response(reply.whole("".join(texts), said, event))
        # Twenty chances of each of thousands of tokens are megabytes of JSON.
        return await visit.unless_it_leaves(
            self.workers.run(lambda _: json_response(reply.whole("".join(texts), said, event)))
        )


class _Visit:
    """One request's stay in the batcher: its events, from another thread, and the moment when the client leaves."""

    def __init__(self, batcher: Scheduler) -> None:
        self._batcher = batcher
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()
        self._job: ActiveJob | None = None
        self._watch: asyncio.Task[None] | None = None

    def watch(self, receive: Receive) -> None:
        """Notice from now on when the client leaves; its request must have been received."""
        self._watch = asyncio.create_task(self._watch_client(receive))

    def open(self, order: GenerationJob) -> None:
        """Submit; raises what the batcher raises where it takes no more."""
        loop = asyncio.get_running_loop()

        def deliver(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has been stopped by force
                loop.call_soon_threadsafe(self._events.put_nowait, event)

        self._job = self._batcher.submit(order, deliver)

    async def _watch_client(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._events.put_nowait(None)

    async def unless_it_leaves(self, work: Coroutine[None, None, Result]) -> Result:
        """Return what comes of some work; cancels it and raises ClientDisconnect where the client leaves before."""
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
        """Return what comes next; raises the error of an answer that failed, ClientDisconnect if nobody reads it."""
        event = await self._events.get()
        if event is None:
            raise ClientDisconnect
        if isinstance(event, Failed):
            raise event.error
        return event

    def close(self) -> None:
        """Leave the batcher, whether or not the answer is finished."""
        if self._watch is not None:
            self._watch.cancel()
        if self._job is not None:
            self._batcher.leave(self._job)
        self._watch = self._job = None


class _Stream(StreamingResponse):
    """An answer as server-sent events; whatever ends it, the batcher is left."""

    def __init__(self, visit: _Visit, first: Piece | Finished, reply: ResponseBuilder, request: Request) -> None:
        super().__init__(
            self._events(first, reply), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
        )
        self._visit, self._request = visit, request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._request.state.outcome = CLIENT_LEFT
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._visit.close()

    async def _events(self, event: Piece | Finished, reply: ResponseBuilder) -> AsyncIterator[bytes]:
        try:
            for body in reply.opening():
                yield to_event(body)
            while not isinstance(event, Finished):
                if event.text or event.said:
                    yield to_event(reply.chunk(event.text, event.said))
                event = await self._visit.next_event()
            for body in (reply.chunk("", (), event.reason), *reply.usage(event)):
                yield to_event(body)
            self._request.state.outcome = 200
            yield DONE
        except LowvramError as error:
            self._request.state.outcome = status_of(error)
            yield to_event(body_of(error))
        except ClientDisconnect:
            return  # there is nobody to tell


async def read_body(request: Request, limits: Limits) -> bytes:
    """Return the body; raises HTTPException 413 above the limit, 408 where it does not come."""
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
        raise HTTPException(408, f"The body did not come within {limits.body_wait_s:g} s.  Send it again.") from error
    if size > limits.body_bytes:
        why = f"The body has more than {limits.body_bytes} bytes.  This server reads no more; shorten it."
        raise HTTPException(413, why)
    return b"".join(pieces)
