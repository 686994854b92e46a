"""Data from the Hub, in streams, and from the chitchat package."""

import json
import re
import types

import pytest

pytest.importorskip("transformers")

import datasets
from conversing import assistant, load, messages_of, numbers, talk, user
from datasets import Dataset, IterableDataset

from paceline.train import InputError, sources
from paceline.train.sources import chitchat

pytestmark = pytest.mark.usefixtures("folder", "quiet")


# ---- the Hub, and streams ----------------------------------------------------------------------


@pytest.fixture(autouse=True)
def there(monkeypatch):
    """The Hub answers, and its datasets have types."""
    builder = types.SimpleNamespace(name="parquet")
    monkeypatch.setattr(sources, "hub_is_there", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_: builder)
    return builder


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

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


USABLE = [n for n in range(300) if n % 3 < 2]


def test_a_dataset_of_the_hub(hub):
    data = load("a/b", data_config="c", split="train", eval_split="test", eval_examples=8)
    assert hub == [("a/b", "c", "train", False), ("a/b", "c", "test", False)]
    assert numbers(data.train) == USABLE
    assert numbers(data.evaluation) == [n + 1000 for n in USABLE[:8]]


def test_another_dataset_to_evaluate_on(hub):
    load("a/b", split="s", eval_data=["c/d"], streaming=True)
    assert hub == [("a/b", None, "s", True), ("c/d", None, "s", False)]
    load("a/b", split="s", eval_data=["c/d"], eval_split="t")
    assert hub[2:] == [("a/b", None, "s", False), ("c/d", None, "t", False)]


def test_of_a_stream_the_first_are_held_out(hub):
    data = load("a/b", streaming=True, eval_examples=8)
    assert isinstance(data.train, IterableDataset)
    assert isinstance(data.evaluation, Dataset)
    assert numbers(data.evaluation) == USABLE[:8]
    assert sorted(numbers(data.train)) == USABLE[8:]
    assert numbers(data.train) != USABLE[8:]  # in a random order
    assert all(set(row) == {"conversation"} for row in data.train)


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
    with pytest.raises(
        InputError, match="^data: a/b has 200 usable examples, and a stream holds out the first 512"
    ):
        load("a/b", streaming=True)


def test_a_stream_beside_what_is_none(hub, few):
    data = load("a/b", "chitchat", streaming=True, eval_examples=2)
    assert sorted(numbers(data.train)) == sorted([*USABLE[2:], *range(20)])


def test_a_stream_of_text(monkeypatch):
    def load_dataset(name, config, *, split, streaming):
        rows = [{"body": f"text {n}", "text": "no"} for n in range(50)] + [{"body": "", "text": ""}]
        return Dataset.from_list(rows).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = load("a/b", task="pretrain", text_column="body", streaming=True, eval_examples=5)
    assert numbers(data.evaluation) == [0, 1, 2, 3, 4]
    assert sorted(numbers(data.train)) == list(range(5, 50))
    with pytest.raises(InputError, match="a/b has 0 usable examples"):
        load("a/b", task="pretrain", text_column="x", streaming=True)


def test_a_bad_row_of_a_stream_is_named(monkeypatch):
    rows = [{"messages": talk(n)} for n in range(20)] + [{"messages": [{"role": "x"}]}]
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda *_, **__: IterableDataset.from_generator(lambda: iter(rows)),
    )
    data = load("a/b", streaming=True, eval_examples=2)
    with pytest.raises(InputError, match="^data: a/b, row 20: unknown role .x."):
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


@pytest.mark.parametrize("streaming", [False, True])
def test_text_is_text_from_the_hub(there, folder, streaming, capfd, monkeypatch):
    monkeypatch.setattr(sources, "TOLD", set())
    answers = ["NA", "None", "2024-03-01", "007"]
    rows = [f"{n}?;{answers[n % 4]};x\n" for n in range(8)]
    (folder / "a.csv").write_text("prompt;completion;id\n" + "".join(rows) + "9?;;x\n")
    there.name = "csv"
    files = {"train": [(folder / "a.csv").as_uri() if streaming else str(folder / "a.csv")]}
    there.config = types.SimpleNamespace(data_files=files, sep=";")
    data = load("a/b", streaming=streaming, eval_data=["chitchat"])
    talks = [messages_of(row) for row in data.train]
    assert sorted(talk[1]["content"] for talk in talks) == sorted(answers * 2)
    said = capfd.readouterr().err
    assert "a/b/a.csv, line 10" in said
    assert "1 columns are not used: id" in said
    with pytest.raises(InputError, match="^data: a/b has no split 'test', only train"):
        load("a/b", split="test")
