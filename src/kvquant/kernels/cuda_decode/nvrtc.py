"""CUDA C++ to machine code: NVRTC, the compiler that comes with PyTorch's CUDA builds, called through ctypes.

It needs neither a GPU nor a driver, so that a machine without them compiles what another one runs.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import sys
from pathlib import Path

_SONAMES = ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")


class NvrtcError(RuntimeError):
    """NVRTC is not there, or does not compile a source; the message holds its log."""


@functools.lru_cache(maxsize=1)
def find_library() -> ctypes.CDLL | None:
    """NVRTC of the installed packages, else of the system; None: there is none."""
    for name in (*_installed(), *_SONAMES):
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name)
    return None


def _installed() -> list[str]:
    """Every NVRTC among Python's packages, first those of the major version that PyTorch was built for."""
    spec = importlib.util.find_spec("nvidia")
    folders = (spec.submodule_search_locations or []) if spec else []
    found = sorted({path for folder in folders for path in Path(folder).rglob("libnvrtc.so*")})
    torch = sys.modules.get("torch")
    major = (getattr(getattr(torch, "version", None), "cuda", None) or "").partition(".")[0]
    return [str(path) for path in sorted(found, key=lambda path: path.name != f"libnvrtc.so.{major}")]


def nvrtc_refusal() -> str | None:
    """Say that NVRTC is not there; None: it is."""
    if find_library() is not None:
        return None
    return (
        "NVRTC was not found, neither in the packages of Python nor as libnvrtc.so; "
        "try pip install nvidia-cuda-nvrtc-cu12"
    )


@functools.cache
def compile_cubin(source: str, options: tuple[str, ...], architecture: int) -> bytes:
    """Compile a source that includes nothing; about a second, the same one once a process.

    Args:
        source: CUDA C++.
        options: of the compiler, such as ``-DBITS=4``.
        architecture: compute capability times ten, such as 80.

    Returns:
        The cubin.

    Raises:
        NvrtcError: NVRTC is not there, or refuses.
    """
    library, reason = find_library(), nvrtc_refusal()
    if library is None:
        raise NvrtcError(reason)
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    program = ctypes.c_void_p()

    def check(code: int) -> None:
        if code:
            raise NvrtcError(f"NVRTC: {library.nvrtcGetErrorString(code).decode()}")

    def read(size_of: str, read_into: str) -> bytes:
        size = ctypes.c_size_t()
        check(getattr(library, size_of)(program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        check(getattr(library, read_into)(program, buffer))
        return buffer.raw

    check(library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"source.cu", 0, None, None))
    try:
        given = [f"--gpu-architecture=sm_{architecture}", "--std=c++17", *options]
        array = (ctypes.c_char_p * len(given))(*(option.encode() for option in given))
        code = library.nvrtcCompileProgram(program, len(given), array)
        if code:
            log = read("nvrtcGetProgramLogSize", "nvrtcGetProgramLog").rstrip(b"\0").decode(errors="replace")
            named = library.nvrtcGetErrorString(code).decode()
            raise NvrtcError(f"NVRTC does not compile for sm_{architecture} ({named}): {log.strip()}")
        return read("nvrtcGetCUBINSize", "nvrtcGetCUBIN")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))
