"""The options of `bench`: a group for each thing that it measures."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias, get_args

from dbrx_fn.cli.adapter_option import add_adapter_option
from dbrx_fn.cli.command import Parser, program
from dbrx_fn.cli.quantize_options import FORMAT_HELP, add_quantize_options
from dbrx_fn.model.config import Dtype

Commands: TypeAlias = "argparse._SubParsersAction[Parser]"
Run = Callable[[argparse.Namespace], None]
_DTYPE_HELP = (
    "dtype of all floats (default: the model's own, but float32 on a CPU, and bfloat16 for a float16 checkpoint on a"
    " GPU with this package's kernels)"
)


def add_inference_options(commands: Commands, run: Run, peers: Sequence[str]) -> None:
    """Adds `bench inference`, which can measure other programs (`peers`) too."""
    inference = commands.add_parser(
        "inference", help="prefill, first token, decoding, loading", description=f"Measure inference. {FORMAT_HELP}"
    )
    inference.set_defaults(run=run)
    add = inference.add_argument
    add(
        "--model",
        help="checkpoint: folder, GGUF file or Hugging Face repository (default: the small model of this package)",
    )
    add_adapter_option(inference, "bounds don't count them")
    add("--shape", help="measure random weights instead: dbrx, small, 1.3b, or the path of a config.json")
    add("--layers", type=int, help="keep only this many of the model's first layers")
    add("--dtype", choices=get_args(Dtype), help=_DTYPE_HELP)
    add_quantize_options(inference)
    add("--prompt", type=int, nargs="+", default=[128, 1024], help="prompt lengths in tokens (default: 128 1024)")
    add(
        "--context",
        type=int,
        nargs="+",
        default=[256, 1024],
        help="tokens in the cache before decoding (default: 256 1024)",
    )
    add("--batch-size", type=int, nargs="+", default=[1, 8], help="sequences decoded at once (default: 1 8)")
    add(
        "--together",
        type=int,
        nargs="+",
        default=[1],
        help="new tokens of each sequence in one decoding step, as when drafted tokens are verified (default: 1)",
    )
    add("--tokens", type=int, default=32, help="decoding steps per repetition (default: %(default)s)")
    add(
        "--repeats",
        type=int,
        default=5,
        help="repetitions for the median, at most a minute of them (default: %(default)s)",
    )
    add(
        "--peer",
        choices=peers,
        nargs="+",
        default=[],
        help="other programs to measure on the same weights",
    )
    add(
        "--picture",
        type=Path,
        metavar="FILE",
        help="draw a roofline (speeds below the machine's limits) to a new .png or .svg",
    )
    add("--json", action="store_true", help="print JSON instead of a table")


def add_training_options(commands: Commands, run: Run) -> None:
    """Adds `bench training`."""
    training = commands.add_parser("training", help="training steps", description="Measure the speed of training.")
    training.set_defaults(run=run)
    add = training.add_argument
    add(
        "--shape",
        nargs="+",
        default=["small"],
        help="models: small, 1.3b, or the path of a config.json (default: small)",
    )
    add("--batch-size", type=int, default=64, help="sequences per step (default: %(default)s)")
    add("--sequence-length", type=int, default=256, help="tokens per sequence (default: %(default)s)")
    add(
        "--dtype",
        nargs="+",
        choices=("float32", "bfloat16"),
        default=["float32"],
        help="dtypes to compute in (default: float32)",
    )
    add("--recompute", action="store_true", help="save memory: compute activations again in the backward pass")
    add("--steps", type=int, default=10, help="steps for the median (default: %(default)s)")
    add("--json", action="store_true", help="print JSON instead of a table")


def add_serving_options(commands: Commands, run: Run, key_variable: str) -> None:
    """Adds `bench serving`. The environment variable `key_variable` holds a server's API key."""
    serving = commands.add_parser(
        "serving",
        help="a server's latencies under load",
        description="Measure the latencies of a server under load, as its clients see them. Without --url it is"
        f" {program('serve')}, started on a free port and ended afterwards.",
    )
    serving.set_defaults(run=run)
    add_adapter_option(serving)
    add = serving.add_argument
    add(
        "--model",
        help="checkpoint to serve: folder, GGUF file or Hugging Face repository (default: the small model of this"
        " package); with --url, the model's name in requests",
    )
    add(
        "--url",
        help="measure an OpenAI-compatible server that runs, such as http://127.0.0.1:8080/v1; the API key that it"
        f" needs is {key_variable} in the environment",
    )
    add("--exact", action="store_true", help="serve in the exact mode")
    add("--decode-concurrency", type=int, metavar="ROWS", help="texts that the started server generates at once")
    add("--capacity", type=int, metavar="TOKENS", help="the longest text of the started server")
    load = serving.add_mutually_exclusive_group()
    load.add_argument(
        "--rate",
        type=float,
        nargs="+",
        metavar="R",
        help="requests per second, arriving independently of each other (default: 1 2 4)",
    )
    load.add_argument("--clients", type=int, nargs="+", metavar="N", help="clients that each wait for their answers")
    add("--requests", type=int, default=64, help="requests under each load (default: %(default)s)")
    add("--prompt", type=int, default=128, help="median of the prompts' tokens (default: %(default)s)")
    add("--tokens", type=int, default=64, help="median of the answers' tokens (default: %(default)s)")
    add(
        "--spread",
        type=float,
        default=0.5,
        help="standard deviation of the lengths' logarithms; 0 means equal lengths (default: %(default)s)",
    )
    add("--temp", type=float, default=0.0, help="temperature (default: %(default)g)")
    add("--seed", type=int, default=0, help="seed of arrivals, lengths and texts (default: %(default)s)")
    add("--ttft", type=float, default=1.0, metavar="SECONDS", help="a good answer's first token (default: %(default)g)")
    add(
        "--gap",
        type=float,
        default=0.2,
        metavar="SECONDS",
        help="the longest time between a good answer's tokens (default: %(default)g)",
    )
    add("--picture", type=Path, metavar="FILE", help="draw latencies over the load to a new .png or .svg")
    add("--json", action="store_true", help="print JSON instead of a table")


def add_speculation_options(commands: Commands, run: Run) -> None:
    """Adds `bench speculation`."""
    speculation = commands.add_parser(
        "speculation",
        help="texts that copy themselves or never repeat",
        description="Measure speculation on random weights, for a text that copies itself and one that never repeats."
        f" {FORMAT_HELP}",
    )
    speculation.set_defaults(run=run)
    add = speculation.add_argument
    add("--shape", default="small", help="dbrx, small, 1.3b, or the path of a config.json (default: %(default)s)")
    add("--layers", type=int, help="keep only this many of the model's first layers")
    add("--dtype", choices=get_args(Dtype), help=_DTYPE_HELP)
    add_quantize_options(speculation)
    add("--prompt", type=int, default=512, help="tokens before a text, at least 300 (default: %(default)s)")
    add("--tokens", type=int, default=400, help="tokens of a text (default: %(default)s)")
    add("--repeats", type=int, default=3, help="repetitions for the median (default: %(default)s)")
    add("--json", action="store_true", help="print JSON instead of a table")
