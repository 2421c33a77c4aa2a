"""What `import dbrx_fn` brings along, and what it says where MLX has no back end."""

import inspect
import os
import pkgutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import dbrx_fn

PUBLIC = {
    *("load", "load_tokenizer", "forward", "init_cache", "grow_cache", "init_params", "check_params", "param_count"),
    *("take_rows", "put_rows", "rewind", "save_cache", "load_cache", "hidden_states", "logits_of"),
    *(
        "stream_text",
        "stream_tokens",
        "Stream",
        "encode_chat",
        "render_chat",
        "Piece",
        "Sampling",
        "Tokenizer",
        "Cache",
        "Params",
    ),
    *("Config", "AttnConfig", "FFNConfig", "DBRX", "SMALL"),
    *("loss", "score", "LossParts", "Routing", "Recipe", "State", "Measured", "init_state", "train_step"),
    *("Adapters", "add_adapters", "fuse_adapters", "is_adapter", "load_adapters", "save_adapters", "partition"),
    *("stack_adapters", "choose_adapters"),
    *("Speculation", "save", "quantize", "dequantize", "Quantization", "Format"),
    *("DbrxError", "ConfigError", "CheckpointError", "TokenizerError", "InputError", "CacheError"),
    *("GenerationError", "TrainingError", "BusyError", "EngineError"),
    *("Structure", "Engine", "Limits", "default_limits", "Request", "PromptRead", "TokenMade", "Failed"),
}
MODULES = [name for _, name, package in pkgutil.walk_packages(dbrx_fn.__path__, "dbrx_fn.") if not package]

ROOT = Path(__file__).parents[2]


def python(*arguments: str, before: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Runs Python with `before` as the first place, then the project, where it looks for modules."""
    path = os.pathsep.join(map(str, (before, ROOT, *sys.path)))
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=before,
        env={**os.environ, "PYTHONPATH": path},
    )


@pytest.fixture
def no_back_end(tmp_path: Path) -> Path:
    """A folder with MLX as on Linux, where the package is there and its library comes with a back end's."""
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "__init__.py").touch()
    (tmp_path / "mlx" / "core.py").write_text("raise ImportError('libmlx.so: cannot open shared object file')")
    return tmp_path


def test_public_names() -> None:
    found = {name for name, value in vars(dbrx_fn).items() if name[0] != "_" and not isinstance(value, ModuleType)}
    assert found == PUBLIC


@pytest.mark.parametrize("name", ["dbrx_fn", *MODULES])
def test_everything_public_is_documented(name: str) -> None:
    module = import_module(name)
    assert module.__doc__
    own = {
        name: value
        for name, value in vars(module).items()
        if name[0] != "_" and getattr(value, "__module__", "") == module.__name__
    }
    for name, value in own.items():
        if inspect.isclass(value):
            # A dataclass without a docstring is given its signature for one.
            assert value.__doc__, name
            assert not value.__doc__.startswith(f"{name}("), name
            for member_name, member in vars(value).items():
                if member_name[0] != "_" and (inspect.isfunction(member) or isinstance(member, property)):
                    # What an inherited method does is said where it is declared.
                    inherited = any(hasattr(base, member_name) for base in value.__mro__[1:])
                    assert inherited or inspect.getdoc(member), f"{name}.{member_name}"
        elif inspect.isroutine(value):
            assert value.__doc__, name


def test_every_error_is_one_that_users_can_catch() -> None:
    for name in PUBLIC:
        if name.endswith("Error"):
            assert issubclass(getattr(dbrx_fn, name), dbrx_fn.DbrxError)


def test_import_brings_nothing_large_along() -> None:
    ended = python("-c", "import dbrx_fn, sys; print(*sorted(sys.modules))")
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    loaded = set(ended.stdout.split())
    assert "mlx.core" in loaded
    for name in ("torch", "transformers", "huggingface_hub", "mlx_lm", "pytest", "tqdm", "requests", "httpx"):
        assert name not in loaded


def test_import_without_a_back_end_says_what_to_install(no_back_end: Path) -> None:
    ended = python("-c", "import dbrx_fn", before=no_back_end)
    assert ended.returncode == 1
    *_, last = ended.stderr.splitlines()
    assert last.startswith("ImportError: dbrx_fn needs MLX with a back end for this machine (libmlx.so: cannot open")
    for extra in ("dbrx-fn[cpu]", "dbrx-fn[cuda13]", "cuda12", "Mac"):
        assert extra in last
    assert "During handling" not in ended.stderr


@pytest.mark.parametrize("command", ["generate", "random_checkpoint"])
def test_commands_without_a_back_end_print_one_line(command: str, no_back_end: Path) -> None:
    ended = python("-m", f"dbrx_fn.{command}", "--help", before=no_back_end)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.startswith("error: dbrx_fn needs MLX")
    assert ended.stderr.count("\n") == 1
    assert "dbrx-fn[cpu]" in ended.stderr
