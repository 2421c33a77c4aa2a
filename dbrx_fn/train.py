"""`python -m dbrx_fn.train`: trains a DBRX model on text, from scratch or from a checkpoint, and resumes exactly."""

import argparse
import contextlib
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any, get_args

from dbrx_fn.checkpoints.config_file import read_config, read_config_file
from dbrx_fn.checkpoints.hub import SMALL, checkpoint_folder
from dbrx_fn.checkpoints.loader import load
from dbrx_fn.checkpoints.saver import copy_tokenizer
from dbrx_fn.cli.command import Parser, program, run
from dbrx_fn.cli.terminal import byte_progress, print_message
from dbrx_fn.data.batches import Batches
from dbrx_fn.data.corpus import Document, read_documents, split, without_held_out
from dbrx_fn.data.token_file import TokenFile, check_vocabulary, write_token_file
from dbrx_fn.errors import InputError, TokenizerError
from dbrx_fn.evaluation.perplexity import check_targets
from dbrx_fn.files.atomic import write_file
from dbrx_fn.generation.sampling import random_key
from dbrx_fn.model.adapters import Adapters
from dbrx_fn.model.params import KINDS
from dbrx_fn.model.partition import PARTS
from dbrx_fn.model.quantization import tree_formats
from dbrx_fn.runs.folder import RunFolder
from dbrx_fn.runs.loop import train
from dbrx_fn.runs.plan import Plan
from dbrx_fn.runs.start import model_sums
from dbrx_fn.runs.together import Parallel, own_plan
from dbrx_fn.runtime.group import group
from dbrx_fn.text.bpe import save_tokenizer, train_bpe
from dbrx_fn.text.chat import ChatFormat
from dbrx_fn.text.chatml_template import chatml_template
from dbrx_fn.text.tokenizer import Tokenizer, read_tokenizer
from dbrx_fn.training.step import Recipe, Schedule

