"""What `nox` runs: `tests`, `typecheck`, `lint`, and `peers` (against transformers and mlx-lm)."""

import sys

import nox

nox.options.sessions = ["tests", "typecheck", "lint"]
nox.options.error_on_missing_interpreters = True

PROJECT = nox.project.load_toml("pyproject.toml")
# A Mac's MLX brings its back end along; elsewhere the CPU's is the one that every machine can run.
INSTALL = ["-e", "."] if sys.platform == "darwin" else ["-e", ".[cpu]"]


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
    tokenizers = ["tests/test_tokenizer.py", "tests/test_chat.py", "tests/test_train_tokenizer.py"]
    session.run("pytest", "-n", "auto", "tests/peers", *tokenizers, *session.posargs)


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
