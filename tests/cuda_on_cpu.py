"""The CUDA decode kernel on a CPU: g++ compiles it with ``cuda_on_cpu.h`` in place of what only a GPU has."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

from kvquant.kernels.cuda_decode.arguments import Arguments
from kvquant.kernels.cuda_decode.configuration import SOURCE, Configuration, read_source

COMPILER = shutil.which("g++")
_ENTRY = """
unsigned char memory[1];
extern "C" void run(const Arguments* a, int blocks, int order, int late) {
  run_on_cpu<const Arguments>(decode, *a, blocks, order, late);
}
"""


def host_source() -> str:
    """The kernel without words.cuh, which the header replaces."""
    words = SOURCE.with_name("words.cuh").read_text().replace("#pragma once\n", "")
    source = read_source()
    assert words in source
    return '#include "cuda_on_cpu.h"\n' + source.replace(words, "") + _ENTRY


@functools.cache
def build(configuration: Configuration, source_text: str) -> ctypes.CDLL:
    """Compile a source for one configuration."""
    macros = [option for option in configuration.options if option.startswith("-D")]
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "decode.cpp"), Path(folder, "decode.so")
        source.write_text(source_text)
        command = [str(COMPILER), "-std=c++17", "-O1", "-fno-strict-aliasing", "-w", "-shared", "-fPIC"]
        here = Path(__file__).parent
        subprocess.run(
            [*command, *macros, f"-I{here}", str(source), "-o", str(library)],
            check=True,
            capture_output=True,
            text=True,
        )
        return ctypes.CDLL(str(library))


def run(
    configuration: Configuration,
    arguments: Arguments,
    *,
    grid: int,
    order: int,
    late: bool,
    source: str | None = None,
) -> None:
    """Run it as a launch would.

    Args:
        configuration: what it is compiled for.
        arguments: addresses of CPU tensors.
        grid: thread blocks, one after the other.
        order: in which lanes take turns: 0 forwards, 1 backwards, else from changing ones on.
        late: whether asynchronous copies come when they are waited for, not at once.
        source: see :func:`mutated`; None: the kernel as it is.
    """
    build(configuration, source or host_source()).run(ctypes.byref(arguments), grid, order, int(late))


def mutated(old: str, new: str) -> str:
    """The kernel with one thing changed, for tests of the tests."""
    source = host_source()
    assert source.count(old) == 1, old
    return source.replace(old, new)
