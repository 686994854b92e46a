"""Data from everywhere, and which tokens of a conversation are learned."""

import csv
import functools
import io
import json
import logging
import re
import types
from pathlib import Path

import pytest
import trl

pytest.importorskip("transformers")

import datasets
from datasets import Dataset, DatasetDict, IterableDataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from paceline.train import InputError, sources
from paceline.train.build import build
from paceline.train.chat import CHATML, END, START, conversation_encoder, show, use_chatml
from paceline.train.data import make_tokenizer
from paceline.train.recipe import Recipe
from paceline.train.sources import chitchat, load_sources
from paceline.train.terminal import quiet

TEMPLATES = Path(trl.__file__).parent / "chat_templates"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty working directory, and a cache of datasets beside it."""
    quiet()
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    return place


def user(text):
    return {"role": "user", "content": text}


def system(text):
    return {"role": "system", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def talk(n, word="a"):
    """A conversation of its own for every n."""
    return [user(f"question {n}"), assistant(f"{word}nswer {n}")]


def load(*names, **changes):
    values = {
        "kind": "messages",
        "config": None,
        "split": "train",
        "eval_names": None,
        "eval_split": None,
        "eval_examples": 512,
        "examples": None,
        "text_column": "text",
        "streaming": False,
        "seed": 0,
    }
    return load_sources(names, **values | changes)


@pytest.fixture
def few(monkeypatch):
    """A chitchat of twenty conversations."""
    monkeypatch.setattr(sources, "chitchat", lambda: map(talk, range(20)))


def numbers(rows):
    """Which of the conversations or texts these are, in order."""
    texts = [row["messages"][-1]["content"] if "messages" in row else row["text"] for row in rows]
    return [int(re.search(r"\d+", text)[0]) for text in texts]


def write_lines(path, rows):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_csv(path, rows):
    with Path(path).open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


MESSAGES = [{"messages": talk(n)} for n in range(20)]
PAIRS = [{"prompt": f"question {n}", "completion": f"answer {n}"} for n in range(20)]
TEXTS = [{"text": f"text {n}"} for n in range(20)]


def sharegpt(n, human="human", gpt="gpt"):
    return [
        {"from": human, "value": f"question {n}"},
        {"from": gpt, "value": f"answer {n}"},
    ]


# ---- conversations ---------------------------------------------------------------------------

FORMS = {
    "messages.jsonl": lambda path: write_lines(path, MESSAGES),
    "sharegpt.jsonl": lambda path: write_lines(
        path, [{"conversations": sharegpt(n), "id": n} for n in range(20)]
    ),
    "roles.jsonl": lambda path: write_lines(
        path, [{"conversations": sharegpt(n, "user", "model")} for n in range(20)]
    ),
    "pairs.jsonl": lambda path: write_lines(path, PAIRS),
    "talks.jsonl": lambda path: write_lines(
        path, [{"prompt": talk(n)[:1], "completion": talk(n)[1:]} for n in range(20)]
    ),
    "half.jsonl": lambda path: write_lines(
        path, [{"prompt": talk(n)[:1], "completion": f"answer {n}"} for n in range(20)]
    ),
    # as ultrachat_200k has it: the first message once more
    "both.jsonl": lambda path: write_lines(
        path, [{"prompt": "question", "prompt_id": "x", **row} for row in MESSAGES]
    ),
    "all.jsonl": lambda path: write_lines(
        path, [{"prompt": "p", "completion": "c", "conversations": None, **row} for row in MESSAGES]
    ),
    "more.jsonl": lambda path: write_lines(
        path,
        [{"messages": [{**m, "weight": 1, "name": None} for m in talk(n)]} for n in range(20)],
    ),
    "list.json": lambda path: Path(path).write_text(json.dumps(MESSAGES, indent=1)),
    "rows.parquet": lambda path: Dataset.from_list(MESSAGES).to_parquet(path),
    "rows.csv": lambda path: write_csv(path, PAIRS),
    "UPPER.JSONL": lambda path: write_lines(path, MESSAGES),
    "one": lambda path: write_lines(f"{path}/x.jsonl", MESSAGES),
    "card": lambda path: [
        write_lines(f"{path}/x.jsonl", MESSAGES),
        Path(path, "README.md").write_text("# Without a head\n"),
    ],
    "files": lambda path: [
        write_lines(f"{path}/{n % 2}/{n}.jsonl", MESSAGES[5 * n : 5 * n + 5]) for n in range(4)
    ],
    "saved": lambda path: Dataset.from_list(MESSAGES).save_to_disk(path, num_shards=2),
    "splits": lambda path: DatasetDict(
        train=Dataset.from_list(MESSAGES), test=Dataset.from_list([{"messages": talk(99)}] * 9)
    ).save_to_disk(path),
    "download": lambda path: download(path, True),
    "data": lambda path: download(path, False),
    "json": lambda path: write_lines(f"{path}/x.jsonl", MESSAGES),  # the name of a reader
}


def download(path, readme):
    """What `hf download --repo-type dataset` makes."""
    Path(path, "data").mkdir(parents=True)
    Path(path, ".gitattributes").write_text("*.parquet filter=lfs\n")
    if readme:
        Path(path, "README.md").write_text(
            "---\nconfigs:\n- config_name: default\n  data_files:\n"
            "  - split: train\n    path: data/train-*\n  - split: test\n    path: data/test-*\n"
            "---\n# A dataset\n"
        )
    Dataset.from_list(MESSAGES).to_parquet(f"{path}/data/train-00000-of-00001.parquet")
    Dataset.from_list([{"messages": talk(99)}] * 9).to_parquet(
        f"{path}/data/test-00000-of-00001.parquet"
    )


def files_of(folder):
    return {p: p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("name", FORMS)
def test_conversations_from_every_form(name, folder, logged):
    FORMS[name](name)
    before = files_of(folder)
    data = load(name)
    rows = [*data.train, *data.evaluation]
    assert sorted(numbers(rows)) == list(range(20))
    assert sorted((row["messages"] for row in rows), key=str) == sorted(
        map(talk, range(20)), key=str
    )
    assert all(set(row) == {"messages"} for row in rows)
    assert not logged
    data.train.map(lambda row: {"n": len(row["messages"])})  # as it will be for the model
    assert files_of(folder) == before


@pytest.mark.parametrize("name", ["splits", "download", "data"])
def test_splits_of_a_folder(name):
    FORMS[name](name)
    data = load(name, eval_split="test")
    assert numbers(data.train) == list(range(20))
    assert set(numbers(data.evaluation)) == {99}
    assert set(numbers(load(name, split="test").train)) == {99}
    with pytest.raises(InputError, match=f"^data: {name} has no split 'dev'"):
        load(name, eval_split="dev")


def test_files_that_are_of_no_split_are_not_lost():
    for name in ("train", "test", "more"):
        write_lines(f"data/{name}.jsonl", MESSAGES)
    with pytest.raises(InputError, match=r"files named after splits, and others, as data/more"):
        load("data")


@pytest.mark.parametrize("name", ["messages.jsonl", "files", "saved", "chitchat", "texts"])
def test_what_has_no_splits_is_not_evaluated_on_what_it_trains_on(name, few):
    if name in FORMS:
        FORMS[name](name)
    write_texts("texts", 20)
    kind = "text" if name == "texts" else "messages"
    data = load(name, eval_split="test", kind=kind)
    assert sorted(numbers(data.train) + numbers(data.evaluation)) == list(range(20))


def test_of_several_those_with_splits_are_evaluated_on():
    for name in ("messages.jsonl", "splits", "download"):
        FORMS[name](name)
    data = load("messages.jsonl", "splits", "download", eval_split="test")
    assert sorted(numbers(data.train)) == sorted([*range(20)] * 3)
    assert numbers(data.evaluation) == [99] * 18


def test_all_turns_of_a_conversation_are_kept():
    long = [system("be brief"), *talk(0), user("and?"), assistant(""), *talk(1)]
    tools = [*talk(0)[:1], assistant("calling"), {"role": "tool", "content": "42"}, *talk(1)[1:]]
    write_lines("x.jsonl", [{"messages": long}, {"messages": tools}])
    data = load("x.jsonl")
    rows = [row["messages"] for part in data for row in part]
    assert sorted(rows, key=len) == [tools, long]


def test_rows_where_no_assistant_speaks_are_left_out():
    silent = [[], None, talk(0)[:1], [*talk(0)[:1], assistant(" \n")], [system("x")]]
    write_lines("x.jsonl", [*({"messages": m} for m in silent), *MESSAGES])
    data = load("x.jsonl")
    assert sorted(numbers([*data.train, *data.evaluation])) == list(range(20))
    write_lines("p.jsonl", [{"prompt": "x", "completion": None}, {"prompt": "x", "completion": ""}])
    with pytest.raises(InputError, match="p.jsonl has 0 usable examples"):
        load("p.jsonl")


def test_files_that_change_are_read_again():
    write_lines("x.jsonl", MESSAGES)
    write_lines("f/x.jsonl", MESSAGES)
    for name in ("x.jsonl", "f"):
        assert load(name).train[0]["messages"][1]["content"].startswith("answer")
    for path in ("x.jsonl", "f/x.jsonl"):
        write_lines(path, [{"messages": talk(n, "A")} for n in range(20)])
    for name in ("x.jsonl", "f"):
        assert load(name).train[0]["messages"][1]["content"].startswith("Answer")


def test_other_code_reads_again(monkeypatch):
    write_lines("x.jsonl", MESSAGES)
    before = load("x.jsonl").train[0]
    monkeypatch.setattr(sources, "MADE_BY", "another version")
    original = sources._messages

    def _messages(row, index, **rest):
        (first, *others) = original(row, index, **rest)["messages"]
        return {"messages": [{**first, "content": "new"}, *others]}

    _messages.__module__, _messages.__qualname__ = original.__module__, original.__qualname__
    monkeypatch.setattr(sources, "_messages", _messages)
    assert load("x.jsonl").train[0]["messages"][0]["content"] == "new" != before


# ---- parts -----------------------------------------------------------------------------------


def test_the_held_out_part_is_the_same_for_every_seed_and_disjoint():
    write_lines("x.jsonl", [{"messages": talk(n)} for n in range(100)])
    parts = [tuple(map(numbers, load("x.jsonl", seed=seed))) for seed in range(3)]
    assert parts[0] == parts[1] == parts[2]
    train, evaluation = map(set, parts[0])
    assert (len(train), len(evaluation)) == (90, 10)
    assert train | evaluation == set(range(100))
    assert evaluation != set(range(90, 100))  # a random part


@pytest.mark.parametrize(
    ("changes", "train", "evaluation"),
    [
        ({"eval_examples": 4}, 96, 4),
        ({"eval_examples": 99}, 90, 10),  # no more than a tenth
        ({"examples": 7}, 7, 10),
        ({"examples": 1, "eval_examples": 1}, 1, 1),
        ({"examples": 1000}, 90, 10),
        ({"eval_names": ["pairs.jsonl"]}, 100, 20),
        ({"eval_names": ["pairs.jsonl"], "eval_examples": 3}, 100, 3),
        ({"eval_names": ["pairs.jsonl"], "examples": 5}, 5, 20),
        ({"eval_names": ["pairs.jsonl", "pairs.jsonl"]}, 100, 40),
    ],
)
def test_numbers_of_examples(changes, train, evaluation):
    write_lines("x.jsonl", [{"messages": talk(n)} for n in range(100)])
    write_lines("pairs.jsonl", PAIRS)
    data = load("x.jsonl", **changes)
    assert (len(data.train), len(data.evaluation)) == (train, evaluation)
    if "eval_names" in changes:
        assert numbers(data.train) == list(range(train))
    else:
        assert not set(numbers(data.train)) & set(numbers(data.evaluation))


def test_two_examples_are_one_each():
    write_lines("x.jsonl", MESSAGES[:2])
    data = load("x.jsonl")
    assert sorted(numbers(data.train) + numbers(data.evaluation)) == [0, 1]
    assert len(data.train) == 1


def test_several_sources_are_put_together(few):
    for name in ("messages.jsonl", "sharegpt.jsonl", "rows.csv", "saved", "rows.parquet"):
        FORMS[name](name)
    data = load("messages.jsonl", "sharegpt.jsonl", "rows.csv", "saved", "rows.parquet")
    assert sorted(numbers([*data.train, *data.evaluation])) == sorted([*range(20)] * 5)
    with_built_in = load("messages.jsonl", "chitchat", eval_names=["messages.jsonl"])
    assert numbers(with_built_in.train) == [*range(20), *range(20)]


# ---- what cannot be used ---------------------------------------------------------------------


@pytest.fixture
def logged():
    """What the libraries log, which has its own way to the terminal."""
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
        logger.addHandler(handler)
    yield records
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
        logger.removeHandler(handler)


def message(row, **message):
    """A file of conversations in which one row has one more message."""
    rows = [{"messages": talk(n)} for n in range(5)]
    rows[row]["messages"] = [*rows[row]["messages"], message]
    return lambda path: write_lines(path, rows)


def text(content):
    return lambda path: Path(path).write_bytes(content)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (message(3, role="narrator", content="x"), "x.jsonl, row 3: unknown role 'narrator'"),
        (message(2, role="user", content=None), "x.jsonl, row 2: content must be text, got None"),
        (message(1, role="user", content=["x"]), "x.jsonl, row 1: content must be text, got"),
        (message(0, role=None, content="x"), "x.jsonl, row 0: a message needs a role and content"),
        (
            lambda p: write_lines(p, [{"messages": [user([{"type": "text", "text": "x"}])]}]),
            "x.jsonl, row 0: content must be text, got .*'type': 'text'",
        ),
        (
            lambda p: write_lines(p, [{"messages": [{"content": "x"}]}]),
            "x.jsonl, row 0: a message needs a role and content",
        ),
        (
            lambda p: write_lines(p, [{"messages": ["x"]}]),
            "x.jsonl, row 0: a message needs a role and content, got 'x'",
        ),
        (
            lambda p: write_lines(p, [{"messages": "hello"}]),
            "x.jsonl, row 0: messages is neither messages nor text: 'hello'",
        ),
        (
            lambda p: write_lines(p, [{"prompt": "1 + 1", "completion": 2}]),
            "x.jsonl, row 0: completion is neither messages nor text: 2",
        ),
        (
            lambda p: write_lines(p, [{"question": "x", "answer": "y"}]),
            "x.jsonl has neither messages nor conversations nor .*, but question, answer",
        ),
        (
            lambda p: write_lines(p, [{"prompt": "x", "chosen": "y"}]),
            "x.jsonl has neither .*, but prompt, chosen",
        ),
        (lambda p: write_lines(p, MESSAGES[:1]), "x.jsonl has 1 usable examples"),
        (lambda p: write_lines(p, [{"messages": []}] * 9), "x.jsonl has 0 usable examples"),
        (text(b""), "x.jsonl cannot be read: it is empty"),
        (text(b"\n\n"), "x.jsonl cannot be read: "),
        (text(b'{"messages": [}\n'), "x.jsonl cannot be read: JSON parse error"),
        (text(b"hello\n"), "x.jsonl cannot be read: JSON parse error"),
        (text(b"\x00\x01\x02"), "x.jsonl cannot be read: "),
        (
            text(b'{"messages": [{"role": "user", "content": "caf\xe9"}]}\n' * 3),
            "x.jsonl is not UTF-8",
        ),
    ],
)
def test_bad_conversations_name_file_and_row(write, message, folder, capfd, logged):
    write("x.jsonl")
    before = files_of(folder)
    with pytest.raises(InputError) as error:
        load("x.jsonl")
    assert re.match(f"data: {message}", str(error.value))
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")
    assert not logged
    assert files_of(folder) == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.jsonl", "no such file or folder: missing.jsonl"),
        ("missing.TXT", "no such file or folder: missing.TXT"),
        ("./missing", "no such file or folder: ./missing"),
        ("/missing", "no such file or folder: /missing"),
        ("~/missing", "no such file or folder: ~/missing"),
        ("/" + "x" * 300, "no such file or folder: /xxx"),
        ("bad.parquet", "bad.parquet cannot be read: Parquet"),
        ("notes.txt", "notes.txt is not of files .jsonl, .json, .parquet, .csv alone"),
        ("empty", "empty is not of files .jsonl"),
        ("mixed", "mixed is not of files .jsonl"),
        ("broken", ".*broken/b.jsonl cannot be read: JSON parse error"),
        ("python", "python is the sources of Python's standard library; this task takes chitchat"),
        ("torch", "torch is the sources of the installed torch; this task takes chitchat"),
    ],
)
def test_bad_names(name, message, capfd, logged):
    Path("bad.parquet").write_bytes(b"PAR1 not")
    Path("notes.txt").write_text("hello")
    Path("empty").mkdir()
    write_lines("mixed/a.jsonl", MESSAGES)
    write_csv("mixed/b.csv", PAIRS)
    write_lines("broken/a.jsonl", MESSAGES)
    write_lines("broken/b.jsonl", MESSAGES[:2])
    with Path("broken/b.jsonl").open("a") as file:
        file.write("{")
    with pytest.raises(InputError) as error:
        load(name)
    assert re.match(f"data: {message}", str(error.value))
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")
    assert not logged
    write_lines("good.jsonl", MESSAGES)
    with pytest.raises(InputError) as again:
        load("good.jsonl", eval_names=[name])
    assert str(again.value) == str(error.value)


def test_nothing_to_evaluate_on_names_that():
    write_lines("x.jsonl", MESSAGES)
    write_lines("silent.jsonl", [{"messages": talk(0)[:1]}] * 3)
    with pytest.raises(InputError, match=r"^data: silent.jsonl has nothing to evaluate on"):
        load("x.jsonl", eval_names=["silent.jsonl"])
    with pytest.raises(InputError, match=r"^data: silent.jsonl has nothing to train on"):
        load("silent.jsonl", eval_names=["x.jsonl"])


def test_what_may_not_be_read(monkeypatch):
    write_lines("x.jsonl", MESSAGES)
    write_texts("texts", 3)

    def forbidden(self, *_, **__):
        raise PermissionError(13, "Permission denied", str(self))

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", forbidden)
        with pytest.raises(InputError, match=r"^data: x.jsonl cannot be read: .*Permission denied"):
            load("x.jsonl")
    monkeypatch.setattr(Path, "read_bytes", forbidden)
    with pytest.raises(InputError, match=r"^cannot read texts/.\.txt: Permission denied"):
        load("texts", kind="text")


# ---- text ------------------------------------------------------------------------------------


def write_texts(folder, count):
    Path(folder).mkdir()
    for n in range(count):
        Path(folder, f"{n}.txt").write_text(f"text {n}\n")
    return folder


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
    data = load(name, kind="text")
    assert (len(data.train), len(data.evaluation)) == (18, 2)
    rows = [*data.train, *data.evaluation]
    assert sorted(row["text"] for row in rows) == sorted(row["text"] for row in TEXTS)
    assert all(set(row) == {"text"} for row in rows)
    assert files_of(folder) == before


def test_a_column_of_another_name():
    rows = [{"text": "not this", "body": f"text {n}"} for n in range(20)]
    write_lines("x.jsonl", rows)
    data = load("x.jsonl", kind="text", text_column="body")
    assert sorted(numbers([*data.train, *data.evaluation])) == list(range(20))
    with pytest.raises(InputError, match="x.jsonl has no column 'boby', but text, body; .*--text"):
        load("x.jsonl", kind="text", text_column="boby")


@pytest.mark.parametrize("count", [1, 3, 9])
def test_of_few_documents_the_ends_are_held_out(count):
    Path("texts").mkdir()
    whole = [f"document {n}\n" + f"line of {n}\n" * 100 for n in range(count)]
    for n, document in enumerate(whole):
        Path("texts", f"{n}.md").write_text(document)
    data = load("texts", kind="text")
    assert len(data.train) == len(data.evaluation) == count
    pairs = zip(data.train, data.evaluation, strict=True)
    assert {a["text"] + b["text"] for a, b in pairs} == {document.strip() for document in whole}
    assert all(row["text"].startswith("line") for row in data.evaluation)
    share = sum(len(row["text"]) for row in data.evaluation) / sum(map(len, whole))
    assert 0.08 < share < 0.16


def test_a_folder_of_documents():
    write_texts("texts", 20)
    Path("texts", "copy.txt").write_text("text 3")
    Path("texts", "binary").write_bytes(b"\xff\xfe\x00")
    Path("texts", "empty.txt").write_text(" \n")
    Path("texts", ".hidden").write_text("secret")
    Path("texts", "rows.json").write_text('{"not": "rows", "text 20": 1}')  # a document, too
    data = load("texts", kind="text")
    rows = [*data.train, *data.evaluation]
    assert len(rows) == 21
    assert not any("secret" in row["text"] for row in rows)
    assert list(load("texts", kind="text").train) == list(data.train)


def test_texts_of_several_sources():
    for name in TEXT_FORMS:
        TEXT_FORMS[name](name)
    data = load(*TEXT_FORMS, kind="text", eval_names=["folder"], eval_examples=5)
    assert sorted(numbers(data.train)) == sorted([*range(20)] * len(TEXT_FORMS))
    assert len(data.evaluation) == 5


def test_text_that_comes_with_python_and_torch():
    assert load("python", kind="text", examples=3).train.num_rows == 3
    with pytest.raises(InputError, match="chitchat is conversations .*; this task takes python, t"):
        load("chitchat", kind="text")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: write_lines(p, [{"text": 3}] * 5), "x.jsonl, row 0: expected text, got 3"),
        (lambda p: write_lines(p, [{"text": ["a"]}] * 5), r"x.jsonl, row 0: expected text"),
        (lambda p: write_lines(p, MESSAGES), "x.jsonl has no column 'text', but messages"),
        (lambda p: write_lines(p, [{"text": ""}] * 5), "x.jsonl has nothing to train on"),
        (text(b'{"text": "caf\xe9"}\n' * 3), "x.jsonl is not UTF-8"),
    ],
)
def test_bad_texts(write, message):
    write("x.jsonl")
    with pytest.raises(InputError, match=f"^data: {message}"):
        load("x.jsonl", kind="text")


def test_no_text_at_all():
    Path("empty").mkdir()
    Path("binary.txt").write_bytes(b"\xff\x00")
    for name in ("empty", "binary.txt"):
        with pytest.raises(InputError, match=f"^data: {name} has no files of UTF-8 text"):
            load(name, kind="text")


# ---- the Hub, and streams ----------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """A Hub of one dataset, of 300 rows of which every third is silent; what is asked of it."""
    asked = []

    def load_dataset(name, config, *, split, streaming):
        asked.append((name, config, split, streaming))
        shift = 0 if split == "train" else 1000

        def rows():
            for n in range(300):
                yield {"messages": talk(n + shift)[: 1 if n % 3 == 2 else 2], "id": n}

        return IterableDataset.from_generator(rows) if streaming else Dataset.from_list([*rows()])

    monkeypatch.setattr(sources, "hub_is_there", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


USABLE = [n for n in range(300) if n % 3 < 2]


def test_a_dataset_of_the_hub(hub):
    data = load("a/b", config="c", split="train", eval_split="test", eval_examples=8)
    assert hub == [("a/b", "c", "train", False), ("a/b", "c", "test", False)]
    assert numbers(data.train) == USABLE
    assert numbers(data.evaluation) == [n + 1000 for n in USABLE[:8]]


def test_another_dataset_to_evaluate_on(hub):
    load("a/b", split="s", eval_names=["c/d"], streaming=True)
    assert hub == [("a/b", None, "s", True), ("c/d", None, "s", False)]
    load("a/b", split="s", eval_names=["c/d"], eval_split="t")
    assert hub[2:] == [("a/b", None, "s", False), ("c/d", None, "t", False)]


def test_of_a_stream_the_first_are_held_out(hub):
    data = load("a/b", streaming=True, eval_examples=8)
    assert isinstance(data.train, IterableDataset)
    assert isinstance(data.evaluation, Dataset)
    assert numbers(data.evaluation) == USABLE[:8]
    assert sorted(numbers(data.train)) == USABLE[8:]
    assert numbers(data.train) != USABLE[8:]  # in a random order
    assert all(set(row) == {"messages"} for row in data.train)


def test_a_stream_is_in_another_order_for_another_seed(hub):
    first, again, other = (
        load("a/b", streaming=True, seed=seed, eval_examples=9) for seed in (0, 0, 1)
    )
    assert numbers(first.train) == numbers(again.train) != numbers(other.train)
    assert sorted(numbers(first.train)) == sorted(numbers(other.train))
    assert numbers(first.evaluation) == numbers(other.evaluation)


def test_numbers_of_examples_of_a_stream(hub):
    data = load("a/b", streaming=True, examples=5, eval_examples=3, eval_split="test")
    assert len(numbers(data.train)) == 5
    assert numbers(data.evaluation) == [n + 1000 for n in USABLE[:3]]


def test_a_short_stream_is_not_held_out_to_the_last(hub):
    with pytest.raises(InputError, match="^data: a/b has 200 usable examples, and the first 512 "):
        load("a/b", streaming=True)


def test_a_stream_beside_what_is_none(hub, few):
    data = load("a/b", "chitchat", streaming=True, eval_examples=2)
    assert sorted(numbers(data.train)) == sorted([*USABLE[2:], *range(20)])


def test_a_stream_of_text(monkeypatch):
    def load_dataset(name, config, *, split, streaming):
        rows = [{"body": f"text {n}", "text": "no"} for n in range(50)] + [{"body": "", "text": ""}]
        return Dataset.from_list(rows).to_iterable_dataset()

    monkeypatch.setattr(sources, "hub_is_there", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = load("a/b", kind="text", text_column="body", streaming=True, eval_examples=5)
    assert numbers(data.evaluation) == [0, 1, 2, 3, 4]
    assert sorted(numbers(data.train)) == list(range(5, 50))
    with pytest.raises(InputError, match="a/b has no column 'x', but body, text"):
        load("a/b", kind="text", text_column="x", streaming=True)


def test_a_bad_row_of_a_stream_is_named(monkeypatch):
    rows = [{"messages": talk(n)} for n in range(20)] + [{"messages": [{"role": "x"}]}]
    monkeypatch.setattr(sources, "hub_is_there", lambda: True)
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda *_, **__: IterableDataset.from_generator(lambda: iter(rows)),
    )
    data = load("a/b", streaming=True, eval_examples=2)
    with pytest.raises(InputError, match="^data: a/b, row 20: content must be text"):
        list(data.train)


# ---- chitchat --------------------------------------------------------------------------------


def test_chitchat():
    talks = list(chitchat())
    assert 3150 < len(talks) < 3250
    for messages in talks:
        assert len(messages) >= 4
        roles = [message["role"] for message in messages]
        assert roles == (["user", "assistant"] * len(roles))[: len(roles)]
        assert all(message["content"].strip() for message in messages)
    said = "\n".join(message["content"] for messages in talks for message in messages)
    assert not re.search(r"\w@\w+\.\w", said)  # addresses
    assert not re.search(r"(^|\s)@[A-Za-z_]\w{2}", said)  # handles
    assert not re.search(r"\d{3}\)?[-. ]?\d{3}[-. ]?\d{4}", said)  # telephone numbers
    assert not re.search(r"\d{10}", said)


@pytest.mark.parametrize(
    ("text", "contact"),
    [
        ("write to me.too@mail.example.com!", True),
        ("I am @some_one there", True),
        ("@abc", True),
        ("call 801-555-0123 12", True),
        ("call +1 (801) 555-0123", True),
        ("8015550123", True),
        ("(801) 555-0123", True),
        ("801 - 555 - 0123", True),
        ("meet @ 5", False),
        ("a @ b", False),
        ("in 1999, 2005 or 2010", False),
        ("from 2013 - 2015", False),
        ("it was 12345678 dollars", False),
        ("me@home", False),
    ],
)
def test_contact_data(text, contact):
    assert bool(sources.CONTACT.search(text)) == contact


def test_chitchat_takes_what_is_strictly_in_turn(monkeypatch, folder):
    def turn(sender, *texts):
        return [{"sender": sender, "text": text} for text in texts]

    def chat(*senders):
        return [turn(sender, f" {sender} ", str(i)) for i, sender in enumerate(senders)]

    chats = [
        chat(*"abab"),
        chat(*"ababa"),
        chat(*"aba"),  # too short
        chat(*"abba"),
        chat(*"aabb"),
        chat(*"abac"),  # three people
        chat(*"aaaa"),
        [*chat(*"aba"), turn("b", "x") + turn("a", "y")],  # two in one turn
        [*chat(*"aba"), turn("b", " ")],
        [*chat(*"aba"), turn("b", "write to x@example.com")],
    ]
    content = {str(i): {"messages": messages} for i, messages in enumerate(chats)}
    (folder / "dataset.json").write_text(json.dumps(content))
    spec = types.SimpleNamespace(submodule_search_locations=[str(folder)])
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: spec)
    four = [user("a\n0"), assistant("b\n1"), user("a\n2"), assistant("b\n3")]
    assert list(chitchat()) == [four, [*four, user("a\n4")]]


def test_chitchat_without_its_package(monkeypatch):
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="^data: chitchat needs its package; pip install"):
        load("chitchat")


# ---- masks -----------------------------------------------------------------------------------

MARKED = """\
{%- for m in messages -%}
{{- '[' + m.role + ']\\n' -}}
{%- if m.role == 'assistant' -%}
{%- generation -%}{{- m.content + eos_token -}}{%- endgeneration -%}
{%- else -%}{{- m.content -}}{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
"""
# Like SmolLM2's: it puts a system prompt in front, and has no marks.
UNMARKED = """\
{%- for m in messages -%}
{%- if loop.first and m.role != 'system' -%}
{{- '<|im_start|>system\\nBe kind.<|im_end|>\\n' -}}
{%- endif -%}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
# It marks the last turn, and so no turn is written the same when others follow.
LAST = """\
{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\\n' + m.content + ('!' if loop.last else '') -}}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
QWEN3 = (TEMPLATES / "qwen3.jinja").read_text(encoding="utf-8")
GEMMA3 = (TEMPLATES / "gemma3.jinja").read_text(encoding="utf-8")


@functools.cache
def encoder_of(template):
    """A tokenizer with this template, and what encodes with it."""
    tokenizer = tokenizer_of(template)
    return tokenizer, conversation_encoder(tokenizer)


def tokenizer_of(template):
    """A byte-level tokenizer with a few merges, and none across a line."""
    tokenizer = make_tokenizer(["hello there, hello user", "a b c d", "question answer"] * 9, 300)
    if template == CHATML:
        use_chatml(tokenizer)
    else:
        special = [START, END, "<start_of_turn>", "<end_of_turn>"]
        tokenizer.add_special_tokens({"additional_special_tokens": special})
        tokenizer.chat_template = template
    return tokenizer


def in_brackets(tokenizer, encoded):
    """All that was encoded, with ⟦ ⟧ around each piece that is learned."""
    ids, mask = encoded["input_ids"], encoded["assistant_masks"]
    assert len(ids) == len(mask)
    assert set(mask) <= {0, 1}
    parts, start = [], 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or mask[end] != mask[start]:
            part = tokenizer.decode(ids[start:end])
            parts.append(f"⟦{part}⟧" if mask[start] else part)
            start = end
    return "".join(parts)


# What each template should write, by hand.
def chatml(messages):
    return "".join(
        f"<|im_start|>assistant\n⟦{m['content']}<|im_end|>⟧\n"
        if m["role"] == "assistant"
        else f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n"
        for m in messages
    )


def unmarked(messages):
    given = messages[0]["role"] == "system"
    said = ("" if given else "<|im_start|>system\nBe kind.<|im_end|>\n") + chatml(messages)
    if messages[0]["role"] == "assistant":  # which is not learned there
        said = re.sub("⟦(.*?)⟧", r"\1", said, count=1, flags=re.DOTALL)
    return said


def marked(messages):
    return "".join(
        f"[assistant]\n⟦{m['content']}<|endoftext|>⟧\n"
        if m["role"] == "assistant"
        else f"[{m['role']}]\n{m['content']}\n"
        for m in messages
    )


def qwen3(messages):
    """In TRL's training template the line break after the turn is the assistant's, too."""
    return "".join(
        f"<|im_start|>assistant\n⟦<think>\n\n</think>\n\n{m['content']}<|im_end|>\n⟧"
        if m["role"] == "assistant"
        else f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n"
        for m in messages
    )


EXPECTED = {CHATML: chatml, UNMARKED: unmarked, MARKED: marked, QWEN3: qwen3}
IDS = ["chatml", "unmarked", "marked", "qwen3"]
CONVERSATIONS = {
    "one turn": talk(1),
    "many turns": [*talk(1), *talk(2), user("hello"), assistant("hello there")],
    "system": [system("Be brief."), *talk(1)],
    "unicode": [user("🦊?"), assistant("ünï 🦊👨‍👩‍👧 中文"), user("é"), assistant("🦊")],
    "empty": [*talk(1), user(""), assistant(""), *talk(2)],
    "unanswered": [*talk(1), user("hello?")],
    "twice": [user("q"), assistant("hello"), assistant("there")],
    "first": [assistant("hello there"), *talk(1)],
    "spaces": [user(" a "), assistant(" b c "), user("d"), assistant("a\n\nb")],
}


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("template", EXPECTED, ids=IDS)
def test_what_the_assistant_says_is_learned_and_nothing_else(template, name):
    messages = CONVERSATIONS[name]
    tokenizer, encode = encoder_of(template)
    assert in_brackets(tokenizer, encode(messages)) == EXPECTED[template](messages)


def test_masks_of_one_conversation_in_full():
    tokenizer = tokenizer_of(CHATML)
    encoded = conversation_encoder(tokenizer)([user("a"), assistant("b c")])
    named = [tokenizer.convert_ids_to_tokens(i) for i in encoded["input_ids"]]
    learned = [name for name, m in zip(named, encoded["assistant_masks"], strict=True) if m]
    assert learned == ["b", "Ġc", "<|im_end|>"]
    assert named[-4:] == ["b", "Ġc", "<|im_end|>", "Ċ"]


def test_gemma_as_trl_knows_it():
    tokenizer = tokenizer_of(GEMMA3)
    encode = conversation_encoder(tokenizer)
    assert in_brackets(tokenizer, encode([system("Be brief."), *talk(1)])) == (
        "<|endoftext|><start_of_turn>user\nBe brief.\n\nquestion 1<end_of_turn>\n"
        "<start_of_turn>model\n⟦answer 1<end_of_turn>\n⟧"
    )
    with pytest.raises(InputError, match="^chat_template: Conversation roles must alternate"):
        encode([*talk(1), *talk(2)[1:]])


ROLES = st.sampled_from(["system", "user", "assistant"])
MESSAGE = st.fixed_dictionaries({"role": ROLES, "content": st.text(max_size=12)})


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=st.lists(MESSAGE, min_size=1, max_size=6))
def test_any_conversation(messages):
    for template in (CHATML, UNMARKED):
        tokenizer, encode = encoder_of(template)
        assert in_brackets(tokenizer, encode(messages)) == EXPECTED[template](messages)


def test_a_token_across_the_border_is_learned():
    """Where no special token is between header and text, as in `assistant: hello`."""
    template = UNMARKED.replace("<|im_start|>", "").replace("\\n' + m", ": ' + m")
    template = template.replace("assistant\\n", "assistant: ")
    tokenizer = tokenizer_of(template)
    encoded = conversation_encoder(tokenizer)([user("hello"), assistant("hello there")])
    assert in_brackets(tokenizer, encoded).endswith("assistant:⟦ hello there<|im_end|>⟧\n")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (LAST, "the tokenizer's template writes a turn differently when others follow"),
        (LAST.replace("if loop.last", "if loop.last and m.role == 'assistant'"), "the tokenizer's"),
        (UNMARKED.replace("<|im_start|>assistant", "<|im_start|>bot"), "the tokenizer's template"),
        ("{% for %}", "Expected an expression"),
        ("{% for m in mesages %}{{ m.content }}{% endfor %}", "it writes, or marks, nothing"),
        ("hello", "it writes, or marks, nothing"),
        ("", "it writes, or marks, nothing"),
        (MARKED.replace("== 'assistant'", "== 'bot'"), "it writes, or marks, nothing"),
        ("{{ raise_exception('not\nme') }}", "not me"),
        ("{{ messages[9].content + 'x' }}", ""),
    ],
)
def test_templates_that_cannot_be_used(template, message):
    with pytest.raises(InputError, match=f"^chat_template: {message}") as error:
        conversation_encoder(tokenizer_of(template))
    assert "\n" not in str(error.value)


def test_how_to_do_without_such_a_template():
    with pytest.raises(InputError, match=r"--chat-template FILE, or --chat-template chatml$"):
        conversation_encoder(tokenizer_of(LAST))
    tokenizer = tokenizer_of(LAST)
    use_chatml(tokenizer)
    encoded = conversation_encoder(tokenizer)(talk(1))
    assert in_brackets(tokenizer, encoded) == chatml(talk(1))


def test_chatml_ends_turns_and_texts_with_the_same_token():
    plain = make_tokenizer(["hello"], 300)
    plain.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    size = len(plain)
    use_chatml(plain)
    assert plain.eos_token == END
    assert len(plain) == size + 2
    use_chatml(plain)  # once is enough
    assert len(plain) == size + 2
    assert plain.bos_token == "<|endoftext|>"
    assert {"<|tool|>", START, END} <= set(plain.all_special_tokens)
    asked = plain.apply_chat_template([user("q")], tokenize=False, add_generation_prompt=True)
    assert asked == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("color", [None, "standard"])
def test_shown_is_what_is_learned(color):
    tokenizer = tokenizer_of(CHATML)
    messages = [user("🦊 [bold]?[/bold]"), assistant("[red]🦊"), user("b"), assistant("")]
    encoded = conversation_encoder(tokenizer)(messages)
    ids = encoded["input_ids"]
    labels = [i if m else -100 for i, m in zip(ids, encoded["assistant_masks"], strict=True)]
    output = io.StringIO()
    console = Console(file=output, width=500, color_system=color, force_terminal=color is not None)
    show(tokenizer, ids, labels, console)
    said = output.getvalue()
    if color:
        said = re.sub("\x1b\\[2m(.*?)\x1b\\[0m", r"\1", said, flags=re.DOTALL)
        said = re.sub("\x1b\\[1;32m(.*?)\x1b\\[0m", r"⟦\1⟧", said, flags=re.DOTALL)
    assert said == chatml(messages) + "\n"


# ---- labels ----------------------------------------------------------------------------------

TINY = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
}


def built(folder, **changes):
    values = {"config": TINY, "tokenizer": "bpe", "vocabulary": 300, "context": 256, "batch": 2}
    values |= {"steps": 1, "report_to": ("none",), **changes}
    return build(Recipe(**values), folder / "run")


def labels_of(trainer, rows):
    """Token ids and labels as the model gets them, padding left out."""
    batch = trainer.data_collator(rows)
    for ids, labels, real in zip(
        batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True
    ):
        assert (labels[real == 0] == -100).all()
        yield ids[real == 1].tolist(), labels[real == 1].tolist()


def bracketed(trainer, ids, labels):
    assert all(label in (-100, i) for i, label in zip(ids, labels, strict=True))
    mask = [int(label != -100) for label in labels]
    return in_brackets(trainer.processing_class, {"input_ids": ids, "assistant_masks": mask})


def test_labels_are_the_masks(tmp_path):
    talks = list(CONVERSATIONS.values())
    write_lines("x.jsonl", [{"messages": messages} for messages in talks])
    write_lines("y.jsonl", [{"messages": talk(1)}] * 2)
    trainer = built(tmp_path, data=("x.jsonl",), eval_data=("y.jsonl",), batch=1)
    for rows, expected in ((trainer.train_dataset, talks), (trainer.eval_dataset, [talk(1)] * 2)):
        found = [bracketed(trainer, *row) for row in labels_of(trainer, list(rows))]
        assert found == list(map(chatml, expected))


@pytest.mark.parametrize("context", [24, 30, 33])
def test_labels_are_cut_at_the_context(tmp_path, context):
    messages = [*talk(1), user("b"), assistant("hello there " * 30)]
    write_lines("x.jsonl", [{"messages": messages}] * 4)
    trainer = built(tmp_path, data=("x.jsonl",), context=context)
    encoded = conversation_encoder(trainer.processing_class)(messages)
    ((ids, labels),) = labels_of(trainer, [trainer.train_dataset[0]])
    assert ids == encoded["input_ids"][:context]
    mask = encoded["assistant_masks"][:context]
    assert labels == [i if m else -100 for i, m in zip(ids, mask, strict=True)]


def test_first_tokens_are_not_labels(tmp_path):
    Path("all.jinja").write_text(
        "{% for m in messages %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}"
        "{% endfor %}"
    )
    write_lines("x.jsonl", MESSAGES)
    trainer = built(tmp_path, data=("x.jsonl",), chat_template="all.jinja")
    rows = [trainer.train_dataset[i] for i in range(4)]
    for ids, labels in labels_of(trainer, rows):
        assert labels == [-100, *ids[1:]]


def test_rows_of_which_nothing_is_left_are_left_out(tmp_path):
    silent = [user("b " * 200), assistant("never")]
    write_lines("x.jsonl", [*MESSAGES, {"messages": silent}, {"messages": silent}])
    write_lines("y.jsonl", [{"messages": silent}, *MESSAGES[:3]])
    trainer = built(tmp_path, data=("x.jsonl",), eval_data=("y.jsonl",), context=64)
    assert len(trainer.train_dataset) == 20
    assert len(trainer.eval_dataset) == 3


@pytest.mark.parametrize("template", ["chatml", MARKED, UNMARKED], ids=["chatml", "marked", "not"])
def test_a_chat_template_of_ones_own(tmp_path, template):
    Path("own.jinja").write_text(template)
    write_lines("x.jsonl", MESSAGES)
    given = "chatml" if template == "chatml" else "own.jinja"
    trainer = built(tmp_path, data=("x.jsonl",), eval_data=("x.jsonl",), chat_template=given)
    ((ids, labels),) = labels_of(trainer, [trainer.train_dataset[0]])
    expected = EXPECTED.get(template, chatml)(talk(0))
    assert bracketed(trainer, ids, labels) == expected


def test_labels_of_text_are_all_but_the_first(tmp_path):
    write_texts("texts", 60)
    trainer = built(tmp_path, task="pretrain", data=("texts",), context=16)
    rows = list(trainer.train_dataset)
    said = []
    for ids, labels in labels_of(trainer, rows):
        assert labels == [-100, *ids[1:]]
        assert len(ids) == 16 or len(said) + len(ids) == sum(len(r["input_ids"]) for r in rows)
        said += ids
    texts = trainer.processing_class.decode(said).split("<|endoftext|>")
    assert len(texts) > 40
    assert all(re.fullmatch(r"text \d+", text) for text in texts[:-1])
    assert len(set(texts)) == len(texts)
