"""The house: floors import downwards only, and each heavy guest has its rooms (design.md, section 6)."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parent.parent / "src"
PACKAGE = SRC / "kvquant"

# First match wins; a module outside this table fails the test, so that somebody decides where it lives.
FLOORS: list[tuple[str, int]] = [
    ("__init__", 0),
    ("errors", 0),
    ("spec", 0),
    ("kernel_limits", 0),
    ("ragged", 0),
    ("provenance", 0),
    ("results", 0),
    ("items", 0),
    ("sweeps", 0),
    ("slurm", 0),
    ("one_thread", 0),
    ("compiled", 1),
    ("codebooks", 1),
    ("encoding", 1),
    ("value_outliers", 1),
    ("nuq", 1),
    ("packing", 1),
    ("sinks", 1),
    ("not_finite", 1),
    ("blocked_sparse", 1),
    ("kernels", 2),
    ("block_ids", 3),
    ("block_layout", 3),
    ("block_pool", 3),
    ("block_storage", 3),
    ("spill_chains", 3),
    ("value_order", 3),
    ("batched_quant", 3),
    ("fitting", 3),
    ("packed_kv", 3),
    ("prefill_quant", 4),
    ("models", 5),
    ("calibration", 5),
    ("data", 5),
    ("serving", 5),
    ("energy", 5),
    ("tracking", 5),
    ("measure", 5),
    ("bench", 5),
    ("peak_memory", 5),
    ("statistics", 5),
    ("methods", 3),
    ("sweep_plan", 6),
    ("config", 6),
    ("validation", 6),
    ("preflight", 6),
    ("cli", 6),
    ("tasks", 6),
    ("report", 6),
]
# What may be imported where; a name covers what lies below it.
ROOMS = {
    "hydra": ("config", "validation", "preflight", "cli", "tasks", "report"),
    "omegaconf": ("config", "validation", "preflight", "cli", "tasks", "report"),
    "transformers": ("models", "calibration", "data", "tasks", "methods.hf_quantized"),
    "numba": ("compiled",),
    "triton": ("kernels.triton_kernels", "bench.compile_table"),
}
HEAVY = {
    "torch",
    "transformers",
    "triton",
    "numpy",
    "numba",
    "scipy",
    "matplotlib",
    "pyarrow",
    "wandb",
    "codecarbon",
    "rich",
}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = sorted(path for path in PACKAGE.rglob("*.py"))


def floor(name: str) -> int | None:
    for prefix, level in FLOORS:
        if name == prefix or name.startswith(f"{prefix}."):
            return level
    return None


def imports(path: Path, *, top_level_only: bool = False) -> Iterator[str]:
    """Yield every absolute module name that a file imports, those under TYPE_CHECKING left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if top_level_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.level:
                package = ["kvquant", *path.relative_to(PACKAGE).parts[:-1]]
                yield ".".join([*package[: len(package) - node.level + 1], node.module])
            elif node.module == "kvquant":
                yield from (f"kvquant.{alias.name}" for alias in node.names)
            else:
                yield node.module
        pending.extend(ast.iter_child_nodes(node))


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_go_downwards(path: Path) -> None:
    name = module_name(path)
    level = floor(name)
    assert level is not None, f"kvquant.{name} has no floor: add it to FLOORS after design.md section 6"
    for imported in imports(path):
        if not imported.startswith("kvquant."):
            continue
        target = floor(imported.removeprefix("kvquant."))
        # A class or function imported from the package itself has no floor of its own.
        assert target is None or target <= level, (
            f"{name} (floor {level}) imports {imported} (floor {target})"
        )


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_heavy_guests_stay_in_their_rooms(path: Path) -> None:
    name = module_name(path)
    for imported in imports(path):
        rooms = ROOMS.get(imported.partition(".")[0])
        if rooms is not None:
            allowed = any(name == room or name.startswith(f"{room}.") for room in rooms)
            assert allowed, f"kvquant.{name} imports {imported}, which belongs in {', '.join(rooms)}"


def test_the_entry_point_is_small_and_light() -> None:
    run = SRC / "run.py"
    assert len(run.read_text().splitlines()) < 60
    assert {name.partition(".")[0] for name in imports_of_script(run)} <= {
        "sys",
        "hydra",
        "omegaconf",
        "kvquant",
    }


def imports_of_script(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("name", ["cli", "config", "validation", "preflight", "results", "errors"])
def test_what_runs_before_main_imports_nothing_heavy(name: str) -> None:
    whole = PACKAGE / name
    files = whole.glob("*.py") if whole.is_dir() else [PACKAGE / f"{name}.py"]
    heavy = {
        imported.partition(".")[0] for file in files for imported in imports(file, top_level_only=True)
    } & HEAVY
    assert not heavy


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, kvquant, kvquant.cli, kvquant.preflight; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": str(SRC)}
    )
    assert done.stdout.strip() == "[]"
