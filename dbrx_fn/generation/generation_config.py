"""`generation_config.json`: the generation settings that a checkpoint's authors recommend.

Settings mean what they mean in transformers' `generate` (5.23). Those that affect greedy decoding apply without
`do_sample` too, and `do_sample` without `top_k` draws among 50 tokens. A setting that would have an effect there and
isn't supported here gives a warning. Stop tokens (`eos_token_id`) are read by the tokenizer.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dbrx_fn.errors import CheckpointError, InputError
from dbrx_fn.files.json_file import parse_json, read_bounded, shown
from dbrx_fn.generation.sampling import Sampling

_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty")
_TOP_K = 50
"""transformers' default of `top_k` with `do_sample`."""

# Settings that change texts in transformers, each with the values that have no effect.
_UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "bad_words_ids": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": ([], {}),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1,),
    "watermarking_config": (),
    "token_healing": (False,),
    "max_time": (),
    "constraints": ([],),
    "force_words_ids": ([],),
    "dola_layers": (),
}
# The same for settings that affect sampling only.
_UNSUPPORTED_DRAWS: Mapping[str, tuple[object, ...]] = {
    "typical_p": (1,),
    "top_h": (),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
}


@dataclass(frozen=True)
class GenerationConfig:
    """A checkpoint's default settings for generation.

    `sampling`: how tokens are chosen. Without `do_sample` it keeps filters such as top-p, which matter if the user
        gives a temperature.
    `max_tokens`: the most tokens to generate.
    `stop_strings`: strings that end a text.
    """

    sampling: Sampling
    max_tokens: int | None
    stop_strings: tuple[str, ...]


def read_generation_config(folder: Path) -> GenerationConfig:
    """Reads a checkpoint folder's settings. Warns of those that aren't supported.

    Raises:
        CheckpointError: if the file can't be read, or a setting has an impossible value.
    """
    file = folder / "generation_config.json"
    try:
        settings = parse_json(read_bounded(file)) if file.exists() else {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} can't be read as JSON ({error}): fetch it again, or remove it.") from None
    if not isinstance(settings, dict):
        raise CheckpointError(f"{file} holds {shown(settings)} where an object is expected: fetch it again.")
    # A null setting counts as absent.
    given: dict[str, Any] = {name: value for name, value in settings.items() if value is not None}
    draws = _checked(file, given, "do_sample", bool, "true or false") or False
    _warn_of_unsupported(file, given, draws)
    stops = given.get("stop_strings", [])
    stops = [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise CheckpointError(f"{file}: stop_strings is {shown(stops)} where a list of texts is expected: mend it.")
    max_tokens = _checked(file, given, "max_new_tokens", int, "a whole number from 1 on")
    if max_tokens is not None and max_tokens < 1:
        raise CheckpointError(f"{file}: max_new_tokens is {max_tokens} where at least 1 is expected: mend it.")
    return GenerationConfig(_sampling(file, given, draws), max_tokens, tuple(stops))


def _sampling(file: Path, given: Mapping[str, Any], draws: bool) -> Sampling:
    chosen: dict[str, Any] = {"temperature": 1.0, "top_k": _TOP_K if draws else 0}
    for name in _NUMBERS:
        value = _checked(file, given, name, (int, float), "a number")
        if value is not None:
            chosen[name] = value
    top_k = _checked(file, given, "top_k", (int, float), "a whole number")
    if top_k is not None:
        if isinstance(top_k, float) and not top_k.is_integer():
            raise CheckpointError(f"{file}: top_k is {top_k} where a whole number is expected: mend or remove it.")
        chosen["top_k"] = int(top_k)
    if not draws:
        chosen["temperature"] = 0.0
    try:
        return Sampling(**chosen)
    except InputError as error:
        raise CheckpointError(f"{file} can't be followed ({str(error).rstrip('.')}): mend or remove it.") from None


def _checked(file: Path, given: Mapping[str, Any], name: str, kinds: type | tuple[type, ...], expected: str) -> Any:
    value = given.get(name)
    wanted = kinds if isinstance(kinds, tuple) else (kinds,)
    if value is None:
        return None
    # Python counts true and false among the integers.
    if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
        raise CheckpointError(f"{file}: {name} is {shown(value)} where {expected} is expected: mend or remove it.")
    return value


def _warn_of_unsupported(file: Path, given: Mapping[str, Any], draws: bool) -> None:
    table = {**_UNSUPPORTED, **(_UNSUPPORTED_DRAWS if draws else {})}
    names = [name for name, neutral in table.items() if name in given and given[name] not in neutral]
    # Contrastive search needs both settings.
    if not draws and given.get("penalty_alpha", 0) != 0 and given.get("top_k", 0) != 0:
        names.append("penalty_alpha")
    if names:
        one = len(names) == 1
        warnings.warn(
            f"{file} asks for {', '.join(names)}, which {'is' if one else 'are'} not supported here: the text is made"
            f" without {'it' if one else 'them'}.",
            stacklevel=3,
        )
