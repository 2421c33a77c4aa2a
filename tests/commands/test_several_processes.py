"""Commands that two processes run together, over the ring on this machine."""

import json
import re
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from subprocess import DEVNULL, run
from typing import cast

import mlx.core as mx
import openai
import pytest

from dbrx_fn import generate, train
from dbrx_fn.checkpoints.config_file import read_config
from dbrx_fn.checkpoints.hub import SMALL
from dbrx_fn.model.costs import decode_work
from tests.support.kill_processes import Kind, dense_small, killed, killed_in, training
from tests.support.processes import Finished, finished, free_ports, run_processes, started

ENDLESS = ["-m", "dbrx_fn.generate", "--prompt", "a", "--max-tokens", "2000", "--model"]
"""A command that takes long enough for a signal."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model, dense."""
    return dense_small(tmp_path_factory.mktemp("model") / "small")


def both(arguments: Sequence[str], says: str = "") -> Finished:
    """Runs `python -m dbrx_fn.ARGUMENTS` as two processes. The second must be silent and end well."""
    with started(["-m", *arguments]) as processes:
        if says:
            assert processes[0].stdin is not None
            processes[0].stdin.write(says)
            processes[0].stdin.flush()
        leader, other = finished(processes)
    assert (other.status, other.out, other.err) == (0, "", "")
    return leader


def test_a_drawn_text_is_that_of_one_process(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", str(model), "--prompt", "Once upon", "--max-tokens", "12", "--temp", "0.9", "--json"]
    shared = json.loads(both(["dbrx_fn.generate", *options]).out)
    assert shared["processes"] == 2
    # The seed wasn't given: the second process had the first one's.
    assert generate.main([*options, "--seed", str(shared["seed"])]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert (alone["processes"], alone["tokens"]) == (1, shared["tokens"])


def test_mlx_launch_starts_them(model: Path) -> None:
    launch = [sys.executable, "-c", "from mlx._distributed_utils.launch import main; main()", "-n", "2"]
    launch += ["--backend", "ring", "--starting-port", str(free_ports(1)[0]), "--"]
    command = [sys.executable, "-m", "dbrx_fn.generate", "--model", str(model), "--prompt", "a", "--max-tokens", "3"]
    ended = run([*launch, *command, "--json"], stdin=DEVNULL, capture_output=True, text=True, timeout=200)
    assert json.loads(ended.stdout)["processes"] == 2, ended.stderr


def test_evaluation_is_that_of_one_process(model: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question.")
    options = ["perplexity", str(model), "--data", str(tmp_path / "text.txt"), "--sequence-length", "16", "--json"]
    shared = json.loads(both(["dbrx_fn.evaluate", *options]).out)
    (alone,) = run_processes(["-m", "dbrx_fn.evaluate", *options], 1)
    assert shared["processes"] == 2
    found, expected = (said["models"][0]["nats_per_token"] for said in (shared, json.loads(alone.out)))
    assert found == pytest.approx(expected, rel=1e-6)


def test_each_process_draws_and_measures_its_part() -> None:
    options = ["--shape", "small", "--prompt", "8", "--context", "8", "--batch-size", "1"]
    options += ["--tokens", "2", "--repeats", "1", "--json"]
    shared = json.loads(both(["dbrx_fn.bench", "inference", *options]).out)
    assert shared["processes"] == 2
    (decoding,) = [figure for figure in shared["figures"] if figure["what"] == "decode"]
    whole = decode_work(replace(read_config(SMALL), dtype="float32"), {}, 9, 1)
    # All but the router and the norms is divided.
    assert 0.5 < decoding["bytes"] / whole.bytes < 0.52
    assert 0.5 < decoding["operations"] / whole.operations < 0.52


def test_a_chat_goes_on_over_turns(model: Path) -> None:
    said = both(
        ["dbrx_fn.chat", "--model", str(model), "--max-tokens", "5"], "Hello\n/undo\nWho are you?\n/quit\nNo one\n"
    )
    assert (said.status, len(re.findall("^5 tokens", said.err, re.MULTILINE))) == (0, 2)


def test_a_server_answers_openai_s_client_and_ends_with_its_other_process(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(model), "--prompt", "Once upon", "--max-tokens", "8", "--temp", "0", "--json"]
    assert generate.main(options) == 0
    alone = json.loads(capsys.readouterr().out)["text"]
    with started(["-m", "dbrx_fn.serve", "--model", str(model), "--port", "0"]) as processes:
        assert processes[0].stdout is not None
        url = processes[0].stdout.readline().strip()
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=150, max_retries=0) as client:

            def asked(temperature: float) -> str:
                return (
                    client.completions.create(
                        model="small", prompt="Once upon", max_tokens=8, temperature=temperature, seed=5
                    )
                    .choices[0]
                    .text
                )

            # A reader that goes away cancels its request, of which the other process learns too.
            stream = client.completions.create(model="small", prompt="A", max_tokens=500, stream=True)
            next(iter(stream))
            stream.close()
            with ThreadPoolExecutor() as pool:
                texts = list(pool.map(asked, [0, 0.9, 0, 0.9]))
            assert texts[0] == texts[2] == alone
            assert texts[1] == texts[3] != alone
        assert not killed(processes, 1).problems(1)


@pytest.mark.parametrize("parallel", ["data", "tensor"])
def test_training_is_that_of_one_process_and_goes_on_exactly(parallel: str, tmp_path: Path) -> None:
    options = ["--steps", "6", "--save-every", "3", "--micro-batches", "2"]
    assert train.main(training(tmp_path / "alone", *options)[1:]) == 0
    assert both([*training(tmp_path / "shared", *options), "--parallel", parallel]).status == 0
    assert losses(tmp_path / "shared") == pytest.approx(losses(tmp_path / "alone"), rel=1e-6)
    assert furthest(tmp_path / "shared", tmp_path / "alone") < 1e-4

    for name in ("by two", "by one"):
        shutil.copytree(tmp_path / "shared", tmp_path / name)
        shutil.rmtree(tmp_path / name / "model")
        shutil.rmtree(tmp_path / name / "checkpoints" / "step-00000006")
    assert both(["dbrx_fn.train", "--out", str(tmp_path / "by two"), "--resume", "--parallel", parallel]).status == 0
    assert furthest(tmp_path / "by two", tmp_path / "shared") == 0
    assert train.main(["--out", str(tmp_path / "by one"), "--resume"]) == 0
    assert furthest(tmp_path / "by one", tmp_path / "shared") < 1e-4


def losses(folder: Path) -> list[float]:
    """The training losses of a run."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["cross_entropy"] for line in lines if "cross_entropy" in line]


def furthest(one: Path, other: Path) -> float:
    """The largest difference between two runs' weights."""
    models = [cast(dict[str, mx.array], mx.load(str(run / "model" / "model.safetensors"))) for run in (one, other)]
    return max(float(mx.abs(models[0][name] - models[1][name]).max()) for name in models[1])


@pytest.mark.parametrize(("kind", "victim"), [("generate", 0), ("train", 1)])
def test_all_end_if_one_is_killed(kind: Kind, victim: int, model: Path, tmp_path: Path) -> None:
    problems, _ = killed_in(kind, model, tmp_path, 0.7, victim)
    assert not problems


@pytest.mark.parametrize(("kind", "victim", "later"), [("generate", 0, 0.1), ("generate", 1, 0), ("train", 1, 0)])
def test_a_death_is_told_although_mlx_launch_ends_the_other(
    kind: Kind, victim: int, later: float, model: Path, tmp_path: Path
) -> None:
    endless = [*ENDLESS, str(model)] if kind == "generate" else ["-m", *training(tmp_path / "run", "--steps", "4000")]
    with started(endless) as processes:
        first = processes[0].stdout if kind == "generate" else processes[0].stderr
        assert first is not None
        first.read(1)
        processes[victim].kill()
        # mlx.launch sends it soon.
        time.sleep(later)
        processes[1 - victim].terminate()
        (other,) = finished(processes[1 - victim : 2 - victim])
    assert other.status == 2
    assert f"error: the process of rank {victim} has ended" in other.err


def test_sigterm_for_another_process_than_the_first_ends_all(model: Path) -> None:
    with started([*ENDLESS, str(model)]) as processes:
        assert processes[0].stdout is not None
        processes[0].stdout.read(1)
        processes[1].terminate()
        leader, other = finished(processes)
    assert (leader.status, other.status) == (2, 143)
    assert "error: the process of rank 1 has ended" in leader.err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["dbrx_fn.inspect", str(SMALL)], "This command is for one process, and 2 run here: start it without"),
        (["dbrx_fn.generate", "--prompt", "a"], "2 processes can't share .*groups of .*w2.*start a single process, or"),
        (["dbrx_fn.train", "--out", "x", "--data", "y", "--micro-batches", "3", "--batch-size", "3"], "multiple of 2"),
    ],
    ids=["inspect", "groups", "micro-batches"],
)
def test_what_two_processes_cannot_do_is_refused_once(arguments: list[str], sentence: str) -> None:
    leader = both(arguments)
    assert leader.status == 2
    assert leader.err.count("error:") == 1
    assert re.search(sentence, leader.err)


def test_an_error_in_the_other_process_is_told_by_the_first(model: Path, tmp_path: Path) -> None:
    link = tmp_path / "model"
    link.symlink_to(model)
    # Only the first process finds the model, as on two machines of which one lacks it.
    script = (
        f"import os, sys; from dbrx_fn import generate; folder = {str(link)!r} + 'x' * int(os.environ['MLX_RANK'])\n"
    )
    script += "sys.exit(generate.main(['--model', folder, '--prompt', 'a']))"
    leader, other = run_processes(["-c", script])
    assert leader.status == 2
    assert "error: in the process of rank 1: " in leader.err
    assert "modelx doesn't exist" in leader.err
    assert (other.status, other.err) == (0, "")
