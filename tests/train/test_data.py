"""Text as data: how it is split and turned into tokens."""

import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from comparing import TEXT
from safetensors.torch import load_file

from paceline.train import InputError
from paceline.train.data import (
    Corpus,
    blocks,
    files_below,
    make_tokenizer,
    read_corpus,
    read_text,
    standard_library_files,
    tokenize,
)


def characters(corpus):
    return sum(len(document) for part in corpus for document in part)


def test_corpus_splits_whole_documents_the_same_way_each_time(tmp_path):
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(f"document {i} " * 20)
    (tmp_path / "copy.txt").write_text("document 3 " * 20)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / ".hidden").write_text("secret")
    files = files_below([tmp_path])
    corpus = read_corpus(files, 10**9)
    assert sorted(corpus.train + corpus.validation) == sorted(
        (f"document {i} " * 20).strip() for i in range(40)
    )
    assert len(corpus.validation) == 4
    assert corpus == read_corpus(files, 10**9)
    assert 1000 < characters(read_corpus(files, 2000)) <= 2000
    # another corpus from the same files never has what this one holds out
    earlier = read_corpus(files, 10**9, held_out=corpus.validation)
    assert sorted(earlier.train + earlier.validation) == sorted(corpus.train)


def test_one_huge_document_does_not_become_the_validation_part(tmp_path):
    for i in range(12):
        (tmp_path / f"{i}.txt").write_text(f"document {i} " * (20 if i else 2000))
    corpus = read_corpus(files_below([tmp_path]), 10**9)
    assert corpus.validation
    assert all(len(document) < 500 for document in corpus.validation)


@pytest.mark.parametrize("count", [1, 5])
def test_of_few_documents_the_last_tenth_is_held_out(tmp_path, count):
    for i in range(count):
        (tmp_path / f"{i}.md").write_text(f"{i}\n{TEXT}")
    corpus = read_corpus(files_below([tmp_path]), 10**9)
    assert len(corpus.train) == len(corpus.validation) == count
    whole = {a + b for a, b in zip(corpus.train, corpus.validation, strict=True)}
    assert whole == {f"{i}\n{TEXT}" for i in range(count)}
    assert all(document.startswith("line") for document in corpus.validation)
    assert 0.09 < sum(map(len, corpus.validation)) / characters(corpus) < 0.16
    assert read_corpus(files_below([tmp_path]), 500).train
    with pytest.raises(InputError, match="empty"):
        read_corpus(files_below([tmp_path]), 10**9, held_out=corpus.validation)


def test_the_default_text_has_no_tests_in_it():
    files = standard_library_files()
    assert len(files) > 500
    assert not any({"test", "tests", "site-packages"} & set(file.parts) for file in files)


def test_tokens_are_the_text():
    corpus = Corpus(["hello wörld\n", "x"], [TEXT])
    tokenizer = make_tokenizer([TEXT], 300)
    tokens = load_file(tokenize(corpus, tokenizer))
    assert tokenizer.decode(tokens["train"]) == "hello wörld\n<|endoftext|>x<|endoftext|>"
    assert torch.equal(load_file(tokenize(corpus, tokenizer))["train"], tokens["train"])  # cached
    part = blocks(tokens["validation"], 16)
    assert part.shape == (len(tokens["validation"]) // 16, 16)
    assert torch.equal(part.flatten(), tokens["validation"][: part.numel()].long())


def test_a_folder_that_changes_while_it_is_read(tmp_path, monkeypatch):
    """As in /proc: processes end, files seem empty and are not, and reading some waits for ever."""
    for name in ("kept", "gone", "empty"):
        (tmp_path / name).write_text("x" * (name != "empty"))
    os.mkfifo(tmp_path / "pipe")
    stat = Path.stat

    def vanished(self, **how):
        if self.name == "gone":
            raise FileNotFoundError(2, "No such file or directory")
        return stat(self, **how)

    monkeypatch.setattr(Path, "stat", vanished)
    assert files_below([tmp_path]) == [tmp_path / "kept"]
    with pytest.raises(InputError, match="pipe is a device or a pipe"):
        files_below([tmp_path / "pipe"])


def test_a_folder_that_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "inner").mkdir()
    scandir = os.scandir

    def fails(path):
        if str(path).endswith("inner"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", fails)
    with pytest.raises(InputError, match="^cannot read the folder .*inner: Permission denied$"):
        files_below([tmp_path])


def test_a_file_that_is_too_large(tmp_path, monkeypatch):
    def fails(*_):
        raise MemoryError

    monkeypatch.setattr(Path, "read_bytes", fails)
    with pytest.raises(InputError, match="^cannot read .*: "):
        read_corpus([tmp_path / "x"], 100)


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_text("text", encoding="utf-8-sig")
    assert read_text(tmp_path / "a.txt") == "text"
