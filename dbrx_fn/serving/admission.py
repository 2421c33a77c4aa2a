"""Checks whether an engine can ever serve a request, before the request is queued."""

from dbrx_fn.errors import InputError
from dbrx_fn.generation.stream import token_budget
from dbrx_fn.generation.structured import Matcher, TokenTrie
from dbrx_fn.model.config import Config
from dbrx_fn.serving.limits import Limits
from dbrx_fn.serving.request import Request
from dbrx_fn.serving.schedule import never_fits


def budget_of(request: Request, config: Config, limits: Limits) -> int:
    """How many tokens a request may generate: `max_tokens`, or fewer if the context ends before.

    Raises:
        InputError: if the model can't serve the request, or it wouldn't fit even if it were alone.
    """
    budget, length = token_budget(request.prompt, config, request.max_tokens), len(request.prompt)
    strange = [token for token, _ in request.sampling.logit_bias if token >= config.vocab_size]
    if strange:
        raise InputError(f"logit_bias names token {strange[0]}, past the model's vocabulary of {config.vocab_size}.")
    if never_fits(length, length + budget - 1, limits):
        raise InputError(
            f"The prompt has {length} tokens and up to {budget} more are asked for, and there is room for"
            f" {min(limits.capacity, limits.positions)} tokens: shorten the prompt or lower max_tokens."
        )
    return budget


def matcher_of(request: Request, trie: TokenTrie | None) -> Matcher | None:
    """What follows the request's structure; `None` if it has none.

    Raises:
        InputError: if there is no trie for it.
    """
    if request.structure is None:
        return None
    if trie is None:
        raise InputError("The request has a structure and the engine no TokenTrie: give it one (trie=).")
    return trie.matcher(request.structure)
