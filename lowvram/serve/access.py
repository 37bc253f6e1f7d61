"""Refuses requests from other origins or without the API key, before their bodies are read.

A page of another site whose name resolves to 127.0.0.1 (DNS rebinding) is same-origin to the browser: only the Host
header distinguishes it from our own page.
"""

from __future__ import annotations

import hmac
from collections.abc import Collection, Mapping
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from lowvram.serve.addresses import is_loopback
from lowvram.serve.errors import refusal

# The page must open before a key can be typed into it; /health is for a supervisor that restarts the server.
OPEN_PATHS = frozenset({"/", "/page.js", "/page.css", "/health"})


class AccessMiddleware:
    """ASGI middleware that answers 401 or 403 to strangers.

    api_key: None where no key is needed.  own_names_only: only hosts that are loopback, and only their own origin.
    """

    def __init__(
        self, app: ASGIApp, api_key: str | None, own_names_only: bool, open_paths: Collection[str] = OPEN_PATHS
    ) -> None:
        self.app, self._own_names_only, self._open_paths = app, own_names_only, open_paths
        self._key = None if api_key is None else api_key.encode("utf-8")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 401 or 403."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        problem = self._find_stranger(headers)
        if problem is not None:
            answer = refusal(403, f"{problem} Open it by its own address.", "permission_error", code="foreign_origin")
            await answer(scope, receive, send)
        elif scope["path"] not in self._open_paths and not self._has_key(headers):
            message = "The API key is missing or wrong. Send it as: Authorization: Bearer KEY."
            answer = refusal(401, message, "authentication_error", code="invalid_api_key")
            answer.headers["WWW-Authenticate"] = "Bearer"
            await answer(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _find_stranger(self, headers: Mapping[str, str]) -> str | None:
        if not self._own_names_only:
            return None  # the key is required, and no browser sends it by itself as it does a cookie
        host = headers.get("host", "")
        if not is_loopback(_name_of(f"//{host}")):
            return f"Host is {host[:60]!r}, and this server answers on this machine's own names only."
        origin = headers.get("origin")
        if origin is not None and origin.lower() not in (f"http://{host}".lower(), f"https://{host}".lower()):
            return f"Origin is {origin[:60]!r}, and this server answers its own page only."
        return None

    def _has_key(self, headers: Mapping[str, str]) -> bool:
        if self._key is None:
            return True
        kind, _, sent = headers.get("authorization", "").partition(" ")
        # The headers' bytes were decoded as Latin-1 above.
        return hmac.compare_digest(sent.strip().encode("latin-1"), self._key) and kind.lower() == "bearer"


def _name_of(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
