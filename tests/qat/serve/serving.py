"""A small real artifact and servers of it: the demo model, rounded, without a training run."""

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import uvicorn

from data.demo import MODEL_DIRECTORY
from qat import convert
from qat.manifest import write_manifest
from qat.models import load_model, load_tokenizer
from qat.prepare import prepare
from qat.scheme import Scheme
from qat.serve.app import create_app
from qat.serve.connection import Connection
from qat.serve.engine import Engine
from qat.serve.prompts import Prompts
from qat.serve.service import Service, Settings

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'system' and not loop.first %}"
    "{{ raise_exception('the system prompt comes first') }}{% endif %}"
    "{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def demo_artifact(directory: Path, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """The built-in demo model as a 4-bit artifact, with a chat template unless it is None."""
    directory.mkdir(parents=True)
    model = load_model(str(MODEL_DIRECTORY))
    tokenizer = load_tokenizer(str(MODEL_DIRECTORY))
    tokenizer.chat_template = chat_template
    coverage = prepare(model, Scheme())
    convert.write_checkpoint(model.eval(), tokenizer, coverage, Scheme(), directory)
    write_manifest(directory, {})
    return directory


class RunningServer:
    """A server in a thread of this process, on a real port."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(
            create_app(service), http=Connection, lifespan="off", log_level="critical"
        )
        self.server = uvicorn.Server(config)
        self.loop: asyncio.AbstractEventLoop | None = None
        self.thread = threading.Thread(target=asyncio.run, args=(self._serve(),))

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        await self.server.serve([self.socket])

    def client(self, key: str = "none") -> openai.OpenAI:
        """The official client; it does not retry, so that refusals are seen."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    # verify=False: no certificates are loaded, which takes longer than most answers
    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        """POST a body, JSON unless it is bytes already."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | options.pop("headers", {})
        options |= {"headers": headers, "timeout": 60, "verify": False}
        return httpx.post(self.url + path, content=content, **options)

    def metric(self, name: str) -> float:
        """One value of /metrics, written as there."""
        rows = httpx.get(f"{self.url}/metrics", verify=False).text.splitlines()
        found = [row.rpartition(" ")[2] for row in rows if row.rpartition(" ")[0] == name]
        assert len(found) == 1, f"{name}: {found}"
        return float(found[0])


@contextmanager
def running(engine: Engine, prompts: Prompts, **settings: Any) -> Iterator[RunningServer]:
    """A server over an engine, stopped at the end; the engine goes on."""
    server = RunningServer(Service(engine, prompts, Settings(**settings)))
    server.thread.start()
    try:
        wait_until(lambda: server.server.started)
        yield server
    finally:
        server.server.should_exit = True
        server.thread.join(20)
        assert not server.thread.is_alive()


@contextmanager
def started(artifact: Path, *words: str, **environment: str) -> Iterator[tuple[Any, str, str]]:
    """``python -m qat serve`` on a free port: the process, its address, what it printed."""
    command = [sys.executable, "-W", "error", "-m", "qat", "serve", str(artifact), *words]
    process = subprocess.Popen(
        [*command, "--port", "0"],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        lines = [process.stdout.readline() for _ in range(3)]
        found = re.search(r"http://[\d.]+:\d+", lines[0])
        assert found, "".join(lines) + process.stderr.read()
        yield process, found[0], "".join(lines)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def wait_until(condition: Any, seconds: float = 60.0) -> None:
    """Wait for a condition; fail when it does not come about."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def idle(engine: Engine) -> bool:
    """Whether nothing runs or waits in an engine."""
    stats = engine.stats()
    return stats.running == 0 and stats.waiting == 0
