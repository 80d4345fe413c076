"""What the API refuses, and how: status, message, parameter and code in OpenAI's shape."""

import gc
import json
import logging
import socket
import time

import httpx
import openai
import pytest
import torch

from qat.serve.engine import Engine, EngineOptions
from qat.serve.errors import ApiError
from qat.serve.prompts import Prompts
from qat.serve.protocol import ChatRequest, CompletionRequest, parse
from tests.qat.serve.serving import idle, running, wait_until

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "Hi"}


def chat(**fields):
    return CHAT, {"messages": [USER], "max_tokens": 2} | fields


def text(**fields):
    return TEXT, {"prompt": "Hi", "max_tokens": 2} | fields


def message(content, **fields):
    return CHAT, {"messages": [{"role": "user", "content": content} | fields]}


REFUSED = [
    # not an object of JSON
    ((TEXT, b""), None, "invalid_json", "the body is not valid JSON"),
    ((TEXT, b'{"prompt": "a"'), None, "invalid_json", "the body is not valid JSON"),
    ((TEXT, b"\xff\xfe{}"), None, "invalid_json", "the body is not valid JSON"),
    ((TEXT, b'{"prompt": "a", "temperature": NaN}'), None, "invalid_json", "NaN is no JSON"),
    ((TEXT, b'{"prompt": "a", "seed": 1' + b"0" * 5000 + b"}"), None, "invalid_json", "not valid"),
    ((TEXT, b"[" * 100_000), None, "invalid_json", "the body is not valid JSON"),
    ((TEXT, b"[1]"), None, "invalid_json", "the body is not a JSON object"),
    # missing, of the wrong type, out of range
    ((CHAT, {}), "messages", "missing_required_parameter", "messages: missing"),
    ((TEXT, {}), "prompt", "missing_required_parameter", "prompt: missing"),
    (chat(messages=[]), "messages", "invalid_value", "at least 1 item"),
    (chat(messages="Hi"), "messages", "invalid_value", "valid list"),
    (chat(messages=["Hi"]), "messages[0]", "invalid_value", "dictionary"),
    (
        chat(messages=[USER, {"role": "user"}]),
        "messages[1].content",
        "missing_required_parameter",
        "",
    ),
    (chat(messages=[USER | {"role": "tool"}]), "messages[0].role", "invalid_value", "'tool'"),
    (message(None), "messages[0].content", "invalid_value", "a string or a list of parts"),
    (message([{"type": "image_url"}]), "messages[0].content", "invalid_value", "type 'image_url'"),
    (message("a", tool_calls=[{}]), "messages[0].tool_calls", "invalid_value", "no tools"),
    (message("a", mood="good"), "messages[0].mood", "unknown_parameter", ""),
    (text(prompt=[]), "prompt", "invalid_value", "a list of strings"),
    (text(prompt=None), "prompt", "invalid_value", "a list of strings"),
    (text(prompt=["a", 1]), "prompt", "invalid_value", "a list of strings"),
    (text(prompt=[True]), "prompt", "invalid_value", "a list of strings"),
    (text(prompt=[1.5]), "prompt", "invalid_value", "a list of strings"),
    (text(prompt=[[1], []]), "prompt", "invalid_value", "a list of strings"),
    (text(prompt=[-1]), "prompt", "invalid_value", "-1 is no token of this model"),
    (text(prompt=[0, 2048]), "prompt", "invalid_value", "ids run from 0 to 2047"),
    (text(temperature="0"), "temperature", "invalid_value", "temperature: "),
    (text(temperature=-0.1), "temperature", "invalid_value", "greater than or equal to 0"),
    (text(temperature=2.1), "temperature", "invalid_value", "less than or equal to 2"),
    (text(temperature=True), "temperature", "invalid_value", ""),
    (text(top_p=0), "top_p", "invalid_value", "greater than 0"),
    (text(max_tokens=0), "max_tokens", "invalid_value", "greater than or equal to 1"),
    (text(max_tokens=1.5), "max_tokens", "invalid_value", "integer"),
    (chat(max_completion_tokens=-3), "max_completion_tokens", "invalid_value", ""),
    (text(n=0), "n", "invalid_value", ""),
    (text(n=65), "n", "invalid_value", "at most 64 in one request"),
    (text(prompt=["a"] * 33, n=2), "n", "invalid_value", "66 answers"),
    (text(prompt=["a"] * 11, n=10**4299), "n", "invalid_value", "less than"),
    (text(prompt=[[1]] * 5000), "prompt", "invalid_value", "5000 prompts, at most 4096"),
    (text(prompt=["a"] * 5000), "prompt", "invalid_value", "5000 prompts, at most 4096"),
    (chat(messages=[USER] * 5000), "messages", "invalid_value", "at most 4096 items"),
    (chat(seed="1"), "seed", "invalid_value", "integer"),
    (text(stream="yes"), "stream", "invalid_value", "boolean"),
    (text(stop=["a"] * 5), "stop", "invalid_value", "at most 4 strings"),
    (text(stop=""), "stop", "invalid_value", "none of them empty"),
    (text(stop=[1]), "stop", "invalid_value", "at most 4 strings"),
    (text(logprobs=21), "logprobs", "invalid_value", "less than or equal to 20"),
    (text(logprobs=True), "logprobs", "invalid_value", "integer"),
    (text(logprobs=1, echo=True), "logprobs", "invalid_value", "not together with echo"),
    (chat(logprobs=2), "logprobs", "invalid_value", "boolean"),
    (chat(top_logprobs=2), "top_logprobs", "invalid_value", "needs logprobs=true"),
    (
        text(stream_options={"include_usage": True}),
        "stream_options",
        "invalid_value",
        "stream=true",
    ),
    (text(stream=True, stream_options={"x": 1}), "stream_options.x", "unknown_parameter", ""),
    # not supported, never silently ignored
    (chat(tools=[{"type": "function"}]), "tools", "unsupported_parameter", "does not support"),
    (chat(tool_choice="required"), "tool_choice", "unsupported_parameter", ""),
    (chat(response_format={"type": "json_object"}), "response_format", "unsupported_parameter", ""),
    (chat(frequency_penalty=0.5), "frequency_penalty", "unsupported_parameter", ""),
    (chat(presence_penalty=False), "presence_penalty", "unsupported_parameter", ""),
    (text(logit_bias={"5": 1}), "logit_bias", "unsupported_parameter", ""),
    (text(best_of=2), "best_of", "unsupported_parameter", ""),
    (text(suffix="!"), "suffix", "unsupported_parameter", ""),
    (text(top_k=5), "top_k", "unsupported_parameter", ""),
    (text(temprature=0), "temprature", "unknown_parameter", "Did you mean 'temperature'?"),
    (text(messages=[]), "messages", "unknown_parameter", "no such parameter"),
    # half a surrogate pair is no text
    ((TEXT, b'{"prompt": "\\ud800"}'), None, "invalid_json", "surrogates not allowed"),
    ((TEXT, b'{"prompt": "a", "\\uDC00": 1}'), None, "invalid_json", "surrogates not allowed"),
    ((TEXT, b'{"prompt": "\xed\xa0\x80"}'), None, "invalid_json", "the body is not valid JSON"),
    # the chat template's own rules
    (
        chat(messages=[USER, {"role": "system", "content": "late"}]),
        "messages",
        "invalid_value",
        "the model's chat template refuses them: the system prompt comes first",
    ),
]


