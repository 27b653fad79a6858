"""A server on loopback that speaks the OpenAI protocol, and labels as well as a keyword search can."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Reply = tuple[int, dict[str, str], bytes]


def completion(text: str) -> Reply:
    """A well-formed answer."""
    body = {"choices": [{"message": {"role": "assistant", "content": text}}]}
    return 200, {"Content-Type": "application/json"}, json.dumps(body).encode()


def honest(body: dict) -> str:
    """Names the token that is marked most often, and believes any description that names a token."""
    if len(body["messages"]) == 1:
        return "hello"
    task, data = body["messages"][0]["content"], json.loads(body["messages"][1]["content"])
    if "description" not in data:
        marks = Counter(mark for text in data["passages"] for mark in set(re.findall("«(.*?)»", text)))
        word = marks.most_common(1)[0][0].strip()
        return f'<think>is it [0]?</think>Here:\n```json\n{{"name": "the word {word}", "description": "{word}"}}\n```'
    word = data["description"].rsplit(" ", 1)[-1]
    wanted = f"« {word}»" if "rightly marked" in task else word
    return json.dumps([int(wanted in text) for text in data["passages"]])


class Stub:
    """`base` is its address; `requests` are (headers, body) as they came; `replies` come before `answer` does."""

    def __init__(self, answer: Callable[[dict], str]) -> None:
        self.answer, self.replies = answer, list[Reply]()
        self.requests: list[tuple[dict[str, str], dict]] = []
        self.base = ""

    def reply(self, headers: dict[str, str], body: dict) -> Reply:
        self.requests.append((headers, body))
        return self.replies.pop(0) if self.replies else completion(self.answer(body))


@contextmanager
def serving(answer: Callable[[dict], str] = honest) -> Iterator[Stub]:
    """A stub that listens on a port of its own."""
    stub = Stub(answer)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # one packet an answer

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["Content-Length"]))
            status, headers, body = stub.reply({"path": self.path, **self.headers}, json.loads(raw))
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.02), daemon=True)
    thread.start()
    stub.base = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
