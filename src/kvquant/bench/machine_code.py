"""What a cubin holds, as the CUDA tools that come with Triton print it: registers, local memory, instructions by kind."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any


def inspect_cubin(cubin: bytes) -> dict[str, Any]:
    """Count what matters in a kernel's machine code: registers and stack of a thread, loads, products, spills."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (_cuobjdump(option, file.name) for option in ("-res-usage", "-sass"))
    found = {key: int(re.search(rf"\b{key}:(\d+)", usage)[1]) for key in ("REG", "STACK")}  # type: ignore[index]
    operations = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", code, re.MULTILINE)
    kinds = Counter(operation.split(".")[0] for operation in operations)
    loads = [op for op in operations if op.startswith(("LDG", "LDGSTS"))]
    return {
        "registers": found["REG"],
        "spills": kinds["STL"] + kinds["LDL"],
        "stack_bytes": found["STACK"],
        "loads": len(loads),
        "loads_128_bit": sum("128" in op for op in loads),
        "hmma": kinds["HMMA"],
        "wgmma": kinds["HGMMA"],
        "instructions": len(operations),
    }


def _cuobjdump(option: str, path: str) -> str:
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("cuobjdump comes with triton, which is not installed")
    tool = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run([tool, option, path], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr
