"""`python -m dbrx_fn.evaluate perplexity`: the figures of `compare`, sizes by hand, and every error a sentence."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import dbrx_fn.evaluate
from dbrx_fn.checkpoints.loader import load, load_tokenizer
from dbrx_fn.checkpoints.saver import save
from dbrx_fn.cli import terminal
from dbrx_fn.cli.command import INTERRUPTED
from dbrx_fn.data.corpus import read_documents
from dbrx_fn.data.token_file import write_token_file
from dbrx_fn.evaluate import main
from dbrx_fn.evaluation.comparison import Model, compare
from dbrx_fn.model.config import AttnConfig, Config, FFNConfig
from dbrx_fn.model.params import param_count
from dbrx_fn.model.quantization import Quantization, dequantize, quantize
from dbrx_fn.ops.formats import Format
from dbrx_fn.random_checkpoint import write_random_checkpoint
from dbrx_fn.text.bpe import SMALLEST_VOCABULARY
from tests.support.tiny_runs import sentences

CONFIG = Config(
    d_model=64,
    n_heads=2,
    n_layers=2,
    vocab_size=SMALLEST_VOCABULARY,
    attn=AttnConfig(kv_n_heads=1),
    ffn=FFNConfig(ffn_hidden_size=64, moe_num_experts=4, moe_top_k=2),
    # Large enough for logits that differ.
    initializer_range=0.3,
    dtype="float32",
)
FOUR = Format(4, 32)
SIZES = ["--sequence-length", "32", "--batch-size", "3"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, what was made of it with and without its routers, and a text."""
    folder = tmp_path_factory.mktemp("made")
    write_random_checkpoint(folder / "dense", CONFIG, mx.random.key(0))
    params, config = load(folder / "dense")
    for name, router in (("four", None), ("four-router", FOUR)):
        quantized = quantize(params, config, Quantization(FOUR, FOUR, FOUR, FOUR, router))
        save(folder / name, quantized, config, tokenizer_files=folder / "dense")
    (folder / "text.txt").write_text(" ".join(sentences(5)))
    return folder


def arguments(made: Path, *models: str, data: Path | None = None) -> list[str]:
    names = [str(made / model) for model in models]
    return ["perplexity", *names, "--data", str(data or made / "text.txt"), *SIZES]