@pytest.mark.parametrize(("request_", "param", "code", "words"), REFUSED)
def test_bad_requests(server, request_, param, code, words):
    reply = server.post(*request_)
    assert reply.status_code == 400, reply.text
    assert list(reply.json()) == ["error"]
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("invalid_request_error", code)
    assert words in error["message"]
    if param is not None:
        assert error["param"] == param


def test_messages_do_not_quote_megabytes(server):
    reply = server.post(*chat(messages=[USER | {"role": "x" * 10**6}]))
    assert reply.json()["error"]["message"].startswith("messages[0].role: 'xxx")
    assert len(reply.content) < 2000


@pytest.mark.parametrize(
    ("schema", "start", "item"),
    [(ChatRequest, b'{"messages": [', b"{}"), (CompletionRequest, b'{"prompt": [', b"[7]")],
)
def test_a_body_of_many_items_is_refused_at_once(schema, start, item):
    """While a body is checked nobody else is answered: it is read, and little more.

    Item by item the check takes 5 and 35 times as long as reading the JSON.
    """
    body = start + b",".join([item] * 500_000) + b"]}"
    gc.disable()  # its time depends on what else this process holds
    try:
        begin = time.thread_time()
        json.loads(body)
        read = time.thread_time() - begin
        with pytest.raises(ApiError) as caught:
            parse(schema, body)
        whole = time.thread_time() - begin - read
    finally:
        gc.enable()
    assert caught.value.status == 400
    assert whole < 3 * read


