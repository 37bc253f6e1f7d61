"""An ASGI layer that counts requests by path and status and times the answers; knows nothing else of them."""

from __future__ import annotations

import time
from collections.abc import Collection

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lowvram.serve.metrics import Metrics

CLIENT_LEFT = 499  # nginx's number for a client that did not wait for its answer


class MetricsMiddleware:
    """Counts what passes.  paths: those that are counted by name; others are one, or a stranger could fill memory.

    A handler that knows better than the status line how it ended says so in `request.state.outcome`.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: Collection[str]) -> None:
        self.app, self.metrics, self._paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on and count it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.monotonic(), 500
        state = scope.setdefault("state", {})

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, watch)
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self.metrics.count_request(path, state.get("outcome", status))
            if path.endswith("completions"):
                self.metrics.time("request_seconds", time.monotonic() - started)
