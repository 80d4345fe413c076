"""Many streams at once for two minutes: no error, and every answer that of a request alone."""

import asyncio
import itertools
import random
import re
import time

import httpx
import openai
import pytest

from tests.qat.serve.serving import started

STREAMS = 32
SECONDS = 120
PROMPTS = 48
LEAST_ROUNDS = 3
"""So many answers each stream gets at least, on the slowest machine that counts."""


def requests():
    """Greedy requests of many lengths, a third of them chats."""
    words = ["This", "function", "returns", "the", "value", "of", "a", "list", "when", "called"]
    generator = random.Random(0)
    made = []
    for number in range(PROMPTS):
        text = " ".join(generator.choices(words, k=generator.randint(1, 90)))
        shared = {"model": "demo", "temperature": 0, "max_tokens": generator.randint(8, 64)}
        if number % 3 == 0:
            made.append(shared | {"messages": [{"role": "user", "content": text}]})
        else:
            made.append(shared | {"prompt": text})
    return made


async def answer(client, request):
    """Text of a streamed answer."""
    if "messages" in request:
        stream = await client.chat.completions.create(stream=True, **request)
        pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
    else:
        stream = await client.completions.create(stream=True, **request)
        pieces = [chunk.choices[0].text async for chunk in stream]
    return "".join(pieces)


async def load(url):
    """Answers each stream got; asserts that all are those of a request alone."""
    limits = httpx.Limits(max_connections=2 * STREAMS)
    client = openai.AsyncOpenAI(
        base_url=f"{url}/v1",
        api_key="none",
        max_retries=0,
        timeout=120,
        http_client=httpx.AsyncClient(limits=limits, timeout=120),
    )
    asked = requests()
    alone = [await answer(client, request) for request in asked]
    assert len(set(alone)) > PROMPTS / 2
    end = time.monotonic() + SECONDS

    async def one(number):
        generator = random.Random(number)
        for count in itertools.count():
            if time.monotonic() > end:
                return count
            place = generator.randrange(PROMPTS)
            assert await answer(client, asked[place]) == alone[place]

    counts = await asyncio.gather(*(one(number) for number in range(STREAMS)))
    await client.close()
    return counts


def values(url):
    """The metrics without labels, and requests by their labels."""
    text = httpx.get(f"{url}/metrics").text
    return {row.rpartition(" ")[0]: float(row.rpartition(" ")[2]) for row in text.splitlines()
            if not row.startswith("#")}  # fmt: skip


@pytest.mark.slow
def test_many_streams_for_two_minutes(demo):
    with started(demo) as (process, url, _):
        counts = asyncio.run(load(url))
        found = values(url)
        by_status = {
            name: value
            for name, value in found.items()
            if re.match(r"qat_requests_total\{endpoint=\"/v1/(chat/)?completions\"", name)
        }
        print(
            f"{sum(counts)} answers of {STREAMS} streams in {SECONDS} s, "
            f"{found['qat_generated_tokens_total']:.0f} tokens, "
            f"{found['process_resident_memory_bytes'] / 2**20:.0f} MiB resident"
        )
        assert min(counts) >= LEAST_ROUNDS
        assert all('status="200"' in name for name in by_status)
        assert sum(by_status.values()) == sum(counts) + PROMPTS
        assert found["qat_requests_in_flight"] == found["qat_running_sequences"] == 0
        assert found["qat_cache_tokens_used"] == 0
        process.terminate()
        assert process.wait(30) == 0
