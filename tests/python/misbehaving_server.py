"""A real HTTP server that speaks OpenAI's chat completions, and misbehaves as it is told."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Payload = dict[str, Any]
Behaviour = Callable[["Handler"], None]


class Server(ThreadingHTTPServer):
    """`answer` makes the text of a reply; `faults` are what the first requests get instead."""

    daemon_threads = True

    def __init__(self, answer: Callable[[Payload], str], faults: list[Behaviour]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer = answer
        self.faults = faults
        self.payloads: list[Payload] = []
        self.times: list[float] = []  # of arrival, on the monotonic clock
        self.headers: list[dict[str, str]] = []
        self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gave up is what some tests are about."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.times.append(time.monotonic())
            self.server.payloads.append(payload)
            self.server.headers.append(dict(self.headers))
            self.server.in_flight += 1
            self.server.most_in_flight = max(self.server.most_in_flight, self.server.in_flight)
            fault = self.server.faults.pop(0) if self.server.faults else None
        try:
            assert self.path == "/v1/chat/completions", self.path
            if fault is not None:
                fault(self)
            else:
                self.send(200, completion(self.server.answer(payload)))
        finally:
            with self.server.lock:
                self.server.in_flight -= 1

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def completion(text: str | None) -> bytes:
    message = {"role": "assistant", "content": text}
    return json.dumps({"choices": [{"index": 0, "message": message}]}).encode()


def status(number: int, headers: dict[str, str] | None = None) -> Behaviour:
    return lambda handler: handler.send(number, b'{"error": "as told"}', headers)


def body(content: bytes) -> Behaviour:
    return lambda handler: handler.send(200, content)


def silence(seconds: float) -> Behaviour:
    return lambda handler: time.sleep(seconds)


def dribble(seconds: float) -> Behaviour:
    """A byte now and then: no single read takes long."""

    def send(handler: Handler) -> None:
        content = completion("[[A]]")
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        for i in range(len(content)):
            handler.wfile.write(content[i : i + 1])
            handler.wfile.flush()
            time.sleep(seconds / len(content))

    return send


def reset(handler: Handler) -> None:
    """Close with RST instead of FIN."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.close_connection = True


def torn(handler: Handler) -> None:
    """Promise more bytes than come."""
    content = completion("[[A]]")
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content[: len(content) // 2])
    handler.wfile.flush()
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


@contextmanager
def serve(
    answer: Callable[[Payload], str] = lambda payload: "[[A]]",
    faults: list[Behaviour] | None = None,
) -> Iterator[Server]:
    server = Server(answer, list(faults or []))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
