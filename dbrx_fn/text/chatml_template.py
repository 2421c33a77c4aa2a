"""DBRX's built-in ChatML as a Jinja template, for programs that need a template beside a checkpoint."""

import json

from dbrx_fn.text.chat_format import DEFAULT_SYSTEM_PROMPT


def chatml_template(*, default_system: bool) -> str:
    """A template that renders the same as the built-in ChatML of `dbrx_fn.text.chat.render_chat`.

    Args:
        default_system: whether it begins with `DEFAULT_SYSTEM_PROMPT` if a conversation has no system message.
    """
    default = json.dumps(f"<|im_start|>system\n{DEFAULT_SYSTEM_PROMPT}<|im_end|>\n", ensure_ascii=False)
    opening = "{%- if messages[0].role != 'system' -%}{{ " + default + " }}{%- endif -%}\n" if default_system else ""
    return (
        opening
        + """{%- for message in messages -%}
    {%- if message.role not in ['system', 'user', 'assistant'] -%}
        {{- raise_exception('The role ' ~ message.role ~ ' is none of system, user and assistant.') -}}
    {%- endif -%}
    {%- set content = message.content.strip() if loop.first and message.role == 'system' else message.content -%}
    {{- '' if loop.first else '\\n' }}{{ '<|im_start|>' ~ message.role ~ '\\n' ~ content ~ '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '\\n<|im_start|>assistant\\n' }}{%- endif -%}
"""
    )
