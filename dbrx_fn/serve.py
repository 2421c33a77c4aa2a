"""`python -m dbrx_fn.serve`: serves a model over OpenAI's API, with a chat page."""

import argparse
import ipaddress
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from urllib.parse import urlsplit

import dbrx_fn
from dbrx_fn.checkpoints.adapter_reader import load_adapters, read_adapters
from dbrx_fn.checkpoints.checkpoint import open_checkpoint
from dbrx_fn.checkpoints.hub import SMALL, checkpoint_path, model_name
from dbrx_fn.checkpoints.loader import computing_dtype, load
from dbrx_fn.checkpoints.tokenizer_files import tokenizer_files
from dbrx_fn.cli.adapter_option import add_adapters_option, chosen_adapters
from dbrx_fn.cli.command import Parser, Terminated, program, run
from dbrx_fn.cli.stop_signals import deferred_stop
from dbrx_fn.cli.terminal import byte_progress, print_message, print_result, size_text
from dbrx_fn.errors import InputError
from dbrx_fn.files.json_file import shown
from dbrx_fn.generation.generation_config import GenerationConfig, read_generation_config
from dbrx_fn.generation.sampling import Sampling
from dbrx_fn.model.config import Config, Dtype
from dbrx_fn.model.costs import cache_bytes
from dbrx_fn.model.shard import own_shard
from dbrx_fn.model.stacked_adapters import stack_adapters
from dbrx_fn.model.tree import Params
from dbrx_fn.runtime.group import group
from dbrx_fn.serving.access import KEY_VARIABLE, Access, read_keys
from dbrx_fn.serving.engine import Engine
from dbrx_fn.serving.fingerprint import fingerprint
from dbrx_fn.serving.following import shared_limits
from dbrx_fn.serving.limits import Limits, default_limits
from dbrx_fn.serving.prefix_store import PrefixStore
from dbrx_fn.serving.served_model import ServedModel
from dbrx_fn.serving.structures import trie_if_any

_MOST_CHOICES = 128
"""The most texts that one request may ask for."""

_MAX_TOKENS = 512
"""The most tokens of a text, unless the request, the options or the checkpoint give another number."""

_LONGEST_DRAIN = 24 * 3600

_ARRIVING = 64
"""The most requests that may be parsed at once, besides those that wait or run."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 0 after SIGTERM, 2 for anything the user can mend, 130 after
    Ctrl-C."""
    return run(
        _run,
        parser(),
        arguments,
        smaller="serve fewer --decode-concurrency or a smaller --capacity, or quantize the model (python -m"
        " dbrx_fn.convert)",
        together=True,
    )


def parser() -> argparse.ArgumentParser:
    """The command's options. Those that mlx-lm's server has too have its names."""
    options = Parser(
        prog=program("serve"),
        description="Serve a DBRX model over HTTP, to OpenAI's clients and to people who chat on its page.",
        epilog="Exit status: 0 after SIGTERM, once what runs has ended or --drain seconds have passed; 2 after an"
        " error; 130 after Ctrl-C.",
    )
    add = options.add_argument
    add(
        "--model",
        default=str(SMALL),
        help="a checkpoint's folder, a GGUF file, or a Hugging Face repository as"
        " owner/name (default: the small model of this package)",
    )
    add_adapters_option(options)
    add("--served-model-name", help="the model's name in requests (default: the name of its repository or folder)")
    add("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 means all (default: %(default)s)")
    add("--port", type=int, default=8080, help="port to listen at; 0 means any free one (default: %(default)s)")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="dtype to load the parameters in (default: as stored, but float32 on a CPU if memory allows, and bfloat16"
        " for float16 on a GPU with this package's kernels)",
    )
    _add_limits(options)
    _add_prompt_cache(options)
    _add_access(options)
    _add_defaults(options)
    return options


def _add_limits(options: argparse.ArgumentParser) -> None:
    add = options.add_argument_group("limits").add_argument
    add(
        "--decode-concurrency",
        type=int,
        metavar="ROWS",
        help="texts generated at once (default: 32, or 8 with --exact)",
    )
    add("--capacity", type=int, metavar="TOKENS", help="the longest text (default: what context and memory allow)")
    add("--exact", action="store_true", help="make answers independent of other requests, bit for bit; slower")
    add("--queue", type=int, default=256, help="texts that may wait; others get status 429 (default: %(default)s)")
    add(
        "--drain",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="how long texts may continue after SIGTERM or Ctrl-C (default: %(default)g)",
    )