def printed_json(made: Path, *models: str, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> Any:
    assert main([*arguments(made, *models), "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_has_the_figures_of_compare(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of quantized models on a CPU, what they stand for."""
    names = ("dense", "four", "four-router")
    found = printed_json(made, *names, options=(), capsys=capsys)

    def model(name: str) -> Model:
        params, config = load(made / name)
        return Model(dequantize(params, config), config)

    text = write_token_file(tmp_path / "text", read_documents([made / "text.txt"]), load_tokenizer(made / "dense"))
    first, *others = map(model, names)
    evaluation, comparisons = compare(first, others, text, batch_size=3, sequence_length=32)
    assert (found["text_bytes"], found["tokens"], found["sequence_length"]) == (text.bytes, len(text) - 1, 32)
    assert [line["model"] for line in found["models"]] == [str(made / name) for name in names]
    assert [line["perplexity"] for line in found["models"]] == pytest.approx(
        [one.perplexity for one in (evaluation, *(comparison.evaluation for comparison in comparisons))], rel=1e-6
    )
    assert found["models"][0]["bits_per_byte"] == evaluation.bits_per_byte
    assert found["models"][0]["kl_divergence"] is None
    for line, comparison in zip(found["models"][1:], comparisons, strict=True):
        assert line["kl_divergence"] == pytest.approx(comparison.kl_divergence, rel=1e-5)
        assert line["top1_agreement"] == comparison.top1_agreement
        assert line["router_agreement_by_layer"] == comparison.router_agreement.tolist()
        assert line["router_agreement"] == pytest.approx(sum(comparison.router_agreement) / 2)
        assert comparison.kl_divergence > 0
        assert 0 < comparison.router_agreement.min() <= comparison.router_agreement.max() < 1


def test_bits_per_weight_count_all_that_is_stored(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed_json(made, "dense", "four", "four-router", options=(), capsys=capsys)["models"]
    weights, routers, norms = param_count(CONFIG), 2 * 4 * 64, 5 * 64
    assert [line["parameters"] for line in lines] == [weights] * 3
    # 4 bits, and for each group of 32 a scale and a bias of 32 bits.
    four = (6 * (weights - routers - norms) + 32 * (routers + norms)) / weights
    assert [line["bits_per_weight"] for line in lines] == pytest.approx([32, four, four - 26 * routers / weights])
    assert [line["quantized_router"] for line in lines] == [False, False, True]
    for line in lines:
        assert line["file_bytes"] == (Path(line["model"]) / "model.safetensors").stat().st_size
        assert line["file_bytes"] > line["bits_per_weight"] * weights / 8


def test_the_table_says_the_same(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = printed_json(made, "dense", "four", options=(), capsys=capsys)
    assert main(arguments(made, "dense", "four")) == 0
    out, err = capsys.readouterr()
    assert err == ""
    summary, _, header, dense, four, _, _, layers, *by_layer = out.splitlines()
    assert summary == f"{found['text_bytes']:,} bytes of text, {found['tokens']:,} tokens to predict, windows of 32"
    assert header.split()[:3] == ["model", "bits/weight", "size"]
    line = found["models"][1]
    shares = (line["top1_agreement"], line["router_agreement"], min(line["router_agreement_by_layer"]))
    assert dense.split()[:3] == ["1", str(made / "dense"), "32.00"]
    assert len(dense.split()) == 8
    assert four.split()[6:] == [
        f"{line['perplexity']:,.3f}",
        f"{line['bits_per_byte']:.4f}",
        f"{line['kl_divergence']:.6f}",
        *(f"{100 * share:.2f}%" for share in shares),
    ]
    assert layers.split() == ["layer", "2"]
    assert [row.split() for row in by_layer] == [
        [str(layer), f"{100 * share:.2f}%"] for layer, share in enumerate(line["router_agreement_by_layer"])
    ]


def test_one_model_is_measured_alone(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = printed_json(made, "four", options=(), capsys=capsys)["models"]
    beside = printed_json(made, "dense", "four", options=(), capsys=capsys)["models"]
    assert [line["nats_per_token"] for line in alone] == pytest.approx([beside[1]["nats_per_token"]])
    assert main(arguments(made, "four")) == 0
    out = capsys.readouterr().out
    assert "KL" not in out
    assert len(out.splitlines()) == 4


def test_models_that_do_not_fit_together_are_measured_one_by_one(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("dense", "four", "four-router", "four")
    together = printed_json(made, *names, options=(), capsys=capsys)
    compared: list[int] = []

    def counted(first: Model, others: list[Model], *rest: Any, **named: Any) -> Any:
        compared.append(len(others))
        return compare(first, others, *rest, **named)

    monkeypatch.setattr(dbrx_fn.evaluate, "compare", counted)
    size = 4 * param_count(CONFIG)
    for memory, groups in ((2 * size, [1, 1, 1]), (6 * size, [2, 1]), (8 * size, [3])):
        compared.clear()
        monkeypatch.setattr(dbrx_fn.evaluate, "memory_size", lambda memory=memory: memory)
        assert printed_json(made, *names, options=(), capsys=capsys) == together
        assert compared == groups


def test_dtype_is_what_is_computed_in(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full, half = (
        printed_json(made, "dense", "dense", options=options, capsys=capsys)["models"]
        for options in ((), ("--dtype", "bfloat16"))
    )
    assert full[1]["nats_per_token"] != half[1]["nats_per_token"] == pytest.approx(full[1]["nats_per_token"], rel=0.02)
    assert half[1]["kl_divergence"] == 0
    assert half[1]["bits_per_weight"] == 32


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_a_picture_of_both_over_bits_per_weight(
    kind: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / f"picture.{kind}"
    # The dense model itself is 0 nats away, for which a logarithm has no place.
    models = ("dense", "dense", "four", "four-router")
    printed_json(made, *models, options=("--picture", str(file)), capsys=capsys)
    if kind == "png":
        assert file.read_bytes().startswith(b"\x89PNG\r\n")
        return
    words = re.findall(r"<!-- (.*?) -->", file.read_text())
    for word, count in (
        ("four", 2),
        ("four-router", 2),
        ("dense", 1),
        ("bits per weight", 2),
        ("perplexity", 1),
        ("KL divergence from the first, nats per token", 1),
        ("routers in high precision", 1),
        ("routers quantized", 1),
    ):
        assert words.count(word) == count, word


def test_names_in_a_picture_are_as_long_as_tells_them_apart(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("old", "new"):
        shutil.copytree(made / "four", tmp_path / folder / "four")
    picture = tmp_path / "picture.svg"
    models = [str(tmp_path / folder / "four") for folder in ("old", "new")]
    printed_json(made, "dense", *models, options=("--picture", str(picture)), capsys=capsys)
    words = re.findall(r"<!-- (.*?) -->", picture.read_text())
    assert [words.count(name) for name in ("old/four", "new/four", "four")] == [2, 2, 0]


def test_a_picture_of_models_that_are_all_the_same(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "picture.png"
    printed_json(made, "dense", "dense", options=("--picture", str(file)), capsys=capsys)
    assert file.read_bytes().startswith(b"\x89PNG\r\n")


def test_progress_without_a_terminal_is_lines(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "_SECONDS_BETWEEN_LINES", 0)
    assert main(arguments(made, "dense", "four")) == 0
    lines = capsys.readouterr().err.splitlines()
    assert all(re.fullmatch(r"measuring: \d+ of \d+ batches, \d\d:\d\d left", line) for line in lines)
    assert lines[-1].startswith(f"measuring: {len(lines)} of {len(lines)} batches")


def test_a_checkpoint_without_a_tokenizer_takes_the_first_ones(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "bare", *load(made / "four"))
    options = (str(tmp_path / "bare"),)
    assert main(["perplexity", str(made / "dense"), *options, *arguments(made)[1:], "--json"]) == 0
    bare = json.loads(capsys.readouterr().out)["models"][1]
    four = printed_json(made, "dense", "four", options=(), capsys=capsys)["models"][1]
    assert bare["kl_divergence"] == four["kl_divergence"]


def test_a_picture_that_cannot_be_written_takes_no_figures_along(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()

    def removing(*given: Any, **named: Any) -> Any:
        shutil.rmtree(tmp_path / "folder", ignore_errors=True)
        return compare(*given, **named)

    monkeypatch.setattr(dbrx_fn.evaluate, "compare", removing)
    picture = tmp_path / "folder" / "new.png"
    assert main([*arguments(made, "dense", "four"), "--json", "--picture", str(picture)]) == 2
    out, err = capsys.readouterr()
    assert len(json.loads(out)["models"]) == 2
    assert err.startswith(f"error: {picture} can't be written")


def error_of(given: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command ends with."""
    assert main(given) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.endswith(".\n")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--batch-size", "0"], "--batch-size is 0 where it must be at least 1"),
        (["--sequence-length", "-1"], "--sequence-length is -1 where it must be at least 1"),
        (["--picture", "{}/picture.jpg"], "picture.jpg is not the name of a picture: end it with .png or .svg"),
        (["--picture", "{}/there.png"], "there.png exists already: name a new picture"),
        (["--picture", "{}/nowhere/new.png"], "nowhere is not a folder"),
        (["--data", "{}/nothing.txt"], "nothing.txt doesn't exist"),
        (["--data", "{}/empty.txt"], "empty.txt holds no text at all"),
        (["--data", "{}/untold.jsonl"], "nothing to predict"),
    ],
)
def test_options_that_cannot_work(
    options: list[str], said: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there.png").touch()
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "untold.jsonl").write_text('{"prompt": "To be", "completion": ""}\n')
    given = [*arguments(made, "dense", "four"), *(option.format(tmp_path) for option in options)]
    assert said in error_of(given, capsys)
    assert {file.name for file in tmp_path.iterdir()} == {"there.png", "empty.txt", "untold.jsonl"}


def test_checkpoints_that_cannot_be_compared(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(name: str) -> str:
        return error_of(["perplexity", str(made / "dense"), str(tmp_path / name), *arguments(made)[1:]], capsys)

    assert f"{tmp_path / 'nowhere'} doesn't exist" in refused("nowhere")
    shutil.copytree(made / "dense", tmp_path / "other")
    settings = json.loads((tmp_path / "other" / "config.json").read_text())
    settings["ffn_config"]["moe_top_k"] = 3
    (tmp_path / "other" / "config.json").write_text(json.dumps(settings))
    said = refused("other")
    assert f"{tmp_path / 'other'} has ffn_config.moe_top_k 3 where {made / 'dense'} has 2" in said

    shutil.copytree(made / "dense", tmp_path / "words")
    tokenizer = json.loads((made / "dense" / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (tmp_path / "words" / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert f"{tmp_path / 'words'} has another tokenizer than {made / 'dense'}" in refused("words")

    shutil.copytree(made / "dense", tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "model.safetensors is damaged or cut short" in refused("cut")


def test_a_picture_needs_something_to_compare(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [*arguments(made, "dense"), "--picture", str(tmp_path / "new.png")]
    assert "only one is given: name at least two" in error_of(given, capsys)


def test_a_picture_without_matplotlib(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    given = [*arguments(made, "dense", "four"), "--picture", str(tmp_path / "new.png")]
    assert "pip install 'dbrx-fn[pictures]'" in error_of(given, capsys)


def test_weights_that_are_not_finite(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    params, config = load(made / "dense")
    norm = params["transformer"]["norm_f"]
    norm["weight"] = norm["weight"] * mx.array(float("nan"))
    save(tmp_path / "nan", params, config)
    given = ["perplexity", str(made / "dense"), str(tmp_path / "nan"), *arguments(made)[1:]]
    assert f"The predictions of {tmp_path / 'nan'} aren't finite" in error_of(given, capsys)


def test_models_that_do_not_fit(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dbrx_fn.evaluate, "memory_size", lambda: 8 * param_count(CONFIG) - 1)
    assert "take a larger machine" in error_of(arguments(made, "dense", "four"), capsys)
    assert main(arguments(made, "dense")) == 0


def test_memory_that_ends_on_the_way(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("[malloc] Unable to allocate")

    monkeypatch.setattr(dbrx_fn.evaluate, "compare", fail)
    assert "Unable to allocate), most likely for lack of memory" in error_of(arguments(made, "dense", "four"), capsys)


def test_ctrl_c_ends_it_with_130(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(dbrx_fn.evaluate, "compare", interrupt)
    assert main(arguments(made, "dense")) == INTERRUPTED
    assert capsys.readouterr().err == ""


def test_it_runs_as_a_module() -> None:
    ran = subprocess.run([sys.executable, "-m", "dbrx_fn.evaluate"], capture_output=True, text=True, timeout=100)
    assert ran.returncode == 2
    assert "perplexity" in ran.stderr
    assert "Traceback" not in ran.stderr
