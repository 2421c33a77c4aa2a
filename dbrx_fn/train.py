"""`python -m dbrx_fn.train`: trains a DBRX model on text, from scratch or from a checkpoint, and resumes exactly."""

import argparse
import contextlib
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path
from textwrap import shorten
from typing import Any, TextIO, cast, get_args

import mlx.core as mx
from mlx.utils import tree_map
from tqdm import tqdm

from dbrx_fn.atomic import new_folder
from dbrx_fn.batches import Batches
from dbrx_fn.chat import ChatFormat
from dbrx_fn.command import Parser, program, run
from dbrx_fn.config import read_config, read_config_file
from dbrx_fn.corpus import Document, read_documents, split, without_held_out
from dbrx_fn.errors import InputError, TokenizerError
from dbrx_fn.evaluation import Evaluation, check_targets, evaluate
from dbrx_fn.hub import SMALL, checkpoint_folder
from dbrx_fn.loader import load
from dbrx_fn.losses import busiest_expert
from dbrx_fn.params import Params, init_params, param_count
from dbrx_fn.pictures import check_matplotlib, write_picture
from dbrx_fn.quantization import tree_formats
from dbrx_fn.run_folder import RunFolder
from dbrx_fn.run_plan import Plan
from dbrx_fn.sampling import random_key
from dbrx_fn.saver import copy_tokenizer, save
from dbrx_fn.terminal import byte_progress, print_message, print_result
from dbrx_fn.token_file import TokenFile, check_ids, check_vocabulary, read_token_file, write_token_file
from dbrx_fn.tokenizer import Tokenizer, read_tokenizer
from dbrx_fn.train_tokenizer import save_tokenizer, train_bpe
from dbrx_fn.training import Measured, Recipe, Schedule, State, check_memory, init_state, train_step
from dbrx_fn.training_pictures import draw_expert_load, draw_losses

