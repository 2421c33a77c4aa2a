"""OpenAI's own client against a real server process: texts, streams, and its typed exceptions."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import mlx.core as mx
import numpy as np
import openai
import pytest

from dbrx_fn.model.transformer import score
from tests.support.running_server import small_model
from tests.support.server_process import ServerProcess, server_process

KEY = "a-key-of-visible-characters"
PROMPT = "To be, or not to be"
MESSAGES: Any = [{"role": "user", "content": "Who goes there?"}]


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with server_process("--decode-concurrency", "4", "--queue", "8", DBRX_FN_API_KEY=KEY) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=60) as opened:
        yield opened


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["small"]
    assert client.models.retrieve("small").owned_by == "dbrx_fn"


def test_a_completion_and_its_stream_are_the_same_text(client: openai.OpenAI) -> None:
    asked: Any = {"model": "small", "prompt": PROMPT, "max_tokens": 25, "seed": 5, "temperature": 1.0}
    whole = client.completions.create(**asked)
    again = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert whole.choices[0].text == again.choices[0].text
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage
    assert client.completions.create(**{**asked, "seed": 6}).choices[0].text != whole.choices[0].text


def test_a_chat_and_its_stream_are_the_same_text(client: openai.OpenAI) -> None:
    asked: Any = {"model": "small", "messages": MESSAGES, "max_completion_tokens": 25, "seed": 5, "n": 4}
    whole = client.chat.completions.create(**asked)
    assert len({choice.message.content for choice in whole.choices}) > 1
    texts = [""] * 4
    for chunk in client.chat.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]
    assert whole.usage is not None
    assert whole.usage.prompt_tokens_details is not None


def test_the_client_s_own_way_to_follow_a_stream_works(client: openai.OpenAI) -> None:
    asked: Any = {"model": "small", "messages": MESSAGES, "max_tokens": 200, "seed": 5, "stop": ["\n", "."]}
    with client.chat.completions.stream(**asked) as stream:
        kinds = [event.type for event in stream]
        whole = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= set(kinds)
    assert whole.choices[0].finish_reason == "stop"
    same = client.chat.completions.create(**asked)
    assert whole.choices[0].message.content == same.choices[0].message.content


def test_log_probabilities_are_those_of_score(client: openai.OpenAI) -> None:
    params, config, tokenizer = small_model()
    answer = client.completions.create(
        model="small", prompt=PROMPT, max_tokens=10, logprobs=0, temperature=0, extra_body={"ignore_eos": True}
    )
    told = answer.choices[0].logprobs
    assert told is not None
    assert told.token_logprobs is not None
    prompt = tokenizer.encode(PROMPT)
    ids = [*prompt, *tokenizer.encode(answer.choices[0].text)]
    logits = np.array(score(params, mx.array([ids]), config)[0][0], np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    wanted = [logprobs[place, ids[place + 1]] for place in range(len(prompt) - 1, len(ids) - 1)]
    np.testing.assert_allclose(told.token_logprobs, wanted, atol=1e-4)


def test_errors_are_the_client_s_typed_exceptions(server: ServerProcess, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature") as bad:
        client.completions.create(model="small", prompt=PROMPT, temperature=3)
    assert (bad.value.param, bad.value.code, bad.value.type) == (
        "temperature",
        "invalid_value",
        "invalid_request_error",
    )
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="large", prompt=PROMPT)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(
            model="small", messages=MESSAGES, tools=[{"type": "function", "function": {"name": "x"}}]
        )
    stranger = openai.OpenAI(base_url=f"{server.url}/v1", api_key="guessed", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    with pytest.raises(openai.APIStatusError) as large:
        client.completions.create(model="small", prompt="x" * 3_000_000)
    assert large.value.status_code == 413


def test_a_full_queue_is_a_rate_limit_that_the_client_waits_out(server: ServerProcess, client: openai.OpenAI) -> None:
    asked: Any = {"model": "small", "prompt": PROMPT, "max_tokens": 300, "extra_body": {"ignore_eos": True}}
    with ThreadPoolExecutor() as threads, client.completions.create(**asked, n=4, stream=True) as stream:
        next(iter(stream))
        waiting = threads.submit(lambda: client.completions.create(**{**asked, "max_tokens": 1}, n=8))
        while 'requests{state="waiting"} 8.0' not in figures(server):
            time.sleep(0.01)
        with pytest.raises(openai.RateLimitError) as busy:
            client.completions.create(**asked)
        assert int(busy.value.response.headers["retry-after"]) > 0
        stubborn = client.with_options(max_retries=5)
        patient = threads.submit(lambda: stubborn.completions.create(**{**asked, "max_tokens": 1}))
        stream.close()
        assert len(waiting.result(60).choices) == 8
        assert patient.result(60).choices[0].finish_reason == "length"


def figures(server: ServerProcess) -> str:
    return httpx.get(f"{server.url}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
