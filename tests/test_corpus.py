import lzma
from pathlib import Path

import pytest

from kvquant.data.corpus import DOCUMENT_SEPARATOR, load_corpus
from kvquant.errors import DataError


@pytest.fixture(scope="module")
def stdlib():
    return load_corpus("stdlib")


def test_stdlib_has_three_disjoint_splits_of_real_text(stdlib):
    names = [{d.name for d in stdlib.split(s)} for s in ("train", "calibration", "heldout")]
    assert not names[0] & names[1] and not names[0] & names[2] and not names[1] & names[2]
    characters = [sum(len(d.text) for d in stdlib.split(s)) for s in ("train", "calibration", "heldout")]
    assert characters[0] > 3_000_000 and min(characters[1:]) > 200_000


def test_stdlib_leaves_out_tests_packages_and_this_machine(stdlib):
    for split in ("train", "calibration", "heldout"):
        for document in stdlib.split(split):
            parts = Path(document.name).parts
            assert not {"test", "tests", "site-packages", "__pycache__"} & set(parts), document.name
            assert not parts[-1].startswith("_sysconfigdata")


def test_stdlib_is_the_same_every_time(stdlib):
    again = load_corpus("stdlib")
    assert again.sha256 == stdlib.sha256
    assert [d.name for d in again.train] == sorted(d.name for d in again.train)


def test_a_file_keeps_its_split_when_others_appear(tmp_path):
    text = "a line of a module that is long enough to be kept\n" * 20
    for index in range(60):
        (tmp_path / f"m{index}.py").write_text(text)
    before = load_corpus("stdlib", tmp_path)
    (tmp_path / "aaa.py").write_text(text)
    after = load_corpus("stdlib", tmp_path)
    for split in ("train", "calibration", "heldout"):
        assert {d.name for d in before.split(split)} <= {d.name for d in after.split(split)}
    assert before.sha256 != after.sha256


def test_a_file_that_does_not_decode_is_left_out(tmp_path):
    for index in range(60):
        (tmp_path / f"m{index}.py").write_text("print('hello, hello, hello, hello')\n" * 30)
    (tmp_path / "latin.py").write_bytes("# gr\u00fc\u00dfe\n".encode("latin-1") * 100)
    corpus = load_corpus("stdlib", tmp_path)
    assert "latin.py" not in {d.name for s in ("train", "calibration", "heldout") for d in corpus.split(s)}


@pytest.mark.parametrize("count", [3, 12, 40])
def test_text_file_splits_by_document(tmp_path, count):
    texts = [f"document {index} " * 30 for index in range(count)]
    path = tmp_path / "books.txt.xz"
    path.write_bytes(lzma.compress(f"\n{DOCUMENT_SEPARATOR}\n".join(texts).encode()))
    corpus = load_corpus("text_file", path)
    found = [d.text for s in ("train", "calibration", "heldout") for d in corpus.split(s)]
    assert sorted(found) == sorted(texts)
    assert corpus.calibration and corpus.heldout


def test_one_document_is_cut_into_contiguous_parts(tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("".join(f"{index} " for index in range(5000)))
    corpus = load_corpus("text_file", path)
    joined = "".join(s[0].text for s in (corpus.train, corpus.calibration, corpus.heldout))
    assert joined == path.read_text()


def test_a_folder_of_texts_is_one_document_each(tmp_path):
    for name in ("a.txt", "b.txt", "c.txt", "d.md"):
        (tmp_path / name).write_text(f"the text of {name} " * 40)
    corpus = load_corpus("text_file", tmp_path)
    assert sum(len(corpus.split(s)) for s in ("train", "calibration", "heldout")) == 4


def test_wikitext2_rows_are_joined_as_usual(tmp_path):
    path = tmp_path / "wiki.test.raw"
    path.write_text(" \n = Title = \n \n A row of text . \n Another row . \n Third row of it . \n")
    corpus = load_corpus("wikitext2", path)
    assert corpus.heldout[0].text.startswith("\n\n = Title = \n\n\n\n\n A row of text . \n\n\n")


def test_wikitext2_folder_calibrates_on_its_train_file(tmp_path):
    (tmp_path / "wiki.train.raw").write_text("train row \n" * 50)
    (tmp_path / "wiki.test.raw").write_text("test row \n" * 50)
    corpus = load_corpus("wikitext2", tmp_path)
    assert "test" not in corpus.calibration[0].text and "train" not in corpus.heldout[0].text


def test_errors_name_the_setting(tmp_path):
    with pytest.raises(DataError, match=r"data\.name must be one of"):
        load_corpus("wikitext")
    with pytest.raises(DataError, match=r"data\.path must"):
        load_corpus("text_file")
    with pytest.raises(DataError, match="existing"):
        load_corpus("text_file", tmp_path / "absent.txt")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(DataError, match="must hold text"):
        load_corpus("text_file", tmp_path / "empty.txt")
    (tmp_path / "broken.txt.xz").write_bytes(b"no xz")
    with pytest.raises(DataError, match="xz"):
        load_corpus("text_file", tmp_path / "broken.txt.xz")
    with pytest.raises(DataError, match="split must be"):
        load_corpus("stdlib").split("test")
