"""The engine gives each sequence what it gives it alone, bit for bit, and what generate gives."""

import asyncio
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from qat.errors import UserError
from qat.kv_cache import KVCacheName
from qat.runtime import load_packed
from qat.serve.engine import Engine, EngineOptions
from qat.serve.requests import EngineStats, FinishEvent, Sampling, TokenEvent
from tests.qat.serve.engine_running import (
    KINDS,
    Job,
    artifact,
    ask_alone,
    ask_together,
    collect,
    generated,
    prompts,
)

# below and above 64 tokens, where prefill changes its operation
LENGTHS = [1, 70, 5, 100, 64, 63]
SMALL = {"max_sequences": 8, "cache_tokens": 1024}


def jobs_of(lengths: list[int], tokens: int = 7, seed: int = 0) -> list[Job]:
    """Greedy, of different lengths, with log-probabilities: they show a single flipped bit."""
    return [
        (prompt, Sampling(tokens + i % 3, top_logprobs=2))
        for i, prompt in enumerate(prompts(lengths, seed))
    ]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", KINDS)
def test_together_as_alone_as_generate(tmp_path: Path, kind: str, dtype: str) -> None:
    path = artifact(tmp_path / "model", kind)
    jobs = jobs_of(LENGTHS)
    engine = Engine(path, EngineOptions(dtype=dtype, **SMALL))
    try:
        alone, together = ask_alone(engine, jobs), ask_together(engine, jobs)
    finally:
        engine.close()
    assert together == alone
    assert [a.finish for a in alone] == [FinishEvent("length")] * len(jobs)
    assert [a.content for a in alone] == generated(path, dtype, jobs)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_several_threads(tmp_path: Path, dtype: str) -> None:
    """Threads split matmuls and loops elsewhere, so the batch could show there."""
    path = artifact(tmp_path / "model")
    jobs = jobs_of(LENGTHS)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        engine = Engine(path, EngineOptions(dtype=dtype, **SMALL))
        try:
            assert ask_together(engine, jobs) == ask_alone(engine, jobs)
        finally:
            engine.close()
    finally:
        torch.set_num_threads(before)


