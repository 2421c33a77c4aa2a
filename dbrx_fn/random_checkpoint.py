"""`python -m dbrx_fn.random_checkpoint`: writes a checkpoint of random weights, to try things with.

It is a complete DBRX checkpoint of any size, in Hugging Face's layout, with a tokenizer whose tokens are bytes. Its
texts are noise, but they show that an installation works, and how fast.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dbrx_fn.checkpoints.saver import CHECKPOINT_FILES, write_checkpoint
from dbrx_fn.cli.command import Parser, program, run
from dbrx_fn.cli.terminal import print_result
from dbrx_fn.errors import InputError
from dbrx_fn.files.atomic import new_folder
from dbrx_fn.generation.sampling import random_key
from dbrx_fn.model.config import AttnConfig, Config, FFNConfig
from dbrx_fn.model.params import init_params
from dbrx_fn.text.bpe import SMALLEST_VOCABULARY, add_special_tokens, save_tokenizer


def write_random_checkpoint(folder: Path, config: Config, key: mx.array) -> None:
    """Writes `config.json`, weights and a byte tokenizer into a new folder.

    The folder appears when it is complete, or not at all.

    Raises:
        InputError: if the folder exists or can't be written, or the vocabulary is smaller than the tokenizer's 260.
    """
    if config.vocab_size < SMALLEST_VOCABULARY:
        raise InputError(
            f"vocab_size is {config.vocab_size} where the byte tokenizer needs at least {SMALLEST_VOCABULARY}."
        )
    with new_folder(folder, files=CHECKPOINT_FILES) as beside:
        write_checkpoint(beside, init_params(config, key), config, layout="fused")
        save_tokenizer(_byte_tokenizer(), beside, default_system_prompt=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 0, 2 for anything the user can mend, 130 after Ctrl-C."""
    return run(_run, parser(), arguments)


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = Parser(
        prog=program("random_checkpoint"),
        description="Write a DBRX checkpoint of random weights and a byte tokenizer, to try things with.",
    )
    options.add_argument("folder", type=Path, help="new folder to write")
    options.add_argument("--keep", action="store_true", help="keep the folder, if it holds a checkpoint already")
    options.add_argument("--seed", type=int, default=0, help="seed for drawing the weights (default: %(default)s)")
    options.add_argument("--d-model", type=int, default=256)
    options.add_argument("--n-heads", type=int, default=8)
    options.add_argument("--kv-n-heads", type=int, default=2)
    options.add_argument("--n-layers", type=int, default=4)
    options.add_argument("--ffn-hidden-size", type=int, default=448)
    options.add_argument("--experts", type=int, default=16)
    options.add_argument("--top-k", type=int, default=4)
    options.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    return options


def _run(chosen: argparse.Namespace) -> None:
    if chosen.keep and (chosen.folder / "config.json").is_file():
        print_result(f"{chosen.folder} exists already and is kept")
        return
    config = Config(
        d_model=chosen.d_model,
        n_heads=chosen.n_heads,
        n_layers=chosen.n_layers,
        max_seq_len=32_768,
        vocab_size=SMALLEST_VOCABULARY,
        attn=AttnConfig(clip_qkv=8.0, kv_n_heads=chosen.kv_n_heads, rope_theta=500_000.0),
        ffn=FFNConfig(ffn_hidden_size=chosen.ffn_hidden_size, moe_num_experts=chosen.experts, moe_top_k=chosen.top_k),
        dtype=chosen.dtype,
    )
    write_random_checkpoint(chosen.folder, config, random_key(chosen.seed))
    print_result(f"{chosen.folder}: a random DBRX of {config.n_layers} layers, {config.ffn.moe_num_experts} experts")


def _byte_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: n for n, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    add_special_tokens(tokenizer)
    return tokenizer


if __name__ == "__main__":
    sys.exit(main())
