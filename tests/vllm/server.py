"""A server as users start it, in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine_cases import Answer


class Server:
    """Calls to a running server; errors come back as (status, body)."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process, self.port, self.log = process, port, log
        self.url = f"http://127.0.0.1:{port}"

    def call(self, path: str, body: Any = None, method: str | None = None, timeout: float = 120) -> tuple[int, Any]:
        data = None if body is None else (body if isinstance(body, bytes) else json.dumps(body).encode())
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                return response.status, _json(response.read())
        except urllib.error.HTTPError as error:
            return error.code, _json(error.read())

    def complete(self, prompt: list[int], field: Any = None, **options: Any) -> tuple[int, Any]:
        body: dict[str, Any] = {
            "model": "m", "prompt": prompt, "max_tokens": 10, "temperature": 0, "logprobs": 4, "ignore_eos": True,
            "return_tokens_as_token_ids": True, "return_token_ids": True, **options,
        }  # fmt: skip
        if field is not None:
            body["vllm_xargs"] = {"headpatch": field}
        return self.call("/v1/completions", body)

    def answer(self, prompt: list[int], field: Any = None, **options: Any) -> Answer:
        status, body = self.complete(prompt, field, **options)
        assert status == 200, body
        return self.read(prompt, body)

    @staticmethod
    def read(prompt: list[int], body: Any) -> Answer:
        """The first choice of a completion."""
        choice = body["choices"][0]
        steps = choice["logprobs"]["top_logprobs"]
        seen = tuple({int(name.removeprefix("token_id:")): value for name, value in step.items()} for step in steps)
        tokens = tuple(int(name.removeprefix("token_id:")) for name in choice["logprobs"]["tokens"])
        return Answer(tuple(prompt), tokens, seen)

    @contextlib.contextmanager
    def stream(self, prompt: list[int], field: Any, tokens: int) -> Iterator[Any]:
        """A streamed answer, open inside the with block and dropped at its end."""
        body = {"model": "m", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True,
                "vllm_xargs": {"headpatch": field}}  # fmt: skip
        request = urllib.request.Request(
            self.url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            yield response


def _json(text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text.decode(errors="replace")


@contextlib.contextmanager
def serving(model: Path | str, flag: dict[str, Any], log: Path, *options: str) -> Iterator[Server]:
    """`headpatch serve`'s own command line, started; ended with the block."""
    from headpatch.commands.serve import command_line

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = command_line(str(model), flag, [
        "--host", "127.0.0.1", "--port", str(port), "--served-model-name", "m", "--dtype", "float32", "--max-model-len", "512",
        "--enforce-eager", "--max-num-batched-tokens", "64", "--max-num-seqs", "32", "--block-size", "32", *options,
    ])  # fmt: skip
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONWARNINGS": "ignore"}
        )
    server = Server(process, port, log)
    try:
        _wait(server)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(30)


def _wait(server: Server, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if server.process.poll() is not None:
            raise RuntimeError(f"the server ended with {server.process.returncode}:\n{server.log.read_text()[-4000:]}")
        try:
            if server.call("/health", timeout=5)[0] == 200:
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    raise RuntimeError(f"the server did not come up:\n{server.log.read_text()[-4000:]}")
