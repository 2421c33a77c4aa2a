"""Data flows one way: a wing imports only those below it, and none imports a command."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "dbrx_fn"

BELOW = {
    "errors": "",
    "files": "errors",
    "runtime": "errors files",
    "ops": "errors runtime",
    "text": "errors files",
    "model": "errors files ops runtime",
    "checkpoints": "errors files model ops runtime text",
    "data": "errors files model text",
    "drawing": "errors files",
    "generation": "errors files model runtime text",
    "serving": "checkpoints errors files generation model runtime text",
    "training": "checkpoints data errors files model ops runtime",
    "evaluation": "checkpoints data drawing errors files model runtime training",
    "benchmarks": "checkpoints data drawing errors files generation model ops runtime training",
    "cli": "errors files generation model ops runtime text",
    "checking": "benchmarks checkpoints errors files generation model ops runtime training",
    "runs": "checkpoints cli data drawing errors evaluation files generation model runtime training",
}
"""What each wing may import, beside itself. `docs/contributing.md` says what each is for."""


def imported(file: Path) -> Iterator[str]:
    """The first name below `dbrx_fn` of each import in a file."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "dbrx_fn":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dbrx_fn."):
            yield str(node.module).split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("dbrx_fn."))


def wings() -> set[str]:
    return {folder.name for folder in PACKAGE.iterdir() if (folder / "__init__.py").is_file()} - {"small"}


def test_each_wing_has_a_rule() -> None:
    assert wings() | {"errors"} == BELOW.keys()


def test_the_rules_go_one_way() -> None:
    list(TopologicalSorter({wing: below.split() for wing, below in BELOW.items()}).static_order())


@pytest.mark.parametrize("wing", sorted(BELOW))
def test_a_wing_imports_only_what_is_below_it(wing: str) -> None:
    folder = PACKAGE / wing
    files = sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{wing}.py"]
    upward = [
        f"{file.relative_to(PACKAGE)} imports {name}"
        for file in files
        for name in imported(file)
        if name not in {wing, *BELOW[wing].split()}
    ]
    assert not upward


@pytest.mark.parametrize("wing", sorted(wings()))
def test_a_wing_s_own_file_is_empty(wing: str) -> None:
    assert not (PACKAGE / wing / "__init__.py").read_text()