def _add_prompt_cache(options: argparse.ArgumentParser) -> None:
    add = options.add_argument_group(
        "prompt cache", "Keys and values of prompts' prefixes are kept for later requests with the same prefix."
    ).add_argument
    add(
        "--prompt-cache-bytes",
        type=_size,
        default=2**30,
        metavar="SIZE",
        help="memory for the caches, such as 500M or 4G; 0 means none (default: 1G)",
    )
    add("--prompt-cache-folder", type=Path, metavar="FOLDER", help="keep the caches on disk too, for the next start")
    add("--prompt-cache-disk", type=_size, metavar="SIZE", help="the most bytes in that folder (default: 10G)")


def _add_access(options: argparse.ArgumentParser) -> None:
    add = options.add_argument_group("access").add_argument
    add(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="file of API keys, one per line; DBRX_FN_API_KEY in the environment is one too (default: no key needed)",
    )
    add(
        "--allowed-origins",
        type=_names,
        default=(),
        metavar="ORIGINS",
        help="other sites whose scripts may send requests, as https://a.example,https://b.example, or * for all",
    )
    add(
        "--allowed-hosts",
        type=_names,
        default=(),
        metavar="NAMES",
        help="the server's names besides localhost and addresses; needed without an API key",
    )


def _add_defaults(options: argparse.ArgumentParser) -> None:
    defaults = options.add_argument_group(
        "defaults", "Defaults of requests. Without these options they are those of generation_config.json."
    )
    add = defaults.add_argument
    add("--temp", type=float, help="temperature; 0 always takes the most likely token")
    add("--top-p", type=float, help="draw among the most likely tokens of this total probability")
    add("--top-k", type=int, help="draw among this many most likely tokens; 0 means all")
    add("--min-p", type=float, help="draw among tokens with at least this fraction of the highest probability")
    add("--max-tokens", type=int, help="the most tokens of a text (default: generation_config.json's, or 512)")


def _run(options: argparse.Namespace) -> None:
    server_module = _server_module()
    _check(options)
    if not group().leads:
        _, engine = _loaded(options)
        engine.follow()
        return
    keys = read_keys(options.api_key_file, os.environ.get(KEY_VARIABLE))
    access = Access(keys, frozenset(options.allowed_origins), frozenset(options.allowed_hosts))
    # Before the weights, which can take minutes.
    with server_module.bound(options.host, options.port) as address:
        model, engine = _loaded(options)
        most_open = options.queue + engine.limits.rows + _ARRIVING
        server = server_module.Server(address, model, engine, server_module.Settings(access, most_open, options.drain))

        def ready(url: str) -> None:
            print_result(url)
            print_message(_budget(model, engine.limits))
            if not keys and not _is_own_machine(url):
                print_message("warning: this address takes requests from everybody: set keys with --api-key-file.")

        def tell() -> None:
            print_message(f"ending: what runs has {options.drain:g} seconds.")
            server.stop()

        with deferred_stop(tell) as stop:
            server.run(ready)
    if stop.requested and not isinstance(stop.error(), Terminated):
        raise stop.error()


def _check(options: argparse.Namespace) -> None:
    """Makes all checks that don't need the checkpoint."""
    for name in ("decode_concurrency", "capacity", "queue", "max_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} is {value} where it must be at least 1.")
    if not 0 <= options.drain <= _LONGEST_DRAIN:
        raise InputError(f"--drain is {options.drain:g} where it must be from 0 to {_LONGEST_DRAIN} seconds.")
    if options.prompt_cache_disk is not None and options.prompt_cache_folder is None:
        raise InputError("--prompt-cache-disk is the room in a folder: name it with --prompt-cache-folder.")
    if options.prompt_cache_folder is not None:
        group().refuse_others("--prompt-cache-folder")
    chosen_adapters(options.adapter_path)
    _with_options(options, GenerationConfig(Sampling(), None, ()))