def check_family(path: Path, dtype: str, jobs: list[Job]) -> None:
    engine = Engine(path, EngineOptions(dtype=dtype, **SMALL))
    try:
        alone, together = ask_alone(engine, jobs), ask_together(engine, jobs)
    finally:
        engine.close()
    assert together == alone
    assert [a.content for a in alone] == generated(path, dtype, jobs)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("mistral", "bfloat16"),
        ("mistral", "float32"),
        ("gemma2", "bfloat16"),
        ("gemma3", "float32"),
    ],
)
def test_other_attention(tmp_path: Path, family: str, dtype: str) -> None:
    """Sliding windows of 16 in some or all layers, and softcaps in eager attention."""
    path = artifact(tmp_path / "model", family=family)
    check_family(path, dtype, jobs_of([3, 15, 40, 80], tokens=5))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    "family",
    [
        *("qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi", "phi3", "gpt_neox"),
        *("llama_bias", "llama_tied", "opt", "gpt2", "mixtral", "qwen3_moe"),
    ],
)
def test_other_families(tmp_path: Path, family: str, dtype: str) -> None:
    kind = "w8a8" if family in ("phi3", "gemma") else "w4a16"
    path = artifact(tmp_path / "model", kind, family)
    check_family(path, dtype, jobs_of([3, 40, 80, 9], tokens=16, seed=3))


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_prompts_in_pieces(tmp_path: Path, family: str) -> None:
    """Pieces have one length whatever else is in the step; in fp32 the answer is that of one."""
    path = artifact(tmp_path / "model", family=family)
    jobs = jobs_of([200, 3, 90, 33], tokens=5)
    for dtype in ("bfloat16", "float32"):
        engine = Engine(path, EngineOptions(dtype=dtype, max_batch_tokens=32, **SMALL))
        try:
            alone, together = ask_alone(engine, jobs), ask_together(engine, jobs)
        finally:
            engine.close()
        assert together == alone
        if dtype == "float32":
            expected = [tokens for tokens, _ in generated(path, dtype, jobs)]
            assert [a.tokens for a in alone] == expected


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", KINDS)
def test_32_at_a_time(tmp_path: Path, kind: str, dtype: str) -> None:
    path = artifact(tmp_path / "model", kind)
    jobs = jobs_of([1 + 37 * i % 150 for i in range(32)], tokens=64)
    engine = Engine(path, EngineOptions(dtype=dtype, max_batch_tokens=100))
    try:
        assert ask_together(engine, jobs) == ask_alone(engine, jobs)
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("kv_cache", "dtype"), [("int8", "float32"), ("int8", "bfloat16"), ("int4", "float32")]
)
def test_quantized_cache(tmp_path: Path, kv_cache: KVCacheName, dtype: str) -> None:
    path = artifact(tmp_path / "model")
    jobs = jobs_of([1, 70, 5, 64])
    engine = Engine(path, EngineOptions(dtype=dtype, kv_cache=kv_cache, **SMALL))
    cache = next(iter(engine._lanes.values()))._manager.batch_processor.cache
    try:
        alone, together = ask_alone(engine, jobs), ask_together(engine, jobs)
    finally:
        engine.close()
    assert together == alone
    assert [a.content for a in alone] == generated(path, dtype, jobs, kv_cache)
    # 2 layers of 2 heads of 16 codes and a scale, keys and values; 2 sectors are never used
    each = 2 * 2 * 2 * (16 * int(kv_cache[3:]) // 8 + 2)
    used = cache.cache_tensor.nbytes - 2 * cache.bytes_per_sector
    assert used == each * engine.stats().cache_tokens


def test_only_full_attention_is_cached_in_codes(tmp_path: Path) -> None:
    path = artifact(tmp_path / "model", family="mistral")
    with pytest.raises(UserError, match="sliding window"):
        Engine(path, EngineOptions(kv_cache="int8", **SMALL))


def test_a_cache_for_few(tmp_path: Path) -> None:
    """Who does not fit waits for a whole place; nobody is put back, and nobody is refused."""
    path = artifact(tmp_path / "model")
    jobs = jobs_of([60, 80, 40, 90, 10, 70], tokens=12)
    engine = Engine(path, EngineOptions(cache_tokens=112, max_sequences=4))
    try:
        assert engine.context == 112
        alone, together = ask_alone(engine, jobs), ask_together(engine, jobs)
        assert together == alone
        assert {a.finish.reason for a in alone} == {"length"}
    finally:
        engine.close()


# ------------------------------------------------------------------------------ sampling


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory):
    path = artifact(tmp_path_factory.mktemp("engine") / "model")
    made = Engine(path, EngineOptions(dtype="float32", name="tiny", **SMALL))
    made.path = path  # type: ignore[attr-defined]
    yield made
    made.close()


def test_seeds(engine: Engine) -> None:
    """A stream of its own for each sequence: the neighbours and the moment do not show."""
    options = [
        Sampling(10, temperature=t, top_p=p, seed=seed)
        for t, p in ((1.0, 1.0), (0.7, 0.9), (2.0, 0.5))
        for seed in (1, 2)
    ]
    prompt = prompts([30])[0]
    jobs = [(prompt, sampling) for sampling in options]
    alone = ask_alone(engine, jobs)
    together = ask_together(engine, [*jobs, *jobs_of([5, 9]), *jobs])
    assert together[:6] == together[-6:] == alone
    tokens = [a.tokens for a in alone]
    expected = generated(engine.path, "float32", jobs)  # type: ignore[attr-defined]
    assert tokens == [found for found, _ in expected]
    assert len({tuple(t) for t in tokens}) == len(tokens)


