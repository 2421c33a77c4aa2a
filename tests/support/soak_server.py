"""Wears a server out: many clients of all kinds at once, each of which must be answered rightly or refused rightly.

    python -m tests.support.soak_server 2000

The server is a process of its own in the exact mode, so whatever is asked has one right answer, known from asking it
alone. Afterwards it must hold no row, thread or socket more than before, and its memory must be where it was.
"""

import argparse
import asyncio
import json
import random
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from tests.support.server_process import ServerProcess, server_process

OPTIONS = ("--exact", "--decode-concurrency", "8", "--capacity", "512", "--queue", "16", "--prompt-cache-bytes", "4M")
TOGETHER = 24
"""Clients at once. Their texts are more than there are rows and places in the queue, so some have to come again."""

ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
"""glibc's settings by which it gives back what is free. Otherwise it keeps some MiB of large bodies, as it likes."""

BUSY = "told to come again"

Json = dict[str, Any]


@dataclass(frozen=True)
class Known:
    """A request, and the texts that it must get."""

    path: str
    body: Json
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Footprint:
    """What a server holds when it has nothing to do."""

    memory: int
    threads: int
    files: int
    device_memory: float


def requests(draw: random.Random, count: int) -> list[tuple[str, Json]]:
    """Requests of random lengths and settings."""
    made: list[tuple[str, Json]] = []
    for number in range(count):
        body: Json = {
            "seed": number,
            "max_tokens": draw.choice([1, 4, 12, 30]),
            "temperature": draw.choice([0, 0.8, 1.5]),
            "n": draw.choice([1, 1, 1, 3]),
        }
        if draw.random() < 0.3:
            body["stop"] = [draw.choice([" the", ".", "\n", " and"])]
        if draw.random() < 0.3:
            body["frequency_penalty"] = 0.5
        if number % 2:
            text = "Who goes there? " * draw.choice([1, 5, 25])
            made.append(("/v1/chat/completions", {**body, "messages": [{"role": "user", "content": text}]}))
        else:
            prompt = [draw.randrange(4000) for _ in range(draw.choice([1, 10, 150, 300]))]
            made.append(("/v1/completions", {**body, "prompt": prompt}))
    return made


def texts_of(answer: Json) -> tuple[str, ...]:
    """The texts of a whole answer."""
    return tuple(c["text"] if "text" in c else c["message"]["content"] for c in answer["choices"])


class Clients:
    """All kinds of clients of one server. Each method is one, and returns how it was answered."""

    def __init__(self, url: str, known: list[Known], http: httpx.AsyncClient, draw: random.Random) -> None:
        self._url, self._known, self._http, self._draw = url, known, http, draw

    def kinds(self) -> list[Callable[[], Awaitable[str]]]:
        """All of them."""
        return [self.whole, self.stream, self.stream, self.leaver, self.early_leaver, self.slow_reader, self.malformed]

    async def whole(self) -> str:
        """Asks for a whole answer."""
        known = self._draw.choice(self._known)
        response = await self._http.post(known.path, json=known.body)
        if response.status_code == 429:
            assert int(response.headers["retry-after"]) > 0
            return BUSY
        assert response.status_code == 200, response.text
        assert texts_of(response.json()) == known.texts, known
        return "answered"

    async def stream(self) -> str:
        """Asks for a stream and follows it to its end."""
        return await self._follow(wait=0)

    async def slow_reader(self) -> str:
        """Reads a stream slowly."""
        return await self._follow(wait=0.02)

    async def leaver(self) -> str:
        """Leaves in the midst of a stream."""
        known = self._draw.choice(self._known)
        body = {**known.body, "stream": True, "max_tokens": 100}
        async with self._http.stream("POST", known.path, json=body) as response:
            if response.status_code == 429:
                return BUSY
            left = self._draw.randrange(4)
            async for _ in response.aiter_lines():
                left -= 1
                if left < 0:
                    break
        return "left"

    async def early_leaver(self) -> str:
        """Leaves before it is answered, or before it has asked."""
        known = self._draw.choice(self._known)
        body = json.dumps({**known.body, "max_tokens": 100}).encode()
        head = f"POST {known.path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        sent = (head + body)[: self._draw.choice([0, 10, len(head) + 5, len(head) + len(body)])]
        where = urlsplit(self._url)
        _, writer = await asyncio.open_connection(where.hostname, where.port)
        writer.write(sent)
        await writer.drain()
        await asyncio.sleep(self._draw.choice([0, 0.01, 0.2]))
        writer.transport.abort()
        return "left"

    async def malformed(self) -> str:
        """Asks for what there isn't."""
        known = self._draw.choice(self._known)
        body = json.dumps(known.body).encode()
        spoilt = self._draw.choice(
            [
                body[:-1],
                b"[]",
                json.dumps({**known.body, "nix": 1}).encode(),
                json.dumps({**known.body, "temperature": "hot"}).encode(),
                json.dumps({**known.body, "max_tokens": 10**6}).encode(),
                b"[" * 10_000,
                b" " * 2_200_000,
            ]
        )
        response = await self._http.post(known.path, content=spoilt)
        assert response.status_code == (413 if len(spoilt) > 2**21 else 400), response.text
        assert response.json()["error"]["message"]
        return "refused"

    async def _follow(self, wait: float) -> str:
        known = self._draw.choice(self._known)
        texts = [""] * len(known.texts)
        async with self._http.stream("POST", known.path, json={**known.body, "stream": True}) as response:
            if response.status_code == 429:
                return BUSY
            assert response.status_code == 200
            last = ""
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    for choice in json.loads(line.removeprefix("data: "))["choices"]:
                        texts[choice["index"]] += choice.get("text", choice.get("delta", {}).get("content", ""))
                last = line or last
                await asyncio.sleep(wait)
        assert last == "data: [DONE]"
        assert tuple(texts) == known.texts, known
        return "answered"


