"""DBRX, Databricks' mixture-of-experts language model, as pure, typed, compiled functions on MLX.

    params, config = dbrx_fn.load("path/to/dbrx")
    tokenizer      = dbrx_fn.load_tokenizer("path/to/dbrx")
    cache          = dbrx_fn.init_cache(config, batch_size=1, capacity=512)
    logits, cache  = dbrx_fn.forward(params, mx.array([tokenizer.encode("…")]), cache)

How the model works, and where each part of it is: `docs/architecture.md`.
"""

import sys

__version__ = "0.1.0"

from dbrx_fn.cli import interrupts as interrupts

# isort: split
# `blas` comes before MLX, which loads its own BLAS when it is imported.
from dbrx_fn.runtime import blas as blas

try:
    import mlx.core  # noqa: F401
except ImportError as error:
    needs = (
        f"dbrx_fn needs MLX with a back end for this machine ({error}): pip install 'dbrx-fn[cpu]' or"
        " 'dbrx-fn[cuda13]' (or cuda12) on Linux, 'dbrx-fn' alone on a Mac."
    )
    if interrupts.IS_COMMAND:
        print(f"error: {needs}", file=sys.stderr)
        raise SystemExit(2) from None
    raise ImportError(needs, name=__name__) from None

from dbrx_fn.checkpoints.adapter_files import save_adapters as save_adapters
from dbrx_fn.checkpoints.adapter_reader import load_adapters as load_adapters
from dbrx_fn.checkpoints.hub import SMALL as SMALL
from dbrx_fn.checkpoints.loader import load as load
from dbrx_fn.checkpoints.loader import load_tokenizer as load_tokenizer
from dbrx_fn.checkpoints.saver import save as save
from dbrx_fn.errors import BusyError as BusyError
from dbrx_fn.errors import CacheError as CacheError
from dbrx_fn.errors import CheckpointError as CheckpointError
from dbrx_fn.errors import ConfigError as ConfigError
from dbrx_fn.errors import DbrxError as DbrxError
from dbrx_fn.errors import EngineError as EngineError
from dbrx_fn.errors import GenerationError as GenerationError
from dbrx_fn.errors import InputError as InputError
from dbrx_fn.errors import TokenizerError as TokenizerError
from dbrx_fn.errors import TrainingError as TrainingError
from dbrx_fn.generation.cache_file import load_cache as load_cache
from dbrx_fn.generation.cache_file import save_cache as save_cache
from dbrx_fn.generation.sampling import Sampling as Sampling
from dbrx_fn.generation.speculation import Speculation as Speculation
from dbrx_fn.generation.stream import Piece as Piece
from dbrx_fn.generation.stream import Stream as Stream
from dbrx_fn.generation.stream import stream_text as stream_text
from dbrx_fn.generation.stream import stream_tokens as stream_tokens
from dbrx_fn.generation.structured import Structure as Structure
from dbrx_fn.model.adapters import Adapters as Adapters
from dbrx_fn.model.adapters import add_adapters as add_adapters
from dbrx_fn.model.adapters import fuse_adapters as fuse_adapters
from dbrx_fn.model.adapters import is_adapter as is_adapter
from dbrx_fn.model.cache import Cache as Cache
from dbrx_fn.model.cache import grow_cache as grow_cache
from dbrx_fn.model.cache import init_cache as init_cache
from dbrx_fn.model.cache_rows import put_rows as put_rows
from dbrx_fn.model.cache_rows import rewind as rewind
from dbrx_fn.model.cache_rows import take_rows as take_rows
from dbrx_fn.model.config import DBRX as DBRX
from dbrx_fn.model.config import AttnConfig as AttnConfig
from dbrx_fn.model.config import Config as Config
from dbrx_fn.model.config import FFNConfig as FFNConfig
from dbrx_fn.model.hidden_states import hidden_states as hidden_states
from dbrx_fn.model.hidden_states import logits_of as logits_of
from dbrx_fn.model.layers.router import Routing as Routing
from dbrx_fn.model.params import check_params as check_params
from dbrx_fn.model.params import init_params as init_params
from dbrx_fn.model.params import param_count as param_count
from dbrx_fn.model.partition import partition as partition
from dbrx_fn.model.quantization import Quantization as Quantization
from dbrx_fn.model.quantization import dequantize as dequantize
from dbrx_fn.model.quantization import quantize as quantize
from dbrx_fn.model.stacked_adapters import choose_adapters as choose_adapters
from dbrx_fn.model.stacked_adapters import stack_adapters as stack_adapters
from dbrx_fn.model.transformer import forward as forward
from dbrx_fn.model.transformer import score as score
from dbrx_fn.model.tree import Params as Params
from dbrx_fn.ops.formats import Format as Format
from dbrx_fn.serving.engine import Engine as Engine
from dbrx_fn.serving.limits import Limits as Limits
from dbrx_fn.serving.limits import default_limits as default_limits
from dbrx_fn.serving.request import Failed as Failed
from dbrx_fn.serving.request import PromptRead as PromptRead
from dbrx_fn.serving.request import Request as Request
from dbrx_fn.serving.request import TokenMade as TokenMade
from dbrx_fn.text.chat import encode_chat as encode_chat
from dbrx_fn.text.chat import render_chat as render_chat
from dbrx_fn.text.tokenizer import Tokenizer as Tokenizer
from dbrx_fn.training.losses import LossParts as LossParts
from dbrx_fn.training.losses import loss as loss
from dbrx_fn.training.step import Measured as Measured
from dbrx_fn.training.step import Recipe as Recipe
from dbrx_fn.training.step import State as State
from dbrx_fn.training.step import init_state as init_state
from dbrx_fn.training.step import train_step as train_step
