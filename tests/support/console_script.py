"""The console script as pip writes it."""

from pathlib import Path

_TEXT = "import sys\nfrom dbrx_fn.__main__ import main\nif __name__ == '__main__':\n    sys.exit(main())\n"


def write_script(file: Path) -> Path:
    """Writes it, to be run by Python; by its name `dbrx-fn` the package knows what started it."""
    file.write_text(_TEXT)
    return file
