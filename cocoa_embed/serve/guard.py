"""Checks before every request: the key, the host, the number of requests, and the size of a body."""

from __future__ import annotations

import hmac
import time

import anyio
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cocoa_embed.serve.address import is_loopback
from cocoa_embed.serve.limits import BusyError, Limits

OPEN_PATHS = frozenset({"/", "/page.css", "/page.js", "/health"})
"""The paths that need no key: the page, which asks for it, and the health check."""

HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
    b"content-security-policy": b"default-src 'self'; img-src 'self' blob: data:; style-src 'self' 'unsafe-inline';"
    b" frame-ancestors 'none'; base-uri 'none'",
}
"""Headers of every response: other sites cannot show what is here, and the page loads nothing from elsewhere."""


def error_response(status: int, message: str) -> JSONResponse:
    """Return an error as JSON; a client that should try again learns when."""
    headers = {503: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}.get(status)
    return JSONResponse({"error": {"message": message}}, status, headers)


class Guard:
    """ASGI middleware that refuses requests before they reach a route."""

    def __init__(self, app: ASGIApp, limits: Limits, api_key: str | None) -> None:
        """Wrap an application.

        :param api_key: The key that every request must send; without one, requests must name this machine as their
            host, so that no page of another site reaches the server through a name that resolves to it.
        """
        self._app = app
        self._limits = limits
        self._too_large = f"the body is larger than {limits.body_bytes} bytes, the most that a request may have"
        self._expected = None if api_key is None else f"Bearer {api_key}".encode()
        self._active = 0
        self._bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *HEADERS.items()]
            await send(message)

        if (refusal := self._refusal(scope)) is not None:
            return await refusal(scope, receive, send_with_headers)
        self._active += 1
        received = [0]
        try:
            await self._app(scope, self._limited(receive, received), send_with_headers)
        finally:
            self._active -= 1
            self._bytes -= received[0]

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers = Headers(scope=scope)
        if self._expected is None and not is_this_machine(headers.get("host", "")):
            return error_response(
                400, "without an API key, requests must be sent to localhost, 127.0.0.1 or another loopback address"
            )
        given = headers.get("authorization", "").encode("latin-1", "replace")
        if self._expected is not None and scope["path"] not in OPEN_PATHS:
            if not hmac.compare_digest(given, self._expected):
                return error_response(401, "send the server's API key as Authorization: Bearer KEY")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._limits.body_bytes:
            return error_response(413, self._too_large)
        if self._active >= self._limits.waiting and scope["path"] != "/health":
            return error_response(503, f"{self._active} requests are being answered, which is the maximum; try again")
        return None

    def _limited(self, receive: Receive, received: list[int]) -> Receive:
        """Return a function that receives a body up to the limits of size and time, and records its size."""
        deadline = time.monotonic() + self._limits.seconds
        is_complete = False

        async def limited() -> Message:
            nonlocal is_complete
            if is_complete:
                return await receive()
            try:
                with anyio.fail_after(deadline - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"the body took longer than {self._limits.seconds:g} seconds") from None
            size = len(message.get("body", b""))
            received[0] += size
            self._bytes += size
            is_complete = not message.get("more_body", False)
            if received[0] > self._limits.body_bytes:
                raise HTTPException(413, self._too_large)
            if self._bytes > self._limits.waiting_bytes:
                raise BusyError("the bodies of all requests take too much memory; try again")
            return message

        return limited


def is_this_machine(host: str) -> bool:
    """Return whether a request's Host header names this machine, with any port."""
    return is_loopback(host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0])
