"""Text from everywhere."""

from pathlib import Path

import pytest

pytest.importorskip("transformers")

from conversing import MESSAGES, files_of, load, numbers, text, write_csv, write_lines, write_texts
from datasets import Dataset

from paceline.train import InputError

pytestmark = pytest.mark.usefixtures("folder", "quiet")

TEXTS = [{"text": f"text {n}"} for n in range(20)]


TEXT_FORMS = {
    "folder": lambda path: write_texts(path, 20),
    "lines.jsonl": lambda path: write_lines(path, TEXTS),
    "rows.csv": lambda path: write_csv(path, [{**row, "id": 3} for row in TEXTS]),
    "rows.parquet": lambda path: Dataset.from_list(TEXTS).to_parquet(path),
    "saved": lambda path: Dataset.from_list(TEXTS).save_to_disk(path),
    "more.jsonl": lambda path: write_lines(path, [*TEXTS, {"text": ""}, {"text": None}]),
}


@pytest.mark.parametrize("name", TEXT_FORMS)
def test_text_from_every_form(name, folder):
    TEXT_FORMS[name](name)
    before = files_of(folder)
    data = load(name, task="pretrain")
    assert (len(data.train), len(data.evaluation)) == (18, 2)
    rows = [*data.train, *data.evaluation]
    assert sorted(row["text"] for row in rows) == sorted(row["text"] for row in TEXTS)
    assert all(set(row) == {"text"} for row in rows)
    assert files_of(folder) == before


def test_a_column_of_another_name():
    rows = [{"text": "not this", "body": f"text {n}"} for n in range(20)]
    write_lines("x.jsonl", rows)
    data = load("x.jsonl", task="pretrain", text_column="body")
    assert sorted(numbers([*data.train, *data.evaluation])) == list(range(20))
    with pytest.raises(InputError, match="x.jsonl .*no column 'boby', only text, body; .*--text"):
        load("x.jsonl", task="pretrain", text_column="boby")


@pytest.mark.parametrize("count", [1, 3, 9])
def test_of_few_documents_the_ends_are_held_out(count):
    Path("texts").mkdir()
    whole = [f"document {n}\n" + f"line of {n}\n" * 100 for n in range(count)]
    for n, document in enumerate(whole):
        Path("texts", f"{n}.md").write_text(document)
    data = load("texts", task="pretrain")
    assert len(data.train) == len(data.evaluation) == count
    pairs = zip(data.train, data.evaluation, strict=True)
    assert {a["text"] + b["text"] for a, b in pairs} == {document.strip() for document in whole}
    assert all(row["text"].startswith("line") for row in data.evaluation)
    share = sum(len(row["text"]) for row in data.evaluation) / sum(map(len, whole))
    assert 0.08 < share < 0.16


def test_a_folder_of_documents(capfd):
    write_texts("texts", 20)
    Path("texts", "copy.txt").write_text("text 3")
    Path("texts", "binary").write_bytes(b"\xff\xfe\x00")
    Path("texts", "empty.txt").write_text(" \n")
    Path("texts", ".hidden").write_text("secret")
    Path("texts", "rows.json").write_text('{"not": "rows", "text 20": 1}')  # a document, too
    data = load("texts", task="pretrain")
    assert capfd.readouterr().err == (
        "paceline: data: texts: kept 21 of 24 files: 2 are not UTF-8 text (the first: "
        "texts/binary), 1 are copies of others\n"
    )
    rows = [*data.train, *data.evaluation]
    assert len(rows) == 21
    assert not any("secret" in row["text"] for row in rows)
    assert list(load("texts", task="pretrain").train) == list(data.train)


def test_texts_of_several_sources():
    for name in TEXT_FORMS:
        TEXT_FORMS[name](name)
    data = load(*TEXT_FORMS, task="pretrain", eval_data=["folder"], eval_examples=5)
    assert sorted(numbers(data.train)) == sorted([*range(20)] * len(TEXT_FORMS))
    assert len(data.evaluation) == 5


def test_text_that_comes_with_python_and_torch():
    assert load("python", task="pretrain", examples=3).train.num_rows == 3
    with pytest.raises(InputError, match="chitchat is conversations .*; this task takes python, t"):
        load("chitchat", task="pretrain")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: write_lines(p, [{"text": 3}] * 5), "x.jsonl, line 1: expected text, got 3"),
        (lambda p: write_lines(p, [{"text": ["a"]}] * 5), r"x.jsonl, line 1: expected text"),
        (
            lambda p: write_lines(p, MESSAGES),
            "x.jsonl has no usable .*no column 'text', only messages",
        ),
        (
            lambda p: write_lines(p, [{"text": ""}] * 5),
            "x.jsonl has no usable examples: 5 left out because text is empty",
        ),
        (text(b'{"text": "caf\xe9"}\n' * 3), "x.jsonl is not UTF-8"),
    ],
)
def test_bad_texts(write, message):
    write("x.jsonl")
    with pytest.raises(InputError, match=f"^data: {message}"):
        load("x.jsonl", task="pretrain")


def test_no_text_at_all():
    Path("empty").mkdir()
    Path("binary.txt").write_bytes(b"\xff\x00")
    for name in ("empty", "binary.txt"):
        with pytest.raises(InputError, match=f"^data: {name} has no files of UTF-8 text"):
            load(name, task="pretrain")
