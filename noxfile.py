"""What `nox` runs: `tests`, `typecheck`, `lint`, and beside them the sessions that `docs/contributing.md` lists."""

import platform
import shutil
import sys
import tempfile
from pathlib import Path

import nox

nox.options.sessions = ["tests", "typecheck", "lint"]
nox.options.error_on_missing_interpreters = True

PROJECT = nox.project.load_toml("pyproject.toml")
# A Mac's MLX brings its back end along; elsewhere the CPU's is the one that every machine can run.
INSTALL = ["-e", "."] if sys.platform == "darwin" else ["-e", ".[cpu]"]
# What a BLAS could round into another result.
EXACT = [
    *(
        f"tests/model/test_{name}.py"
        for name in ("cache", "forward", "ids", "layers", "moe", "quantization", "row_independence")
    ),
    *(f"tests/training/test_{name}.py" for name in ("adapter_gradients", "losses", "target_nats", "training")),
    "tests/runs/test_train_resume.py",
    "tests/checkpoints/test_exactness.py",
    "tests/generation/test_generation.py",
    "tests/serving/test_exact_mode.py",
    "tests/commands/test_small_model.py",
    "tests/ops/test_cpu.py",
    "tests/runtime/test_blas.py",
]
# What a trace could change, on few shapes: g++ takes half a second and more for each kernel that they meet.
COMPILED = [
    "tests/compiled",
    *(f"tests/model/test_{name}.py" for name in ("forward", "moe", "quantization", "traces")),
    *(f"tests/training/test_{name}.py" for name in ("losses", "target_nats", "training")),
    "tests/generation/test_generation.py",
    "tests/runtime/test_compile.py",
]

# What runs every kernel of the CPU.
CPU_KERNELS = [
    *(f"tests/ops/test_cpu_{name}.py" for name in ("experts", "products")),
    *(f"tests/model/test_{name}.py" for name in ("cpu_attention", "decode_step", "adapted_decode_step")),
]
SANITIZER = ("libasan.so", "libstdc++.so.6")


def install(session: nox.Session, group: str) -> None:
    """Installs the project and one of its dependency groups."""
    session.install(*INSTALL, *nox.project.dependency_groups(PROJECT, group))


@nox.session
def tests(session: nox.Session) -> None:
    """The whole test suite but the peers; arguments after -- go to pytest."""
    install(session, "tests")
    session.run("pytest", "-n", "auto", "--ignore=tests/peers", *session.posargs)


@nox.session
def peers(session: nox.Session) -> None:
    """The same numbers as transformers on torch's CPU build, and as mlx-lm."""
    install(session, "peers")
    # The tokenizers' comparisons with transformers stand beside their other tests, and are skipped without it.
    tokenizers = [
        "tests/text/test_tokenizer.py",
        "tests/text/test_chat.py",
        "tests/commands/test_train_tokenizer.py",
        "tests/text/test_chatml_template.py",
    ]
    session.run("pytest", "-n", "auto", "tests/peers", *tokenizers, *session.posargs)


@nox.session
def blas(session: nox.Session) -> None:
    """The tests that compute, by stock operations and each BLAS that users have; files after -- take their place."""
    if sys.platform != "linux":
        session.skip("only MLX's wheels for Linux leave their BLAS open")
    install(session, "tests")
    settings = {"AVX2": {"OPENBLAS_CORETYPE": "Haswell"}, "MLX's own": {"DBRX_FN_BLAS": "0"}}
    if "avx512f" in Path("/proc/cpuinfo").read_text():
        settings["AVX-512"] = {"OPENBLAS_CORETYPE": "SkylakeX"}
    # The system's loader looks here first, and can't load an empty file.
    hidden = Path(session.create_tmp())
    for library in ("libopenblas.so.0", "libmkl_rt.so.2", "libblis.so.4"):
        (hidden / library).touch()
    settings["none installed"] = {"LD_LIBRARY_PATH": str(hidden)}
    for name, setting in settings.items():
        session.log(f"BLAS: {name}")
        # A CPU's own kernels would take the BLAS's place.
        setting["DBRX_FN_KERNELS"] = "0"
        environment = {**setting, "TESTS_KEEP": ",".join(setting)}
        # Without a library MLX's own computes, which has had its turn.
        files = (
            ["tests/runtime/test_blas.py", "tests/commands/test_small_model.py"] if name == "none installed" else EXACT
        )
        session.run("pytest", "-n", "auto", "--ignore=tests/peers", *(session.posargs or files), env=environment)


@nox.session
def compiled(session: nox.Session) -> None:
    """The tests that compute, with layers compiled as on GPUs; files after -- take their place."""
    if shutil.which("g++") is None:
        session.skip("MLX compiles for a CPU with g++, which isn't installed")
    install(session, "tests")
    # A file's tests share kernels, so one worker takes them all.
    with tempfile.TemporaryDirectory() as kernels:
        # A CPU's own kernels would take the stock operations' place, which are what a Mac compiles.
        environment = {"DBRX_FN_COMPILE": "1", "DBRX_FN_KERNELS": "0", "TMPDIR": kernels}
        session.run("pytest", "-n", "auto", "--dist", "loadfile", *(session.posargs or COMPILED), env=environment)


@nox.session
def sanitize(session: nox.Session) -> None:
    """The tests of the CPU's kernels, which are compiled to find wrong reads, writes and arithmetic; g++, Linux."""
    if sys.platform != "linux" or shutil.which("g++") is None:
        session.skip("it needs Linux and g++")
    install(session, "tests")
    found = [session.run("g++", f"-print-file-name={name}", external=True, silent=True) for name in SANITIZER]
    targets = ["-march=native", "-march=x86-64-v3", "-march=x86-64"] if platform.machine() == "x86_64" else [""]
    for target in targets:
        flags = f"{target} -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
        environment = {"DBRX_FN_CPU_FLAGS": flags, "XDG_CACHE_HOME": session.create_tmp()}
        # This takes about a minute of one core, too long for a test that is timed.
        build = "from dbrx_fn.ops.kernels.cpu.build import built_library; built_library(limit=600)"
        session.run("python", "-c", build, env=environment)
        environment |= {"LD_PRELOAD": " ".join(str(path).strip() for path in found)}
        environment |= {"ASAN_OPTIONS": "detect_leaks=0", "PYTHONMALLOC": "malloc"}
        # A report goes to the process's own standard error.
        session.run("pytest", "--capture=sys", *(session.posargs or CPU_KERNELS), env=environment)


@nox.session
def templates(session: nox.Session) -> None:
    """A small model trained on each family's chat template answers and stops; names after -- choose families."""
    install(session, "tests")
    session.run("python", "-m", "tests.templates.learn_to_stop", *session.posargs)


@nox.session
def targets(session: nox.Session) -> None:
    """Compiles the CUDA kernels for every NVIDIA GPU from Ampere on, without one; arguments choose: 80 90a."""
    install(session, "targets")
    session.run("python", "-m", "tests.targets.compile_kernels", *session.posargs)


@nox.session
def llama_cpp(session: nox.Session) -> None:
    """llama.cpp's logits, files, tokens and speed beside ours; it is compiled for minutes first."""
    install(session, "llama_cpp")
    session.run("pytest", "tests/llama_cpp", *session.posargs)


@nox.session
def typecheck(session: nox.Session) -> None:
    """A strict static check of the package and its tests."""
    install(session, "typecheck")
    session.run("mypy", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Style, and formatting as it would be written."""
    session.install(*nox.project.dependency_groups(PROJECT, "lint"))
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
