"""`/tokenize`, `/detokenize` and `/tokenizer_info`, in vLLM's form: text to token ids and back, without the engine."""

from dbrx_fn.serving.chat_completions import read_messages
from dbrx_fn.serving.completions import checked_ids
from dbrx_fn.serving.fields import FieldError, read_object
from dbrx_fn.serving.openai_objects import Object, token_text
from dbrx_fn.serving.served_model import ServedModel
from dbrx_fn.text.chat import encode_chat
from dbrx_fn.text.prompt_length import encode_prompt


def tokenized(body: bytes, model: ServedModel) -> Object:
    """The tokens of a `prompt`, or of a conversation's `messages`.

    Raises:
        InputError: naming what can't be followed.
        TokenizerError: the tokenizer fails, or the chat template can't be rendered.
    """
    fields = read_object(body)
    model.read_adapter(fields)
    wants_texts = fields.flag("return_token_strs")
    most, tokenizer = model.config.max_seq_len, model.tokenizer
    prompt = fields.text("prompt")
    if prompt is not None:
        adds = fields.flag("add_special_tokens", absent=True)
        fields.finish()
        tokens = encode_prompt(tokenizer, prompt, most, add_special_tokens=adds)
    else:
        if "messages" not in fields.names:
            raise FieldError("prompt", "prompt is missing: give it, or messages.", "missing_required_parameter")
        messages = read_messages(fields, model)
        opens = fields.flag("add_generation_prompt", absent=True)
        fields.finish()
        tokens = encode_chat(tokenizer, messages, add_generation_prompt=opens, most=most)
    texts = [token_text(model.piece(token)) for token in tokens] if wants_texts else None
    return {"count": len(tokens), "max_model_len": model.capacity, "tokens": tokens, "token_strs": texts}


def detokenized(body: bytes, model: ServedModel) -> Object:
    """The text of `tokens`. Control tokens are spelled out.

    Raises:
        InputError: naming what can't be followed.
    """
    fields = read_object(body)
    model.read_adapter(fields)
    tokens = checked_ids("tokens", fields.required("tokens"), model)
    fields.finish()
    return {"prompt": model.tokenizer.decode(tokens, skip_special_tokens=False)}


def tokenizer_info(model: ServedModel) -> Object:
    """What lm-evaluation-harness asks for before it uses `/tokenize`."""
    form, end = model.tokenizer.chat_format, model.tokenizer.end_of_text
    return {
        "bos_token": form.special_tokens.get("bos_token"),
        "eos_token": None if end is None else model.tokenizer.decode([end], skip_special_tokens=False),
        "chat_template": form.template,
    }