def _loaded(options: argparse.Namespace) -> tuple[ServedModel, Engine]:
    """The served model, and an engine that is ready."""
    path = checkpoint_path(options.model)
    name = options.served_model_name or model_name(options.model, path)
    own, named = chosen_adapters(options.adapter_path)
    if name in named:
        raise InputError(f"--adapter-path gives the name {shown(name)}, which is the model's: take another.")
    with tokenizer_files(path) as files:
        defaults, tokenizer = _with_options(options, read_generation_config(files.folder)), files.read()
    # This fills a cache, which takes a second for a large vocabulary. Otherwise the first message that spells a control
    # token would wait for it.
    spelled = "".join(tokenizer.control_tokens)
    tokenizer.encode(spelled, literal=[(0, len(spelled))])
    params, config = _load(path, options.dtype, own, list(named.values()))
    limits = shared_limits(
        lambda: default_limits(
            params,
            config,
            rows=options.decode_concurrency,
            capacity=options.capacity,
            exact=options.exact,
            reserved=options.prompt_cache_bytes,
        )
    )
    prefixes = PrefixStore(
        config,
        fingerprint(params, config, limits, dbrx_fn.__version__),
        chunk=limits.chunk,
        memory=options.prompt_cache_bytes,
        folder=options.prompt_cache_folder,
        disk=10 * 2**30 if options.prompt_cache_disk is None else options.prompt_cache_disk,
    )
    model = ServedModel(
        name=name,
        adapters=tuple(named),
        created=int(time.time()),
        config=config,
        tokenizer=tokenizer,
        capacity=min(limits.capacity, limits.positions),
        defaults=defaults,
        max_tokens=options.max_tokens or defaults.max_tokens or _MAX_TOKENS,
        most_choices=min(_MOST_CHOICES, options.queue),
    )
    trie = trie_if_any(tokenizer, config.vocab_size)
    engine = Engine(params, config, limits, trie=trie, prefixes=prefixes, queue=options.queue, adapters=model.adapters)
    try:
        engine.wait_until_ready()
    except BaseException:
        engine.close()
        raise
    return model, engine


def _load(path: Path, dtype: Dtype | None, own: Path | None, others: Sequence[Path]) -> tuple[Params, Config]:
    """The tree, with the model's own adapters or with several that rows choose from."""
    for folder in others:
        # What can't be read is refused before the weights, which can take minutes.
        read_adapters(folder, replace(open_checkpoint(path).config, shard=own_shard()))
    with byte_progress("loading") as progress:
        shared = group().share(dtype or computing_dtype(path))
        params, config = load(path, dtype=shared, progress=progress, shard=own_shard(), adapter_path=own)
    trees = [load_adapters(folder, params, config) for folder in others]
    return (stack_adapters(params, config, trees) if trees else params), config


def _server_module() -> ModuleType:
    try:
        return import_module("dbrx_fn.serving.server")
    except ImportError as error:
        if error.name in ("starlette", "uvicorn", "prometheus_client", "h11", "anyio"):
            raise InputError(
                f"Serving needs {error.name}, which isn't installed: pip install 'dbrx-fn[serve]'."
            ) from None
        raise


def _with_options(options: argparse.Namespace, defaults: GenerationConfig) -> GenerationConfig:
    given = {"temperature": options.temp, "top_p": options.top_p, "top_k": options.top_k, "min_p": options.min_p}
    chosen = {name: value for name, value in given.items() if value is not None}
    return replace(defaults, sampling=replace(defaults.sampling, **chosen))


def _budget(model: ServedModel, limits: Limits) -> str:
    """One line that says what there is room for."""
    room = size_text(limits.positions * cache_bytes(model.config, 1))
    mode = " in the exact mode" if limits.exact else ""
    return (
        f"{model.name}: up to {limits.rows} texts at once{mode}, of up to {model.capacity} tokens; memory has"
        f" {room} for {limits.positions} tokens in all."
        + (f" Adapters, each by its name as the model: {', '.join(model.adapters)}." if model.adapters else "")
    )


def _is_own_machine(url: str) -> bool:
    return ipaddress.ip_address(urlsplit(url).hostname or "").is_loopback


def _size(option: str) -> int:
    found = re.fullmatch(r"(\d{1,15})([kmg]?)", option.lower())
    if found is None:
        raise argparse.ArgumentTypeError(f"{shown(option)} is no size: give a number of bytes, or such as 500M or 4G")
    return int(found[1]) << 10 * " kmg".index(found[2] or " ")


def _names(option: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in option.split(",") if name.strip())


if __name__ == "__main__":
    sys.exit(main())
