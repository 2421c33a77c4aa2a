"""Errors that a user can cause. Each message is one sentence: what was found, what was expected, what to do."""


class DbrxError(Exception):
    """Base of every error that a user can cause. Its text is one sentence, ready to print."""


class ConfigError(DbrxError):
    """A `config.json` that is missing, isn't DBRX's, or describes an impossible model."""


class CheckpointError(DbrxError):
    """Checkpoint files that are missing or damaged, or that lack tensors of the config."""


class TokenizerError(DbrxError):
    """Tokenizer files that are missing or unreadable, or a chat template that can't be rendered."""


class InputError(DbrxError):
    """Arguments that can't work: an empty prompt, one longer than the context, an unknown option value."""


class CacheError(DbrxError):
    """A cache that is too small, or that was made for another batch, model or dtype."""


class GenerationError(DbrxError):
    """Generation that can't continue: the model's numbers aren't finite any more, or no token fits the structure."""


class BusyError(DbrxError):
    """An engine whose queue is full. The same request may be taken later."""


class EngineError(DbrxError):
    """An engine that was closed, or that ended by a fault of its own."""


class TrainingError(DbrxError):
    """A training run that can't continue: its numbers are no longer finite."""


def lacks_memory(error: Exception) -> bool:
    """Whether an allocation failed in MLX or Python. MLX raises plain RuntimeErrors for that."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in said for words in ("out of memory", "allocat"))
    )
