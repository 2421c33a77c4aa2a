"""The HTTP API over a real connection: what is asked is done or refused by name, streamed or whole alike."""

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import mlx.core as mx
import numpy as np
import pytest

from dbrx_fn.model.transformer import score
from dbrx_fn.serving.server import bound
from dbrx_fn.text.chat import encode_chat
from tests.support.running_server import Running, running_server, small_model

PROMPT = "To be, or not to be"
MESSAGES = [{"role": "user", "content": "Who goes there?"}]
COMPLETION = {"prompt": PROMPT, "seed": 3}
CHAT = {"messages": MESSAGES, "seed": 3}
Json = dict[str, Any]


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with running_server() as server:
        yield server


@pytest.fixture(scope="module")
def client(running: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=running.url, timeout=60) as opened:
        yield opened


def post(client: httpx.Client, path: str, body: Json) -> Json:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    found: Json = response.json()
    return found


def refusal(client: httpx.Client, path: str, body: Json, status: int = 400) -> Json:
    response = client.post(path, json=body)
    assert response.status_code == status, response.text
    error: Json = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"].endswith(".")
    return error


def streamed(client: httpx.Client, path: str, body: Json) -> list[Json]:
    """The objects of a stream."""
    with client.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def without_time(answer: Json) -> Json:
    return {name: value for name, value in answer.items() if name not in ("id", "created")}


