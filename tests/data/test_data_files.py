"""Which files are read as data, and how: endings, links, special files, bounds."""

import json
import os
import resource
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from dbrx_fn.data.corpus import read_documents
from dbrx_fn.data.data_files import LARGEST_FILE, LARGEST_ROW
from dbrx_fn.errors import InputError

TOP = Path(__file__).parents[2]
ROWS = [{"text": "first"}, {"text": "second"}]


def texts(*paths: Path) -> list[str]:
    return [document.text for document in read_documents(paths)]


# Endings


@pytest.mark.parametrize("ending", [".jsonl", ".ndjson", ".JSONL", ".Ndjson"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\n\n \n"])
def test_lines_are_rows(ending: str, newline: str, tmp_path: Path) -> None:
    path = tmp_path / f"x{ending}"
    path.write_bytes(b"\xef\xbb\xbf" + newline.join(map(json.dumps, ROWS)).encode())
    assert texts(path) == ["first", "second"]


@pytest.mark.parametrize("indent", [None, 2])
def test_json_is_a_list_of_rows_or_one(indent: int | None, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("\ufeff" + json.dumps(ROWS, indent=indent))
    documents = read_documents([path])
    assert [document.text for document in documents] == ["first", "second"]
    assert [document.source for document in documents] == [f"{path}, row 1", f"{path}, row 2"]
    path.write_text(json.dumps(ROWS[0], indent=indent))
    assert [(document.source, document.text) for document in read_documents([path])] == [(str(path), "first")]


@pytest.mark.parametrize(
    "name", ["a.txt", "a.TEXT", "a.md", "a.markdown", "a.rst", "a.tex", "README", ".notes", "a.b.txt"]
)
def test_texts_are_texts(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text('{"text": "a"}')
    assert texts(tmp_path / name) == ['{"text": "a"}']


@pytest.mark.parametrize(
    "name",
    ["x.csv", "x.tsv", "x.parquet", "x.jsonl.gz", "x.txt.zst", "x.zip", "x.yaml", "x.html", "x.py", "x.json5", "v1.2"],
)
def test_others_are_refused_by_name(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text('{"text": "a"}')
    ending = Path(name).suffix
    with pytest.raises(InputError) as caught:
        read_documents([tmp_path / name])
    assert str(caught.value) == (
        f"{tmp_path / name} ends in {ending}, which isn't read: give rows as .jsonl, .ndjson, .json, and text of any "
        "kind as .txt."
    )
    # In a folder they are passed over aloud.
    (tmp_path / "a.txt").write_text("a")
    with pytest.warns(UserWarning, match=rf"files of other kinds are passed over \(1 of \{ending}\)"):
        assert texts(tmp_path) == ["a"]


# Links


def test_links_are_followed_and_no_file_is_read_twice(tmp_path: Path) -> None:
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    for folder in (data / "real", elsewhere):
        folder.mkdir(parents=True)
    (data / "real" / "a.txt").write_text("a")
    (elsewhere / "b.txt").write_text("b")
    (elsewhere / "c.jsonl").write_text('{"text": "c"}')
    (data / "a folder").symlink_to(elsewhere)
    (data / "a link to real").symlink_to(data / "real")
    (data / "real" / "up").symlink_to(data)
    (data / "real" / "here").symlink_to(".")
    (elsewhere / "back").symlink_to(data / "real")
    (data / "z.txt").symlink_to(elsewhere / "b.txt")
    os.link(data / "real" / "a.txt", data / "real" / "same.txt")
    documents = read_documents([data])
    assert [Path(document.source.partition(",")[0]).relative_to(data).as_posix() for document in documents] == [
        "a folder/c.jsonl",
        "real/a.txt",
        "z.txt",
    ]
    # What is named twice counts twice.
    assert texts(data / "z.txt", data / "z.txt") == ["b", "b"]


def test_links_that_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "a.txt").symlink_to("missing")
    with pytest.raises(InputError, match=r"a\.txt doesn't exist: name a file of text or rows"):
        read_documents([tmp_path])
    (tmp_path / "a.txt").unlink()
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "folder").symlink_to("folder")
    with pytest.warns(UserWarning, match=r"passed over \(1 of no ending\)"):
        assert texts(tmp_path) == ["b"]


# What isn't text


def test_a_byte_order_mark_goes_and_only_that(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeff\ufeffa".encode())
    assert texts(tmp_path / "a.txt") == ["\ufeffa"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
@pytest.mark.parametrize("content", [b"\0" * 100, "text".encode("utf-16"), b"\xff\xfe", b"\x1f\x8b\x08\x00", b"a\xc3"])
def test_what_is_no_text_is_refused(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_documents([tmp_path / name])
    assert str(caught.value).startswith(str(tmp_path / name))
    assert str(caught.value).endswith(".")
    assert str(caught.value).isprintable()


def hostile(folder: Path) -> Iterator[tuple[Path, str]]:
    """Files that would take much memory or never end, and a part of what is said of each."""
    pipe = folder / "pipe.txt"
    os.mkfifo(pipe)
    (folder / "pipe.jsonl").symlink_to(pipe)
    (folder / "pipe.json").symlink_to(pipe)
    for name in ("pipe.txt", "pipe.jsonl", "pipe.json"):
        yield folder / name, "not a regular file"
    for device in ("/dev/zero", "/dev/urandom", "/dev/full", "/dev/stdin"):
        yield Path(device), "not a regular file"
    for ending in ("txt", "jsonl", "json"):
        (folder / f"zero.{ending}").symlink_to("/dev/zero")
        yield folder / f"zero.{ending}", "not a regular file"
    for ending in ("txt", "jsonl", "json", "ndjson"):
        for size in (2 * 2**30, 100 * 2**30):
            sparse = folder / f"sparse{size}.{ending}"
            with open(sparse, "wb") as file:
                file.truncate(size)
            yield sparse, str(sparse)
        # Text first.
        late = folder / f"late.{ending}"
        with open(late, "wb") as file:
            file.write(b'{"text": "a"}\n' * 1000)
            file.truncate(4 * 2**30)
        yield late, str(late)
    for ending, most in (("jsonl", LARGEST_ROW), ("json", LARGEST_ROW)):
        long = folder / f"long.{ending}"
        with open(long, "wb") as file:
            file.write(b'{"text": "')
            file.write(b"a" * most)
            file.write(b'"}')
        yield long, str(long)
        deep = folder / f"deep.{ending}"
        deep.write_bytes(b"[" * 10**6)
        yield deep, "nested too deeply"
        wide = folder / f"wide.{ending}"
        wide.write_bytes(b"[" + b"[]," * 10**7 + b"[]]")
        yield wide, "is found where a JSON object is expected"
        number = folder / f"number.{ending}"
        number.write_bytes(b'{"text": ' + b"9" * 10**6 + b"}")
        yield number, str(number)
        keys = folder / f"keys.{ending}"
        keys.write_bytes(b"{" + b",".join(b'"%d": 1' % i for i in range(10**6)) + b"}")
        yield keys, "the object has only"
        twice = folder / f"twice.{ending}"
        twice.write_bytes(b'{"text": "a", "text": "b"}')
        yield twice, "'text' is there twice"


def test_hostile_files_end_in_a_sentence(tmp_path: Path) -> None:
    """In a process that has 2 GiB, and soon."""
    cases = list(hostile(tmp_path))
    script = (
        "import json, sys, time\nfrom pathlib import Path\nfrom dbrx_fn.data.corpus import read_documents\n"
        "from dbrx_fn.errors import InputError\n"
        "for path in sys.argv[1:]:\n"
        "    start = time.process_time()\n"
        "    try:\n        said = str(len(read_documents([path])))\n"
        "    except InputError as error:\n        said = str(error)\n"
        "    print(json.dumps([said, time.process_time() - start]), flush=True)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script, *(str(path) for path, _ in cases)],
        capture_output=True,
        text=True,
        stdin=subprocess.PIPE,
        timeout=600,
        cwd=TOP,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (2 * 2**30, 2 * 2**30)),
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    results = [json.loads(line) for line in ended.stdout.splitlines()]
    for (path, words), (said, seconds) in zip(cases, results, strict=True):
        assert words in said, (path, said)
        assert said.endswith("."), said
        assert "\n" not in said
        assert len(said) < 600
        assert seconds < 20, (path, seconds)


def test_bounds_are_those_that_the_docs_say() -> None:
    training = (TOP / "docs" / "training.md").read_text()
    assert f"{LARGEST_FILE // 2**30} GiB" in training
    assert f"{LARGEST_ROW // 2**20} MiB" in training


def test_nothing_is_warned_of_where_all_is_used(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.json").write_text(json.dumps(ROWS))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert texts(tmp_path) == ["a", "first", "second"]
