"""What a user can get wrong, each as one sentence: what was found, what was expected, what to do."""


class DbrxError(Exception):
    """Base of every error a user can cause; its text is one sentence fit to print as it stands."""


class ConfigError(DbrxError):
    """A `config.json` that is missing, isn't DBRX's, or describes a model that can't exist."""


class CheckpointError(DbrxError):
    """Checkpoint files that are missing, damaged or don't hold the tensors the config asks for."""


class TokenizerError(DbrxError):
    """Tokenizer files that are missing or unreadable, or a chat template that can't be rendered."""


class InputError(DbrxError):
    """Arguments that can't work: an empty prompt, one longer than the context, an unknown option value."""


class CacheError(DbrxError):
    """A cache that is too small, or that was made for another batch, model or dtype."""


class GenerationError(DbrxError):
    """A text that can't go on: the model's numbers are no longer finite."""


class TrainingError(DbrxError):
    """A training run that can't go on: its numbers are no longer finite."""


def lacks_memory(error: Exception) -> bool:
    """Whether MLX or Python raised it because an array can't be allocated; MLX has no class of its own for that."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in said for words in ("out of memory", "allocat"))
    )
