"""Conversations from everywhere, in parts, and what cannot be used."""

import json
import logging
import re
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from conversing import (
    MESSAGES,
    assistant,
    files_of,
    load,
    messages_of,
    numbers,
    system,
    talk,
    text,
    user,
    write_csv,
    write_lines,
    write_texts,
)
from datasets import Dataset, DatasetDict

from paceline.train import InputError, sources

pytestmark = pytest.mark.usefixtures("folder", "quiet")

PAIRS = [{"prompt": f"question {n}", "completion": f"answer {n}"} for n in range(20)]


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
    "data.json": lambda path: Path(path).write_text(json.dumps({"data": MESSAGES}, indent=1)),
    "alpaca.jsonl": lambda path: write_lines(
        path, [{"instruction": f"question {n}", "output": f"answer {n}"} for n in range(20)]
    ),
    "parts.parquet": lambda path: Dataset.from_list(
        [
            {"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in x]}
            for x in map(talk, range(20))
        ]
    ).to_parquet(path),
    "rows.parquet": lambda path: Dataset.from_list(MESSAGES).to_parquet(path),
    "rows.csv": lambda path: write_csv(path, PAIRS),
    "UPPER.JSONL": lambda path: write_lines(path, MESSAGES),
    "one": lambda path: write_lines(f"{path}/x.jsonl", MESSAGES),
    "card": lambda path: [
        write_lines(f"{path}/x.jsonl", MESSAGES),
        Path(path, "README.md").write_text("# Without a head\n---\n: [no YAML\n"),
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


@pytest.mark.parametrize("name", FORMS)
def test_conversations_from_every_form(name, folder, logged):
    FORMS[name](name)
    before = files_of(folder)
    data = load(name)
    rows = [*data.train, *data.evaluation]
    assert sorted(numbers(rows)) == list(range(20))
    assert sorted((messages_of(row) for row in rows), key=str) == sorted(
        map(talk, range(20)), key=str
    )
    assert all(set(row) == {"conversation"} for row in rows)
    assert not logged
    data.train.map(lambda row: {"n": len(messages_of(row))})  # as it will be for the model
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
    with pytest.raises(InputError, match=r"files named after splits and others such as data/more"):
        load("data")


@pytest.mark.parametrize("name", ["messages.jsonl", "files", "saved", "chitchat", "texts"])
def test_what_has_no_splits_is_not_evaluated_on_what_it_trains_on(name, few):
    if name in FORMS:
        FORMS[name](name)
    write_texts("texts", 20)
    task = "pretrain" if name == "texts" else "sft"
    data = load(name, eval_split="test", task=task)
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
    rows = [messages_of(row) for part in data[:2] for row in part]
    assert sorted(rows, key=len) == [tools, long]


def test_rows_where_no_assistant_speaks_are_left_out():
    silent = [[], None, talk(0)[:1], [*talk(0)[:1], assistant(" \n")], [system("x")]]
    write_lines("x.jsonl", [*({"messages": m} for m in silent), *MESSAGES])
    data = load("x.jsonl")
    assert sorted(numbers([*data.train, *data.evaluation])) == list(range(20))
    write_lines("p.jsonl", [{"prompt": "x", "completion": None}, {"prompt": "x", "completion": ""}])
    with pytest.raises(
        InputError, match="p.jsonl has no usable examples: 2 left out because completion is empty"
    ):
        load("p.jsonl")


def test_a_folder_with_the_name_of_built_in_data_is_passed_over_aloud(capfd):
    write_lines("python/x.jsonl", [{"text": f"text {i}"} for i in range(20)])
    load("python", task="pretrain", examples=1)
    assert "data: python is the built-in one; what has this name here is ./python" in (
        capfd.readouterr().err
    )
    assert len(numbers(load("./python", task="pretrain").train)) == 18


def test_files_that_change_are_read_again():
    write_lines("x.jsonl", MESSAGES)
    write_lines("f/x.jsonl", MESSAGES)
    for name in ("x.jsonl", "f"):
        assert messages_of(load(name).train[0])[1]["content"].startswith("answer")
    for path in ("x.jsonl", "f/x.jsonl"):
        write_lines(path, [{"messages": talk(n, "A")} for n in range(20)])
    for name in ("x.jsonl", "f"):
        assert messages_of(load(name).train[0])[1]["content"].startswith("Answer")


def test_other_code_reads_again(monkeypatch):
    write_lines("x.jsonl", MESSAGES)
    before = load("x.jsonl").train[0]
    monkeypatch.setattr(sources, "MADE_BY", "another version")
    new = json.dumps({"messages": [{"content": "new"}]})
    original = sources._convert
    monkeypatch.setattr(sources, "_convert", lambda *x: {**original(*x), "conversation": new})
    assert load("x.jsonl").train[0]["conversation"] == new != before["conversation"]


# ---- parts -----------------------------------------------------------------------------------


def test_the_held_out_part_is_the_same_for_every_seed_and_disjoint():
    write_lines("x.jsonl", [{"messages": talk(n)} for n in range(100)])
    parts = [tuple(map(numbers, load("x.jsonl", seed=seed)[:2])) for seed in range(3)]
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
        ({"eval_data": ["pairs.jsonl"]}, 100, 20),
        ({"eval_data": ["pairs.jsonl"], "eval_examples": 3}, 100, 3),
        ({"eval_data": ["pairs.jsonl"], "examples": 5}, 5, 20),
        ({"eval_data": ["pairs.jsonl", "pairs.jsonl"]}, 100, 40),
    ],
)
def test_numbers_of_examples(changes, train, evaluation):
    write_lines("x.jsonl", [{"messages": talk(n)} for n in range(100)])
    write_lines("pairs.jsonl", PAIRS)
    data = load("x.jsonl", **changes)
    assert (len(data.train), len(data.evaluation)) == (train, evaluation)
    if "eval_data" in changes:
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
    with_built_in = load("messages.jsonl", "chitchat", eval_data=["messages.jsonl"])
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


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (message(3, role="narrator", content="x"), "x.jsonl, line 4: unknown role 'narrator'"),
        (message(2, role="user", content=None), "x.jsonl, line 3: content must be text, got None"),
        (message(1, role="user", content=["x"]), "x.jsonl, line 2: content must be text, got"),
        (message(0, role=None, content="x"), "x.jsonl, line 1: a message needs a role and content"),
        (
            lambda p: write_lines(p, [{"messages": [user([{"type": "image", "url": "x"}])]}]),
            "x.jsonl, line 1: content must be text, got the part .*'type': 'image'",
        ),
        (
            lambda p: write_lines(p, [{"messages": [{"content": "x"}]}]),
            "x.jsonl, line 1: a message needs a role and content",
        ),
        (
            lambda p: write_lines(p, [{"messages": ["x"]}]),
            "x.jsonl, line 1: a message needs a role and content, got 'x'",
        ),
        (
            lambda p: write_lines(p, [{"messages": "hello"}]),
            "x.jsonl, line 1: messages must be messages or text, got 'hello'",
        ),
        (
            lambda p: write_lines(p, [{"prompt": "1 + 1", "completion": 2}]),
            "x.jsonl, line 1: completion must be messages or text, got 2",
        ),
        (
            lambda p: write_lines(p, [{"question": "x", "answer": "y"}]),
            "x.jsonl has no usable .* none of the columns messages, .*, only question, answer",
        ),
        (
            lambda p: write_lines(p, [{"prompt": "x", "chosen": "y"}]),
            "x.jsonl has no usable .* none of the columns .*, only prompt, chosen",
        ),
        (lambda p: write_lines(p, MESSAGES[:1]), "x.jsonl has 1 usable example, and"),
        (
            lambda p: write_lines(p, [{"messages": []}] * 9),
            "x.jsonl has no usable examples: 9 left out because",
        ),
        (text(b""), "x.jsonl has no rows"),
        (text(b"\n\n"), "x.jsonl has no rows"),
        (text(b'{"messages": [}\n'), "x.jsonl cannot be read: line 1 is not JSON: Expecting value"),
        (text(b"hello\n"), "x.jsonl cannot be read: line 1 is not JSON: Expecting value"),
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
        ("notes.txt", "notes.txt has other files than one kind of .jsonl, .json, .parquet, .csv"),
        ("empty", "empty has other files than one kind of .jsonl"),
        ("mixed", "mixed has other files than one kind of .jsonl"),
        ("broken", ".*broken/b.jsonl cannot be read: line 3 is not JSON: Expecting property"),
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
        load("good.jsonl", eval_data=[name])
    assert str(again.value) == str(error.value)


