"""Fail when the paper's log shows what a reader would see: python paper/check_log.py paper/build/main.log.

Refused are boxes that stick out and tables that overrun their page by more than 10 pt, references and citations that nothing defines, and missing glyphs.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

MAX_OVERFULL_PT = 10.0
# LaTeX breaks its log at 79 characters, in the middle of words.
WRAP = 79
REFUSED = (
    (r"LaTeX Warning: (Reference|Hyper reference) `[^']*' .*?undefined", "undefined reference"),
    (r"Package natbib Warning: Citation `[^']*' .*?undefined", "undefined citation"),
    (r"LaTeX Warning: Citation `[^']*' .*?undefined", "undefined citation"),
    (r"LaTeX Warning: Label `[^']*' multiply defined", "label defined twice"),
    (r"Missing character: There is no .*? in font", "missing character"),
)


def problems(log: str) -> list[str]:
    """Return what is wrong, one line each.

    Args:
        log: LaTeX's own, of the last run.
    """
    lines = log.splitlines()
    joined = "".join(line + ("" if len(line) == WRAP else "\n") for line in lines)
    found = [
        f"overfull box by {points} pt{where.rstrip()}"
        for points, where in re.findall(r"Overfull \\[hv]box \(([\d.]+)pt too (?:wide|high)\)(.*)", joined)
        if float(points) > MAX_OVERFULL_PT
    ]
    found += [
        f"float too large for its page by {points} pt{where.rstrip()}"
        for points, where in re.findall(r"Float too large for page by ([\d.]+)pt(.*)", joined)
        if float(points) > MAX_OVERFULL_PT
    ]
    for pattern, name in REFUSED:
        found += [f"{name}: {match.group()}" for match in re.finditer(pattern, joined)]
    return found


def main(path: Path) -> int:
    """Print what is wrong; returns the exit code."""
    log = path.read_text(encoding="utf-8", errors="replace")
    found = problems(log)
    if "Output written on" not in log:
        found.append("no PDF was written")
    for line in found:
        print(f"{path}: {line}", file=sys.stderr)
    pages = re.search(r"Output written on .*?\((\d+) pages", log.replace("\n", ""))
    if not found:
        print(
            f"{path.with_suffix('.pdf')}: {pages.group(1) if pages else '?'} pages, no overfull box, nothing undefined"
        )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
