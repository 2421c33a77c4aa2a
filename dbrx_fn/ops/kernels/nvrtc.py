"""NVRTC, NVIDIA's compiler of CUDA sources at run time, through ctypes. It needs no GPU."""

import ctypes
import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Source(NamedTuple):
    """What NVRTC compiles.

    `text`: the CUDA source.
    `headers`: the files that it may include.
    `name`: the source's name in messages.
    `options`: NVRTC's, with the architecture.
    """

    text: bytes
    headers: Mapping[str, bytes]
    name: str
    options: Sequence[str]

    def digest(self) -> str:
        """All that the machine code depends on, with NVRTC's version, as a short text."""
        major, minor = ctypes.c_int(), ctypes.c_int()
        if (nvrtc := _nvrtc()) is not None:
            nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        parts = [f"{major.value}.{minor.value}".encode(), self.text, *[option.encode() for option in self.options]]
        for name, header in self.headers.items():
            parts += [name.encode(), header]
        digest = hashlib.sha256()
        for part in parts:
            digest.update(len(part).to_bytes(8, "little") + part)
        return digest.hexdigest()[:24]


def compile_source(source: Source) -> tuple[bytes, str]:
    """Compiles one source to machine code.

    Returns:
        The machine code (a cubin), and the compiler's log.

    Raises:
        RuntimeError: if NVRTC is missing, or refuses the source. The message has its log.
    """
    nvrtc = _nvrtc()
    if nvrtc is None:
        raise RuntimeError("NVRTC, which comes with MLX's CUDA build, can't be loaded.")
    program = ctypes.c_void_p()

    def read(size_of: str, read_to: str) -> bytes:
        size = ctypes.c_size_t()
        getattr(nvrtc, size_of)(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        getattr(nvrtc, read_to)(program, buffer)
        return buffer.raw

    nvrtc.nvrtcCreateProgram(
        ctypes.byref(program),
        source.text,
        source.name.encode(),
        len(source.headers),
        _strings(list(source.headers.values())),
        _strings([header.encode() for header in source.headers]),
    )
    try:
        options = [option.encode() for option in source.options]
        failed = nvrtc.nvrtcCompileProgram(program, len(options), _strings(options))
        log = read("nvrtcGetProgramLogSize", "nvrtcGetProgramLog").rstrip(b"\0").decode(errors="replace")
        if failed:
            raise RuntimeError(f"NVRTC can't compile {source.name}: {log}")
        return read("nvrtcGetCUBINSize", "nvrtcGetCUBIN"), log
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _strings(items: Sequence[bytes]) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * len(items))(*items)


@functools.cache
def compiles_for(capability: tuple[int, int]) -> bool:
    """Whether NVRTC is there, and knows this compute capability."""
    nvrtc, count = _nvrtc(), ctypes.c_int()
    if nvrtc is None or nvrtc.nvrtcGetNumSupportedArchs(ctypes.byref(count)):
        return False
    known = (ctypes.c_int * count.value)()
    return not nvrtc.nvrtcGetSupportedArchs(known) and 10 * capability[0] + capability[1] in list(known)


@functools.cache
def _nvrtc() -> ctypes.CDLL | None:
    # MLX has already loaded one of these, so the bare name is enough.
    for name in ("libnvrtc.so.13", "libnvrtc.so.12"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None