_DEFAULTS: dict[str, Any] = {
    **{field.name: field.default for field in fields(Recipe) if field.default is not MISSING},
    "data": [],
    "held_out": [],
    "held_out_share": 0.05,
    "control_tokens": False,
    "resume": False,
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
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 0, 2 for anything the user can mend, 130 after Ctrl-C."""
    return run(
        lambda options: _run(vars(options)),
        parser(),
        arguments,
        kept=_kept,
        smaller="take a smaller --batch-size, more --micro-batches, or --recompute",
    )


def _kept(options: argparse.Namespace) -> str:
    started = RunFolder(options.out).started
    return f"--out {options.out} --resume goes on from the last checkpoint" if started else "nothing is kept"


def parser() -> argparse.ArgumentParser:
    """The command's options. One that isn't given is absent from what they parse to."""
    options = Parser(
        prog=program("train"),
        description="Train a DBRX model on text. With --resume, go on with the run in --out exactly where its last"
        " checkpoint left it.",
        argument_default=argparse.SUPPRESS,
    )
    add = options.add_argument

    def number(name: str, kind: type, text: str) -> None:
        default = _DEFAULTS[name.removeprefix("--").replace("-", "_")]
        add(name, type=kind, help=text if default is None else f"{text}; {default} if not given")

    add("--out", type=Path, required=True, help="new folder of the run: checkpoints, metrics, pictures, the model")
    add("--resume", action="store_true", help="go on with the run in --out; no other option is needed or taken")
    add(
        "--data",
        nargs="+",
        metavar="PATH",
        help="files of text (.txt, .md), of rows (.jsonl, .json: text, prompt and completion, or messages), or folders",
    )
    add("--held-out", nargs="+", metavar="PATH", help="the same, to evaluate on; never trained on")
    add(
        "--control-tokens",
        action="store_true",
        help="let texts spell control tokens, such as <|im_end|>; if not given they are plain text",
    )
    number("--held-out-share", float, "share of the documents to hold out where --held-out isn't given")
    add("--model", help="checkpoint to start from, a folder or a Hugging Face repository; a fresh model if not given")
    add("--config", type=Path, help="config.json of a fresh model; the small model's that ships here if not given")
    add("--tokenizer", help="checkpoint whose tokenizer to take; if not given, --model's, or one trained on the data")
    number("--steps", int, "updates to make")
    number("--batch-size", int, "sequences to an update")
    number("--micro-batches", int, "parts that a batch is worked on in, one by one, to save memory")
    number("--sequence-length", int, "tokens of a sequence")
    number("--learning-rate", float, "at its highest")
    number("--warmup", int, "steps until it is reached; a twentieth of --steps, at most 100, if not given")
    add(
        "--schedule",
        choices=get_args(Schedule),
        help=f"how it falls from there; {_DEFAULTS['schedule']} if not given",
    )
    number("--final-share", float, "what part of it is left at the end")
    number("--weight-decay", float, "of AdamW")
    number("--clip-norm", float, "largest norm of the gradients")
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        help=f"to compute in, with float32 master weights; {_DEFAULTS['dtype']} if not given",
    )
    add("--recompute", action="store_true", help="save memory: compute activations again in the backward pass")
    number("--z-loss-weight", float, "of the routers' z-loss")
    number("--moe-loss-weight", float, "of the load-balancing loss; the config's if not given")
    number("--moe-jitter-eps", float, "jitter of what the routers read; the config's if not given")
    number("--seed", int, "for the order of the data, fresh weights and jitter")
    number("--log-every", int, "steps between lines of metrics.jsonl")
    number("--eval-every", int, "steps between evaluations of the held-out text")
    number("--save-every", int, "steps between checkpoints")
    number("--keep", int, "how many of the last checkpoints to keep")
    return options


def _run(given: dict[str, Any]) -> None:
    folder = RunFolder(given["out"])
    if given.get("resume"):
        others = sorted(given.keys() - {"out", "resume"})
        if others:
            option = f"--{others[0].replace('_', '-')}"
            raise InputError(f"{option} can't be changed on the way: give --resume with --out alone.")
        plan = Plan.from_dict(folder.read_settings(), folder.settings_file)
        check_memory(plan.config)
    else:
        options = argparse.Namespace(**{**_DEFAULTS, **given})
        if folder.started:
            raise InputError(f"{folder.path} holds a run already: go on with it with --resume, or name another --out.")
        if not options.data:
            raise InputError("--data is missing: name the text to train on.")
        plan = _plan(options)
        # An empty folder is as good as none.
        with contextlib.suppress(OSError):
            folder.path.rmdir()
        with new_folder(folder.path) as beside:
            _set_up(RunFolder(beside), plan, options)
    with folder.locked():
        folder.clean()
        _train(folder, plan)


def _plan(options: argparse.Namespace) -> Plan:
    """What the options ask for, checked as far as can be without the data."""
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
    )
    check_memory(plan.config)
    if plan.model is not None and tree_formats(_start_params(plan.model), config):
        raise InputError(f"{options.model} is quantized: start from the dense checkpoint that it was made of.")
    return plan


def _set_up(folder: RunFolder, plan: Plan, options: argparse.Namespace) -> None:
    """Reads the data, and leaves in the run's folder what training needs."""
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
            print_message(f"{removed} documents are held out and left out of training")
    else:
        documents, held_out = split(documents, options.held_out_share, options.seed)

    if named is None:
        size = plan.config.vocab_size
        print_message(f"training a tokenizer of {size:,} tokens")
        save_tokenizer(train_bpe((text for d in documents for text, _ in d.spans), size), folder.tokenizer)
    else:
        copy_tokenizer(Path(named), folder.tokenizer)
    train = _tokenize(folder, folder.train_data, documents)
    Batches(train, plan.batch_size, plan.sequence_length, plan.seed)
    check_targets(train)
    if held_out:
        check_targets(_tokenize(folder, folder.held_out_data, held_out))
    folder.write_settings(plan.as_dict())


def _warn_of_another_tokenizer(model: str, tokenizer: Tokenizer, options: argparse.Namespace) -> None:
    # A model without a tokenizer of its own has none to differ from.
    with contextlib.suppress(TokenizerError):
        if read_tokenizer(Path(model)).fingerprint() != tokenizer.fingerprint():
            warnings.warn(
                f"{options.tokenizer} makes other tokens than {options.model} was trained on, and what they"
                " mean has to be learned anew: leave --tokenizer out to keep the model's own.",
                stacklevel=2,
            )


def _tokenize(folder: RunFolder, data: Path, documents: Sequence[Document]) -> TokenFile:
    with byte_progress("tokenizing") as progress:
        return write_token_file(data, documents, read_tokenizer(folder.tokenizer), progress)


def _start_params(model: str) -> Params:
    return load(Path(model), dtype="float32", lazy=True)[0]


def _train(folder: RunFolder, plan: Plan) -> None:
    config, recipe = plan.config, plan.recipe
    train = read_token_file(folder.train_data)
    held_out = read_token_file(folder.held_out_data) if folder.held_out_data.exists() else None
    for token_file in (train,) if held_out is None else (train, held_out):
        check_ids(token_file, config)
    batches = Batches(train, plan.batch_size, plan.sequence_length, plan.seed)
    init_key, run_key = mx.random.split(random_key(plan.seed))
    # Where there is a checkpoint, fresh parameters are only its outline: they are never computed, nor --model needed.
    fresh = plan.model is None or folder.saved_steps()
    params = init_params(config, init_key) if fresh else _start_params(cast(str, plan.model))
    state, start = folder.load(init_state(params, recipe, run_key))
    folder.cut_metrics(start)
    print_message(
        f"{param_count(config):,} parameters, {param_count(config, active=True):,} active;"
        f" {len(train):,} tokens to train on, {0 if held_out is None else len(held_out):,} held out;"
        f" {recipe.steps:,} steps of {plan.batch_size * plan.sequence_length:,} tokens,"
        f" {batches.epochs(recipe.steps):.2f} epochs" + (f"; resumed after step {start:,}" if start else "")
    )
    evaluation: Evaluation | None = None
    clock, since = time.perf_counter(), start
    with (
        folder.metrics_file.open("a") as metrics,
        tqdm(total=recipe.steps, initial=start, unit="step", disable=None, smoothing=0.05) as bar,
    ):
        bar.set_description("compiling" if start < recipe.steps else "done")
        previous: Measured | None = None
        for step in range(start + 1, recipe.steps + 1):
            first, last = step == start + 1, step == recipe.steps
            try:
                tokens, mask = batches[step - 1]
                state, measured = train_step(state, mx.array(tokens), mx.array(mask), config=config, recipe=recipe)
                mx.async_eval(state, measured)
                if first:
                    mx.eval(measured)
            except (RuntimeError, MemoryError) as error:
                if not first:
                    raise
                raise InputError(
                    f"The first step can't be computed ({shorten(str(error), 200, placeholder='…')}), most likely for"
                    " want of memory: start anew in another --out with a smaller --batch-size, more --micro-batches,"
                    " or --recompute."
                ) from None
            # The step before is looked at while this one runs.
            if previous is not None:
                _check_finite(previous, step - 1, folder)
            previous = measured
            bar.update()
            if step % plan.log_every == 0 or last or first:
                _check_finite(measured, step, folder)
                now = time.perf_counter()
                rate = (step - since) * plan.batch_size * plan.sequence_length / (now - clock)
                clock, since = now, step
                noted = _noted(measured, step, batches.epochs(step), rate)
                bar.set_description(_described(noted, evaluation))
                if step % plan.log_every == 0 or last:
                    _note(metrics, noted)
                    if bar.disable:
                        left = tqdm.format_interval(
                            plan.batch_size * plan.sequence_length * (recipe.steps - step) / rate
                        )
                        print_message(f"step {step:6d}  {_described(noted, evaluation)}, {left} left")
            pauses = last or step % plan.save_every == 0 or (held_out is not None and step % plan.eval_every == 0)
            if pauses:
                # It waits for the step, so that the step's time isn't taken for theirs.
                _check_finite(measured, step, folder)
            began = time.perf_counter()
            if held_out is not None and (step % plan.eval_every == 0 or last):
                evaluation = _evaluate(state, plan, held_out)
                if not math.isfinite(evaluation.nats_per_token):
                    raise folder.not_finite(f"The held-out text's loss became {evaluation.nats_per_token} after", step)
                _note(metrics, _noted_evaluation(evaluation, step))
                print_message(_line(measured, evaluation, step))
            if step % plan.save_every == 0 or last:
                # A checkpoint on the disk means that what was noted before it is there too.
                os.fsync(metrics.fileno())
                folder.save(state, step, config, keep=plan.keep)
            clock += time.perf_counter() - began
    _finish(folder, plan, state)


def _finish(folder: RunFolder, plan: Plan, state: State) -> None:
    """Writes the model by itself, draws what the metrics say, and prints how it went."""
    model = folder.path / "model"
    if not model.exists():
        save(
            model,
            _computed(state, plan),
            replace(plan.config, dtype=plan.recipe.dtype),
            tokenizer_files=folder.tokenizer,
        )
    lines = folder.read_metrics()
    evaluated = [line for line in lines if "expert_share" in line]
    try:
        check_matplotlib()
        write_picture(draw_losses({"model": lines}), folder.path / "loss.png")
        if evaluated:
            write_picture(draw_expert_load(evaluated[-1]["expert_share"]), folder.path / "expert_load.png")
    except InputError as error:
        print_message(f"warning: {error}")
    rows = [
        ("steps", f"{plan.recipe.steps:,}"),
        ("tokens", f"{plan.recipe.steps * plan.batch_size * plan.sequence_length:,}"),
    ]
    trained = [line for line in lines if "cross_entropy" in line]
    if trained:
        rows.append(("training", f"{trained[-1]['cross_entropy']:.4f} nats/token"))
    if evaluated:
        held_out = evaluated[-1]
        rows += [
            ("held out", f"{held_out['held_out_nats_per_token']:.4f} nats/token"),
            ("", f"{held_out['held_out_bits_per_byte']:.4f} bits/byte"),
            ("busiest expert", f"{held_out['held_out_busiest_expert']:.2f} times its share"),
        ]
    rows.append(("model", str(model)))
    print_result("\n".join(f"{name:15} {value}" for name, value in rows))


def _computed(state: State, plan: Plan) -> Params:
    """The parameters as the passes of training see them."""
    dtype = getattr(mx, plan.recipe.dtype)
    params: Params = tree_map(lambda array: array.astype(dtype), state["params"])
    return params


def _evaluate(state: State, plan: Plan, held_out: TokenFile) -> Evaluation:
    return evaluate(
        _computed(state, plan),
        replace(plan.config, dtype=plan.recipe.dtype),
        held_out,
        batch_size=plan.batch_size // plan.recipe.micro_batches,
        sequence_length=plan.sequence_length,
    )


def _check_finite(measured: Measured, step: int, folder: RunFolder) -> None:
    loss, norm = _number(measured.loss), _number(measured.gradient_norm)
    if math.isfinite(loss) and math.isfinite(norm):
        return
    what = f"loss became {loss}" if not math.isfinite(loss) else f"gradients' norm became {norm}"
    raise folder.not_finite(f"The {what} at", step)


def _noted(measured: Measured, step: int, epoch: float, rate: float) -> dict[str, float]:
    parts = measured.parts
    return {
        "step": step,
        "epoch": round(epoch, 4),
        "loss": _number(measured.loss),
        "cross_entropy": _number(parts.cross_entropy),
        "load_balance": _number(parts.load_balance),
        "router_z": _number(parts.router_z),
        "gradient_norm": _number(measured.gradient_norm),
        "learning_rate": _number(measured.learning_rate),
        "busiest_expert": busiest_expert(parts.expert_share),
        "tokens_per_second": round(rate, 1),
    }


def _noted_evaluation(evaluation: Evaluation, step: int) -> dict[str, Any]:
    return {
        "step": step,
        "held_out_nats_per_token": evaluation.nats_per_token,
        "held_out_bits_per_byte": evaluation.bits_per_byte,
        "held_out_busiest_expert": evaluation.busiest_expert,
        "expert_share": evaluation.expert_share.tolist(),
    }


def _number(array: mx.array) -> float:
    return cast(float, array.item())


def _note(metrics: TextIO, line: Mapping[str, Any]) -> None:
    metrics.write(json.dumps(line) + "\n")
    metrics.flush()


def _described(noted: Mapping[str, float], evaluation: Evaluation | None) -> str:
    held_out = "" if evaluation is None else f", held out {evaluation.bits_per_byte:.3f} bits/byte"
    return (
        f"loss {noted['cross_entropy']:.3f}{held_out}, busiest expert {noted['busiest_expert']:.2f}x,"
        f" {noted['tokens_per_second']:,.0f} tokens/s"
    )


def _line(measured: Measured, evaluation: Evaluation, step: int) -> str:
    return (
        f"step {step:6d}  training {_number(measured.parts.cross_entropy):.4f}  held out"
        f" {evaluation.nats_per_token:.4f} nats/token {evaluation.bits_per_byte:.4f} bits/byte  busiest expert"
        f" {evaluation.busiest_expert:.2f}x"
    )


if __name__ == "__main__":
    sys.exit(main())
