"""Write texts with an OpenAI-compatible endpoint: chat completions about images that are sent along."""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Sequence
from typing import Any

from PIL import Image

from cocoa_embed.captioning.prompts import Answer, NoAnswerError, Prompts, Request
from cocoa_embed.data.rows import shortened
from cocoa_embed.errors import CocoaError, UsageError, one_line, require

require("tenacity", "caption")
require("httpx", "caption")

import httpx  # noqa: E402
import tenacity  # noqa: E402

KEY_VARIABLE = "OPENAI_API_KEY"
ATTEMPTS = 5
TIMEOUT_SECONDS = 120.0
"""The longest wait until an endpoint begins to answer, and between two parts of the answer."""
MAX_WAIT_SECONDS = 60.0
"""The longest wait between two attempts, even if the endpoint asks for more."""
TEMPORARY = frozenset({408, 409, 425, 429})
"""Statuses, besides 5xx, after which the same request may succeed later."""
JPEG_QUALITY = 92
PIXELS_PER_TOKEN = 28 * 28
"""The value of Qwen2-VL; others are close: Claude's formula is 750."""
CHARACTERS_PER_TOKEN = 4

back_off = tenacity.wait_exponential(multiplier=1, max=20) + tenacity.wait_random(0, 1)


class EndpointWriter:
    """Writes with ``POST {endpoint}/chat/completions``; threads may share it."""

    follows_prompts = True
    images_at_once = 1

    def __init__(self, endpoint: str, model: str, prompts: Prompts, max_pixels: int, threads: int,
                 key_variable: str | None) -> None:  # fmt: skip
        """Read the key; nothing is sent yet.

        :param endpoint: An address such as ``http://127.0.0.1:8000/v1``.
        :param key_variable: The environment variable that holds the key; by default ``KEY_VARIABLE``, if it is set.
        :raises UsageError: If the address is malformed, or the key is missing or cannot be sent.
        """
        base = endpoint.rstrip("/").removesuffix("/chat/completions")
        try:
            address = httpx.URL(base)
        except httpx.InvalidURL:
            address = httpx.URL("")
        if address.scheme not in ("http", "https") or not address.host or address.userinfo:
            raise UsageError(f"{endpoint!a} is not the address of an endpoint; give one such as "
                             "http://127.0.0.1:8000/v1.")  # fmt: skip
        self._variable = key_variable or KEY_VARIABLE
        self._key = os.environ.get(self._variable, "").strip()
        if key_variable and not self._key:
            raise UsageError(f"The environment variable {key_variable} is not set; put the endpoint's key into it.")
        if not (self._key.isascii() and self._key.isprintable()):
            raise UsageError(f"The key in {self._variable} holds characters that cannot be sent.")
        self.name, self.threads = f"{model} ({address.netloc.decode()})", threads
        self._url, self._model, self._prompts, self._max_pixels = f"{base}/chat/completions", model, prompts, max_pixels
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._client = httpx.Client(headers=headers, timeout=TIMEOUT_SECONDS)

    def tokens(self, width: int, height: int, prompt: str) -> int:
        """Return roughly how many tokens a request takes: models differ."""
        pixels = min(width * height, self._max_pixels)
        return math.ceil(pixels / PIXELS_PER_TOKEN) + math.ceil(len(prompt) / CHARACTERS_PER_TOKEN)

    def write(self, images: Sequence[Image.Image], requests: Sequence[Sequence[Request]]) -> list[list[Answer]]:
        """Return the answers to the requests about each image, one after the other.

        :raises NoAnswerError: If the endpoint refuses a request, or still fails after ``ATTEMPTS``.
        :raises CocoaError: If the endpoint refuses the key or the model.
        """
        uris = map(self._data_uri, images)
        return [[self._ask(uri, each) for each in asked] for uri, asked in zip(uris, requests, strict=True)]

    def _ask(self, uri: str, request: Request) -> Answer:
        content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": request.prompt}]
        document = {"model": self._model, "max_tokens": self._prompts.max_tokens,
                    "messages": [{"role": "user", "content": content}],
                    **(self._prompts.sampling if request.is_drawn else {})}  # fmt: skip
        may_pass, last = tenacity.retry_if_exception(is_temporary), tenacity.stop_after_attempt(ATTEMPTS)
        return tenacity.Retrying(retry=may_pass, wait=wait, stop=last, reraise=True)(self._post, document)

    def _post(self, document: dict[str, Any]) -> Answer:
        try:
            response = self._client.post(self._url, json=document)
        except httpx.RequestError as error:
            raise NoAnswerError(f"{self._url} does not answer ({one_line(error)})", wait=0) from error
        if response.status_code != 200:
            raise self._failure(response)
        try:
            choice = response.json()["choices"][0]
            refusal, end = choice["message"].get("refusal"), choice.get("finish_reason")
            text = (refusal or choice["message"].get("content") or "") + ""
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise NoAnswerError(f"{self._url} does not answer with a chat completion "
                                f"({shortened(response.text)})", wait=0) from error  # fmt: skip
        return Answer(text, is_cut=end == "length", is_refused=bool(refusal) or end == "content_filter")

    def _failure(self, response: httpx.Response) -> CocoaError:
        status, after = response.status_code, response.headers.get("Retry-After", "")
        said = f"status {status}: {shortened(' '.join(response.text.split()))}"
        if status in (401, 403):
            fault = f"refuses the key in {self._variable}" if self._key else "asks for a key"
            return CocoaError(f"{self._url} {fault} ({said}); put a valid key into the environment variable "
                              f"{self._variable}, or name another variable with --key-variable.")  # fmt: skip
        if status in (404, 405) or 300 <= status < 400:
            return CocoaError(f"{self._url} has no chat completions of the model {self._model!r} ({said}); check "
                              "--model, and --endpoint, which often ends in /v1.")  # fmt: skip
        may_pass = status in TEMPORARY or status >= 500
        wait = (float(after) if after.isdecimal() else 0.0) if may_pass else None
        return NoAnswerError(f"{self._url} answers with {said}", wait)

    def _data_uri(self, image: Image.Image) -> str:
        """Return an image as a JPEG of at most ``max_pixels``: a PNG of a photograph would take seconds."""
        if (scale := math.sqrt(self._max_pixels / (image.width * image.height))) < 1:
            image = image.resize((max(1, int(image.width * scale)), max(1, int(image.height * scale))))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=JPEG_QUALITY)
        return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def is_temporary(error: BaseException) -> bool:
    """Return whether the same request may succeed later."""
    return isinstance(error, NoAnswerError) and error.wait is not None


def wait(state: tenacity.RetryCallState) -> float:
    """Return the seconds to wait before the next attempt: longer each time, and as long as the endpoint asks."""
    error = state.outcome.exception() if state.outcome is not None else None
    asked = (error.wait or 0) if isinstance(error, NoAnswerError) else 0
    return min(max(back_off(state), asked), MAX_WAIT_SECONDS)
