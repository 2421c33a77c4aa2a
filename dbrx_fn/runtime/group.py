"""The processes of one command, as `mlx.launch` starts them, and the small channel between them.

Every process runs the same command. The one of rank 0 leads: it talks to the user, and what only it knows (a seed, a
message, a stop) reaches the others by `share`. MLX's own collectives (`dbrx_fn.ops.collectives`) carry the arrays.

The channel is one TCP connection from each process to the leader. MLX's back ends don't tell that a process has died,
and the others would wait for it forever. A connection ends with its process, so every process watches its own, and ends
too. Rank 0's port is told by MLX's group, so any back end will do.
"""

import contextlib
import hmac
import json
import os
import queue
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NoReturn

import mlx.core as mx

from dbrx_fn.errors import InputError

_GRACE = 4.0
"""Seconds for other processes to end, or to fail for the same reason, before the leader ends."""
_LEEWAY = 1.0
"""Seconds for a process to finish what the leader has finished, or to notice that another has died."""
_GREETING = 60.0
"""Seconds for a process to connect to the leader."""
_SECRET = 16
_FAILED = 2
"""The exit status of a command that failed."""


class Group:
    """A command's processes, from one of them.

    Attributes:
        rank: this process's number, from 0.
        size: the number of processes.
        how_to_go_on: what to do when another process has ended, as a clause.
    """

    def __init__(self, rank: int = 0, size: int = 1, peers: "dict[int, socket.socket] | None" = None) -> None:
        self.rank, self.size = rank, size
        self.how_to_go_on: Callable[[], str] = lambda: "start all of them again"
        self._peers = peers or {}
        self._values: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._sending = threading.Lock()
        self._failure: str | None = None
        self._ending, self._finished = threading.Event(), threading.Event()
        self._watchers = [
            threading.Thread(target=self._watch, args=(rank, peer), daemon=True) for rank, peer in self._peers.items()
        ]
        for watcher in self._watchers:
            watcher.start()

    @property
    def leads(self) -> bool:
        """Whether this process talks to the user."""
        return self.rank == 0

    def share(self, value: Any) -> Any:
        """The leader's value in every process. A value is what JSON can write. All processes must call this alike."""
        if self.size == 1:
            return value
        if not self.leads:
            return self._values.get()
        self._send({"value": value})
        return value

    def refuse_others(self, what: str) -> None:
        """Raises `InputError` if there are several processes.

        Args:
            what: what one process can do and several can't, as the beginning of a sentence.
        """
        if self.size > 1:
            raise InputError(f"{what} is for one process, and {self.size} run here: start it without mlx.launch.")

    def wait_for_watchers(self) -> None:
        """Waits after an error. If another process's death caused it, that is noticed now, and this process ends."""
        if self.size > 1:
            time.sleep(_LEEWAY)

    def fail(self, sentence: str) -> None:
        """Tells the leader why this process fails. The leader says so, unless it fails itself."""
        if not self.leads:
            self._send({"failed": sentence})

    def finish(self) -> None:
        """Ends the group. The leader lets the others end. They wait for that, however early they are done."""
        if self.leads:
            self._ending.set()
            self._send({"end": True})
            end = time.monotonic() + _GRACE
            for watcher in self._watchers:
                watcher.join(max(0.0, end - time.monotonic()))
        else:
            self._finished.set()
            threading.Event().wait()

    def _send(self, message: dict[str, Any]) -> None:
        line = (json.dumps(message) + "\n").encode()
        with self._sending:
            for peer in self._peers.values():
                # A process that has died is noticed by the watcher.
                with contextlib.suppress(OSError):
                    peer.sendall(line)

    def _watch(self, rank: int, peer: socket.socket) -> None:
        """Reads what another process says until its connection ends."""
        with contextlib.suppress(OSError, ValueError), peer.makefile("rb") as lines:
            for line in lines:
                message = json.loads(line)
                if "value" in message:
                    self._values.put(message["value"])
                elif "failed" in message:
                    # If it fails here for the same reason, that is told instead.
                    if self._ending.wait(_GRACE):
                        return
                    self._end(f"error: in the process of rank {rank}: {message['failed']}")
                elif "end" in message:
                    # It may be about to remove its temporary files.
                    self._finished.wait(_LEEWAY)
                    os._exit(0)
        if not self._ending.is_set():
            # MLX's ring says on standard error that it lost a connection. The last line should be this one.
            time.sleep(0.2)
            self._end(
                f"error: the process of rank {rank} has ended, and the other {self._others} can't go on without it:"
                f" {self.how_to_go_on()}."
            )

    @property
    def _others(self) -> str:
        return "one" if self.size == 2 else str(self.size - 1)

    def _end(self, sentence: str) -> NoReturn:
        """Ends this process at once, since its main thread may be waiting for the others' arrays."""
        self._ending.set()
        if self.rank <= 1:
            # Only one process says so: the leader, or the first of the others if it was the leader that ended.
            with contextlib.suppress(OSError):
                os.write(2, f"\n{sentence}\n".encode(errors="replace"))
        self._send({"end": True})
        os._exit(_FAILED)


