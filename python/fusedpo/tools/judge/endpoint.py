"""An OpenAI-compatible server, and how it is asked: what goes out, and what a reply must be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import urlsplit

Message = dict[str, str]  # role, content


# Of an endpoint whose body nobody sets: for a judge. What samples sets a temperature of its own.
DEFAULT_BODY: Mapping[str, Any] = {"temperature": 0, "max_tokens": 1024}


class EndpointError(RuntimeError):
    """A server could not be made to answer; the message says what it did, and what to do."""


class Request(NamedTuple):
    """One question: the conversation, and what is sent beside the endpoint's own `body`."""

    messages: list[Message]
    body: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible server (`POST base_url/chat/completions`).

    Args:
        base_url: up to and with the version, e.g. "http://localhost:8000/v1".
        model: the name that the server knows.
        api_key: sent as a bearer token; in no report, cache or message.
        body: what every request says beside model and messages. Servers differ in what they take:
            {"max_completion_tokens": 1024} for one that refuses max_tokens.
        timeout: seconds that one attempt may take, from the first byte sent to the last one read.
        retries: how often a question is asked again after a failure that may pass: no answer in
            time, a broken connection, status 408, 409, 425, 429 or 5xx, a reply that is no chat
            completion.
        backoff: seconds before the second attempt, doubled for each one after it, at most 60; each
            wait is shortened at random by up to a half, so that requests that failed together do
            not come back together. A server's `Retry-After` above 0 is obeyed instead.
        concurrency: questions in flight.
        requests_per_minute: attempts begin at least 60 / this many seconds apart. None: no limit.

    Raises:
        ValueError: a value that cannot be.
    """

    base_url: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    body: Mapping[str, Any] = field(default_factory=lambda: DEFAULT_BODY)
    timeout: float = 120.0
    retries: int = 6
    backoff: float = 1.0
    concurrency: int = 8
    requests_per_minute: float | None = None

    def __post_init__(self) -> None:
        _check_url(self.base_url)
        key = self.api_key
        _check(
            key is None or (bool(key) and all("!" <= each <= "~" for each in key)),
            "api_key must be printable ASCII without spaces, and not empty (it is not shown here); "
            "look for a line break or for quotation marks in it.",
        )
        _check(bool(self.model), "an endpoint needs the name of its model; got an empty one.")
        for name in ("model", "messages", "stream", "n"):
            _check(
                name not in self.body,
                f"the endpoint's body must not have {name!r}, which is set for each request.",
            )
        _check(self.timeout > 0, f"timeout must be more than 0 seconds; got {self.timeout}.")
        _check(self.retries >= 0, f"retries must be 0 or more; got {self.retries}.")
        _check(self.backoff >= 0, f"backoff must be 0 seconds or more; got {self.backoff}.")
        _check(self.concurrency >= 1, f"concurrency must be at least 1; got {self.concurrency}.")
        limit = self.requests_per_minute
        _check(limit is None or limit > 0, f"requests_per_minute must be more than 0; got {limit}.")

    @property
    def url(self) -> str:
        return self.base_url.rstrip("/") + "/chat/completions"

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the replies, JSON-able; the API key does not."""
        return {"url": self.url, "model": self.model, "body": dict(self.body)}

    def payload(self, request: Request) -> dict[str, Any]:
        return {**self.body, **request.body, "model": self.model, "messages": request.messages}


def reply_text(decoded: Any) -> str:
    """Return the text of a chat completion; "" where the model returned none.

    Raises:
        ValueError: it is not of that shape; the message says what is missing.
    """
    choices = decoded.get("choices") if isinstance(decoded, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise ValueError('it has no list "choices"')
    message = choices[0].get("message")
    if not isinstance(message, dict) or "content" not in message:
        raise ValueError('its first choice has no "message" with a "content"')
    content = message["content"]
    if content is not None and not isinstance(content, str):
        raise ValueError(f'the "content" must be a text; it is a {type(content).__name__}')
    return content or ""


def _check_url(url: str) -> None:
    """Refuse an address that no request could go to, or with a password, which every report would
    tell; such an address is not shown."""
    _check(
        "@" not in url,
        "base_url must have no user and password (it is not shown here), for it stands in reports "
        "and caches; give the key as api_key.",
    )
    _check(
        url.startswith(("http://", "https://")),
        f"base_url must begin with http:// or https://; got {url!r}.",
    )
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"base_url must be an address; got {url!r} ({error}).") from None
    _check(bool(host), f"base_url must have the name of a host; got {url!r}.")


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)
