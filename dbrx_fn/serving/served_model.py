"""The model that a server serves, as requests' readers need it."""

from dataclasses import dataclass

from dbrx_fn.generation.generation_config import GenerationConfig
from dbrx_fn.model.config import Config
from dbrx_fn.serving.fields import FieldError, Fields, wrong_value
from dbrx_fn.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class ServedModel:
    """The model that is asked.

    `name`: what requests call it.
    `created`: when the server began to serve it, in seconds since 1970.
    `capacity`: tokens of the longest text that there is room for.
    `defaults`: what holds where a request leaves it open.
    `max_tokens`: the same.
    `most_choices`: texts that one request may ask for, over all its prompts.
    """

    name: str
    created: int
    config: Config
    tokenizer: Tokenizer
    capacity: int
    defaults: GenerationConfig
    max_tokens: int
    most_choices: int

    def check_meant(self, fields: Fields) -> None:
        """Makes sure that a request means this model, or none in particular.

        Raises:
            FieldError: if it names another.
        """
        name = fields.text("model")
        if name is not None and name != self.name:
            raise self.unknown(name)

    def unknown(self, name: str) -> FieldError:
        """The error for another model's name."""
        wrong = wrong_value("model", name, f"{self.name!r}, the one model that is served,")
        return FieldError("model", str(wrong), "model_not_found")

    def piece(self, token: int) -> bytes:
        """The bytes that a token stands for in a text, control tokens as they are written."""
        return self.tokenizer.token_bytes(token, skip_special_tokens=False)
