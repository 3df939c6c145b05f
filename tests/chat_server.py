"""A server on this machine that speaks the chat-completions API, counts what it is asked, and misbehaves on request."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, dict[str, str], bytes]
"""Status, headers and body."""


def completion(text: Any, **fields: Any) -> Answer:
    """A reply as a model gives it."""
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    body = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    body["usage"] = {"prompt_tokens": 90, "completion_tokens": 10, "total_tokens": 100}
    return 200, {"Content-Type": "application/json"}, json.dumps(body | fields).encode()


def failure(status: int, **headers: str) -> Answer:
    """An error of the API."""
    body = {"error": {"message": f"this is a {status}"}}
    return status, {"Content-Type": "application/json", **headers}, json.dumps(body).encode()


def html() -> Answer:
    """What a proxy says with status 200."""
    return 200, {"Content-Type": "text/html"}, b"<!doctype html><title>Sign in</title>"


def asked(body: dict[str, Any]) -> tuple[str, str]:
    """The text of the page (or the end of its image) and the instruction of a request."""
    parts = body["messages"][0]["content"]
    page = "".join(part.get("text") or part["image_url"]["url"][-40:] for part in parts[:-1])
    return page, parts[-1]["text"]


class ChatServer(ThreadingHTTPServer):
    """Answers by a function of the request's body and of how often the same was asked, from 1.

    Attributes:
        counts: How often each page and instruction was asked about.
        bodies: All requests.
        headers: Their headers.
    """

    daemon_threads = True

    def __init__(self, answer: Callable[[dict[str, Any], int], Answer]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer = answer
        self.counts: Counter[tuple[str, str]] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: ChatServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.counts[asked(body)] += 1
            self.server.bodies.append(body)
            self.server.headers.append({name.lower(): value for name, value in self.headers.items()})
            times = self.server.counts[asked(body)]
        self._send(self.server.answer(body, times))

    def do_GET(self) -> None:
        with self.server.lock:
            found = [[*call, count] for call, count in self.server.counts.items()]
        self._send((200, {}, json.dumps(found).encode()))

    def _send(self, answer: Answer) -> None:
        status, headers, content = answer
        try:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)
        except OSError:  # the client was killed, or no longer waits
            self.close_connection = True

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def serving(answer: Callable[[dict[str, Any], int], Answer]) -> Iterator[ChatServer]:
    """A server for the time of a block."""
    server = ChatServer(answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def slow(seconds: float, answer: Answer) -> Answer:
    """The answer, later."""
    time.sleep(seconds)
    return answer