def until(holds: Any) -> None:
    ends = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < ends
        time.sleep(0.01)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"n": 3, "temperature": 1.2, "max_tokens": 30},
        {"temperature": 0, "stop": [" the", "and"], "max_tokens": 60},
        {"logprobs": 3, "echo": True, "max_tokens": 5},
        {"prompt": ["Who", "What says", PROMPT], "n": 2, "max_tokens": 7},
    ],
)
def test_a_streamed_completion_is_the_whole_one(client: httpx.Client, body: Json) -> None:
    asked = {**COMPLETION, **body}
    whole = post(client, "/v1/completions", asked)
    chunks = streamed(client, "/v1/completions", {**asked, "stream_options": {"include_usage": True}})
    assert chunks[-1]["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    for choice in whole["choices"]:
        own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(part["text"] for part in own) == choice["text"]
        assert [part["finish_reason"] for part in own] == [None] * (len(own) - 1) + [choice["finish_reason"]]
        if "logprobs" in body:
            for name, values in choice["logprobs"].items():
                assert [value for part in own for value in part["logprobs"][name]] == values


def test_a_streamed_chat_is_the_whole_one(client: httpx.Client) -> None:
    asked = {**CHAT, "n": 2, "temperature": 1, "logprobs": True, "top_logprobs": 2, "max_completion_tokens": 20}
    whole = post(client, "/v1/chat/completions", asked)
    chunks = streamed(client, "/v1/chat/completions", asked)
    for choice in whole["choices"]:
        own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert [part["delta"].get("role") for part in own] == ["assistant"] + [None] * (len(own) - 1)
        assert "".join(part["delta"].get("content", "") for part in own) == choice["message"]["content"]
        assert own[-1]["finish_reason"] == choice["finish_reason"]
        entries = [entry for part in own for entry in part["logprobs"]["content"]]
        assert entries == choice["logprobs"]["content"]
        assert all(len(entry["top_logprobs"]) == 2 for entry in entries)


def test_experts_are_those_of_score_s_routing(client: httpx.Client) -> None:
    params, config, tokenizer = small_model()
    asked = {**CHAT, "experts": True, "max_tokens": 12, "ignore_eos": True}
    whole = post(client, "/v1/chat/completions", {**asked, "logprobs": True})["choices"][0]
    prompt = encode_chat(tokenizer, MESSAGES)
    made = tokenizer.encode(whole["message"]["content"])
    _, routing = score(params, mx.array([[*prompt, *made]]), config)
    places = slice(len(prompt) - 1, len(prompt) + len(made) - 1)
    wanted = np.sort(np.array(routing.top_experts)[:, 0, places], axis=-1).swapaxes(0, 1)
    assert whole["experts"] == wanted.tolist()
    assert np.array(whole["experts"]).shape == (12, config.n_layers, config.ffn.moe_top_k)
    parts = [chunk["choices"][0] for chunk in streamed(client, "/v1/chat/completions", asked)]
    assert [experts for part in parts for experts in part["experts"]] == whole["experts"]
    completion = post(client, "/v1/completions", {**asked, "messages": None, "prompt": prompt})["choices"][0]
    assert (completion["text"], completion["experts"]) == (whole["message"]["content"], whole["experts"])
    plain = post(client, "/v1/chat/completions", {**asked, "experts": False})["choices"][0]
    assert "experts" not in plain
    assert plain["message"] == whole["message"]
    assert refusal(client, "/v1/completions", {**COMPLETION, "experts": 1})["param"] == "experts"


def test_all_forms_of_a_prompt_are_answered_alike(client: httpx.Client) -> None:
    _, _, tokenizer = small_model()
    ids = tokenizer.encode(PROMPT)
    (text, *others) = (
        post(client, "/v1/completions", {**COMPLETION, "prompt": prompt})["choices"][0]["text"]
        for prompt in (PROMPT, ids, [PROMPT], [ids], ["Other", ids])
    )
    assert text
    assert others[:3] == [text] * 3
    both = post(client, "/v1/completions", {**COMPLETION, "prompt": [ids, PROMPT]})
    assert [choice["text"] for choice in both["choices"]] == [text, text]


def test_a_choice_has_the_seed_after_the_one_before_it(client: httpx.Client) -> None:
    asked = {**COMPLETION, "temperature": 1}
    choices = post(client, "/v1/completions", {**asked, "n": 3})["choices"]
    alone = [post(client, "/v1/completions", {**asked, "seed": seed})["choices"][0]["text"] for seed in (3, 4, 5)]
    assert [choice["text"] for choice in choices] == alone
    assert len(set(alone)) == 3


def test_log_probabilities_are_those_of_score(client: httpx.Client) -> None:
    params, config, tokenizer = small_model()
    answer = post(client, "/v1/completions", {**COMPLETION, "echo": True, "logprobs": 4, "max_tokens": 6})
    told, text = answer["choices"][0]["logprobs"], answer["choices"][0]["text"]
    made = told["tokens"]
    assert "".join(made) == text
    assert [text[offset:][: len(token)] for offset, token in zip(told["text_offset"], made, strict=True)] == made
    ids = tokenizer.encode(text)
    logits = np.array(score(params, mx.array([ids]), config)[0][0], np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    wanted = [logprobs[place, token] for place, token in enumerate(ids[1:])]
    assert told["token_logprobs"][0] is None
    np.testing.assert_allclose(told["token_logprobs"][1:], wanted, atol=1e-4)
    for place, top in enumerate(told["top_logprobs"][1:]):
        likeliest = np.sort(logprobs[place])[::-1][:4]
        np.testing.assert_allclose(sorted(top.values(), reverse=True)[:4], likeliest, atol=1e-4)
        assert made[place + 1] in top


def test_a_prompt_can_be_scored_without_a_text(client: httpx.Client) -> None:
    asked = {"prompt": PROMPT, "echo": True, "logprobs": 1}
    scored = post(client, "/v1/completions", {**asked, "max_tokens": 0})
    made = post(client, "/v1/completions", {**asked, "max_tokens": 1})
    assert scored["choices"][0]["text"] == PROMPT
    assert scored["usage"]["completion_tokens"] == 0
    told = made["choices"][0]["logprobs"]
    assert scored["choices"][0]["logprobs"] == {name: values[:-1] for name, values in told.items()}


def test_usage_counts_tokens(client: httpx.Client) -> None:
    _, _, tokenizer = small_model()
    chat = post(client, "/v1/chat/completions", {**CHAT, "n": 2, "max_tokens": 5, "ignore_eos": True})
    prompt = len(encode_chat(tokenizer, MESSAGES))
    assert chat["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": 10,
        "total_tokens": prompt + 10,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_a_stop_string_ends_a_text_and_frees_its_row(client: httpx.Client, running: Running) -> None:
    asked = {**COMPLETION, "temperature": 0, "max_tokens": 60}
    text = post(client, "/v1/completions", asked)["choices"][0]["text"]
    stop = text[20:24]
    before = dict(running.engine.statistics().finished).get("cancelled", 0)
    cut = post(client, "/v1/completions", {**asked, "stop": stop, "max_tokens": 1500, "ignore_eos": True})
    assert cut["choices"][0]["text"] == text[: text.index(stop)]
    assert cut["choices"][0]["finish_reason"] == "stop"
    assert cut["usage"]["completion_tokens"] < 60
    until(lambda: not running.engine.statistics().decoding)
    assert dict(running.engine.statistics().finished)["cancelled"] == before + 1


def test_whoever_goes_away_is_served_no_longer(client: httpx.Client, running: Running) -> None:
    asked = {**CHAT, "n": 4, "max_tokens": 1500, "ignore_eos": True, "stream": True}
    with client.stream("POST", "/v1/chat/completions", json=asked) as response:
        next(response.iter_lines())
        assert running.engine.statistics().decoding
    until(lambda: running.engine.statistics().decoding == 0)
    with pytest.raises(httpx.ReadTimeout):
        client.post("/v1/chat/completions", json={**asked, "stream": False}, timeout=1)
    until(lambda: running.engine.statistics().decoding == 0)


NOT_SUPPORTED = {
    "/v1/completions": {"suffix": "x", "best_of": 2, "nix": 1},
    "/v1/chat/completions": {
        "audio": {"voice": "x"},
        "functions": [{"name": "x"}],
        "function_call": {"name": "x"},
        "metadata": {"a": "b"},
        "modalities": ["text", "audio"],
        "prediction": {"type": "content", "content": "x"},
        "reasoning_effort": "low",
        "service_tier": "priority",
        "store": True,
        "tools": [{"type": "function", "function": {"name": "x"}}],
        "tool_choice": "required",
        "verbosity": "low",
        "web_search_options": {},
        "suffix": "x",
        "echo": True,
        "best_of": 1,
        "nix": 1,
    },
}


@pytest.mark.parametrize("path", NOT_SUPPORTED)
def test_what_is_not_supported_is_refused_by_name(client: httpx.Client, path: str) -> None:
    base = COMPLETION if path == "/v1/completions" else CHAT
    for name, value in NOT_SUPPORTED[path].items():
        error = refusal(client, path, {**base, name: value})
        assert error["param"] == name
        assert name in error["message"]
        assert error["code"] in ("unsupported_parameter", "unknown_parameter")


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "temperature": [-0.1, 2.1, "1", True, [], 10**400],
        "top_p": [-0.5, 1.5, 0],
        "min_p": [-1, 2],
        "top_k": [-2, 1.5, "3"],
        "presence_penalty": [-2.5, 2.5],
        "frequency_penalty": [3],
        "repetition_penalty": [-1, 0],
        "max_tokens": [0, -1, 1.5, "5", 2**40],
        "n": [0, 65, -1, 1.0, True],
        "seed": [1.5, 2**70, "x"],
        "stop": ["", [""], ["a"] * 5, [1], 3, "x" * 300],
        "stream": [1, "true"],
        "logit_bias": [{"x": 1}, {"1": "x"}, {"1": 101}, [], {"99999": 1}, {"-1": 1}],
        "user": [1],
        "ignore_eos": ["x"],
    }.items(),
)
def test_a_value_out_of_its_range_is_refused(client: httpx.Client, name: str, values: list[Any]) -> None:
    for path, base in (("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)):
        for value in values:
            response = client.post(path, content=json.dumps({**base, name: value}))
            assert response.status_code == 400, (path, value, response.text)
            assert name in response.json()["error"]["message"]


@pytest.mark.parametrize("prompt", [[], {}, 3, "", [""], [[]], [1, "x"], [[1], 2], [4096], [-1], [True], [1.0], [None]])
def test_a_prompt_that_is_none_is_refused(client: httpx.Client, prompt: object) -> None:
    assert "prompt" in refusal(client, "/v1/completions", {"prompt": prompt})["message"].lower()


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        "x",
        [1],
        [{}],
        [{"role": "user"}],
        [{"role": "king", "content": "x"}],
        [{"role": "system", "content": "x"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": "x", "name": "x"}],
        [{"role": "assistant", "content": None, "tool_calls": [{}]}],
    ],
)
def test_a_conversation_that_is_none_is_refused(client: httpx.Client, messages: object) -> None:
    assert refusal(client, "/v1/chat/completions", {"messages": messages})["message"]


def test_a_text_that_never_fits_is_refused(client: httpx.Client) -> None:
    refusal(client, "/v1/completions", {"prompt": [1] * 2049})
    refusal(client, "/v1/completions", {"prompt": "to be or " * 20_000})
    # What nobody asked for is cut to what fits.
    answer = post(client, "/v1/completions", {"prompt": [1] * 2045, "ignore_eos": True})
    assert answer["usage"]["completion_tokens"] == 4


def test_parts_of_a_content_are_one_text(client: httpx.Client) -> None:
    parts = [{"type": "text", "text": "Who goes "}, {"type": "text", "text": "there?"}]
    whole = post(client, "/v1/chat/completions", CHAT)
    assert (
        post(client, "/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": parts}]})["choices"]
        == whole["choices"]
    )


