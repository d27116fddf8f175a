"""Real text with fixed train / calibration / held-out splits, found on the machine itself or in a file.

Nothing here opens a network connection and nothing here needs torch: a corpus is a list of strings and a hash that
names exactly those strings, so that a result can say which text it was measured on.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from kvquant.errors import DataError

CORPORA = ("stdlib", "text_file", "wikitext2")
DOCUMENT_SEPARATOR = "\x1e"

# Tests and vendored trees are not documentation; code pages and grammar tools are tables that change with every Python.
_SKIPPED_FOLDERS = frozenset(
    [
        "__pycache__",
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "encodings",
        "lib2to3",
        "distutils",
        "ensurepip",
        "turtledemo",
        "lib-dynload",
        "_pyrepl",
        "__phello__",
        "config",
    ]
)
# A file this short is an import line or two: no prompt can be cut from it.
_MIN_CHARACTERS = 400

Splits: TypeAlias = "tuple[list[Document], list[Document], list[Document]]"


@dataclass(frozen=True)
class Document:
    """One text, never split between two splits.

    name (str): path relative to the corpus root, or `<file>#<index>`.
    text (str): decoded text with "\\n" line ends.
    """

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order, in three disjoint splits.

    name (str): one of `CORPORA`.
    sha256 (str): hash over split names, document names and texts.
    """

    name: str
    train: list[Document] = field(repr=False)
    calibration: list[Document] = field(repr=False)
    heldout: list[Document] = field(repr=False)
    sha256: str = ""

    def split(self, name: str) -> list[Document]:
        """The documents of split `name`; raises DataError for a name that is no split."""
        if name not in ("train", "calibration", "heldout"):
            raise DataError(f"split must be train, calibration or heldout, got {name!r}")
        documents: list[Document] = getattr(self, name)
        return documents


def load_corpus(name: str, path: str | Path | None = None) -> Corpus:
    """Read a corpus by name.

    stdlib: this Python's own standard library, one document per file, split by a hash of the file's relative path
        (80% train, 10% calibration, 10% held-out), so that a file keeps its split from one Python version to the next.
    text_file: any UTF-8 text, plain or `.xz`, whose documents are separated by a line holding the byte 0x1E, or a folder
        of such files. Three or more documents are split whole, by a hash of their index and length (a tenth each for
        calibration and held-out, at least one); fewer are joined and cut into contiguous parts of 80%, 10% and 10% of
        the characters, so that calibration and held-out text then come from the same document as the train text.
    wikitext2: raw WikiText-2, one row per line, rows joined by two newlines as GPTQ and its successors do. A folder with
        wiki.train.raw and wiki.test.raw: held-out is the test file, calibration the last tenth of the train file. One
        file alone: held-out is all of it, since published perplexities are over the whole test split; calibration and
        train text then are the standard library's, so that nothing measured has been calibrated on.

    path (str | Path | None): file or folder; needed by text_file and wikitext2; for stdlib another library's folder.
    Raises DataError for an unknown name, a path missing or unreadable, or a split without text.
    """
    if name not in CORPORA:
        raise DataError(f"data.name must be one of {', '.join(CORPORA)}, got {name!r}")
    if name == "stdlib":
        return _stdlib(Path(path) if path is not None else Path(sysconfig.get_paths()["stdlib"]))
    if path is None:
        raise DataError(f"data.path must name a file when data.name={name}, got null; set data.path=<file>")
    path = Path(path)
    if name == "wikitext2":
        return _corpus(name, *_wikitext2(path), path)
    return _corpus(name, *_split_text(path.name, _documents(path)), path)


def read_text(path: Path) -> str:
    """The UTF-8 text of a plain or `.xz` file, with "\\n" line ends.

    Raises DataError for a file that is missing, no `.xz` file or not UTF-8, with the line.
    """
    if not path.is_file():
        raise DataError(f"data.path must name an existing file, got {str(path)!r}")
    try:
        raw = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    except lzma.LZMAError as error:
        raise DataError(f"data.path must be a valid .xz file, {str(path)!r} is not: {error}") from error
    try:
        return raw.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"data.path must be UTF-8, {path}, line {line} is not (byte {error.start} of the file); convert it with "
            "iconv -t utf-8, or keep other files out of the folder"
        ) from error


def split_documents(text: str) -> list[str]:
    """Cut a text at its 0x1E separators, dropping empty documents."""
    return [part.strip("\n") for part in text.split(DOCUMENT_SEPARATOR) if part.strip()]


