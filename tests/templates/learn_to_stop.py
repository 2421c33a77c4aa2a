"""Trains a small model on each family's template, and looks whether it answers and stops: `nox -s templates`.

Names of families as arguments choose some. It prints a line for each, and exits with status 1 if one goes on where it
should stop, or isn't refused where it should be.
"""

import io
import json
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from tokenizers import AddedToken

from dbrx_fn import encode_chat, load, load_tokenizer, stream_text, train
from dbrx_fn.data.corpus import read_documents
from dbrx_fn.errors import TokenizerError
from dbrx_fn.text.bpe import save_tokenizer, train_bpe
from dbrx_fn.text.chat import render_chat
from tests.templates.families import FAMILIES, Family

ANSWERS = {
    "Who wrote Hamlet?": "Shakespeare did.",
    "What is 2 + 2?": "4",
    "Name a colour.": "Blue, like the sea\nand the sky.",
    "Are you well?": "Yes, thank you. And you?",
    "Count to five.": "1, 2, 3, 4, 5.",
    "Say nothing.": "...",
    "What is red?": "A rose is red.",
    "Where is Elsinore?": "In Denmark, they say.",
}
SHAPE = {
    "model_type": "dbrx",
    "d_model": 64,
    "n_heads": 2,
    "n_layers": 2,
    "max_seq_len": 1024,
    "attn_config": {"kv_n_heads": 1, "rope_theta": 10000.0, "clip_qkv": 8.0},
    "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
}
STEPS = 300


def write_tokenizer(family: Family, folder: Path) -> None:
    """Writes a tokenizer as a checkpoint of the family has it."""
    texts = [*ANSWERS, *ANSWERS.values(), render_chat(family.conversation(("", "")), family.chat_format)]
    tokenizer = train_bpe(texts, 320)
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in family.control])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in family.words])
    save_tokenizer(tokenizer, folder)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": family.bos, "eos_token": family.eos}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(family.chat_format.template or "", encoding="utf-8")
    stops = [tokenizer.token_to_id(text) for text in family.stops]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))


def write_rows(family: Family, file: Path) -> None:
    """Writes conversations of one and of two turns."""
    pairs = list(ANSWERS.items())
    conversations = [family.conversation(pair) for pair in pairs]
    conversations += [family.conversation(first, second) for first in pairs for second in pairs if first != second]
    file.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in conversations))


def learn(family: Family, folder: Path) -> tuple[bool, str]:
    """Trains a model and asks it all; returns whether it did as it should, and what it did."""
    write_tokenizer(family, folder / "tokenizer")
    write_rows(family, folder / "rows.jsonl")
    tokenizer = load_tokenizer(folder / "tokenizer")
    try:
        read_documents([folder / "rows.jsonl"], tokenizer.chat_format)
    except TokenizerError as error:
        return family.ends is None, f"refused: {str(error).partition(': ')[2]}"
    (folder / "config.json").write_text(json.dumps({**SHAPE, "vocab_size": tokenizer.vocab_size}))
    options = {
        "--data": folder / "rows.jsonl",
        "--tokenizer": folder / "tokenizer",
        "--config": folder / "config.json",
        "--out": folder / "run",
        "--held-out-share": 0,
        "--steps": STEPS,
        "--batch-size": 8,
        "--sequence-length": 96,
        "--learning-rate": 4e-3,
        "--save-every": STEPS,
    }
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as said:
        status = train.main([str(part) for option in options.items() for part in option])
    if status != 0:
        return False, f"training ended with status {status}: {said.getvalue()[-300:]}"
    params, config = load(folder / "run" / "model")
    wrong = []
    for question, answer in ANSWERS.items():
        for before in ((), (("Are you well?", "Yes, thank you. And you?"),)):
            messages = family.conversation(*before, (question, ""))[:-1]
            pieces = list(stream_text(params, config, tokenizer, encode_chat(tokenizer, messages), max_tokens=60))
            text = "".join(piece.text for piece in pieces)
            ended = tokenizer.decode([pieces[-1].token], skip_special_tokens=False)
            if pieces[-1].finish_reason != "stop" or answer not in text or ended not in (family.ends or "").strip():
                wrong.append(f"{text!r} ({pieces[-1].finish_reason}, {ended!r})")
    right = 2 * len(ANSWERS) - len(wrong)
    return not wrong, f"{right} of {2 * len(ANSWERS)} answered and stopped" + (f", not {wrong[0]}" if wrong else "")


def main() -> int:
    """Runs all families, or those that are named."""
    failed = 0
    for family in FAMILIES:
        if sys.argv[1:] and family.name not in sys.argv[1:]:
            continue
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            fine, what = learn(family, Path(folder))
        failed += not fine
        seconds = time.perf_counter() - start
        print(f"{family.name:18s} {'ok' if fine else 'WRONG':6s} {seconds:5.1f} s  {what}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