@torch.no_grad()
def test_logprobs_are_the_models(engine: Engine) -> None:
    """Under the model's own distribution, whatever temperature the token is drawn with."""
    prompt = prompts([20])[0]
    jobs = [
        (prompt, Sampling(6, top_logprobs=3)),
        (prompt, Sampling(6, temperature=1.5, top_p=0.8, seed=5, top_logprobs=0)),
    ]
    model = load_packed(engine.path, torch.float32)  # type: ignore[attr-defined]
    for answer, count in zip(ask_alone(engine, jobs), (3, 0)):
        # as `generate` computes: the prompt, then one token at a time, the head for the last only
        cache, rows = DynamicCache(config=model.config), []
        for piece in (prompt, *([token] for token in answer.tokens[:-1])):
            options = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
            rows.append(model(torch.tensor([piece]), **options).logits[0, 0].log_softmax(-1))
        assert answer.logprobs == [
            float(row[token]) for row, token in zip(rows, answer.tokens, strict=True)
        ]
        for row, top in zip(rows, answer.top, strict=True):
            best = row.topk(3)
            expected = zip(best.indices.tolist(), best.values.tolist())
            assert list(top) == list(expected)[:count]


def test_stop_tokens(engine: Engine) -> None:
    prompt = prompts([25])[0]
    whole = ask_alone(engine, [(prompt, Sampling(12))])[0].tokens
    stop = next(t for i, t in enumerate(whole) if i > 3 and t not in whole[:i])
    found = ask_alone(engine, [(prompt, Sampling(12, stop_token_ids=(stop, 1)))])[0]
    assert found.tokens == whole[: whole.index(stop) + 1]
    assert found.finish == FinishEvent("stop")
    # the last token that is allowed may be a stop token
    length = whole.index(stop) + 1
    found = ask_alone(engine, [(prompt, Sampling(length, stop_token_ids=(stop,)))])[0]
    assert found.finish == FinishEvent("stop")


def test_without_logprobs_there_are_none(engine: Engine) -> None:
    answer = ask_alone(engine, [(prompts([4])[0], Sampling(3))])[0]
    assert answer.logprobs == [None] * 3
    assert answer.top == [()] * 3


# ---------------------------------------------------------------- requests that come and go


def test_requests_that_do_not_fit(engine: Engine) -> None:
    async def run() -> None:
        assert engine.models == ["tiny"]
        with pytest.raises(KeyError):
            engine.submit([1], Sampling(1), "other")
        for prompt, tokens, message in (
            ([], 1, "empty"),
            ([1], 0, "no token"),
            ([1] * 250, 7, "pass the context of 256"),
            ([256], 1, "0 to 255"),
            ([-1], 1, "0 to 255"),
        ):
            with pytest.raises(ValueError, match=message):
                engine.submit(prompt, Sampling(tokens), "tiny")
        answer = await collect(engine.submit([1] * 250, Sampling(6), "tiny"))
        assert len(answer.tokens) == 6

    asyncio.run(run())


def test_cancelling_disturbs_nobody(engine: Engine) -> None:
    jobs = jobs_of([30, 40, 50])
    expected = ask_alone(engine, jobs)

    async def run() -> None:
        handles = [engine.submit(prompt, sampling, "tiny") for prompt, sampling in jobs]
        gone = [engine.submit(prompts([20])[0], Sampling(200), "tiny") for _ in range(6)]
        gone[0].cancel()
        assert await gone[0].next_event() == FinishEvent("cancelled")
        for handle in gone[1:]:
            assert isinstance(await handle.next_event(), TokenEvent)
            handle.cancel()
            handle.cancel()
        for handle in gone[1:]:
            events = [await handle.next_event()]
            while isinstance(events[-1], TokenEvent):
                events.append(await handle.next_event())
            assert events[-1] == FinishEvent("cancelled")
        assert [await collect(handle) for handle in handles] == expected
        handles[0].cancel()
        await idle(engine)

    asyncio.run(run())


def test_a_cancellation_that_comes_before_its_request(engine: Engine) -> None:
    """Transformers forgets it then; the sequence is cancelled again at its first token."""
    lane = engine._lanes["tiny"]
    steps: list[int] = []
    hook = lane._manager.model.register_forward_pre_hook(lambda *_: steps.append(1))
    try:
        asyncio.run(idle(engine))
        lane._manager.add_request([5], "gone", 200, streaming=True, eos_token_id=[-1])
        # one that is submitted later is answered in the same steps
        ask_alone(engine, jobs_of([9]))
        asyncio.run(idle(engine))
    finally:
        hook.remove()
    assert 0 < len(steps) < 20


