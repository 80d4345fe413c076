"""The API under the official client: chat, completions, streams, stop, logprobs, n, seeds."""

import json
import math
import shutil

import httpx
import openai
import pytest

from qat.generate import GenerateOptions, generate
from qat.serve.prompts import Prompts
from qat.serve.text import BROKEN
from tests.qat.serve.serving import idle, running, wait_until

ASK = [{"role": "user", "content": "What does this function return?"}]
PROMPT = "This function returns the"
GREEDY = {"model": "demo", "temperature": 0}


def chat(client, messages=ASK, **options):
    return client.chat.completions.create(messages=messages, **(GREEDY | options))


def complete(client, prompt=PROMPT, **options):
    return client.completions.create(prompt=prompt, **(GREEDY | options))


def streamed_chat(client, **options):
    """Text, log-probabilities and last chunk of a stream; asserts the order of its chunks."""
    chunks = list(chat(client, stream=True, **options))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    last = [chunk for chunk in chunks if chunk.choices][-1]
    assert [c.choices[0].finish_reason for c in chunks if c.choices][:-1].count(None) == (
        sum(bool(c.choices) for c in chunks) - 1
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    tokens = [
        token
        for chunk in chunks
        if chunk.choices and chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content
    ]
    return text, tokens, last.choices[0].finish_reason, chunks[-1]


@pytest.fixture(scope="module")
def answer(client):
    """The greedy answer to `ASK`."""
    return chat(client, max_tokens=40)


def test_chat_answers_what_qat_generate_answers(answer, demo, server):
    expected = generate(demo, ASK[0]["content"], GenerateOptions(max_new_tokens=40))
    choice = answer.choices[0]
    assert choice.message.content == expected
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "length"
    prompt = server.service.prompts.tokenizer.apply_chat_template(
        ASK, add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == 40
    assert answer.usage.total_tokens == len(prompt) + 40
    assert (answer.object, answer.model) == ("chat.completion", "demo")
    assert answer.system_fingerprint


def test_completion_answers_what_qat_generate_answers(client, plain_demo):
    expected = generate(plain_demo, PROMPT, GenerateOptions(max_new_tokens=30))
    got = complete(client, max_tokens=30)
    assert (got.choices[0].text, got.object) == (expected, "text_completion")
    # OpenAI's default length
    assert complete(client).usage.completion_tokens == 16


def test_a_stream_says_the_same(client, answer):
    text, tokens, reason, last = streamed_chat(
        client, max_tokens=40, stream_options={"include_usage": True}
    )
    assert (text, tokens, reason) == (answer.choices[0].message.content, [], "length")
    assert last.usage == answer.usage
    assert last.choices == []
    *_, last = chat(client, max_tokens=3, stream=True)
    assert last.usage is None
    chunks = list(complete(client, max_tokens=30, stream=True))
    whole = complete(client, max_tokens=30)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "length"


def test_a_stream_is_server_sent_events_that_end_with_done(server):
    body = {"prompt": PROMPT, "max_tokens": 4, "stream": True, "temperature": 0}
    reply = server.post("/v1/completions", body)
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert reply.headers["cache-control"] == "no-cache"
    *parts, done, end = reply.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    assert all(json.loads(part.removeprefix("data: "))["choices"] for part in parts)


def test_stop_strings_end_the_answer_before_them(client, answer, engine):
    text = answer.choices[0].message.content
    # from the middle of a word on, so that it spans tokens
    stop = text[11:19]
    expected = text[: text.index(stop)]
    got = chat(client, max_tokens=40, stop=stop)
    assert (got.choices[0].message.content, got.choices[0].finish_reason) == (expected, "stop")
    assert got.usage.completion_tokens < 40
    shown, _, reason, _ = streamed_chat(client, max_tokens=40, stop=["@never@", stop])
    assert (shown, reason) == (expected, "stop")
    # the sequence is given up in the engine too
    wait_until(lambda: idle(engine))
    whole = complete(client, max_tokens=30).choices[0].text
    got = complete(client, max_tokens=30, stop=[whole[7:13]], stream=True)
    assert "".join(c.choices[0].text for c in got) == whole[: whole.index(whole[7:13])]


def test_the_beginning_of_a_stop_string_is_shown_when_it_was_none(client, answer):
    text = answer.choices[0].message.content
    almost = text[-3:] + "@"
    assert chat(client, max_tokens=40, stop=[almost]).choices[0].message.content == text
    assert streamed_chat(client, max_tokens=40, stop=[almost])[0] == text


def test_end_tokens_end_the_answer(client, engine, demo, tmp_path):
    rows = complete(client, max_tokens=10, logprobs=0).choices[0].logprobs
    # the first token that did not come before is declared to be an end of text
    end = next(i for i in range(3, 10) if rows.tokens[i] not in rows.tokens[:i])
    copy = shutil.copytree(demo, tmp_path / "demo")
    tokenizer = Prompts(demo).tokenizer
    (token,) = tokenizer(rows.tokens[end]).input_ids
    generation = json.loads((copy / "generation_config.json").read_text())
    generation["eos_token_id"] = [generation["eos_token_id"], token]
    (copy / "generation_config.json").write_text(json.dumps(generation))
    with running(engine, Prompts(copy)) as server, server.client() as other:
        got = complete(other, max_tokens=10, logprobs=0)
        assert got.choices[0].finish_reason == "stop"
        # its text is not shown, but it was generated
        assert got.choices[0].text == "".join(rows.tokens[:end])
        assert got.choices[0].logprobs.tokens == rows.tokens[:end]
        assert got.usage.completion_tokens == end + 1
        on = complete(other, max_tokens=10, extra_body={"ignore_eos": True})
        assert (on.choices[0].text, on.usage.completion_tokens) == ("".join(rows.tokens), 10)


def test_chat_log_probabilities(client, answer):
    got = chat(client, max_tokens=40, logprobs=True, top_logprobs=3)
    text = answer.choices[0].message.content
    tokens = got.choices[0].logprobs.content
    assert got.choices[0].message.content == text
    assert "".join(token.token for token in tokens) == text
    assert b"".join(bytes(token.bytes) for token in tokens).decode() == text
    for token in tokens:
        assert len(token.top_logprobs) == 3
        values = [top.logprob for top in token.top_logprobs]
        assert values == sorted(values, reverse=True)
        # greedy takes the likeliest
        assert (token.token, token.logprob) == (token.top_logprobs[0].token, values[0])
        assert math.fsum(map(math.exp, values)) <= 1 + 1e-6
    assert streamed_chat(client, max_tokens=40, logprobs=True, top_logprobs=3)[1] == tokens
    only = chat(client, max_tokens=5, logprobs=True).choices[0].logprobs.content
    assert [token.top_logprobs for token in only] == [[]] * 5
    assert answer.choices[0].logprobs is None


def test_completion_log_probabilities(client):
    got = complete(client, max_tokens=12, logprobs=2)
    text, rows = got.choices[0].text, got.choices[0].logprobs
    assert "".join(rows.tokens) == text
    assert [text[place:].startswith(t) for place, t in zip(rows.text_offset, rows.tokens)] == (
        [True] * 12
    )
    for token, value, top in zip(rows.tokens, rows.token_logprobs, rows.top_logprobs):
        assert len(top) == 2
        assert top[token] == value == max(top.values())
    none = complete(client, max_tokens=3, logprobs=0).choices[0].logprobs
    assert [len(top) for top in none.top_logprobs] == [1, 1, 1]
    chunks = list(complete(client, max_tokens=12, logprobs=2, stream=True))
    assert [t for c in chunks for t in c.choices[0].logprobs.tokens] == rows.tokens
    assert [o for c in chunks for o in c.choices[0].logprobs.text_offset] == rows.text_offset


def test_a_seed_repeats_an_answer_and_n_takes_the_next_seeds(client):
    options = {"temperature": 1.0, "top_p": 0.95, "max_tokens": 24}
    first = chat(client, seed=7, **options).choices[0].message.content
    assert chat(client, seed=7, **options).choices[0].message.content == first
    several = chat(client, seed=7, n=3, **options)
    texts = [choice.message.content for choice in several.choices]
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert texts[0] == first
    assert texts[2] == chat(client, seed=9, **options).choices[0].message.content
    assert len(set(texts)) == 3
    assert several.usage.completion_tokens <= 72
    free = {chat(client, **options).choices[0].message.content for _ in range(3)}
    assert len(free) == 3, "without a seed answers differ"
    assert chat(client, seed=-(2**70), max_tokens=2).usage.completion_tokens == 2


def test_several_answers_in_one_stream(client):
    options = {"temperature": 1.0, "seed": 7, "max_tokens": 10, "n": 3}
    whole = complete(client, ["One", "Two"], **options)
    texts, reasons = [""] * 6, [None] * 6
    for chunk in complete(client, ["One", "Two"], stream=True, **options):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]


def test_prompts_as_text_and_as_tokens(client, server):
    ids = server.service.prompts.tokenizer(PROMPT).input_ids
    text = complete(client).choices[0].text
    assert complete(client, ids).choices[0].text == text
    both = complete(client, [ids, ids[:2]], max_tokens=5)
    assert [choice.index for choice in both.choices] == [0, 1]
    assert text.startswith(both.choices[0].text)
    several = complete(client, [PROMPT, "Once"], max_tokens=5)
    assert several.choices[1].text == complete(client, "Once", max_tokens=5).choices[0].text
    assert several.usage.completion_tokens == 10
    # an empty text begins with the token that begins a text
    assert complete(client, "", max_tokens=2).usage.prompt_tokens == 1


def test_echo(client, server):
    text = complete(client).choices[0].text
    ids = server.service.prompts.tokenizer(PROMPT).input_ids
    assert complete(client, ids, echo=True).choices[0].text == PROMPT + text
    assert complete(client, echo=True).choices[0].text == PROMPT + text
    chunks = complete(client, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == PROMPT + text


def test_messages_as_parts_and_roles(client):
    parts = [{"type": "text", "text": ASK[0]["content"][:5]}]
    parts.append({"type": "text", "text": ASK[0]["content"][5:]})
    text = chat(client, max_tokens=8).choices[0].message.content
    assert (
        chat(client, [{"role": "user", "content": parts}], max_tokens=8).choices[0].message.content
        == text
    )
    turns = [{"role": "system", "content": "Short."}, *ASK]
    system = chat(client, turns, max_tokens=8)
    turns[0]["role"] = "developer"
    assert chat(client, turns, max_tokens=8).choices == system.choices
    assert system.usage.prompt_tokens > chat(client, max_tokens=1).usage.prompt_tokens


def test_lengths(client, engine):
    newer = client.chat.completions.create(messages=ASK, max_completion_tokens=3, **GREEDY)
    assert newer.usage.completion_tokens == 3
    # a chat without a limit goes on up to the context
    ids = [9] * (engine.context - 5)
    assert complete(client, ids, extra_body={"ignore_eos": True}).usage.completion_tokens == 5


def test_harmless_and_neutral_parameters_are_accepted(client):
    got = chat(
        client,
        max_tokens=2,
        user="me",
        metadata={"a": "b"},
        store=False,
        frequency_penalty=0,
        presence_penalty=0.0,
        logit_bias={},
        response_format={"type": "text"},
        tools=[],
        extra_body={"top_k": -1, "repetition_penalty": 1.0, "best_of": None},
    )
    assert got.usage.completion_tokens == 2


def test_models(client, engine, server):
    (card,) = client.models.list().data
    assert (card.id, card.object, card.owned_by) == ("demo", "model", "qat-lightning")
    assert (card.max_model_len, card.chat) == (engine.context, True)
    assert client.models.retrieve("demo") == card
    with pytest.raises(openai.NotFoundError, match="model 'a/b' is not here; there are: demo"):
        client.models.retrieve("a/b")
    # a request that names no model gets the artifact's
    reply = server.post("/v1/completions", {"prompt": "a", "max_tokens": 1}).json()
    assert reply["model"] == "demo"


def test_no_broken_characters_in_a_stream(client):
    for seed in range(3):
        chunks = complete(client, "é🙂", temperature=1.0, seed=seed, max_tokens=30, stream=True)
        texts = [chunk.choices[0].text for chunk in chunks]
        assert not any(BROKEN in text for text in texts[:-1])


def test_page_health_and_metrics(server):
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    page = httpx.get(server.url)
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in page.headers["content-security-policy"]
    ok = 'qat_requests_total{endpoint="/v1/completions",status="200"}'
    before = {
        name: server.metric(name)
        for name in (
            ok,
            "qat_generated_tokens_total",
            "qat_prompt_tokens_total",
            "qat_time_to_first_token_seconds_count",
            "qat_inter_token_seconds_count",
            'qat_sequences_total{reason="length"}',
        )
    }
    body = {"prompt": [5, 6, 7], "max_tokens": 6, "n": 2, "ignore_eos": True}
    assert server.post("/v1/completions", body).status_code == 200
    after = [server.metric(name) - value for name, value in before.items()]
    assert after == [1, 12, 3, 2, 10, 2]
    assert server.metric("qat_tokens_per_second") > 0
    for name in ("qat_requests_in_flight", "qat_waiting_sequences", "qat_running_sequences"):
        assert server.metric(name) == 0
    assert server.metric("qat_cache_tokens") > 0
    assert server.metric("process_resident_memory_bytes") > 2**20
