"""A file's small cases in Triton's interpreter: in a process of their own, since Triton decides at import.

``python tests/interpreter.py tests/test_triton_write.py`` runs them by hand.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SRC = Path(__file__).resolve().parent.parent / "src"


def interpret(file: str, *arguments: str) -> None:
    """Run the file as a script; what it prints says why it failed."""
    environment = {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, file, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


def look_things_up_once() -> None:
    """Keep what Triton 3.7 looks up anew in every step of a kernel: more than half of the interpreter's time.

    Each call of one device function by another goes through all names of the language for those to be replaced, which
    does nothing after the first call of a launch into the same module; and each number's type is found in a new table.
    """
    from triton.runtime import interpreter

    if not all(hasattr(interpreter, name) for name in ("GridExecutor", "_patch_lang", "_get_np_dtype")):
        return  # another Triton: slower, and no less right
    launch, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang
    find_dtype = interpreter._get_np_dtype
    patched: dict[int, Any] = {}  # by the globals of the function that is called
    dtypes: dict[str, Any] = {}

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()  # the launch before put the language back
        return launch(self, *args, **kwargs)

    def patch_once(fn: Callable[..., Any]) -> Any:
        module = id(fn.__globals__)
        if module not in patched:
            patched[module] = patch(fn)
        return patched[module]

    def dtype_of(dtype: Any) -> Any:
        if dtype.name not in dtypes:
            dtypes[dtype.name] = find_dtype(dtype)
        return dtypes[dtype.name]

    interpreter.GridExecutor.__call__ = launch_anew
    interpreter._patch_lang = patch_once
    interpreter._get_np_dtype = dtype_of


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    look_things_up_once()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
