"""Structures of CUDA's driver as ctypes declares them, against the driver's own header, which Triton brings."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from kvquant.kernels.cuda_decode import driver

triton = pytest.importorskip("triton")
HEADERS = Path(triton.__file__).parent / "backends" / "nvidia" / "include"

# Fields of ours and of the header's.
ATTRIBUTE = {"id": "id", "value": "value"}
CONFIG = {
    **{f"{ours}_{axis}": f"{theirs}Dim{axis.upper()}" for ours, theirs in (("grid", "grid"), ("threads", "block")) for axis in "xyz"},
    "shared_bytes": "sharedMemBytes", "stream": "hStream", "attributes": "attrs", "attribute_count": "numAttrs",
}  # fmt: skip


@pytest.mark.skipif(
    shutil.which("g++") is None or not (HEADERS / "cuda.h").exists(), reason="needs g++ and cuda.h"
)
def test_a_launch_is_laid_out_as_the_driver_reads_it(tmp_path: Path) -> None:
    checks = [
        f"static_assert(CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION == {driver._PROGRAMMATIC_STREAM_SERIALIZATION});",
        f"static_assert(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES == {driver._MAX_DYNAMIC_SHARED_SIZE_BYTES});",
        "static_assert(offsetof(CUlaunchAttributeValue, programmaticStreamSerializationAllowed) == 0);",
    ]
    for ours, theirs, fields in (
        (driver._LaunchAttribute, "CUlaunchAttribute", ATTRIBUTE),
        (driver._LaunchConfig, "CUlaunchConfig", CONFIG),
    ):
        checks.append(f"static_assert(sizeof({theirs}) == {ctypes.sizeof(ours)});")
        for name, header_name in fields.items():
            offset = getattr(ours, name).offset
            checks.append(f"static_assert(offsetof({theirs}, {header_name}) == {offset});")
    source = tmp_path / "layout.cpp"
    source.write_text("#include <cstddef>\n#include <cuda.h>\n" + "\n".join(checks) + "\n")
    done = subprocess.run(
        ["g++", "-std=c++17", "-fsyntax-only", f"-I{HEADERS}", str(source)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
