"""Each example runs as a user would run it, shows what it says, and leaves no file but the pictures that it names."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "examples"
EXAMPLES = sorted(path.name for path in FOLDER.glob("*.py"))


def table(text: str) -> list[list[float]]:
    """The numbers of each line that begins with one."""
    lines = [line.replace(",", "") for line in text.splitlines() if re.match(r" *-?\d", line)]
    return [[float(number) for number in re.findall(r"-?\d+\.?\d*", line)] for line in lines]


def wider_beams_find_likelier_texts(said: str) -> None:
    scores = [float(score) for score in re.findall(r"ln p *(-\d+\.\d+)", said)]
    assert scores == sorted(scores)
    assert len(scores) == 3


def eight_answers_ranked(said: str) -> None:
    scores = [line[0] for line in table(said)]
    assert len(scores) == 8
    assert scores == sorted(scores, reverse=True)


def the_loss_falls(said: str) -> None:
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", said)]
    assert losses[-1] < losses[0] - 0.5


def the_tokens_probabilities_make_the_texts(said: str) -> None:
    parts = [float(score) for score in re.findall(r"^'.*' +(-\d+\.\d+)   '", said, re.MULTILINE)]
    whole = re.search(r"ln p (-\d+\.\d+)", said)
    assert whole is not None
    assert len(parts) == 16
    assert abs(sum(parts) - float(whole[1])) < 0.2


def the_last_layer_agrees_with_itself(said: str) -> None:
    agreeing = [int(share) for share in re.findall(r"for (\d+)% of tokens", said)]
    assert len(agreeing) == 6
    assert agreeing[0] < agreeing[-1] == 100


def a_merge_is_better_than_its_parts(said: str) -> None:
    """At both texts together: of each it keeps most."""
    together = {share: docs + play for share, docs, play in table(said)}
    assert together.keys() == {0, 25, 50, 75, 100}
    assert min(together, key=together.__getitem__) in (25, 50, 75)


def a_loaded_prompt_goes_on(said: str) -> None:
    assert re.search(r"^466 tokens read and saved in .* s: 1,19\d,\d{3} bytes$", said, re.MULTILINE)
    assert len(set(re.findall(r"^[A-Za-z ]+: (?:'.+'|\".+\")$", said, re.MULTILINE))) == 3


def what_is_used_least_is_missed_least(said: str) -> None:
    rows = table(said)
    assert [row[0] for row in rows] == [16, 12, 8, 4]
    assert all(least < most for _, _, least, most in rows[1:])
    assert all(before < after for (_, _, before, _), (_, _, after, _) in pairwise(rows))


def each_layer_has_a_largest_weight(said: str) -> None:
    assert len(re.findall(r"\d+%", said)) == 5


SHOWN: dict[str, Callable[[str], None]] = {
    "beam_search.py": wider_beams_find_likelier_texts,
    "best_of_n.py": eight_answers_ranked,
    "finetune_routers.py": the_loss_falls,
    "log_probabilities.py": the_tokens_probabilities_make_the_texts,
    "logit_lens.py": the_last_layer_agrees_with_itself,
    "merge_checkpoints.py": a_merge_is_better_than_its_parts,
    "prompt_cache.py": a_loaded_prompt_goes_on,
    "prune_experts.py": what_is_used_least_is_missed_least,
    "routing.py": each_layer_has_a_largest_weight,
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_shows_what_it_says_and_leaves_nothing_else(name: str, tmp_path: Path) -> None:
    here, temporary, before = tmp_path / "here", tmp_path / "temporary", sorted(FOLDER.iterdir())
    here.mkdir()
    temporary.mkdir()
    done = subprocess.run(
        [sys.executable, "-W", "error", str(FOLDER / name)],
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        cwd=here,
        env={**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg", "TMPDIR": str(temporary)},
    )
    assert done.returncode == 0, done.stderr
    SHOWN[name](done.stdout)
    pictures = {path.name: path.read_bytes() for path in here.iterdir()}
    assert pictures.keys() == set(re.findall(r"\w+\.png", done.stdout))
    assert all(content.startswith(b"\x89PNG") and len(content) > 10_000 for content in pictures.values())
    # MLX leaves kernels there when it builds some with a compiler, which not every machine has.
    assert not list(temporary.iterdir())
    assert sorted(FOLDER.iterdir()) == before


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_short_and_listed(name: str) -> None:
    content = (FOLDER / name).read_text(encoding="utf-8")
    assert content.count("\n") < 40
    assert f"({name})" in (FOLDER / "README.md").read_text(encoding="utf-8")