def test_fields_that_ask_for_nothing_are_taken(client: httpx.Client) -> None:
    extra = {"tools": [], "tool_choice": "none", "store": False, "user": "me", "response_format": {"type": "text"}}
    plain = without_time(post(client, "/v1/chat/completions", CHAT))
    assert (
        without_time(post(client, "/v1/chat/completions", {**CHAT, **extra, "audio": None, "model": "small"})) == plain
    )


def test_text_becomes_tokens_and_tokens_text(client: httpx.Client) -> None:
    _, _, tokenizer = small_model()
    found = post(client, "/tokenize", {"prompt": PROMPT, "return_token_strs": True})
    assert found["tokens"] == tokenizer.encode(PROMPT)
    assert "".join(found["token_strs"]) == PROMPT
    assert (found["count"], found["max_model_len"]) == (len(found["tokens"]), 2048)
    assert post(client, "/detokenize", {"tokens": found["tokens"]}) == {"prompt": PROMPT}
    chat = post(client, "/tokenize", {"messages": MESSAGES})["tokens"]
    assert chat == encode_chat(tokenizer, MESSAGES)
    assert "prompt" in refusal(client, "/tokenize", {})["message"]
    assert "tokens" in refusal(client, "/detokenize", {"tokens": ["x"]})["message"]


