"""Clients that hang up, and the drain: what was accepted is answered, the rest is told so."""

import asyncio
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from tests.qat.serve.serving import idle, running, wait_until

LONG = {"prompt": "This", "max_tokens": 900, "ignore_eos": True, "temperature": 0}


def send(server, body):
    """A raw connection that has sent a request and reads nothing yet."""
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n"
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + content)
    return connection


def busy(engine):
    return engine.stats().running > 0


@pytest.mark.parametrize("stream", [True, False])
def test_hanging_up_cancels_the_sequences(server, engine, stream):
    wait_until(lambda: idle(engine))
    before = server.metric("qat_generated_tokens_total")
    with send(server, LONG | {"stream": stream, "n": 2}) as connection:
        wait_until(lambda: engine.stats().running == 2)
        if stream:
            received = b""
            while received.count(b"data: ") < 3:
                received += connection.recv(4096)
            assert b"text/event-stream" in received
    wait_until(lambda: idle(engine))
    assert 0 < server.metric("qat_generated_tokens_total") - before < 1800
    assert server.metric("qat_requests_in_flight") == 0
    wait_until(lambda: engine.stats().cache_tokens_used == 0)


def test_hanging_up_in_the_queue(server, engine):
    with send(server, LONG | {"stream": True, "n": 4}):
        wait_until(lambda: engine.stats().running == 4)
        with send(server, LONG | {"n": 2}):
            wait_until(lambda: engine.stats().waiting == 2)
        wait_until(lambda: engine.stats().waiting == 0)
        assert engine.stats().running == 4
    wait_until(lambda: idle(engine))


def test_hanging_up_within_the_body(engine, prompts):
    with running(engine, prompts) as server:
        for part in (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n", b"GET / HT", b"\x00\x01"):
            with socket.create_connection(("127.0.0.1", server.port)) as connection:
                connection.sendall(part)
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(head + b'Content-Length: 50\r\n\r\n{"prompt"')
            wait_until(lambda: server.metric("qat_requests_in_flight") == 1)
        wait_until(lambda: server.metric("qat_requests_in_flight") == 0)
        assert server.metric('qat_requests_total{endpoint="/v1/completions",status="499"}') == 1
        # a reader that is slow to begin still gets all of it
        body = {"prompt": "a", "max_tokens": 3, "stream": True}
        with send(server, body) as connection:
            wait_until(lambda: idle(engine))
            received = b""
            while b"[DONE]" not in received:
                received += connection.recv(4096)


def drain(server, seconds):
    """Begin to drain in the server's own event loop; the future of how many were cut off."""
    return asyncio.run_coroutine_threadsafe(server.service.lifecycle.drain(seconds), server.loop)


def test_the_drain_answers_what_was_accepted(engine, prompts):
    with running(engine, prompts) as server, server.client() as client:
        options = {"model": "demo", "temperature": 0, "extra_body": {"ignore_eos": True}}
        options["max_tokens"] = 400  # so that they last while the drain is looked at
        expected = client.completions.create(prompt="This", **options)
        stream = client.completions.create(prompt="This", stream=True, **options)
        texts = [next(stream).choices[0].text]
        with ThreadPoolExecutor() as pool:
            whole = pool.submit(client.completions.create, prompt="This", **options)
            wait_until(lambda: engine.stats().running == 2)
            drained = drain(server, 60)
            wait_until(lambda: server.service.lifecycle.draining)
            health = httpx.get(f"{server.url}/health")
            assert (health.status_code, health.json()) == (503, {"status": "draining"})
            assert not drained.done()
            with pytest.raises(openai.InternalServerError) as caught:
                client.completions.create(prompt="a", **options)
            assert (caught.value.status_code, caught.value.code) == (503, "draining")
            assert caught.value.response.headers["connection"] == "close"
            assert int(caught.value.response.headers["retry-after"]) > 0
            texts += [chunk.choices[0].text for chunk in stream]
            assert whole.result().choices[0].text == expected.choices[0].text
        assert "".join(texts) == expected.choices[0].text
        assert drained.result(10) == 0


def test_the_drain_has_an_end(engine, prompts):
    with running(engine, prompts) as server, server.client() as client:
        options = {"model": "demo", "max_tokens": 900, "extra_body": {"ignore_eos": True}}
        stream = client.completions.create(prompt="This", stream=True, **options)
        next(stream)
        found = []
        thread = threading.Thread(target=lambda: found.append(server.post("/v1/completions", LONG)))
        thread.start()
        wait_until(lambda: engine.stats().running == 2)
        drained = drain(server, 0.2)
        # the stream is told in its last event, the other request by its status
        with pytest.raises(openai.APIError, match="the server is shutting down"):
            list(stream)
        thread.join(10)
        assert (found[0].status_code, found[0].json()["error"]["code"]) == (503, "draining")
        assert drained.result(10) == 2
        wait_until(lambda: idle(engine))