def _stdlib(root: Path) -> Corpus:
    splits: dict[str, list[Document]] = {"train": [], "calibration": [], "heldout": []}
    for file in _stdlib_files(root):
        relative = file.relative_to(root).as_posix()
        try:
            text = file.read_text(encoding="utf-8").replace("\r\n", "\n")
        except (UnicodeDecodeError, OSError):
            # A stray Latin-1 or unreadable file is no reason to refuse the other seven hundred.
            continue
        if len(text) >= _MIN_CHARACTERS:
            splits[_hashed_split(relative)].append(Document(relative, text))
    return _corpus("stdlib", splits["train"], splits["calibration"], splits["heldout"])


def _stdlib_files(root: Path) -> list[Path]:
    """Sources and the licence text, sorted by relative path so that the order does not depend on the file system."""
    files = []
    for folder, below, names in os.walk(root):
        # Cut off here: installed packages may be a hundred times as many files as the library.
        below[:] = [name for name in below if name not in _SKIPPED_FOLDERS]
        for name in names:
            # _sysconfigdata* records how this very machine built Python: paths, not text.
            wanted = name.endswith(".py") or name.startswith("LICENSE")
            if wanted and not name.startswith("_sysconfigdata"):
                files.append(Path(folder) / name)
    return sorted(files, key=lambda file: file.relative_to(root).as_posix())


def _hashed_split(key: str) -> str:
    bucket = hashlib.sha256(key.encode()).digest()[0] % 10
    return "calibration" if bucket == 0 else "heldout" if bucket == 1 else "train"


def _documents(path: Path) -> list[str]:
    """Documents of a file, or of every file in a folder in the order of their paths."""
    if not path.is_dir():
        return split_documents(read_text(path))
    files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
    return [document for file in files for document in split_documents(read_text(file))]


def _split_text(name: str, texts: list[str]) -> Splits:
    if len(texts) < 3:
        parts = _cut("\n\n".join(texts), (0.8, 0.1, 0.1))
        one, two, three = ([Document(f"{name}#{index}", part)] for index, part in enumerate(parts))
        return one, two, three
    documents = [Document(f"{name}#{index}", text) for index, text in enumerate(texts)]
    # Ranked by hash instead of bucketed, so that even three documents leave no split empty.
    ranked = sorted(documents, key=lambda d: hashlib.sha256(f"{d.name}:{len(d.text)}".encode()).hexdigest())
    tenth = max(1, len(documents) // 10)
    calibration = {d.name for d in ranked[:tenth]}
    heldout = {d.name for d in ranked[tenth : 2 * tenth]}
    return (
        [d for d in documents if d.name not in calibration | heldout],
        [d for d in documents if d.name in calibration],
        [d for d in documents if d.name in heldout],
    )


def _wikitext2(path: Path) -> Splits:
    if not path.is_dir():
        elsewhere = load_corpus("stdlib")
        return elsewhere.train, elsewhere.calibration, [Document(path.name, _joined_rows(path))]
    first, last = _cut(_joined_rows(path / "wiki.train.raw"), (0.9, 0.1))
    test = _joined_rows(path / "wiki.test.raw")
    return (
        [Document("wiki.train.raw#0", first)],
        [Document("wiki.train.raw#1", last)],
        [Document("wiki.test.raw", test)],
    )


def _joined_rows(path: Path) -> str:
    # As the `datasets` library serves it: a row keeps its newline, a blank row is the empty string.
    return "\n\n".join(f"{row}\n" if row.strip() else "" for row in read_text(path).split("\n"))


def _cut(text: str, shares: Iterable[float]) -> list[str]:
    """Contiguous parts of the given shares; the last takes the rest."""
    parts, start, position = [], 0, 0.0
    shares = list(shares)
    for share in shares[:-1]:
        position += share
        end = round(position * len(text))
        parts.append(text[start:end])
        start = end
    return [*parts, text[start:]]


def _corpus(
    name: str,
    train: list[Document],
    calibration: list[Document],
    heldout: list[Document],
    path: Path | None = None,
) -> Corpus:
    digest = hashlib.sha256()
    for label, documents in (("train", train), ("calibration", calibration), ("heldout", heldout)):
        if not any(document.text.strip() for document in documents):
            raise DataError(
                f"{path or name}: the {label} split must hold text, found none; give a longer data.path"
            )
        for document in documents:
            # Lengths are hashed too, so that no two different corpora join to the same bytes.
            digest.update(f"{label}\0{document.name}\0{len(document.text)}\0".encode())
            digest.update(document.text.encode("utf-8", errors="surrogatepass"))
    return Corpus(name, train, calibration, heldout, digest.hexdigest())
