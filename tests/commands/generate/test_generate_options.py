"""`generate` with prompts, options and structures: those that work, and what is said of the others."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from dbrx_fn.generate import main
from tests.support.generating import CONFIG, Command, Refused

# What users can get wrong: the prompt


def test_empty_prompt(folder: Path, refused: Refused, standard_input: Callable[[bytes], None]) -> None:
    refused(["--model", folder, "-p", ""], "The prompt from --prompt is empty")
    standard_input(b"")
    refused(["--model", folder, "-p", "-"], "The prompt from standard input is empty")


def test_closed_standard_input(folder: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell's `<&-` leaves Python with no `sys.stdin` at all."""
    monkeypatch.setattr("sys.stdin", None)
    refused(["--model", folder, "-p", "-"], "standard input")


def test_prompt_longer_than_the_context(folder: Path, refused: Refused) -> None:
    prompt = "x" * (CONFIG.max_seq_len + 1)
    refused(["--model", folder, "-p", prompt], "The prompt has 1501 tokens", "context holds 1500", "shorten it")


@pytest.mark.parametrize("prompt", ["a\udcff", "\ud800"])
def test_prompt_option_that_is_no_utf8(prompt: str, folder: Path, refused: Refused) -> None:
    refused(["--model", folder, "-p", prompt], "The prompt from --prompt is not UTF-8")


def test_standard_input_that_is_no_utf8(
    folder: Path, refused: Refused, standard_input: Callable[[bytes], None]
) -> None:
    standard_input(b"a\xff")
    refused(["--model", folder, "-p", "-"], "The prompt from standard input is not UTF-8")


# What users can get wrong: options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--temp=-1"], ["temperature is -1.0 where it must be from 0 to 1e+20"]),
        (["--temp=nan"], ["temperature is nan"]),
        (["--temp=inf"], ["temperature is inf"]),
        (["--top-p=0"], ["top_p is 0.0 where it must be above 0 and at most 1"]),
        (["--top-p=2"], ["top_p is 2.0"]),
        (["--top-p=nan"], ["top_p is nan"]),
        (["--min-p=-0.1"], ["min_p is -0.1 where it must be from 0 to 1"]),
        (["--min-p=1.1"], ["min_p is 1.1"]),
        (["--top-k=-1"], ["top_k is -1 where it must be 0 (all tokens) or a positive integer"]),
        (["--repetition-penalty=0"], ["repetition_penalty is 0.0 where it must be from 1e-06 to 1e+06"]),
        (["--repetition-penalty=nan"], ["repetition_penalty is nan"]),
        (["--temp=1e39"], ["temperature is 1e+39"]),
        (["--repetition-penalty=1e-39"], ["repetition_penalty is 1e-39"]),
        (["--presence-penalty=1e39"], ["presence_penalty is 1e+39"]),
        (["--frequency-penalty=-1e39"], ["frequency_penalty is -1e+39"]),
        (["--presence-penalty=inf"], ["presence_penalty is inf where it must be a number"]),
        (["--frequency-penalty=nan"], ["frequency_penalty is nan where it must be a number"]),
        (["--max-tokens=0"], ["is 0 where it must be at least 1"]),
        (["--max-tokens=-5"], ["is -5 where it must be at least 1"]),
        (["--speculate=ngram", "--num-draft-tokens=32"], ["num_draft_tokens is 32 where it must be from 1 to 31"]),
        (["--num-draft-tokens=4"], ["--num-draft-tokens is for speculation", "--speculate ngram"]),
        (["--speculate=ngram", "--regex=a*"], ["--speculate can't be combined with --json-schema or --regex"]),
        (["--prefill-step-size=0"], ["--prefill-step-size is 0 where it must be at least 1"]),
        (["--logit-bias=junk"], ["--logit-bias is 'junk' where a token's id, a colon and a number are expected"]),
        (["--logit-bias=7"], ["--logit-bias is '7'"]),
        (["--logit-bias=x:1"], ["--logit-bias is 'x:1'"]),
        (["--logit-bias=-3:1"], ["logit_bias"]),
        (["--logit-bias=7:nan"], ["logit_bias"]),
        (["--logit-bias=320:5"], ["logit_bias", "320"]),
        (["--logit-bias=99999999999999999999:5"], ["logit_bias", "99999999999999999999"]),
        (["--stop="], ["stop string is empty"]),
        (["--extra-eos-token=ab"], ["--extra-eos-token is 'ab', which is 2 tokens where one is expected"]),
        (["--extra-eos-token="], ["--extra-eos-token is '', which is 0 tokens"]),
        (["--seed=-1"], ["seed", "-1"]),
        (["--seed=18446744073709551616"], ["seed", "18446744073709551616"]),
    ],
)
def test_value_that_cannot_work(options: list[object], words: list[str], folder: Path, refused: Refused) -> None:
    refused(["--model", folder, "-p", "x", *options], *words)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--model", "x"],
        ["--model", "x", "-p", "x", "--no-such-option"],
        ["--model", "x", "-p", "x", "--temp", "warm"],
        ["--model", "x", "-p", "x", "--max-tokens", "1.5"],
        ["--model", "x", "-p", "x", "--dtype", "int8"],
    ],
)
def test_arguments_that_are_none(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "generate: error: " in err


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    for option in ("--prompt", "--system", "--temp", "--logit-bias", "--stop", "--seed", "--json"):
        assert option in out


# Structure


def test_the_text_is_json_of_the_schema(command: Command, tmp_path: Path) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(schema))
    for options in (["--temp", "0"], ["--temp", "1", "--seed", "3", "--chat"]):
        report = command("-p", "Who?", "--json-schema", file, "-m", "300", *options)
        assert report["finish_reason"] == "stop"
        assert json.loads(report["text"]).keys() == {"name", "age"}


def test_the_text_is_what_the_regex_matches(command: Command) -> None:
    report = command("-p", "Call", "--regex", "[0-9]{3}-[0-9]{4}", "--temp", "1", "--seed", "1")
    assert re.fullmatch("[0-9]{3}-[0-9]{4}", report["text"])


def test_a_text_that_is_cut_off_within_its_structure_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-p", "x", "--regex", "[a-z]{50}", "-m", "3", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["finish_reason"] == "length"
    assert "warning: " in err
    assert "beginning" in err
    assert main(["-p", "x", "--regex", "[a-z]", "-m", "3", "--json"]) == 0
    assert "warning: " not in capsys.readouterr().err


def test_structures_that_cannot_be_enforced_are_refused(refused: Refused, tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    for content, reason in (
        ('{"not": {}}', "'not'"),
        ('{"type": "object", "type": "string"}', "twice"),
        ("{", "Expecting"),
        ("[]", "object"),
    ):
        file.write_text(content)
        refused(["-p", "x", "--json-schema", file], "--json-schema", reason)
    refused(["-p", "x", "--json-schema", tmp_path / "none"], "--json-schema", "No such file")
    refused(["-p", "x", "--json-schema", "/dev/zero"], "--json-schema", "regular file")
    refused(["-p", "x", "--regex", "(?=a)"], "regular expression", "look-ahead")
