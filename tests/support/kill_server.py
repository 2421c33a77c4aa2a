"""Kills a server again and again while it keeps prefixes on disk, and compares every answer with one known before.

    python -m tests.support.kill_server 20

The server runs in the exact mode, so each request has one right answer, whether a prefix was computed or read from the
folder. Each life of the server is killed at a random moment while clients ask. The next one reads what is left.
"""

import argparse
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from tests.support.server_process import ServerProcess, server_process

OPTIONS = ("--exact", "--decode-concurrency", "8", "--capacity", "1024")
CLIENTS = 4

Json = dict[str, Any]


def requests(draw: random.Random) -> list[Json]:
    """Requests in families that share long prefixes."""
    made: list[Json] = []
    for _ in range(4):
        prefix = [draw.randrange(4000) for _ in range(700)]
        for number in range(4):
            prompt = [*prefix[: 300 + 100 * number], *(draw.randrange(4000) for _ in range(10))]
            made.append({"prompt": prompt, "max_tokens": 8, "seed": number, "temperature": 0.8, "logprobs": 2})
    return made


def answer_of(http: httpx.Client, body: Json) -> tuple[Json, int]:
    """The choice, and how many tokens of the prompt were cached."""
    answer = http.post("/v1/completions", json=body).raise_for_status().json()
    return answer["choices"][0], answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def lives(folder: Path, count: int, seed: int = 0) -> Counter[str]:
    """Starts and kills `count` servers over one folder.

    Returns:
        How many answers were compared, how many tokens came from the cache, and how many of those were there at a
        server's start.

    Raises:
        AssertionError: if an answer differs from that of a server without a cache.
    """
    draw = random.Random(seed)
    asked = requests(draw)
    with server_process(*OPTIONS, "--prompt-cache-bytes", "0") as server, _client(server) as http:
        known = [answer_of(http, body)[0] for body in asked]
    options = (*OPTIONS, "--prompt-cache-folder", str(folder), "--prompt-cache-disk", "8M")
    outcome: Counter[str] = Counter()
    for _ in range(count):
        with server_process(*options) as server:
            with _client(server) as http:
                first = draw.randrange(len(asked))
                choice, cached = answer_of(http, asked[first])
                assert choice == known[first]
                outcome["answers"] += 1
                outcome["tokens from disk"] += cached
            wrong, ended = list[int](), threading.Event()
            clients = [
                threading.Thread(target=_ask, args=(server, asked, known, seed, outcome, wrong, ended))
                for seed in range(CLIENTS)
            ]
            for client in clients:
                client.start()
            time.sleep(draw.uniform(0, 4))
            ended.set()
            server.process.send_signal(signal.SIGKILL)
            for client in clients:
                client.join()
            assert not wrong, f"request {wrong[0]} of seed {seed} was answered wrongly"
    return outcome


def _ask(
    server: ServerProcess,
    asked: list[Json],
    known: list[Json],
    seed: int,
    outcome: Counter[str],
    wrong: list[int],
    ended: threading.Event,
) -> None:
    draw = random.Random(seed)
    with _client(server) as http:
        while not ended.is_set():
            number = draw.randrange(len(asked))
            try:
                choice, cached = answer_of(http, asked[number])
            except httpx.TransportError:
                assert ended.wait(5), "the server went away before it was killed"
                return
            outcome["answers"] += 1
            outcome["tokens from the cache"] += cached
            if choice != known[number]:
                wrong.append(number)
                return


def _client(server: ServerProcess) -> httpx.Client:
    return httpx.Client(base_url=server.url, timeout=60)


def main() -> int:
    """Runs it, and prints what was compared."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(lives(Path(folder), options.count, options.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