_DEFAULTS: dict[str, Any] = {
    **{field.name: field.default for field in fields(Recipe) if field.default is not MISSING},
    "data": [],
    "held_out": [],
    "held_out_share": 0.05,
    "control_tokens": False,
    "resume": False,
    "parallel": "data",
    "micro_batches": None,
    "model": None,
    "config": None,
    "tokenizer": None,
    "steps": 1000,
    "batch_size": 32,
    "sequence_length": 256,
    "warmup": None,
    "moe_loss_weight": None,
    "moe_jitter_eps": None,
    "seed": 0,
    "log_every": 10,
    "eval_every": 100,
    "save_every": 100,
    "keep": 3,
    "lora": None,
    "lora_alpha": None,
    "lora_targets": None,
    "lora_rank_stabilized": False,
    "train_only": None,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 0, 2 for anything the user can mend, 130 after Ctrl-C."""
    return run(
        lambda options: _run(vars(options)),
        parser(),
        arguments,
        kept=lambda options: RunFolder(options.out).how_to_go_on(),
        smaller="take a smaller --batch-size, more --micro-batches, or --recompute",
        takes_sigterm=True,
        together=True,
    )


def parser() -> argparse.ArgumentParser:
    """The command's options. One that isn't given is absent from the parsed namespace."""
    options = Parser(
        prog=program("train"),
        description="Train a DBRX model on text. With --resume, continue the run in --out exactly from its last"
        " checkpoint.",
        argument_default=argparse.SUPPRESS,
    )
    options.add_argument(
        "--out", type=Path, required=True, help="new folder of the run: checkpoints, metrics, pictures, the model"
    )
    options.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in --out; the only other options allowed are --steps and --parallel",
    )
    options.add_argument(
        "--parallel",
        choices=get_args(Parallel),
        help="what processes under mlx.launch divide: the micro-batches (data), or the model (tensor) (default: data)",
    )
    _add_data(options.add_argument_group("data"))
    _add_model(options.add_argument_group("model"))
    _add_part(options.add_argument_group("parts of a model"))
    _add_recipe(options.add_argument_group("training"))
    run_options = options.add_argument_group("output")
    _add_number(run_options, "--log-every", int, "steps between lines of metrics.jsonl")
    _add_number(run_options, "--eval-every", int, "steps between evaluations of the held-out text")
    _add_number(run_options, "--save-every", int, "steps between checkpoints")
    _add_number(run_options, "--keep", int, "number of the last checkpoints to keep")
    return options


def _add_data(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--data",
        nargs="+",
        metavar="PATH",
        help="files of text (.txt, .md), of rows (.jsonl, .json: text, prompt and completion, or messages), or folders",
    )
    group.add_argument(
        "--held-out", nargs="+", metavar="PATH", help="files or folders to evaluate on; they are never trained on"
    )
    group.add_argument(
        "--control-tokens",
        action="store_true",
        help="encode control tokens in texts, such as <|im_end|> (default: they are plain text)",
    )
    _add_number(group, "--held-out-share", float, "share of the documents to hold out, without --held-out")


def _add_model(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--model", help="checkpoint to start from, a folder or a Hugging Face repository (default: a fresh model)")
    add("--config", type=Path, help="config.json of a fresh model (default: that of this package's small model)")
    add("--tokenizer", help="checkpoint with the tokenizer to use (default: --model's, or one trained on the data)")


def _add_part(group: argparse._ArgumentGroup) -> None:
    _add_number(
        group,
        "--lora",
        int,
        "rank of adapters to train beside --model's matrices, which stay as they are",
    )
    _add_number(group, "--lora-alpha", float, "alpha of the adapters: their scale is alpha / rank (default: 2 * rank)")
    group.add_argument(
        "--lora-targets",
        metavar="KINDS",
        help=f"matrices that get adapters, of {','.join(KINDS)} (default: attention,experts)",
    )
    group.add_argument(
        "--lora-rank-stabilized", action="store_true", help="scale by alpha / sqrt(rank) in place of alpha / rank"
    )
    group.add_argument("--train-only", metavar="PARTS", help=f"train only these parts of --model, of {','.join(PARTS)}")


def _add_recipe(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    _add_number(group, "--steps", int, "number of updates; with --resume, of the whole run")
    _add_number(group, "--batch-size", int, "sequences per update")
    _add_number(
        group,
        "--micro-batches",
        int,
        "number of parts of a batch, computed one after the other to save memory (default: 1, or one for each process"
        " that computes its own)",
    )
    _add_number(group, "--sequence-length", int, "tokens per sequence")
    _add_number(group, "--learning-rate", float, "the highest learning rate")
    _add_number(group, "--warmup", int, "steps until the highest rate (default: a twentieth of --steps, at most 100)")
    add(
        "--schedule",
        choices=get_args(Schedule),
        help=f"how the learning rate falls after the warm-up (default: {_DEFAULTS['schedule']})",
    )
    _add_number(group, "--final-share", float, "learning rate at the last step, as a fraction of the highest")
    _add_number(group, "--weight-decay", float, "weight decay of AdamW")
    _add_number(group, "--clip-norm", float, "largest norm of the gradients; larger ones are scaled down")
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        help=f"dtype to compute in; master weights are float32 (default: {_DEFAULTS['dtype']})",
    )
    add("--recompute", action="store_true", help="save memory: compute activations again in the backward pass")
    _add_number(group, "--z-loss-weight", float, "weight of the routers' z-loss")
    _add_number(group, "--moe-loss-weight", float, "weight of the load-balancing loss (default: the config's)")
    _add_number(group, "--moe-jitter-eps", float, "jitter of the routers' inputs (default: the config's)")
    _add_number(group, "--seed", int, "seed for the order of the data, fresh weights and jitter")


def _add_number(group: argparse._ArgumentGroup, name: str, kind: type, text: str) -> None:
    default = _DEFAULTS[name.removeprefix("--").replace("-", "_")]
    group.add_argument(name, type=kind, help=text if default is None else f"{text} (default: {default})")


def _run(given: dict[str, Any]) -> None:
    folder = RunFolder(given["out"])
    if given.get("resume"):
        _resume(folder, given)
        return
    options = argparse.Namespace(**{**_DEFAULTS, **given})
    if group().leads:
        _begin(folder, options)
    _train(folder, None, options.parallel)


def _begin(folder: RunFolder, options: argparse.Namespace) -> None:
    """Sets up a new run."""
    if folder.started:
        raise InputError(f"{folder.path} holds a run already: continue it with --resume, or name another --out.")
    if not options.data:
        raise InputError("--data is missing: name the text to train on.")
    plan = _plan(options)
    with folder.set_up() as hidden:
        _set_up(hidden, plan, options)


def _train(folder: RunFolder, steps: int | None, parallel: Parallel) -> None:
    """Trains in a folder that is set up. Of several processes only the leader has set it up, and locks it."""
    with folder.locked() if group().leads else contextlib.nullcontext():
        # The others wait here.
        group().share(None)
        plan = folder.read_plan()
        own_plan(plan, parallel)
        if group().leads:
            folder.clean()
        train(folder, plan, steps, parallel)


def _resume(folder: RunFolder, given: Mapping[str, Any]) -> None:
    others = sorted(given.keys() - {"out", "resume", "steps", "parallel"})
    if others:
        option = f"--{others[0].replace('_', '-')}"
        raise InputError(f"{option} can't be changed in a run: give --resume with --out, and --steps at most.")
    _train(folder, given.get("steps"), given.get("parallel", "data"))


def _plan(options: argparse.Namespace) -> Plan:
    """The plan that the options describe, with all checks that don't need the data."""
    if options.model is not None and options.config is not None:
        raise InputError("--model and --config are both given: a model to start from brings its own config.")
    random_key(options.seed)
    start = None if options.model is None else checkpoint_folder(options.model).resolve()
    config = read_config(start or SMALL) if options.config is None else read_config_file(options.config)
    ffn = config.ffn
    if options.moe_loss_weight is not None:
        ffn = replace(ffn, moe_loss_weight=options.moe_loss_weight)
    if options.moe_jitter_eps is not None:
        ffn = replace(ffn, moe_jitter_eps=options.moe_jitter_eps)
    chosen = {field.name: getattr(options, field.name) for field in fields(Recipe)}
    if chosen["micro_batches"] is None:
        chosen["micro_batches"] = group().size if options.parallel == "data" else Recipe.micro_batches
    plan = Plan(
        config=replace(config, ffn=ffn, dtype="float32"),
        recipe=Recipe(**chosen),
        batch_size=options.batch_size,
        sequence_length=options.sequence_length,
        seed=options.seed,
        model=None if start is None else str(start),
        log_every=options.log_every,
        eval_every=options.eval_every,
        save_every=options.save_every,
        keep=options.keep,
        adapters=_adapters(options),
        train_only=None if options.train_only is None else _named("--train-only", options.train_only, PARTS),
    )
    own_plan(plan, options.parallel)
    if plan.trains_part:
        return plan
    if start is not None and tree_formats(load(start, dtype="float32", lazy=True)[0], config):
        print_message(
            f"{options.model} is quantized: its weights are dequantized, and trained as floats (--lora keeps them)"
        )
    return plan


def _adapters(options: argparse.Namespace) -> Adapters | None:
    """The adapters that the options ask for."""
    if options.lora is None:
        for name in ("lora_alpha", "lora_targets", "lora_rank_stabilized"):
            if getattr(options, name) != _DEFAULTS[name]:
                raise InputError(f"--{name.replace('_', '-')} needs --lora: give the adapters' rank.")
        return None
    targets = {} if options.lora_targets is None else {"targets": _named("--lora-targets", options.lora_targets, KINDS)}
    try:
        return Adapters(options.lora, options.lora_alpha, rank_stabilized=options.lora_rank_stabilized, **targets)
    except InputError as error:
        raise InputError(f"--lora: {error}") from None


def _named(option: str, text: str, known: tuple[Any, ...]) -> tuple[Any, ...]:
    """The names in a list with commas, in the order of the known ones."""
    # There is a router in each layer, so its plural is understood too.
    names = ["router" if name.strip() == "routers" else name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise InputError(f"{option} names {name!r} where {', '.join(known)} are known: separate them by commas.")
    return tuple(name for name in known if name in names)


def _set_up(folder: RunFolder, plan: Plan, options: argparse.Namespace) -> None:
    """Reads the data, and writes all that training needs into the run's folder."""
    named = plan.model if options.tokenizer is None else checkpoint_folder(options.tokenizer, weights=False)
    chat_format = ChatFormat(default_system=False)
    if named is not None:
        tokenizer = read_tokenizer(Path(named))
        check_vocabulary(tokenizer, plan.config)
        chat_format = tokenizer.chat_format
        if plan.model is not None and options.tokenizer is not None:
            _warn_of_another_tokenizer(plan.model, tokenizer, options)
    documents = read_documents(options.data, chat_format, control_tokens=options.control_tokens)
    if options.held_out:
        held_out = read_documents(options.held_out, chat_format, control_tokens=options.control_tokens)
        documents, removed = without_held_out(documents, held_out)
        if removed:
            print_message(f"{removed} documents are held out, and not trained on")
    else:
        documents, held_out = split(documents, options.held_out_share, options.seed)

    if named is None:
        size = plan.config.vocab_size
        print_message(f"training a tokenizer of {size:,} tokens")
        save_tokenizer(train_bpe((text for d in documents for text, _ in d.spans), size), folder.tokenizer)
    else:
        copy_tokenizer(Path(named), folder.tokenizer, tokenizer.stop_tokens)
    if chat_format.template is None and any(document.is_chat for document in documents):
        # Other programs don't have the built-in format.
        template = chatml_template(default_system=chat_format.default_system)
        write_file(folder.tokenizer / "chat_template.jinja", template.encode())
    train = _tokenize(folder, folder.train_data, documents)
    Batches(train, plan.batch_size, plan.sequence_length, plan.seed)
    check_targets(train)
    fingerprints = {folder.train_data.name: train.fingerprint}
    if held_out:
        kept = _tokenize(folder, folder.held_out_data, held_out)
        check_targets(kept)
        fingerprints[folder.held_out_data.name] = kept.fingerprint
    folder.begin(plan, fingerprints, model_sums(plan))


def _warn_of_another_tokenizer(model: str, tokenizer: Tokenizer, options: argparse.Namespace) -> None:
    # A model without a tokenizer of its own needs no warning.
    with contextlib.suppress(TokenizerError):
        if read_tokenizer(Path(model)).fingerprint() != tokenizer.fingerprint():
            warnings.warn(
                f"{options.tokenizer} makes other tokens than {options.model} was trained on, so the model has to learn"
                " them from scratch: leave --tokenizer out to keep the model's own.",
                stacklevel=2,
            )


def _tokenize(folder: RunFolder, data: Path, documents: Sequence[Document]) -> TokenFile:
    with byte_progress("tokenizing") as progress:
        return write_token_file(data, documents, read_tokenizer(folder.tokenizer), progress)


if __name__ == "__main__":
    sys.exit(main())