def test_an_event_loop_that_ends_in_mid_stream(engine: Engine) -> None:
    async def leave() -> None:
        await engine.submit([5], Sampling(200), "tiny").next_event()

    asyncio.run(leave())
    jobs = jobs_of([12])
    assert len(ask_alone(engine, jobs)[0].tokens) == 7
    asyncio.run(idle(engine))
    assert engine.failure is None


async def idle(engine: Engine) -> None:
    """Until the engine holds nothing any more."""
    slots = engine.stats().cache_tokens
    for _ in range(1200):
        if engine.stats() == EngineStats(0, 0, 0, 0, slots):
            return
        await asyncio.sleep(0.05)
    raise AssertionError(engine.stats())


def test_stats(engine: Engine) -> None:
    async def run() -> None:
        await idle(engine)
        handles = [engine.submit([7] * 20, Sampling(100), "tiny") for _ in range(11)]
        for handle in handles[:8]:
            await handle.next_event()
        for _ in range(100):
            await handles[0].next_event()
            stats = engine.stats()
            if stats.running == 8 and stats.batch_tokens == 8:
                break
        assert (stats.running, stats.waiting, stats.batch_tokens) == (8, 3, 8)
        assert 8 * 32 <= stats.cache_tokens_used <= 8 * 128
        for handle in handles:
            handle.cancel()
        await idle(engine)

    asyncio.run(run())


def test_an_error_in_the_model_ends_all(tmp_path: Path) -> None:
    engine = Engine(artifact(tmp_path / "model"), EngineOptions(name="tiny", **SMALL))
    calls = []

    def fail(*_: object) -> None:
        calls.append(1)
        if len(calls) > 3:
            raise RuntimeError("the model broke")

    async def run() -> None:
        lane = engine._lanes["tiny"]
        handles = [engine.submit([3 + i], Sampling(50), "tiny") for i in range(10)]
        lane._manager.model.register_forward_pre_hook(fail)
        for handle in handles:
            answer = await collect(handle)
            assert answer.finish.reason == "error"
            assert "the model broke" in answer.finish.message
        for _ in range(100):
            if engine.failure:
                break
            await asyncio.sleep(0.02)
        assert "the model broke" in engine.failure
        with pytest.raises(RuntimeError, match="the model broke"):
            engine.submit([3], Sampling(1), "tiny")

    asyncio.run(run())
    engine.close()


def test_closing(tmp_path: Path) -> None:
    engine = Engine(artifact(tmp_path / "model"), EngineOptions(name="tiny", **SMALL))

    async def run() -> None:
        handles = [engine.submit([3], Sampling(200), "tiny") for _ in range(10)]
        await handles[0].next_event()
        engine.close()
        for handle in handles:
            assert (await collect(handle)).finish.reason == "error"
        assert engine.failure is None
        with pytest.raises(RuntimeError, match="closed"):
            engine.submit([3], Sampling(1), "tiny")
        engine.close()

    asyncio.run(run())


@pytest.mark.parametrize(("family", "kind"), [("falcon", "w8a8"), ("stablelm", "w4a16")])
def test_models_that_cannot_be_served(tmp_path: Path, family: str, kind: str) -> None:
    """Their layers do not hand the paged cache on to attention."""
    path = artifact(tmp_path / family, kind, family)
    with pytest.raises(UserError, match=f"{family}: its attention cannot be replaced"):
        Engine(path, EngineOptions(**SMALL))


def test_options_that_cannot_be(tmp_path: Path) -> None:
    for options, message in (
        ({"max_sequences": 0}, "max_sequences=0"),
        ({"kv_cache": "int3"}, "kv_cache=int3"),
        ({"dtype": "float16"}, "dtype=float16"),
    ):
        with pytest.raises(ValueError, match=message):
            EngineOptions(**options)  # type: ignore[arg-type]
    path = artifact(tmp_path / "model")
    for options, message in (
        ({"device": "tpu"}, "device=tpu"),
        ({"compile": True, "device": "cpu"}, "compile=true"),
        ({"cuda_graphs": True, "kv_cache": "int8", "device": "cpu"}, "kv_cache=int8"),
        ({"adapters": {"a": str(path)}, "device": "cpu"}, "adapters"),
    ):
        with pytest.raises(UserError, match=message):
            Engine(path, EngineOptions(**{**SMALL, **options}))