def test_the_server_goes_on_after_bad_requests(server, engine):
    assert server.post(*text()).status_code == 200
    wait_until(lambda: idle(engine))


def test_prompts_that_do_not_fit(server, engine, client):
    room = engine.context
    for body, words in (
        ({"prompt": [5] * room}, f"the request has {room} tokens of prompt;"),
        ({"prompt": [5] * (room - 3), "max_tokens": 4}, f"{room - 3} tokens of prompt and 4 for"),
        ({"prompt": ["a", "word " * 3000], "max_tokens": 4}, "maximum context length"),
        ({"prompt": "a", "max_tokens": 10**30}, "maximum context length"),
    ):
        reply = server.post(TEXT, body)
        assert reply.status_code == 400
        error = reply.json()["error"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
        assert words in error["message"]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": "word " * 3000}], stream=True
        )
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
    # a default length gives way to a long prompt
    fits = server.post(TEXT, {"prompt": [5] * (room - 3), "ignore_eos": True})
    assert fits.json()["usage"]["completion_tokens"] == 3
    wait_until(lambda: idle(engine))


def test_routes_methods_and_content_types(server):
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("GET", CHAT, 405),
        ("POST", "/v1/models", 405),
        ("GET", "/docs", 404),
        ("GET", "/openapi.json", 404),
    ):
        reply = httpx.request(method, server.url + path)
        assert reply.status_code == status
        assert reply.json()["error"]["message"].startswith(f"{method} {path}: ")
    assert httpx.get(server.url + CHAT).headers["allow"] == "POST"
    # what a form of another site's page can send is refused
    reply = httpx.post(server.url + TEXT, data={"prompt": "a"})
    assert reply.status_code == 415
    assert "send application/json" in reply.json()["error"]["message"]
    # no other site may read answers
    origin = {"Origin": "https://example.org"}
    assert "access-control-allow-origin" not in server.post(*text(), headers=origin).headers


def test_unknown_models(client, server):
    for create in (
        lambda: client.chat.completions.create(model="gpt", messages=[USER]),
        lambda: client.completions.create(model="gpt", prompt="a"),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            create()
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_api_key(engine, prompts):
    with running(engine, prompts, api_key="sesame ä") as server:
        for headers in ({}, {"Authorization": "Bearer sesam"}, {"Authorization": "sesame"}):
            for path in ("/v1/models", "/metrics", "/v1/nothing"):
                reply = httpx.get(server.url + path, headers=headers)
                assert reply.status_code == 401
                assert reply.json()["error"]["code"] == "invalid_api_key"
                assert reply.headers["www-authenticate"] == "Bearer"
            assert server.post(*text(), headers=headers).status_code == 401
        for path in ("/", "/health"):
            assert httpx.get(server.url + path).status_code == 200
        right = {"Authorization": "Bearer sesame ä".encode()}
        assert httpx.get(f"{server.url}/v1/models", headers=right).status_code == 200
        assert httpx.get(f"{server.url}/metrics", headers=right).status_code == 200
    with running(engine, prompts, api_key="k") as server:
        assert server.client("k").models.list().data
        with pytest.raises(openai.AuthenticationError):
            server.client("l").models.list()


def test_limits_of_body_and_tokens(engine, prompts):
    with running(engine, prompts, max_body_bytes=1000, max_tokens=8) as server:
        reply = server.post(TEXT, {"prompt": "a" * 1000})
        assert reply.status_code == 413
        assert reply.json()["error"]["code"] == "request_too_large"
        # a body much larger than what sockets hold gets its answer too
        large = server.post(TEXT, {"prompt": "a" * (16 << 20)})
        assert large.status_code == 413
        reply = server.post(TEXT, {"prompt": "a", "max_tokens": 9})
        assert reply.json()["error"]["param"] == "max_tokens"
        body = {"messages": [USER], "ignore_eos": True}
        assert server.post(CHAT, body).json()["usage"]["completion_tokens"] == 8


def test_cors_where_it_is_asked_for(engine, prompts):
    with running(engine, prompts, api_key="k", cors_origins=("https://a.example",)) as server:
        headers = {
            "Origin": "https://a.example",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type",
        }
        asked = httpx.options(server.url + CHAT, headers=headers)
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] == "https://a.example"
        headers["Origin"] = "https://b.example"
        assert (
            "access-control-allow-origin"
            not in httpx.options(server.url + CHAT, headers=headers).headers
        )