async def soak(server: ServerProcess, count: int, seed: int = 0) -> Counter[str]:
    """Sends `count` clients, and returns how many were answered how.

    Raises:
        AssertionError: if one was answered wrongly, or the server holds more at the end than after its first clients.
    """
    draw = random.Random(seed)
    limits = httpx.Limits(max_connections=TOGETHER, max_keepalive_connections=8)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as http:
        known = []
        for path, body in requests(draw, 16):
            answer = (await http.post(path, json=body)).json()
            known.append(Known(path, body, texts_of(answer)))
        clients = Clients(server.url, known, http, draw)
        await _run(clients, max(40, count // 4), draw)
        before = await _footprint(server)
        outcome = await _run(clients, count, draw)
    after = await _footprint(server)
    print(f"before: {before}\nafter:  {after}", file=sys.stderr)
    assert after.threads <= before.threads
    assert after.files <= before.files
    assert after.memory <= 1.02 * before.memory
    assert after.device_memory <= 1.02 * before.device_memory
    return outcome


async def _run(clients: Clients, count: int, draw: random.Random) -> Counter[str]:
    outcome: Counter[str] = Counter()
    turns = asyncio.Semaphore(TOGETHER)

    async def one(client: Callable[[], Awaitable[str]]) -> None:
        async with turns:
            while (answered := await client()) == BUSY:
                outcome[BUSY] += 1
                await asyncio.sleep(draw.uniform(0.1, 1))
            outcome[answered] += 1

    async with asyncio.TaskGroup() as group:
        for _ in range(count):
            group.create_task(one(draw.choice(clients.kinds())))
    return outcome


async def _footprint(server: ServerProcess) -> Footprint:
    """Waits until the server has nothing to do, and looks at it."""
    process = Path(f"/proc/{server.process.pid}")
    for _ in range(300):
        await asyncio.sleep(0.1)
        async with httpx.AsyncClient() as http:
            lines = (await http.get(f"{server.url}/metrics")).text.splitlines()
        figures = {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}
        if not any(figures[f'dbrx_fn_requests{{state="{state}"}}'] for state in ("waiting", "reading", "decoding")):
            break
    else:
        raise AssertionError("some rows are still held")
    assert figures["dbrx_fn_rows"] == 0
    # Connections that clients have closed take a moment to go.
    await asyncio.sleep(0.5)
    resident = next(line for line in (process / "status").read_text().splitlines() if line.startswith("VmRSS"))
    return Footprint(
        memory=int(resident.split()[1]) * 1024,
        threads=len(list((process / "task").iterdir())),
        files=len(list((process / "fd").iterdir())),
        device_memory=figures['dbrx_fn_device_memory_bytes{kind="active"}'],
    )


def main() -> int:
    """Runs it, and prints how clients were answered."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with server_process(*OPTIONS, **ALLOCATOR) as server:
        print(asyncio.run(soak(server, options.count, options.seed)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
