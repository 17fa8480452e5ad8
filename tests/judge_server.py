"""An OpenAI-compatible endpoint on loopback that fails as it is told to."""

import contextlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SECRET = "sk-test-0123456789abcdef"  # the key


def candidates(question: str) -> list[str]:
    return re.findall(r"<<<CANDIDATE [AB]>>>\n(.*?)\n<<<END>>>", question, re.S)


def longer(question: str) -> str:
    a, b = candidates(question)
    return f"One is longer.\nVerdict: {'A' if len(a) > len(b) else 'B' if len(b) > len(a) else 'tie'}"


class Server(ThreadingHTTPServer):
    """An OpenAI-compatible endpoint on loopback. `faults` are the names of what happens to the first requests; then
    it says what `judge` makes of a question."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.judge: Callable[[str], str] = longer
        self.faults: list[str] = []
        self.usage: Any = {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}
        self.hang_seconds = 2.0
        self.questions: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *arguments: Any) -> None: ...

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            self.server.questions.append(question := body["messages"][0]["content"])
            self.server.bodies.append(body)
            self.server.keys.add(self.headers["authorization"])
            fault = self.server.faults.pop(0) if self.server.faults else ""
        message: dict[str, Any] = {"role": "assistant", "content": self.server.judge(question)}
        message |= {"empty content": {"content": ""}, "refusal": {"content": "I\u2019m sorry, but I can't judge."}}.get(
            fault, {}
        )
        end = "length" if fault == "cut" else "stop"
        choices = [] if fault == "empty choices" else [{"index": 0, "finish_reason": end, "message": message}]
        reply: Any = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": choices}
        text = json.dumps(reply | {"usage": self.server.usage})
        with contextlib.suppress(OSError):
            self.reply(fault, text)

    def reply(self, fault: str, text: str) -> None:
        status = {"429": 429, "500": 500, "401": 401, "404": 404, "400": 400}.get(fault, 200)
        if status != 200:
            text = json.dumps({"error": {"message": f"no: {self.headers['authorization']}", "code": fault}})
        if fault == "hang":
            time.sleep(self.server.hang_seconds)
        if fault == "closed":
            self.close_connection = True
            return self.connection.close()
        text = {"half": text[: len(text) // 2], "schema": '{"answer": ["A"]}'}.get(fault, text)
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        if fault == "429":
            self.send_header("retry-after", "1")
        self.end_headers()
        self.wfile.write(text.encode())


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    server = Server()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()
