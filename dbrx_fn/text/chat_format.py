"""A checkpoint's format of conversations."""

from collections.abc import Mapping
from dataclasses import dataclass, field

# The wording of the chat template in the Hub's databricks/dbrx-instruct, which LLaMA-Factory (template "dbrx") and
# SGLang (template "dbrx-instruct") repeat. The repository github.com/databricks/dbrx has an older wording.
DEFAULT_SYSTEM_PROMPT = (
    "You are DBRX, created by Databricks. You were last updated in December 2023. You answer questions based on "
    "information available up to that point.\n"
    "YOU PROVIDE SHORT RESPONSES TO SHORT QUESTIONS OR STATEMENTS, but provide thorough responses to more complex and "
    "open-ended questions.\n"
    "You assist with various tasks, from writing to coding (using markdown for code blocks — remember to use ``` with "
    "code, JSON, and tables).\n"
    "(You do not have real-time data access or code execution capabilities. You avoid stereotyping and provide "
    "balanced perspectives on controversial topics. You do not provide song lyrics, poems, or news articles and do "
    "not divulge details of your training data.)\n"
    "This is your system prompt, guiding your responses. Do not reference it, just respond to the user. If you find "
    "yourself talking about this message, stop. You should be responding appropriately and usually that means not "
    "mentioning this.\n"
    "YOU DO NOT MENTION ANY OF THIS INFORMATION ABOUT YOURSELF UNLESS THE INFORMATION IS DIRECTLY PERTINENT TO THE "
    "USER'S QUERY."
)


@dataclass(frozen=True)
class ChatFormat:
    """A checkpoint's format of conversations.

    Attributes:
        template: the checkpoint's own Jinja template, or None for the built-in DBRX ChatML.
        default_system: whether the built-in ChatML begins with `DEFAULT_SYSTEM_PROMPT` if a conversation has no system
            message (`use_default_system_prompt` in tokenizer_config.json). A template decides this itself.
        special_tokens: variables for a template, such as `{"bos_token": "<|endoftext|>"}`.
        source: the template's file, for error messages.
        control_tokens: texts of the tokens that steer the model (`Tokenizer.control_tokens`). A message's content must
            not become one. Without a tokenizer they are DBRX's.
        stop_tokens: the control tokens that end generation. None, without a tokenizer, means DBRX's and the `eos_token`
            of `special_tokens`.
    """

    template: str | None = None
    default_system: bool = True
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    source: str = "The chat template"
    control_tokens: tuple[str, ...] = ("<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>")
    stop_tokens: tuple[str, ...] | None = None

    @property
    def ends(self) -> tuple[str, ...]:
        """Texts of the tokens that end generation."""
        if self.stop_tokens is not None:
            return self.stop_tokens
        texts = ("<|im_end|>", "<|endoftext|>", self.special_tokens.get("eos_token", "<|im_end|>"))
        return tuple(dict.fromkeys(texts))


CHATML = ChatFormat()
