"""Where a result came from: code, packages, machine. Read without importing torch and without a network."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "transformers",
    "triton",
    "tokenizers",
    "safetensors",
    "accelerate",
    "numpy",
    "numba",
    "scipy",
    "hydra-core",
    "omegaconf",
    "submitit",
    "codecarbon",
    "nvidia-ml-py",
)
# A diff is kept to explain a result, not to archive a tree.
MAX_DIFF_CHARS = 100_000
GIT_TIMEOUT_S = 5


def package_versions() -> dict[str, str | None]:
    """Return the installed version of every package that can change a result, None where it is missing."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _git(root: Path, *args: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *args],
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=GIT_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def git_state(package_dir: Path | None = None) -> dict[str, Any]:
    """Return commit and uncommitted changes of the checkout this package runs from.

    Args:
        package_dir: folder of the package; by default this one.

    Returns:
        ``git_sha``, ``git_dirty``, ``git_diff`` (bounded), ``git_diff_sha256`` (of the whole diff) and
        ``git_untracked``; all None outside a checkout.
    """
    package_dir = package_dir or Path(__file__).resolve().parent
    state: dict[str, Any] = dict.fromkeys(
        ("git_sha", "git_dirty", "git_diff", "git_diff_sha256", "git_untracked")
    )
    # An installed copy may lie inside somebody else's repository: its files are then not tracked there.
    root = _git(package_dir, "rev-parse", "--show-toplevel")
    if root is None or not _git(package_dir, "ls-files", "__init__.py"):
        return state
    top = Path(root.strip())
    sha = _git(top, "rev-parse", "--verify", "HEAD")
    status = _git(top, "status", "--porcelain", "--untracked-files=normal") or ""
    diff = (_git(top, "diff", "HEAD") if sha else _git(top, "diff")) or ""
    state["git_sha"] = sha.strip() if sha else None
    state["git_dirty"] = bool(status.strip())
    state["git_untracked"] = [line[3:] for line in status.splitlines() if line.startswith("??")][:100]
    if diff:
        state["git_diff_sha256"] = hashlib.sha256(diff.encode()).hexdigest()
        cut = len(diff) - MAX_DIFF_CHARS
        state["git_diff"] = diff if cut <= 0 else f"{diff[:MAX_DIFF_CHARS]}\n[{cut} characters left out]\n"
    return state


def code_hash(package_dir: Path | None = None) -> str:
    """Return 12 hex digits over this package's sources: what a queued job must still find when it starts.

    Unlike a commit it does not change with a README, and it exists outside a checkout.
    """
    package_dir = package_dir or Path(__file__).resolve().parent
    digest = hashlib.sha256()
    for path in sorted(package_dir.rglob("*.py")):
        digest.update(path.relative_to(package_dir).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def cpu_name() -> str:
    """Return the processor's own name, else its architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def collect_provenance() -> dict[str, Any]:
    """Return everything about code and machine that is known before a task starts (no host name: it is nobody's
    business and explains nothing)."""
    return {
        **git_state(),
        "packages": package_versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }
