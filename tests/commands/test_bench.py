"""`python -m dbrx_fn.bench`: it prints what it measured, of what was asked for. Its times decide nothing."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from dbrx_fn.bench import main
from dbrx_fn.benchmarks.inference import Program, measure_inference, our_program
from dbrx_fn.benchmarks.llama_cpp import check_llama_cpp
from dbrx_fn.benchmarks.machine import MachineLimits
from dbrx_fn.benchmarks.plan import Cases, plan_checkpoint, plan_random
from dbrx_fn.benchmarks.training import BILLION
from dbrx_fn.checkpoints.config_file import config_to_dict
from dbrx_fn.checkpoints.saver import save
from dbrx_fn.errors import InputError
from dbrx_fn.generation.stream import stream_tokens
from dbrx_fn.model.config import DBRX, AttnConfig, Config, FFNConfig
from dbrx_fn.model.costs import decode_work, prefill_work, weight_bytes
from dbrx_fn.model.params import init_params, param_count
from dbrx_fn.model.quantization import Quantization, quantize
from dbrx_fn.ops.formats import Format

TINY = Config(
    d_model=64,
    n_heads=2,
    n_layers=3,
    max_seq_len=512,
    vocab_size=20,
    attn=AttnConfig(clip_qkv=8.0, kv_n_heads=1),
    ffn=FFNConfig(ffn_hidden_size=64, moe_num_experts=4, moe_top_k=2),
    dtype="float32",
)
LIMITS = MachineLimits(
    backend="cpu",
    device="a model",
    mlx="0",
    blas=None,
    dtype="float32",
    memory=1,
    memory_rates=((1, 4e9), (2, 1e9)),
    matmul_rate=1e12,
)
SHORT = ["--prompt", "5", "--context", "7", "30", "--batch-size", "1", "3", "--tokens", "2", "--repeats", "2"]


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    (tmp_path / "tiny.json").write_text(json.dumps(config_to_dict(TINY)))
    return tmp_path / "tiny.json"


@pytest.fixture(autouse=True)
def quickly_measured_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's limits take seconds, and are tested by themselves."""
    monkeypatch.setattr("dbrx_fn.bench.measure_limits", lambda dtype: replace(LIMITS, dtype=dtype))
    monkeypatch.setattr("dbrx_fn.benchmarks.training.matmul_rate", lambda dtype: 1e12)


def figures(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    assert main(["inference", *options, *SHORT, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    return report["model"], report["figures"]


def test_the_billion_is_that() -> None:
    assert 1.25e9 < param_count(BILLION) < 1.35e9


def test_json_and_table_of_training_say_the_same(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["training", "--shape", str(config_file), "--batch-size", "2", "--sequence-length", "8", "--steps", "2"]
    assert main([*arguments, "--json"]) == 0
    (speed,) = json.loads(capsys.readouterr().out)
    assert speed["parameters"] == param_count(TINY)
    assert speed["tokens_per_second"] == pytest.approx(16 / speed["step"])
    done = speed["tokens_per_second"] * speed["operations_per_token"]
    assert speed["fraction_of_bound"] == pytest.approx(done / speed["matmul_rate"])
    assert main(arguments) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert "of bound" in header
    assert str(config_file) in row


def test_every_case_of_inference_is_measured_against_its_bound(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, made = figures(capsys, "--shape", str(config_file), "--quantize", "4", "--layers", "2")
    config = replace(TINY, n_layers=2)
    assert (model["random"], model["parameters"]) == (True, param_count(config))
    formats = plan_random("", TINY, 2, None, Quantization()).formats
    assert model["formats"] == dict.fromkeys(formats, "affine 4:64")
    assert model["weight_bytes"] == weight_bytes(config, formats)
    cases = [(figure["what"], figure["tokens"], figure["batch_size"]) for figure in made]
    decoded = [("decode", context, batch_size) for context in (7, 30) for batch_size in (1, 3)]
    assert cases == [("draw", 0, 1), ("prefill", 5, 1), ("first token", 5, 1), *decoded]
    for figure in made[1:]:
        steps = 4 + 2 * 2 + 1
        tokens, batch_size = figure["tokens"], figure["batch_size"]
        if figure["what"] == "decode":
            work = decode_work(config, formats, tokens + steps / 2, batch_size)
            assert figure["tokens_per_second"] == pytest.approx(batch_size / figure["seconds"])
        else:
            work = prefill_work(config, formats, tokens)
            assert figure["tokens_per_second"] == pytest.approx(tokens / figure["seconds"])
        assert (figure["operations"], figure["bytes"]) == (work.operations, work.bytes)
        assert figure["bound"] == work.seconds(1e12, 1e9)
        assert figure["fraction_of_bound"] == pytest.approx(figure["bound"] / figure["seconds"])
        assert figure["fastest"] <= figure["seconds"] <= figure["slowest"]
        assert figure["repeats"] == 2
        assert (figure["host"] is not None) == (figure["what"] == "decode")
        assert figure["host"] is None or 0 < figure["host"] <= figure["slowest"]
        assert figure["peak_memory"] >= model["weight_bytes"]
        assert figure["missing"] is None


def test_steps_of_several_tokens_are_measured_against_their_bound(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, made = figures(capsys, "--shape", str(config_file), "--together", "1", "4")
    decoded = [figure for figure in made if figure["what"] == "decode" and figure["tokens"] == 7]
    assert [(figure["batch_size"], figure["together"]) for figure in decoded] == [(1, 1), (1, 4), (3, 1), (3, 4)]
    for figure in decoded:
        work = decode_work(TINY, {}, 7 + (4 + 2 * 2 + 4) / 2, figure["batch_size"], figure["together"])
        assert (figure["operations"], figure["bytes"]) == (work.operations, work.bytes)
        made_in_step = figure["batch_size"] * figure["together"]
        assert figure["tokens_per_second"] == pytest.approx(made_in_step / figure["seconds"])


def test_a_checkpoint_is_loaded_cut_and_quantized(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    params = init_params(TINY, mx.random.key(0))
    save(tmp_path / "dense", params, TINY)
    only_experts = Quantization(Format(8, 32), None, None, None)
    save(tmp_path / "quantized", quantize(params, TINY, only_experts), TINY)
    model, (load, *_) = figures(capsys, "--model", str(tmp_path / "dense"))
    assert (load["what"], load["bound_by"], load["bytes"]) == ("load", "files", model["weight_bytes"])
    assert load["fraction_of_bound"] == pytest.approx(load["bound"] / load["seconds"])
    assert model["weight_bytes"] == weight_bytes(TINY, {})
    model, (load, *_) = figures(capsys, "--model", str(tmp_path / "quantized"), "--layers", "1", "--attention", "4:32")
    assert load["bound"] is None
    assert set(model["formats"].values()) == {"affine 8:32", "affine 4:32"}
    assert {path.split(".")[2] for path in model["formats"]} == {"0"}
    assert model["config"]["n_layers"] == 1
    assert main(["inference", "--model", str(tmp_path / "quantized"), "--experts", "4"]) == 2
    assert "is quantized already" in capsys.readouterr().err


def test_the_small_model_is_what_is_measured_if_nothing_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inference", *SHORT]) == 0
    model, machine, header, load, *rows = capsys.readouterr().out.splitlines()
    assert "5 layers, 6.9M parameters, 3.9M active, 9.08 bits a weight, float32" in model
    assert "reads 1.0 GB/s from memory and at most 4.0 from caches, multiplies 1.000 TFLOP/s" in machine
    assert "of bound" in header
    assert re.search(r"load .* files ", load)
    assert len(rows) == 6
    assert all(row.rstrip().endswith("MiB") for row in rows)


@pytest.mark.parametrize("together", [1, 3])
def test_what_is_timed_makes_the_tokens_that_users_get(together: int) -> None:
    params = init_params(replace(TINY, initializer_range=0.5), mx.random.key(5))
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    expected = list(stream_tokens(params, TINY, prompt, max_tokens=12))
    assert len(set(expected)) > 3
    # Nothing was before: the cache of the prompt's tokens is decoded into, one by one. Of several only the first stays.
    step = our_program(params, TINY).decoder(0, 2, 64, together)
    for token in prompt:
        made = step(mx.array([token, token], mx.int32))
    for wanted in expected:
        assert made.tolist() == [wanted, wanted]
        made = step(made)


def test_what_another_program_cannot_do_is_missing_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(*_: object) -> Any:
        raise RuntimeError("not implemented\nsomewhere")

    params = init_params(TINY, mx.random.key(0))
    cases = Cases((5,), (7,), (1,), 2, 1)
    programs = [our_program(params, TINY), Program("other", TINY, refuse, refuse, refuse)]
    made = measure_inference(programs, plan_random("tiny", TINY, None, None, None), cases, LIMITS)
    assert [figure.program for figure in made] == ["dbrx_fn", "other"] * 3
    assert {figure.missing for figure in made[::2]} == {None}
    assert {(figure.missing, figure.seconds) for figure in made[1::2]} == {("RuntimeError: not implemented", None)}


def test_memory_that_runs_out_is_a_missing_figure_and_any_other_error_is_raised() -> None:
    def failing(message: str) -> Program:
        def fail(*_: object) -> Any:
            raise RuntimeError(message)

        return Program("dbrx_fn", TINY, fail, fail, fail)

    planned, cases = plan_random("tiny", TINY, None, None, None), Cases((5,), (7,), (1,), 2, 1)
    made = measure_inference([failing("[malloc] Unable to allocate 8 bytes.")], planned, cases, LIMITS)
    assert all("Unable to allocate" in str(figure.missing) for figure in made)
    with pytest.raises(RuntimeError, match="shapes"):
        measure_inference([failing("shapes differ")], planned, cases, LIMITS)


def test_a_picture_shows_every_case(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures(capsys, "--shape", str(config_file), "--picture", str(tmp_path / "roof.svg"))
    words = " ".join(re.findall(r"<!-- (.*?) -->", (tmp_path / "roof.svg").read_text()))
    for label in ("prefill 5", "decode 7 x 1", "decode 7 x 3", "decode 30 x 3", "dbrx_fn", "1.0 GB/s, 1 TFLOP/s"):
        assert label in words


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["training", "--steps", "0"], "--steps is 0"),
        (["training", "--shape", "nowhere.json"], "nowhere.json doesn't exist"),
        (["inference", "--shape", "nowhere.json"], "nowhere.json doesn't exist"),
        (["inference", "--model", "nowhere"], "nowhere doesn't exist"),
        (["inference", "--model", "a", "--shape", "small"], "--model and --shape are both given"),
        (["inference", "--prompt", "8", "0"], "--prompt is 0"),
        (["inference", "--batch-size", "-1"], "--batch-size is -1"),
        (["inference", "--prompt", "4000"], "--prompt comes to 4000 tokens and the model's context holds 2048"),
        (["inference", "--context", "2048"], "--context comes to 2213 tokens, the 165 of decoding included,"),
        (["inference", "--layers", "7"], "--layers is 7 where 1 to 5"),
        (["inference", "--shape", "small", "--quantize", "7"], "--quantize is 7"),
        (["inference", "--shape", "small", "--quantize", "4:128"], "group_size is 128 where a divisor of 64"),
        (["inference", "--picture", "roof.pdf"], "roof.pdf is not the name of a picture"),
        (["inference", "--picture", "nowhere/roof.png"], "nowhere is not a folder"),
    ],
)
def test_what_cannot_be_measured(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(options) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert words in err
    assert len(err.splitlines()) == 1


def test_a_model_that_is_too_large(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    huge = replace(TINY, d_model=2**16, n_layers=400)
    (tmp_path / "huge.json").write_text(json.dumps(config_to_dict(huge)))
    assert main(["training", "--shape", str(tmp_path / "huge.json")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: The model's ")
    assert "GiB for training" in err
    assert err.count("\n") == 1
    # All of DBRX in 4 bits fits a GPU of 80 GB, and not with a batch of long contexts.
    monkeypatch.setattr("dbrx_fn.benchmarks.plan.memory_size", lambda: 80 * 10**9)
    monkeypatch.setattr("dbrx_fn.bench.make_weights", lambda planned: pytest.fail("weights were made"))
    long = ["--context", "8192", "--batch-size", "8"]
    assert main(["inference", "--shape", "dbrx", "--dtype", "bfloat16", "--quantize", "4", *long]) == 2
    assert "The weights need 68.9 GiB and the largest cache 12.5 GiB" in capsys.readouterr().err
    planned = plan_random("dbrx", DBRX, None, "bfloat16", Quantization())
    assert weight_bytes(planned.config, planned.formats) + 160 * 1024 * 1024 < 80 * 10**9


def test_without_mlx_lm_the_error_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "mlx_lm", None)
    assert main(["inference", "--peer", "mlx-lm"]) == 2
    assert capsys.readouterr().err == (
        "error: --peer mlx-lm needs mlx-lm, which isn't installed: pip install mlx-lm.\n"
    )


def test_without_llama_cpp_python_the_error_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    assert main(["inference", "--peer", "llama.cpp"]) == 2
    assert capsys.readouterr().err == (
        "error: --peer llama.cpp needs llama-cpp-python, which isn't installed: pip install llama-cpp-python (it"
        " compiles llama.cpp for minutes).\n"
    )


@pytest.mark.parametrize(
    ("config", "quantization", "words"),
    [
        (
            TINY,
            Quantization(router=None, experts=Format(4, 32), attention=Format(8, 32)),
            "quantize all matrices to one",
        ),
        (TINY, Quantization(router=None, experts=Format(6, 32)), "measures Q8_0 and Q4_0 beside 8 and 4 bits"),
        (replace(TINY, ffn=replace(TINY.ffn, ffn_act_fn="gelu")), None, "llama.cpp computes DBRX only with"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    config: Config, quantization: Quantization | None, words: str
) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        check_llama_cpp(plan_random("tiny", config, None, None, quantization))


def test_a_checkpoint_is_planned_from_its_headers(tmp_path: Path) -> None:
    save(tmp_path / "dense", init_params(TINY, mx.random.key(0)), TINY)
    planned = plan_checkpoint(str(tmp_path / "dense"), 2, "float16", Quantization())
    assert planned.config == replace(TINY, n_layers=2, dtype="float16")
    assert len(planned.formats) == 2 * 5 + 2
