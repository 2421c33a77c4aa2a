"""The options of all commands that generate text: its length, its end, and the choice of tokens."""

import argparse
from dataclasses import replace

from dbrx_fn.errors import InputError
from dbrx_fn.generation.sampling import Sampling
from dbrx_fn.generation.speculation import MOST_DRAFTED, Speculation
from dbrx_fn.generation.stream import check_limits
from dbrx_fn.model.shapes import CHUNK_SIZE
from dbrx_fn.text.tokenizer import Tokenizer

MOST_TOKENS = 100
"""The number of tokens to generate if neither the options nor the checkpoint give one."""


def add_generation_options(options: argparse.ArgumentParser, most_tokens: int = MOST_TOKENS) -> None:
    """Adds the options. Those that mlx-lm has too have mlx-lm's names.

    Args:
        options: the command's parser.
        most_tokens: the number of tokens to generate if neither the options nor the checkpoint give one.
    """
    add = options.add_argument
    add(
        "--max-tokens",
        "-m",
        type=int,
        help=f"the most tokens to generate (default: max_new_tokens of generation_config.json, or {most_tokens})",
    )
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end the text before this string; repeatable (default: stop_strings of generation_config.json)",
    )
    add(
        "--extra-eos-token",
        action="extend",
        nargs="+",
        default=[],
        metavar="TOKEN",
        help="additional tokens that end the text",
    )
    add("--seed", type=int, help="seed for drawing tokens (default: another one each time)")
    add(
        "--prefill-step-size",
        type=int,
        default=CHUNK_SIZE,
        help="number of prompt tokens computed at once, which bounds memory (default: %(default)s)",
    )
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="dtype to load the parameters in (default: as stored, but float32 on a CPU if memory allows, and bfloat16"
        " for float16 on a GPU with this package's kernels)",
    )
    speculation = options.add_argument_group("speculation", "Several drafted tokens are verified in one pass.")
    speculation.add_argument(
        "--speculate",
        choices=("ngram",),
        help="draft tokens from what followed the same tokens earlier in the text, where that is faster; the text stays"
        " the same (default: one token per pass)",
    )
    speculation.add_argument(
        "--num-draft-tokens",
        type=int,
        metavar="N",
        help=f"with --speculate, the most tokens to draft at once (default: {MOST_DRAFTED})",
    )
    _add_sampling(options)


def _add_sampling(options: argparse.ArgumentParser) -> None:
    sampling = options.add_argument_group(
        "sampling", "The defaults are those of the checkpoint's generation_config.json, or else the ones below."
    )
    add = sampling.add_argument
    add("--temp", type=float, help="temperature; 0 always takes the most likely token (default: 0)")
    add("--top-p", type=float, help="draw among the most likely tokens of this total probability (default: 1)")
    add("--top-k", type=int, help="draw among this many most likely tokens; 0 means all (default: 0)")
    add("--min-p", type=float, help="draw among tokens with at least this fraction of the highest probability")
    add("--repetition-penalty", type=float, help="above 1, tokens of the prompt and the text become less likely")
    add("--presence-penalty", type=float, default=0.0, help="subtract this from the logits of tokens in the text")
    add("--frequency-penalty", type=float, default=0.0, help="subtract this once for each time a token is in the text")
    add("--logit-bias", action="append", default=[], metavar="ID:BIAS", help="add to a token's logit; repeatable")


def check_generation_options(options: argparse.Namespace) -> None:
    """Makes all checks that don't need the checkpoint.

    Raises:
        InputError: if an option has an impossible value. It names the option.
    """
    chosen_sampling(options, Sampling())
    chosen_speculation(options)
    check_limits(1 if options.max_tokens is None else options.max_tokens, options.stop)
    if options.prefill_step_size < 1:
        raise InputError(f"--prefill-step-size is {options.prefill_step_size} where it must be at least 1.")


def chosen_sampling(options: argparse.Namespace, default: Sampling) -> Sampling:
    """How to choose tokens: by the options, and by `default` for those that aren't given.

    Raises:
        InputError: if an option has an impossible value. It names the option.
    """
    given = {
        "temperature": options.temp,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "min_p": options.min_p,
        "repetition_penalty": options.repetition_penalty,
    }
    return replace(
        default,
        **{name: value for name, value in given.items() if value is not None},
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        logit_bias=tuple(_bias(entry) for entry in options.logit_bias),
    )


def chosen_speculation(options: argparse.Namespace) -> Speculation | None:
    """Speculation, if it is wanted.

    Raises:
        InputError: if `--num-draft-tokens` is out of range, or comes alone.
    """
    if options.speculate is None:
        if options.num_draft_tokens is not None:
            raise InputError("--num-draft-tokens is for speculation: give --speculate ngram too, or leave it out.")
        return None
    return Speculation() if options.num_draft_tokens is None else Speculation(options.num_draft_tokens)


def chosen_stop_tokens(options: argparse.Namespace, tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that end a text: the tokenizer's, and those of `--extra-eos-token`.

    Raises:
        InputError: if one of these isn't a single token.
    """
    return tokenizer.stop_tokens | {_one_token(tokenizer, token) for token in options.extra_eos_token}


def _bias(entry: str) -> tuple[int, float]:
    token, _, bias = entry.partition(":")
    try:
        return int(token), float(bias)
    except ValueError:
        raise InputError(f"--logit-bias is {entry!r} where a token's id, a colon and a number are expected.") from None


def _one_token(tokenizer: Tokenizer, text: str) -> int:
    tokens = tokenizer.encode(text, add_special_tokens=False)
    if len(tokens) != 1:
        raise InputError(f"--extra-eos-token is {text!r}, which is {len(tokens)} tokens where one is expected.")
    return tokens[0]
