"""Samples from an OpenAI-compatible server, such as vLLM or SGLang, that is started for one model."""

import contextlib
import functools
import os
import shlex
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpo.sampling import Sampling
from dpo.utils import UserError, end_with_parent, log, redact

SECONDS_TO_START = 1800.0  # reading the weights of a large model


@dataclass(frozen=True)
class Server:
    """A server at `url` that serves `model`."""

    url: str
    model: str

    def sample(self, prompts: Sequence[list[int]], first: int, how: Sampling) -> list[dict[str, Any]]:
        """Return a response to each prompt (token ids: a server may add BOS to text): its text, number of tokens, and
        whether the model ended it. `first`: the number of the first of them, which with the seed gives their samples.
        Raise UserError if the server fails."""
        import openai  # slow, and other samplers do without

        client = openai.OpenAI(base_url=self.url, api_key="none", max_retries=5)

        def one(number: int, prompt: list[int]) -> dict[str, Any]:
            seed = int(np.random.SeedSequence([how.seed, number]).generate_state(1)[0]) // 2
            reply = client.completions.create(
                model=self.model, prompt=prompt, max_tokens=how.max_new_tokens, temperature=how.temperature,
                top_p=how.top_p, seed=seed,
            )  # fmt: skip
            [choice], usage = reply.choices, reply.usage
            n = usage.completion_tokens if usage is not None else 0
            return {"policy": choice.text, "tokens_policy": n, "ended": choice.finish_reason == "stop"}

        try:
            with ThreadPoolExecutor(len(prompts)) as pool:
                return list(pool.map(one, range(first, first + len(prompts)), prompts))
        except (openai.OpenAIError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"the server that --serve started gave no sample: {str(error).splitlines()[0]}") from error


@contextlib.contextmanager
def serving(command: str, model: str, log_file: Path) -> Iterator[Server]:
    """Run `command`, with {model} and {port} filled in, inside the block; its output goes to `log_file`. Raise
    UserError if it ends early, or does not answer in time."""
    port = _free_port()
    arguments = [part.replace("{model}", model).replace("{port}", str(port)) for part in shlex.split(command)]
    log(redact(f"serving {model}: {shlex.join(arguments)}"))
    with open(log_file, "wb") as file:
        try:
            end = functools.partial(end_with_parent, os.getpid())
            process = subprocess.Popen(arguments, stdout=file, stderr=file, start_new_session=True, preexec_fn=end)
        except OSError as error:
            raise UserError(f"--serve: {arguments[0]} cannot be started: {error.strerror}") from error
        try:
            _wait(process, f"http://127.0.0.1:{port}", log_file)
            yield Server(f"http://127.0.0.1:{port}/v1", model)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _wait(process: subprocess.Popen[bytes], address: str, log_file: Path) -> None:
    """Wait until the server answers."""
    until = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < until:
        if process.poll() is not None:
            lines = log_file.read_text(errors="replace").strip().splitlines() or ["it printed nothing"]
            raise UserError(f"--serve: the server ended with code {process.returncode}: {lines[-1]} ({log_file})")
        try:
            with urllib.request.urlopen(f"{address}/v1/models", timeout=10):
                return
        except OSError as error:
            if getattr(error, "code", 500) < 500:  # HTTPError: it answers; 503 is a server that reads its weights
                return
            time.sleep(0.2)
    raise UserError(f"--serve: no answer on {address} after {SECONDS_TO_START:.0f} s; see {log_file}")