_ALONE = Group()
_group = ContextVar("group", default=_ALONE)


def group() -> Group:
    """The processes of this command; a single one outside of `joined`."""
    return _group.get()


@contextlib.contextmanager
def joined() -> Iterator[Group]:
    """Joins the processes that were started together, for as long as a command runs. A single process joins nobody.

    Raises:
        InputError: if the others can't be reached.
    """
    if not _are_several():
        yield _ALONE
        return
    try:
        found = mx.distributed.init(strict=True)
        one = Group(found.rank(), found.size(), _connected(found.rank(), found.size()))
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(
            f"The processes that mlx.launch started can't reach each other ({error}): check the hosts and their ports."
        ) from None
    token = _group.set(one)
    try:
        yield one
    finally:
        _group.reset(token)


def _are_several() -> bool:
    """Whether the environment is that of one of several processes."""
    if sizes := [os.environ[name] for name in _SIZES if name in os.environ]:
        return any(size not in ("", "1") for size in sizes)
    if "MLX_RANK" not in os.environ:
        return False
    hosts = os.environ.get("MLX_HOSTFILE", "")
    # For a single process, mlx.launch writes an empty file.
    return bool(Path(hosts).read_text().strip() if hosts else os.environ.get("MLX_IBV_DEVICES"))


_SIZES = ("MLX_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
"""Variables with the number of processes: NCCL's under mlx.launch, and those of two MPI libraries."""


def _connected(rank: int, size: int) -> dict[int, socket.socket]:
    """The connections: the leader's to all others, by their ranks, and each other process's to the leader."""
    if size == 1:
        return {}
    if rank == 0:
        host = _leader_host() or socket.gethostbyname(socket.gethostname())
        with socket.create_server((host, 0), backlog=size) as server:
            server.settimeout(_GREETING)
            secret = secrets.token_bytes(2 * _SECRET)
            _told(_address(host) + server.getsockname()[1].to_bytes(2) + secret)
            return _accepted(server, size, secret)
    told = _told(bytes(6 + 2 * _SECRET))
    host = _leader_host() or ".".join(map(str, told[:4]))
    peer = socket.create_connection((host, int.from_bytes(told[4:6])), timeout=_GREETING)
    peer.sendall(told[6 : 6 + _SECRET] + rank.to_bytes(4))
    if not hmac.compare_digest(_read(peer, _SECRET), told[6 + _SECRET :]):
        raise ValueError("another program answers at rank 0's port")
    return {0: _watched(peer)}


def _accepted(server: socket.socket, size: int, secret: bytes) -> dict[int, socket.socket]:
    peers: dict[int, socket.socket] = {}
    while len(peers) < size - 1:
        peer, _ = server.accept()
        peer.settimeout(_GREETING)
        hello = _read(peer, _SECRET + 4)
        if not hmac.compare_digest(hello[:_SECRET], secret[:_SECRET]):
            peer.close()
            continue
        peer.sendall(secret[_SECRET:])
        peers[int.from_bytes(hello[_SECRET:])] = _watched(peer)
    return peers


def _told(own: bytes) -> bytes:
    """Rank 0's bytes, by a sum in which the others' are zeros."""
    return bytes(mx.distributed.all_sum(mx.array(list(own), mx.int32)).tolist())  # type: ignore[arg-type]


def _leader_host() -> str | None:
    """Rank 0's address, as MLX's back ends have it; `None` if they don't."""
    if file := os.environ.get("MLX_HOSTFILE"):
        return str(json.loads(Path(file).read_text())[0][0]).rpartition(":")[0]
    if host := os.environ.get("NCCL_HOST_IP"):
        return host
    return os.environ.get("MLX_JACCL_COORDINATOR", "").rpartition(":")[0] or None


def _address(host: str) -> bytes:
    with contextlib.suppress(OSError):
        return socket.inet_aton(host)
    return bytes(4)


def _read(peer: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count:
        more = peer.recv(count - len(found))
        if not more:
            raise OSError("a connection ended")
        found += more
    return found


def _watched(peer: socket.socket) -> socket.socket:
    """A connection that also ends within seconds if the other machine goes away without a word."""
    peer.settimeout(None)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    idle = "TCP_KEEPALIVE" if sys.platform == "darwin" else "TCP_KEEPIDLE"
    for name, value in ((idle, 3), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 2)):
        if hasattr(socket, name):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return peer
