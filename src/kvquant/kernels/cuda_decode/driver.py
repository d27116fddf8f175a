"""Machine code to a launch: the few calls of CUDA's driver that it takes, through ctypes.

A launch neither waits for the device nor allocates, so that it can be part of a CUDA graph.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator

import torch

_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # CUfunction_attribute
_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CUlaunchAttributeID
_CAPTURE_MODE_RELAXED = 2  # CUstreamCaptureMode


class _LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute; its value is a union of 64 bytes, of which this attribute has an int."""

    _fields_ = (
        ("id", ctypes.c_int),
        ("pad", ctypes.c_int),
        ("value", ctypes.c_int),
        ("rest", ctypes.c_int * 15),
    )


class _LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        *((f"{of}_{axis}", ctypes.c_uint) for of in ("grid", "threads") for axis in "xyz"),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_LaunchAttribute)),
        ("attribute_count", ctypes.c_uint),
    )


class CudaDriverError(RuntimeError):
    """CUDA's driver refused a call; the message holds the error's name and text."""


@functools.lru_cache(maxsize=1)
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise CudaDriverError(f"CUDA's driver was not found: {error}") from None


def _call(function: str, *arguments: object) -> None:
    """Call a function of the driver; anything but success is raised."""
    driver = _driver()
    code = getattr(driver, function)(*arguments)
    if code:
        name, text = ctypes.c_char_p(), ctypes.c_char_p()
        driver.cuGetErrorName(code, ctypes.byref(name))
        driver.cuGetErrorString(code, ctypes.byref(text))
        named, said = ((x.value or b"unknown").decode() for x in (name, text))
        raise CudaDriverError(f"{function} gave {named} ({code}): {said}")


@functools.cache
def _primary_context(device: int) -> ctypes.c_void_p:
    """The context that PyTorch works in on a device."""
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    _call("cuInit", 0)
    _call("cuDeviceGet", ctypes.byref(handle), device)
    _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)
    return context


@contextlib.contextmanager
def _on(device: int) -> Iterator[None]:
    """Make a device's context that of this thread, which may have none so far, while the block lasts."""
    _call("cuCtxPushCurrent_v2", _primary_context(device))
    try:
        yield
    finally:
        _call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))


@contextlib.contextmanager
def _beside_a_capture() -> Iterator[None]:
    """Let this thread do what is no work of a stream while one is captured into a graph."""
    mode = ctypes.c_int(_CAPTURE_MODE_RELAXED)
    _call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
    try:
        yield
    finally:
        _call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))


@functools.cache
def load_kernel(cubin: bytes, name: str, shared_bytes: int, device: int) -> int:
    """Load a kernel on a device, for good; the same one once a process.

    Args:
        cubin: machine code.
        name: of the kernel.
        shared_bytes: dynamic shared memory of a launch.
        device: index.

    Returns:
        What :func:`launch` takes.

    Raises:
        CudaDriverError: the driver refuses, for example code of a newer CUDA.
    """
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    with _on(device), _beside_a_capture():
        _call("cuModuleLoadData", ctypes.byref(module), cubin)
        _call("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
        _call("cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes)
    assert function.value is not None
    return function.value


def launch(
    kernel: int, arguments: ctypes.Structure, *, grid: int, threads: int, shared_bytes: int, device: int
) -> None:
    """Launch a kernel of one argument, a struct, on PyTorch's current stream of a device.

    It may start before the kernel in front of it has ended, and must wait by itself (``griddepcontrol.wait``).

    Args:
        kernel: see :func:`load_kernel`.
        arguments: read before this returns.
        grid: programs (thread blocks).
        threads: of each.
        shared_bytes: dynamic shared memory of each.
        device: index.
    """
    stream = torch.cuda.current_stream(device).cuda_stream
    addresses = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
    early = _LaunchAttribute(id=_PROGRAMMATIC_STREAM_SERIALIZATION, value=1)
    configuration = _LaunchConfig(grid, 1, 1, threads, 1, 1, shared_bytes, stream, ctypes.pointer(early), 1)
    with _on(device):
        _call("cuLaunchKernelEx", ctypes.byref(configuration), ctypes.c_void_p(kernel), addresses, None)
