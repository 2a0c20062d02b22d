"""Ask a server many questions: several in flight, evenly paced, again where a failure may pass.

On one event loop, so that Ctrl-C ends what is in flight at once; replies are handed over as they
come, so that they can be kept before anything goes wrong.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import random
import re
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from .endpoint import Endpoint, EndpointError, Request, reply_text

if TYPE_CHECKING:
    import httpx

MAX_BACKOFF = 60.0  # seconds
MAX_RETRY_AFTER = 600.0  # seconds; a server that asks for more is out of quota rather than busy
_SPREAD = 1.0  # seconds at most, after a Retry-After
_SECONDS = re.compile(r"\d+(\.\d+)?")
_JSON = {"Content-Type": "application/json"}
_PASSING = (408, 409, 425, 429)  # and 5xx


class _Passing(Exception):
    """A failure that may pass; `after` is the wait in seconds that the server asked for."""

    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


class _Pacer:
    """Says when the next attempt may begin: spaced evenly, and not while the server asked to wait.

    One for all questions, so that a `Retry-After` to one of them holds the others, too.
    """

    def __init__(self, requests_per_minute: float | None) -> None:
        self._interval = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._next = 0.0  # on the clock `time.monotonic`

    async def turn(self) -> None:
        while (wait := self._next - time.monotonic()) > 0:
            await asyncio.sleep(wait)
        self._next = time.monotonic() + self._interval

    def hold(self, seconds: float) -> None:
        self._next = max(self._next, time.monotonic() + seconds)


def ask_all(
    endpoint: Endpoint, requests: Sequence[Request], on_reply: Callable[[int, str], None]
) -> None:
    """Ask every question; `on_reply(number, text)` is called for each as it is answered.

    Raises:
        EndpointError: a question was refused, or failed more often than `endpoint.retries` allows;
            those in flight are dropped, what was handed over stays.
        ImportError: httpx is not installed.
    """
    _run(_ask_all(endpoint, requests, on_reply))


def _run(work: Coroutine[Any, Any, None]) -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(work)
    else:  # in a notebook, whose loop cannot be entered a second time
        with ThreadPoolExecutor(1) as thread:
            thread.submit(asyncio.run, work).result()


async def _ask_all(
    endpoint: Endpoint, requests: Sequence[Request], on_reply: Callable[[int, str], None]
) -> None:
    try:
        import httpx
    except ImportError as error:
        raise ImportError(
            'asking a server needs httpx, which is not installed: pip install "fusedpo[tools]"'
        ) from error
    todo = iter(enumerate(requests))
    pacer = _Pacer(endpoint.requests_per_minute)
    headers = {} if endpoint.api_key is None else {"Authorization": f"Bearer {endpoint.api_key}"}

    async def work(client: httpx.AsyncClient) -> None:
        for number, request in todo:
            on_reply(number, await _ask(client, endpoint, pacer, request))

    workers = min(endpoint.concurrency, len(requests))
    limits = httpx.Limits(max_connections=workers, max_keepalive_connections=workers)
    # One attempt is timed as a whole in _attempt: httpx would time each read alone, and a server
    # that sends a byte now and then would hold it for ever.
    async with httpx.AsyncClient(headers=headers, timeout=None, limits=limits) as client:
        tasks = [asyncio.ensure_future(work(client)) for _ in range(workers)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _ask(
    client: httpx.AsyncClient, endpoint: Endpoint, pacer: _Pacer, request: Request
) -> str:
    for attempt in range(endpoint.retries + 1):
        await pacer.turn()
        try:
            return await _attempt(client, endpoint, request)
        except _Passing as failure:
            if attempt < endpoint.retries:
                wait = min(endpoint.backoff * 2**attempt, MAX_BACKOFF) * random.uniform(0.5, 1.0)
                if failure.after:  # 0, or a date that is past, asks for nothing
                    pacer.hold(failure.after)
                    # Those that were refused together do not come back together.
                    wait = failure.after + min(wait, _SPREAD)
                await asyncio.sleep(wait)
            last = failure
    raise EndpointError(
        f"{endpoint.url} failed {endpoint.retries + 1} times in a row, at last so: {last}. What "
        "was answered is kept where there is a cache; see to the server and run it again."
    )


async def _attempt(client: httpx.AsyncClient, endpoint: Endpoint, request: Request) -> str:
    import httpx

    try:
        # Escaped to ASCII: a text may have a lone surrogate, which is no UTF-8.
        content = json.dumps(endpoint.payload(request)).encode()
        sent = client.post(endpoint.url, content=content, headers=_JSON)
        response = await asyncio.wait_for(sent, endpoint.timeout)
    except (asyncio.TimeoutError, TimeoutError):
        raise _Passing(f"no answer within {endpoint.timeout:g} seconds") from None
    except (httpx.LocalProtocolError, httpx.UnsupportedProtocol) as error:
        raise EndpointError(
            f"a request to {endpoint.url} cannot be sent ({type(error).__name__}); check the "
            "address."
        ) from None
    except httpx.RequestError as error:
        raise _Passing(f"{type(error).__name__}: {error}".rstrip(": ")) from error
    if response.status_code != 200:
        _refuse(endpoint, response)
    try:
        return reply_text(response.json())
    except ValueError as error:  # not JSON, half a JSON, not UTF-8, or another shape
        raise _Passing(
            f"the reply is no chat completion ({error}): {_excerpt(response)}"
        ) from error


def _refuse(endpoint: Endpoint, response: httpx.Response) -> None:
    status = response.status_code
    told = f"status {status}: {_excerpt(response)}"
    if status not in _PASSING and status < 500:
        todo = {
            401: " Check the API key.",
            403: " Check the API key and what it is allowed.",
            404: " Check the base URL (it ends with the version, as in /v1) and the model's name.",
        }.get(status, "")
        raise EndpointError(f"{endpoint.url} refused a request with {told}.{todo}")
    after = _retry_after(response.headers.get("Retry-After"))
    if after is not None and after > MAX_RETRY_AFTER:
        raise EndpointError(
            f"{endpoint.url} asks to wait for {after:.0f} seconds, which is more than "
            f"{MAX_RETRY_AFTER:.0f} ({told}). Run it again then; what was answered is kept where "
            "there is a cache."
        )
    raise _Passing(told, after)


def _retry_after(value: str | None) -> float | None:
    """Seconds to wait, from a header that has seconds or a date; None where it has neither."""
    if value is None:
        return None
    if _SECONDS.fullmatch(value.strip()):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def _excerpt(response: httpx.Response) -> str:
    text = " ".join(response.text.split())
    return repr(text if len(text) <= 200 else text[:200] + "...")