def test_nothing_usable_names_what_and_why():
    write_lines("x.jsonl", MESSAGES)
    write_lines("silent.jsonl", [{"messages": talk(0)[:1]}] * 3)
    message = (
        r"^data: silent.jsonl has no usable examples: 3 left out because the assistant .* 1\)$"
    )
    with pytest.raises(InputError, match=message):
        load("x.jsonl", eval_data=["silent.jsonl"])
    with pytest.raises(InputError, match=message):
        load("silent.jsonl", eval_data=["x.jsonl"])


def test_what_may_not_be_read(monkeypatch):
    write_lines("x.jsonl", MESSAGES)
    write_texts("texts", 3)

    def forbidden(self, *_, **__):
        raise PermissionError(13, "Permission denied", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", forbidden)
        with pytest.raises(InputError, match=r"^data: x.jsonl cannot be read: .*Permission denied"):
            load("x.jsonl")
    monkeypatch.setattr(Path, "read_bytes", forbidden)
    with pytest.raises(InputError, match=r"^cannot read texts/.\.txt: Permission denied"):
        load("texts", task="pretrain")


# ---- what is said of it ----------------------------------------------------------------------


def test_rows_that_are_left_out_are_counted_aloud(capfd):
    rows = [*PAIRS, {"prompt": "x", "completion": None}, {"prompt": "y", "completion": " "}]
    for write in (write_lines, lambda p, rows: Dataset.from_list(rows).to_parquet(p)):
        path = "x.jsonl" if write is write_lines else "x.parquet"
        places = ("line 21", "line 22") if write is write_lines else ("row 20", "row 21")
        write(path, [{**row, "id": 3} for row in rows])
        data = load(path)
        assert sorted(numbers([*data.train, *data.evaluation])) == list(range(20))
        out, error = capfd.readouterr()
        assert out == ""
        assert error == (
            f"paceline: data: {path}: kept 20 of 22 rows: 1 left out because completion is empty "
            f"(the first: {path}, {places[0]}); 1 left out because the assistant says nothing that "
            f"is to be learned (the first: {path}, {places[1]})\n"
            f"paceline: data: {path}: 1 columns are not used: id\n"
        )


def test_bad_rows_are_left_out_aloud_if_asked_to(capfd):
    narrated = {"messages": [*talk(9), {"role": "narrator", "content": "x"}]}
    write_lines("x.jsonl", [*MESSAGES, narrated, narrated])
    with Path("x.jsonl").open("a") as file:
        file.write('\n{"messages": [}\nhello\n')
    Dataset.from_list([*MESSAGES, narrated]).to_parquet("x.parquet")
    Path("x.csv").write_text("prompt,completion\n" + "a,answer 1\n" * 20 + "\na\n")
    unknown = "left out because unknown role 'narrator'; known: assistant, system, tool, user"
    expected = {
        "x.jsonl": f"kept 20 of 24 rows: 2 {unknown} (the first: x.jsonl, line 21); 2 left out "
        "because the line is not JSON (the first: x.jsonl, line 24)",
        "x.parquet": f"kept 20 of 21 rows: 1 {unknown} (the first: x.parquet, row 20)",
        "x.csv": "kept 20 of 21 rows: 1 left out because the line has 1 fields, and the header has "
        "2 (the first: x.csv, line 23)",
    }
    for name, said in expected.items():
        data = load(name, skip_bad_rows=True)
        assert len(data.train) + len(data.evaluation) == 20
        assert capfd.readouterr().err == f"paceline: data: {name}: {said}\n"
        with pytest.raises(InputError, match=r"; --skip-bad-rows leaves out such rows$"):
            load(name)


@pytest.mark.parametrize("name", ["x.csv", "x.jsonl", "x.parquet"])
def test_words_taken_for_missing_and_dates_are_text(name, capfd):
    answers = ["NA", "None", "null", "N/A", "2024-03-01", "2024-04-01 10:00:00", "007", "True"]
    rows = [{"prompt": f"item {i}?", "completion": answers[i % 8]} for i in range(40)]
    if name == "x.parquet":
        Dataset.from_list(rows).to_parquet(name)
    else:
        (write_csv if name == "x.csv" else write_lines)(name, rows)
    data = load(name, eval_data=[name])
    assert [messages_of(row)[1]["content"] for row in data.train] == answers * 5
    assert capfd.readouterr() == ("", "")


def test_objects_keep_their_own_keys():
    """A format with types gives all objects of a column the same keys."""
    calls = [
        {"type": "function", "function": {"name": "f", "arguments": {key: n}}}
        for n, key in enumerate("ab")
    ]
    talks = [[user("q"), {**assistant(""), "tool_calls": [call]}] for call in calls]
    rows = [{"messages": talk} for talk in talks]
    write_lines("x.jsonl", rows)
    Dataset.from_list(rows).to_parquet("x.parquet")
    for name in ("x.jsonl", "x.parquet"):
        assert list(map(messages_of, load(name, eval_data=[name]).train)) == talks


# ---- damaged folders -------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "{}", '{"_data_files": [3]}', "{"])
def test_a_damaged_saved_folder_is_one_line(text):
    FORMS["saved"]("saved")
    Path("saved/state.json").write_text(text)
    with pytest.raises(InputError, match="^data: saved cannot be read: "):
        load("saved")


def test_a_card_with_too_many_aliases_is_one_line():
    lists = [f"l{i + 1}: &l{i + 1} [{', '.join([f'*l{i}'] * 9)}]" for i in range(9)]
    write_lines("d/x.jsonl", MESSAGES)
    Path("d/README.md").write_text("\n".join(["---", "l0: &l0 [x]", *lists, "---", "# A"]))
    with pytest.raises(InputError, match="^data: d cannot be read: it has more than 100,000 val"):
        load("d")