def test_a_full_queue_turns_requests_away(engine, prompts):
    with running(engine, prompts, max_queued=2) as server, server.client() as client:
        long = {"model": "demo", "max_tokens": 900, "extra_body": {"ignore_eos": True}}
        stream = client.completions.create(prompt=["a"] * 6, stream=True, **long)
        # four are in the batch, two wait
        wait_until(lambda: engine.stats().waiting == 2)
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(model="demo", prompt="a", max_tokens=1)
        assert caught.value.code == "rate_limit_exceeded"
        assert int(caught.value.response.headers["retry-after"]) > 0
        stream.close()
        wait_until(lambda: idle(engine))
        assert client.completions.create(model="demo", prompt="a", max_tokens=1).choices


def test_no_chat_template(engine, plain_demo):
    with running(engine, Prompts(plain_demo)) as server, server.client() as client:
        with pytest.raises(openai.BadRequestError, match="send its text to /v1/completions"):
            client.chat.completions.create(model="demo", messages=[USER])
        assert client.models.list().data[0].chat is False


def test_a_failed_engine(demo, prompts, monkeypatch, caplog):
    """An engine whose model raises: the requests in it get an error, and so do all later ones."""

    def broken(module, ids):
        raise RuntimeError("broken on purpose")

    caplog.set_level(logging.CRITICAL)
    engine = Engine(demo, EngineOptions(max_sequences=2))
    with running(engine, prompts) as server, server.client() as client:
        options = {"model": "demo", "max_tokens": 900, "extra_body": {"ignore_eos": True}}
        stream = client.completions.create(prompt="a", stream=True, **options)
        next(stream)
        monkeypatch.setattr(torch.nn.Embedding, "forward", broken)
        with pytest.raises(openai.APIError, match=r"the engine failed: .*broken on purpose"):
            list(stream)
        wait_until(lambda: engine.failure is not None)
        for request in (text(), text(stream=True), chat()):
            reply = server.post(*request)
            assert reply.status_code == 503
            error = reply.json()["error"]
            assert (error["type"], error["code"]) == ("server_error", "engine_failed")
        health = httpx.get(f"{server.url}/health")
        assert (health.status_code, health.json()["status"]) == (503, "failed")
        assert "broken on purpose" in health.json()["reason"]
        assert server.metric('qat_sequences_total{reason="error"}') == 1
    engine.close()


def test_a_body_that_does_not_come(server, monkeypatch):
    monkeypatch.setattr("qat.serve.transport.BODY_SECONDS", 0.3)

    def slowly():
        yield b'{"prompt"'
        time.sleep(1.0)
        yield b': "a"}'

    headers = {"Content-Type": "application/json"}
    reply = httpx.post(server.url + TEXT, content=slowly(), headers=headers)
    assert (reply.status_code, reply.json()["error"]["code"]) == (408, "timeout")


def test_a_head_that_does_not_come(server, monkeypatch):
    monkeypatch.setattr("qat.serve.connection.HEAD_SECONDS", 0.2)
    whole = b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"

    def replies(*parts):
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            for part in parts:
                connection.sendall(part)
                time.sleep(0.4)
            return b"".join(iter(lambda: connection.recv(4096), b"")).count(b"200 OK")

    # a recv() that gives nothing: the server has closed the connection
    assert replies(b"") == 0
    assert replies(b"GET /heal") == 0
    assert replies(whole + b"GET /heal") == 1
    # between two requests there is more time
    assert replies(whole, whole, b"GET /heal") == 2


def test_error_bodies_are_json_whatever_the_text(server):
    reply = server.post(TEXT, {"prompt": "a", 'x"\n{}': 1})
    assert json.loads(reply.content)["error"]["param"] == 'x"\n{}'
