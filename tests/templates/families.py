"""Chat templates in the manner of the families in use: a Jinja file each, and what a checkpoint of it would say."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dbrx_fn.text.chat import ChatFormat

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Family:
    """A family's template and tokens.

    Attributes:
        name: of its file.
        control: its special tokens.
        stops: those that end generation.
        bos: what the template sees as bos_token.
        eos: what it sees as eos_token.
        words: added tokens that aren't special.
        system: whether it takes a system message.
        tools: whether it takes tools and calls.
        reasoning: whether it writes reasoning.
        ends: what ends a turn; None where there is no such thing, and it can't be learned from.
    """

    name: str
    control: tuple[str, ...]
    stops: tuple[str, ...]
    ends: str | None
    bos: str = "<s>"
    eos: str = "</s>"
    words: tuple[str, ...] = ()
    system: bool = True
    tools: bool = False
    reasoning: bool = False

    @property
    def chat_format(self) -> ChatFormat:
        """As a tokenizer of the family would have it."""
        return ChatFormat(
            template=(FOLDER / f"{self.name}.jinja").read_text(encoding="utf-8"),
            special_tokens={"bos_token": self.bos, "eos_token": self.eos},
            source=f"{self.name}.jinja",
            control_tokens=self.control,
            stop_tokens=self.stops,
        )

    def conversation(self, *turns: tuple[str, str]) -> list[dict[str, Any]]:
        """Turns of user and assistant, with a system message where the family takes one."""
        messages = [{"role": "system", "content": "Be brief."}] if self.system else []
        for user, assistant in turns:
            messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
        return messages


IM = ("<|im_start|>", "<|im_end|>")
SENTENCE = ("<s>", "</s>")
LLAMA3 = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|eom_id|>",
)
PHI = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>")
INST = (*SENTENCE, "[INST]", "[/INST]")
COHERE = ("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>")
DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")  # noqa: RUF001
TOOLS = ("<tool_call>", "</tool_call>")
THINK = ("<think>", "</think>", *TOOLS)
HARMONY = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>")
IM_END, EOT = "<|im_end|>", "<|eot_id|>"

FAMILIES = (
    Family("chatml", (*IM, "<|endoftext|>"), IM[1:], IM_END, eos=IM_END),
    Family("dbrx", (*IM, "<|endoftext|>"), ("<|endoftext|>", *IM[1:]), IM_END, eos="<|endoftext|>"),
    Family("llama2", SENTENCE, ("</s>",), "</s>"),
    Family("llama3", LLAMA3, LLAMA3[1:2] + LLAMA3[4:5], EOT, bos=LLAMA3[0], eos=EOT),
    Family("llama31_tools", LLAMA3, (LLAMA3[1], *LLAMA3[4:]), EOT, bos=LLAMA3[0], eos=EOT, tools=True),
    Family("mistral_v1", SENTENCE, ("</s>",), "</s>", system=False),
    # It writes a system message behind the last turn only.
    Family(
        "mistral_v3_tools",
        (*INST, "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        ("</s>",),
        "</s>",
        system=False,
        tools=True,
    ),
    Family("mistral_tekken", (*INST, "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"), ("</s>",), "</s>"),
    Family(
        "gemma",
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        ("<eos>", "<end_of_turn>"),
        "<end_of_turn>",
        bos="<bos>",
        eos="<eos>",
        system=False,
    ),
    Family("phi3", PHI, ("<|end|>", "<|endoftext|>"), "<|end|>", eos="<|endoftext|>"),
    Family("phi4", (*IM, "<|im_sep|>", "<|endoftext|>"), (IM_END, "<|endoftext|>"), IM_END, eos=IM_END),
    Family("qwen25", (*IM, "<|endoftext|>"), (IM_END, "<|endoftext|>"), IM_END, eos=IM_END, words=TOOLS, tools=True),
    Family(
        "qwen3",
        (*IM, "<|endoftext|>"),
        (IM_END, "<|endoftext|>"),
        IM_END,
        eos=IM_END,
        words=THINK,
        tools=True,
        reasoning=True,
    ),
    Family("zephyr", SENTENCE, ("</s>",), "</s>"),
    Family("vicuna", SENTENCE, ("</s>",), "</s>"),
    Family("alpaca", SENTENCE, ("</s>",), "</s>"),
    Family("deepseek_v3", DEEPSEEK, DEEPSEEK[1:2], DEEPSEEK[1], bos=DEEPSEEK[0], eos=DEEPSEEK[1]),
    # It writes no reasoning, but generation begins with it.
    Family("deepseek_r1", DEEPSEEK, DEEPSEEK[1:2], None, bos=DEEPSEEK[0], eos=DEEPSEEK[1], words=THINK[:2]),
    Family("command_r", ("<BOS_TOKEN>", *COHERE), COHERE[1:2], COHERE[1], bos="<BOS_TOKEN>", eos=COHERE[1]),
    Family("olmo", PHI, ("<|endoftext|>",), "<|endoftext|>", bos="<|endoftext|>", eos="<|endoftext|>"),
    Family(
        "granite",
        ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"),
        ("<|end_of_text|>",),
        "<|end_of_text|>",
        eos="<|end_of_text|>",
        words=("<|tool_call|>",),
        tools=True,
    ),
    # Nothing ends its turns.
    Family("falcon", ("<|endoftext|>",), ("<|endoftext|>",), None, eos="<|endoftext|>"),
    Family("starchat", PHI, ("<|end|>",), "<|end|>", eos="<|endoftext|>"),
    Family("openchat", (*SENTENCE, "<|end_of_turn|>"), ("<|end_of_turn|>",), "<|end_of_turn|>", eos="<|end_of_turn|>"),
    Family("internlm2", (*SENTENCE, *IM), ("</s>", IM_END), IM_END),
    # The next turn's opening ends a turn.
    Family(
        "glm4",
        ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|endoftext|>"),
        ("<|endoftext|>", "<|user|>", "<|observation|>"),
        "<|user|>",
        eos="<|endoftext|>",
    ),
    Family("hermes_tools", (*IM, "<|endoftext|>"), IM[1:], IM_END, bos="", eos=IM_END, words=TOOLS, tools=True),
    Family("nemotron", ("<extra_id_0>", "<extra_id_1>", "</s>"), ("</s>", "<extra_id_1>"), "\n<extra_id_1>"),
    Family("smollm3", (*IM, "<|endoftext|>"), IM[1:], IM_END, eos=IM_END, words=THINK[:2]),
    Family(
        "jamba",
        ("<|startoftext|>", "<|eom|>", *PHI[:3], "<|tool|>"),
        ("<|eom|>",),
        "<|eom|>",
        bos="<|startoftext|>",
        eos="<|eom|>",
        words=("<tool_calls>", "</tool_calls>"),
        tools=True,
    ),
    Family("harmony", HARMONY, HARMONY[4:], "<|return|>", eos="<|return|>", tools=True, reasoning=True),
    Family("parts", (*IM, "<|endoftext|>"), IM[1:], IM_END, eos=IM_END),
)
