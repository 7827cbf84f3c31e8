"""Ask a running server. Imports no library, so that a search from the shell takes no time to start."""

from __future__ import annotations

import json
from collections.abc import Mapping
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from cocoa_embed.errors import CocoaError, UsageError, one_line
from cocoa_embed.serve.address import check_key

TIMEOUT_SECONDS = 90.0


def post_search(server: str, document: Mapping[str, Any], api_key: str | None = None) -> dict[str, Any]:
    """Return the JSON object, with a list ``hits``, with which a server answers a search.

    No proxy is used and no redirect is followed: the key goes to the named server only.

    :param server: ``http://127.0.0.1:8000``; a path after the port goes before ``/search``.
    :raises UsageError: If the address or the key is malformed, or the server refuses the request as malformed.
    :raises CocoaError: If no server answers, it fails, or it is not a server of cocoa-embed.
    """
    if api_key:
        check_key(api_key)
    try:
        address = urlsplit(server)
        kind = {"http": HTTPConnection, "https": HTTPSConnection}.get(address.scheme)
        if kind is None or not address.hostname or "@" in address.netloc:
            raise ValueError
        connection = kind(address.hostname, address.port, timeout=TIMEOUT_SECONDS)
    except ValueError:
        raise UsageError(f"{server!a} is not the address of a server; give one such as http://127.0.0.1:8000") from None
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {api_key}"} if api_key else {})}
    try:
        connection.request("POST", address.path.rstrip("/") + "/search", json.dumps(document), headers)
        response = connection.getresponse()
        body = response.read()
    except (OSError, HTTPException, UnicodeError) as error:
        raise CocoaError(
            f"{server} does not answer ({one_line(error)}); is cocoa-embed serve running there?"
        ) from error
    finally:
        connection.close()
    try:
        answer = json.loads(body)
        if response.status == 200 and isinstance(answer["hits"], list):
            return dict(answer)
        message = answer["error"]["message"]
    except (ValueError, TypeError, KeyError):
        raise CocoaError(
            f"{server} is not a server of cocoa-embed (it answers with status {response.status})"
        ) from None
    raise (UsageError if response.status == 400 else CocoaError)(f"{server}: {message}")