def test_models_health_and_figures_are_told(client: httpx.Client) -> None:
    (model,) = client.get("/v1/models").json()["data"]
    assert client.get("/v1/models/small").json() == model
    assert model["moe_num_experts"] == 16
    assert (model["id"], model["object"], model["max_model_len"]) == ("small", "model", 2048)
    error = client.get("/v1/models/large/one").json()["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert refusal(client, "/v1/completions", {**COMPLETION, "model": "large"}, 404)["code"] == "model_not_found"
    assert client.get("/health").json() == {"status": "ok"}
    post(client, "/v1/completions", COMPLETION)
    figures = client.get("/metrics").text
    for line in (
        'dbrx_fn_http_requests_total{endpoint="/v1/completions",status="200"}',
        'dbrx_fn_requests{state="decoding"} ',
        "dbrx_fn_time_to_first_token_seconds_count",
        "dbrx_fn_time_between_tokens_seconds_bucket",
        'dbrx_fn_tokens_total{kind="made"}',
        'dbrx_fn_device_memory_bytes{kind="active"}',
    ):
        assert line in figures


def test_what_is_not_there_is_an_error_object(client: httpx.Client) -> None:
    for method, path, status in (
        ("GET", "/nix", 404),
        ("GET", "/v1/completions", 405),
        ("POST", "/v1/models", 405),
        ("DELETE", "/v1/models/small", 405),
        ("POST", "/v1/completions/", 404),
    ):
        response = client.request(method, path)
        assert response.status_code == status
        assert response.json()["error"]["type"] == "invalid_request_error"


def test_log_likelihoods_as_lm_evaluation_harness_asks_for_them_are_those_of_score(client: httpx.Client) -> None:
    params, config, _ = small_model()
    info = client.get("/tokenizer_info").json()
    assert info.keys() == {"bos_token", "eos_token", "chat_template"}
    pairs = [("To be, or not", " to be"), ("And God said,", " Let there be light"), ("x", "zebra")]
    contexts: list[list[int]] = []
    wholes: list[list[int]] = []
    for context, continuation in pairs:
        for which, asked_text in ((contexts, context), (wholes, context + continuation)):
            which.append(post(client, "/tokenize", {"prompt": asked_text, "add_special_tokens": False})["tokens"])
    # Its `LocalCompletionsAPI._create_payload` and `parse_logprobs`.
    asked = {"model": "small", "prompt": wholes, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234}
    choices = post(client, "/v1/completions", {**asked, "echo": True})["choices"]
    for before, whole, choice in zip(contexts, wholes, choices, strict=True):
        told = choice["logprobs"]["token_logprobs"][len(before) : -1]
        tops = choice["logprobs"]["top_logprobs"][len(before) : -1]
        is_greedy = all(logprob == max(top.values()) for logprob, top in zip(told, tops, strict=True))
        logits = np.array(score(params, mx.array([whole]), config)[0][0], np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        places = range(len(before) - 1, len(whole) - 1)
        np.testing.assert_allclose(sum(told), sum(logprobs[place, whole[place + 1]] for place in places), atol=1e-4)
        assert is_greedy == all(logprobs[place].argmax() == whole[place + 1] for place in places)


def test_connections_are_such_that_asyncio_sends_each_token_at_once() -> None:
    with bound("127.0.0.1", 0) as address:
        address.listen()
        with socket.create_connection(address.getsockname()), address.accept()[0] as accepted:
            assert (accepted.type, accepted.proto) == (socket.SOCK_STREAM, socket.IPPROTO_TCP)
