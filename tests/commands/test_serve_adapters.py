"""`serve --adapter-path`: one adapter for the model, or several that requests choose by their names."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import mlx.core as mx
import openai
import pytest

from dbrx_fn.checkpoints.adapter_files import save_adapters
from dbrx_fn.checkpoints.loader import load, load_tokenizer
from dbrx_fn.generation.sampling import GREEDY
from dbrx_fn.generation.stream import stream_text
from dbrx_fn.model.config import AttnConfig, Config, FFNConfig
from dbrx_fn.model.params import init_params
from dbrx_fn.serve import main
from tests.support.adapters import with_random_adapters, write_model_with_adapters
from tests.support.processes import finished, started
from tests.support.server_process import ServerProcess, server_process

CONFIG = Config(
    d_model=32,
    n_heads=2,
    n_layers=2,
    vocab_size=264,
    max_seq_len=2048,
    attn=AttnConfig(kv_n_heads=2),
    ffn=FFNConfig(16, 4, 2),
    dtype="float32",
)
PROMPT = "Who goes there?"
LIMITS = ("--decode-concurrency", "4", "--capacity", "2048")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, and `adapters-1` to `adapters-3` of it."""
    path = tmp_path_factory.mktemp("served")
    write_model_with_adapters(path, CONFIG, [("attention", "experts"), ("experts", "head"), ("attention", "router")])
    return path


def text_alone(folder: Path, adapters: str | None) -> str:
    """The greedy text of the model with these adapters, by this process."""
    params, config = load(folder / "model", adapter_path=None if adapters is None else folder / adapters)
    tokenizer = load_tokenizer(folder / "model")
    prompt = tokenizer.encode(PROMPT)
    pieces = stream_text(params, config, tokenizer, prompt, max_tokens=24, sampling=GREEDY, stop_tokens=())
    return "".join(piece.text for piece in pieces)


def asked(client: openai.OpenAI, model: str) -> str:
    answer = client.completions.create(
        model=model, prompt=PROMPT, max_tokens=24, temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.model == model
    return answer.choices[0].text


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ServerProcess]:
    named = [f"--adapter-path={name}={folder / f'adapters-{n}'}" for n, name in enumerate(("hamlet", "lear", "mac"), 1)]
    with server_process("--model", str(folder / "model"), *LIMITS, *named) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as opened:
        yield opened


def test_one_adapter_answers_as_the_model(folder: Path) -> None:
    adapters = str(folder / "adapters-1")
    with (
        server_process("--model", str(folder / "model"), *LIMITS, "--adapter-path", adapters) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        assert [model.id for model in client.models.list()] == ["model"]
        assert asked(client, "model") == text_alone(folder, "adapters-1") != text_alone(folder, None)


def test_the_model_of_a_request_chooses_the_adapter(folder: Path, client: openai.OpenAI) -> None:
    expected = {"model": text_alone(folder, None)}
    expected |= {name: text_alone(folder, f"adapters-{n}") for n, name in enumerate(("hamlet", "lear", "mac"), 1)}
    assert len(set(expected.values())) == 4
    names = [*expected, *reversed(expected)]
    with ThreadPoolExecutor(8) as threads:
        # All at once, so that rows of one batch differ.
        assert list(threads.map(lambda name: asked(client, name), names)) == [expected[name] for name in names]


def test_models_are_listed_with_what_they_stand_beside(client: openai.OpenAI) -> None:
    listed = {model.id: (model.model_extra or {})["parent"] for model in client.models.list()}
    assert listed == {"model": None, "hamlet": "model", "lear": "model", "mac": "model"}
    assert client.models.retrieve("lear").owned_by == "dbrx_fn"


def test_streams_and_chats_are_told_which_model_answers(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": PROMPT}]
    chunks = client.chat.completions.create(model="lear", messages=messages, max_tokens=3, stream=True)
    assert {chunk.model for chunk in chunks} == {"lear"}


def test_an_unknown_model_is_told_the_names_there_are(server: ServerProcess, client: openai.OpenAI) -> None:
    with pytest.raises(
        openai.NotFoundError, match="'othello' where one of 'model', 'hamlet', 'lear', 'mac' is"
    ) as error:
        asked(client, "othello")
    assert (error.value.code, error.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("othello")
    for name, status in (("mac", 200), ("othello", 404)):
        assert httpx.post(f"{server.url}/tokenize", json={"model": name, "prompt": "a"}).status_code == status


def test_processes_that_share_a_model_refuse_adapters(folder: Path) -> None:
    words = ["--model", str(folder / "model"), "--port", "0", f"--adapter-path=lear={folder / 'adapters-1'}"]
    with started(["-m", "dbrx_fn.serve", *words]) as processes:
        leader, other = finished(processes)
    assert (leader.status, leader.out, other.err) == (2, "", "")
    assert leader.err.startswith("error: Adapters can't be shared by several processes yet")


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], folder: Path) -> Callable[..., str]:
    """Runs the command, which must end with status 2 and one sentence."""

    def run(*values: object) -> str:
        words = [f"--adapter-path={value}" for value in values]
        assert main(["--model", str(folder / "model"), *LIMITS, "--port", "0", *words]) == 2
        out, error = capsys.readouterr()
        assert (out, error.startswith("error: "), error.count("\n")) == ("", True, 1)
        return error

    return run


def test_adapters_that_cannot_be_served_are_refused_in_one_sentence(
    refused: Callable[..., str], folder: Path, tmp_path: Path
) -> None:
    one, other = folder / "adapters-1", folder / "adapters-2"
    wider = replace(CONFIG, d_model=64, n_heads=4)
    tree = with_random_adapters(init_params(wider, mx.random.key(0)), wider, ("attention",))
    save_adapters(tmp_path / "wider", tree, wider)
    assert "gives the name 'lear' twice" in refused(f"lear={one}", f"lear={other}")
    assert "gives the name 'model', which is the model's" in refused(f"model={one}")
    assert "has no name, where several are given" in refused(f"lear={one}", other)
    assert "is '=x' where NAME=FOLDER is expected" in refused("=x")
    assert "is 'lear=' where NAME=FOLDER is expected" in refused("lear=")
    assert "of the adapters' tensors don't fit the model" in refused(f"lear={one}", f"wider={tmp_path / 'wider'}")
    assert "doesn't exist where a folder with adapters is expected" in refused(f"lear={tmp_path / 'none'}")
    # With a "/" before "=", it is a folder.
    assert f"{tmp_path}/a=b doesn't exist where a folder" in refused(f"{tmp_path}/a=b")
