"""Training data: conversations or texts, from files, the Hub or installed packages."""

import functools
import importlib.util
import itertools
import json
import logging
import random
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import datasets
import huggingface_hub
from datasets import Dataset, Features, IterableDataset, Value
from trl.data_utils import maybe_convert_to_chatml

from . import InputError
from .data import (
    content_key,
    files_below,
    last_tenth,
    read_text,
    standard_library_files,
    torch_files,
)

Data: TypeAlias = Dataset | IterableDataset

BUILT_IN = {
    "chitchat": "conversations of two people, of the package chitchat-dataset (MIT)",
    "python": "the sources of Python's standard library",
    "torch": "the sources of the installed torch",
}
SPEAKER = {"prompt": "user", "completion": "assistant"}  # of columns with plain text
READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
# Files that may lie beside the data, as in the folder of a Hub dataset.
BESIDE = {"README.md", "LICENSE", "LICENSE.md", "LICENSE.txt", "dataset_infos.json"}
TALKS = Features({"messages": [{"role": Value("string"), "content": Value("string")}]})
SHUFFLED_AT_A_TIME = 10_000  # examples of a stream
FEW = 10  # documents; of fewer, the last tenth of each is held out
# datasets caches results by the names of the functions that made them; this adds their source.
MADE_BY = content_key(Path(__file__).read_text(encoding="utf-8"))
# Addresses, numbers of ten digits and more, names on other services.
CONTACT = re.compile(
    r"[\w.+-]+@[\w-]+\.\w|(?<!\d)\+?\d(?:[\s().-]{0,3}\d){9,}|(?<!\w)@[a-z_]\w{2,}", re.IGNORECASE
)


class Sources(NamedTuple):
    """Data to train and to evaluate on, with one column: `messages` or `text`."""

    train: Data
    evaluation: Dataset


def load_sources(
    names: Iterable[str],
    *,
    kind: str,
    config: str | None,
    split: str,
    eval_names: Iterable[str] | None,
    eval_split: str | None,
    eval_examples: int,
    examples: int | None,
    text_column: str,
    streaming: bool,
    seed: int,
) -> Sources:
    """Load conversations (`kind` "messages") or documents ("text").

    Without data for evaluation, a part of the training data is held out: the first examples of a
    stream, the last tenths of fewer than ten documents, and otherwise a random part, which is the
    same for every seed.

    Args:
        names: built-in names, files, folders, or names of Hub datasets.
        kind: the column of the result.
        config: configuration of Hub datasets.
        split: split of Hub datasets to train on.
        eval_names: data for evaluation; from `split`, unless `eval_split` is given.
        eval_split: split to evaluate on, of Hub datasets and of folders with splits.
        eval_examples: examples to evaluate on at most.
        examples: examples to train on at most; None: all.
        text_column: column of the text.
        streaming: read Hub datasets while training.
        seed: of the order of a stream.

    Raises:
        InputError: data are missing, empty or of another kind.
    """
    read = functools.partial(_read_all, kind=kind, config=config, text_column=text_column)
    names = tuple(names)
    data = read(names, split=split, streaming=streaming)
    held_out: Data | None = None
    if eval_names is not None:
        held_out = read(tuple(eval_names), split=eval_split or split, streaming=False)
    elif eval_split is not None and (having := [n for n in names if _has_splits(n, config)]):
        held_out = read(tuple(having), split=eval_split, streaming=streaming)
    if isinstance(data, IterableDataset):
        if held_out is None:
            held_out = Dataset.from_list(list(data.take(eval_examples)))
            if len(held_out) < eval_examples:
                raise InputError(
                    f"data: {', '.join(names)} has {len(held_out)} usable examples, and a stream "
                    f"holds out the first {eval_examples}; give fewer --eval-examples"
                )
            data = data.skip(eval_examples)
        data = data.shuffle(seed=seed, buffer_size=SHUFFLED_AT_A_TIME)
        data = data if examples is None else data.take(examples)
    elif held_out is None:
        if kind == "text" and len(data) < FEW:
            data, held_out = _without_ends(data)
        elif len(data) < 2:
            raise InputError(
                f"data: {', '.join(names)} has {len(data)} usable examples, and at least 2 are "
                "needed"
            )
        else:
            parts = data.train_test_split(min(eval_examples, max(1, len(data) // 10)), seed=0)
            data, held_out = parts["train"], parts["test"]
    if isinstance(data, Dataset) and examples is not None:
        data = data.select(range(min(examples, len(data))))
    if isinstance(held_out, IterableDataset):
        held_out = Dataset.from_list(list(held_out.take(eval_examples)))
    evaluation = held_out.select(range(min(eval_examples, len(held_out))))
    for what, given, part in (
        ("train", names, data),
        ("evaluate", eval_names or names, evaluation),
    ):
        if isinstance(part, Dataset) and not len(part):
            raise InputError(f"data: {', '.join(given)} has no usable examples to {what} on")
    return Sources(data, evaluation)


def _without_ends(data: Dataset) -> tuple[Dataset, Dataset]:
    """Documents without their last tenths, and the last tenths."""
    texts = list(data["text"])
    cuts = list(map(last_tenth, texts))
    parts = (
        [text[:cut] for text, cut in zip(texts, cuts, strict=True)],
        [text[cut:] for text, cut in zip(texts, cuts, strict=True)],
    )
    first, second = (Dataset.from_dict({"text": [t for t in part if t]}) for part in parts)
    return first, second


def _read_all(names: tuple[str, ...], *, streaming: bool, **options: Any) -> Data:
    parts = [_read_source(name, streaming=streaming, **options) for name in names]
    if len(parts) == 1:
        return parts[0]
    if any(isinstance(part, IterableDataset) for part in parts):
        parts = [p.to_iterable_dataset() if isinstance(p, Dataset) else p for p in parts]
    joined: Data = datasets.concatenate_datasets(parts)
    return joined


def _read_source(
    name: str, *, kind: str, config: str | None, split: str, text_column: str, streaming: bool
) -> Data:
    if name in BUILT_IN:
        return _built_in(name, kind)
    if is_here(name):
        found = _here(name, config, split, kind)
        if isinstance(found, list):
            return _documents(name, found)
        rows: Data = found
    elif name.startswith((".", "/", "~")) or Path(name).suffix.lower() in (*READERS, ".txt"):
        raise InputError(f"data: no such file or folder: {name}")
    else:
        rows = _from_hub(name, config, split, streaming)
    columns = rows.column_names
    if columns is None:  # a stream may not know them
        columns = list(next(iter(rows)))
    try:
        if kind == "text":
            return _text_rows(rows, columns, name, text_column)
        return _conversations(rows, columns, name)
    except UnicodeDecodeError as error:
        raise InputError(f"data: {name} is not UTF-8: {error}") from error


def _text_rows(rows: Data, columns: list[str], name: str, column: str) -> Data:
    if column not in columns:
        raise InputError(
            f"data: {name} has no column {column!r}, only {', '.join(columns)}; "
            "name the column of the text by --text-column"
        )
    rows = rows.select_columns([column])
    rows = rows.rename_column(column, "text") if column != "text" else rows
    if rows.features is not None and rows.features["text"] == Value("large_string"):
        rows = rows.cast_column("text", Value("string"))  # as other sources have it
    return rows.filter(functools.partial(_has_text, name=name, made_by=MADE_BY), with_indices=True)


def _has_text(row: dict[str, Any], index: int, *, name: str, made_by: str) -> bool:
    text = row["text"]
    if text is not None and not isinstance(text, str):
        raise InputError(f"data: {name}, row {index}: expected text, got {text!r:.80}")
    return bool(text)


def _conversations(rows: Data, columns: list[str], name: str) -> Data:
    known = (["messages"], ["conversations"], list(SPEAKER))
    given = next((names for names in known if set(names) <= set(columns)), None)
    if given is None:
        raise InputError(
            f"data: {name} has none of the columns messages, conversations, or prompt and "
            f"completion, only {', '.join(columns)}"
        )
    wrapped = functools.partial(_messages, given=given, name=name, made_by=MADE_BY)
    as_messages = rows.map(wrapped, with_indices=True, remove_columns=columns, features=TALKS)
    return as_messages.filter(lambda row: bool(row["messages"]))


def _messages(
    row: dict[str, Any], index: int, *, given: list[str], name: str, made_by: str
) -> dict[str, Any]:
    """The conversation of a row; empty if the assistant says nothing in it."""
    where = f"data: {name}, row {index}"
    parts = []
    for column in given:
        part = row[column]
        if isinstance(part, str) and column in SPEAKER:
            part = [{"role": SPEAKER[column], "content": part}]
        if not isinstance(part, list | None):
            raise InputError(f"{where}: {column} must be messages or text, got {part!r:.80}")
        parts += part or []
    messages = maybe_convert_to_chatml({"messages": parts})["messages"]
    roles = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
    found = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InputError(f"{where}: a message needs a role and content, got {message!r:.80}")
        if not isinstance(message.get("content"), str):
            raise InputError(f"{where}: content must be text, got {message.get('content')!r:.80}")
        role = roles.get(message["role"], message["role"])
        if role not in ("system", "user", "assistant", "tool"):
            raise InputError(
                f"{where}: unknown role {role!r}; known: system, user, assistant, tool"
            )
        found.append({"role": role, "content": message["content"]})
    speaks = any(m["role"] == "assistant" and m["content"].strip() for m in found)
    return {"messages": found if speaks else []}


# ---- files --------------------------------------------------------------------------------------


def is_here(name: str) -> bool:
    """Whether the name is the path of a file or folder."""
    try:
        return Path(name).exists()
    except OSError:  # too long a name, for example
        return False


def _saved(path: Path) -> bool:
    """Whether a folder was written by `Dataset.save_to_disk`."""
    return (path / "state.json").is_file() and (path / "dataset_info.json").is_file()


def _rows_in(path: Path) -> list[Path]:
    """The data files of a path (JSONL, JSON, Parquet, CSV); none if they are of several kinds."""
    files = [f for f in files_below([path]) if not path.is_dir() or f.name not in BESIDE]
    kinds = {READERS.get(file.suffix.lower()) for file in files}
    return files if len(kinds) == 1 and None not in kinds else []


def _has_splits(name: str, config: str | None) -> bool:
    """Whether data are from the Hub, or a folder with several splits."""
    path = Path(name)
    if name in BUILT_IN or not is_here(name):
        return name not in BUILT_IN
    if (path / "dataset_dict.json").is_file():
        return True
    rows = path.is_dir() and not _saved(path) and _rows_in(path)
    return bool(rows) and len(_splits_of(path, config)) > 1


def _splits_of(path: Path, config: str | None) -> dict[str, list[Path]]:
    """The splits of a folder by its README or the names of its files -> their files."""
    with _reading(str(path)):
        found: Any = datasets.load_dataset_builder(str(path.resolve()), config).config.data_files
    return {str(split): list(map(Path, part)) for split, part in found.items()}


def _here(name: str, config: str | None, split: str, kind: str) -> Dataset | list[Path]:
    """The rows of a file or folder, or the files that are one document each."""
    path = Path(name)
    if (path / "dataset_dict.json").is_file():
        path = path / split
        if not path.is_dir():
            raise InputError(f"data: {name} has no split {split!r}")
    if _saved(path):
        # load_from_disk would let datasets write into the folder.
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        return _load_files(
            name, "arrow", [path / part["filename"] for part in state["_data_files"]]
        )
    if files := _rows_in(path):
        reader = READERS[files[0].suffix.lower()]
        if path.is_file():
            return _load_files(name, reader, files)
        return _split_of_folder(path, config, split, files)
    if kind == "messages":
        raise InputError(
            f"data: {name} has other files than one kind of {', '.join(READERS)}, from which "
            "conversations are read"
        )
    return files_below([path])


def _split_of_folder(path: Path, config: str | None, split: str, files: list[Path]) -> Dataset:
    found = _splits_of(path, config)
    used = {file for part in found.values() for file in part}
    left = [file for file in files if file.resolve() not in used]
    if left and not (path / "README.md").is_file():
        raise InputError(
            f"data: {path} has files named after splits and others such as {left[0]}; give the "
            "files by their names, separated by commas"
        )
    if split not in found:
        raise InputError(f"data: {path} has no split {split!r}, only {', '.join(found)}")
    try:
        with _reading(str(path)):
            rows: Dataset = datasets.load_dataset(str(path.resolve()), config, split=split)
    except InputError:
        for file in found[split]:  # the message then names the broken file
            _load_files(str(file), READERS[file.suffix.lower()], [file])
        raise
    return rows


def _load_files(name: str, reader: str, files: list[Path]) -> Dataset:
    with _reading(name):
        rows: Dataset = datasets.load_dataset(
            reader, data_files=list(map(str, files)), split="train"
        )
    return rows


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Report in one line why data cannot be read; readers raise many kinds of errors."""
    datasets.logging.set_verbosity(logging.CRITICAL)  # it would report the same once more
    huggingface_hub.logging.set_verbosity_error()
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise InputError(f"data: {name} cannot be read: {reason or 'it is empty'}") from error


def _documents(name: str, files: list[Path]) -> Dataset:
    """The text files as documents, in a random order that is always the same."""
    documents = [text for text in dict.fromkeys(map(read_text, files)) if text]
    if not documents:
        raise InputError(f"data: {name} has no files of UTF-8 text")
    random.Random(0).shuffle(documents)
    return Dataset.from_dict({"text": documents})


# ---- without a network ------------------------------------------------------------------------


def _built_in(name: str, kind: str) -> Dataset:
    if (name == "chitchat") != (kind == "messages"):
        right = ", ".join(known for known in BUILT_IN if (known == "chitchat") == (kind != "text"))
        raise InputError(f"data: {name} is {BUILT_IN[name]}; this task takes {right}")
    if name == "chitchat":
        return Dataset.from_list([{"messages": messages} for messages in chitchat()])
    return _documents(name, standard_library_files() if name == "python" else torch_files())


def chitchat() -> Iterator[list[dict[str, str]]]:
    """Some 3,200 conversations of two people in turn, of four turns or more, without contact data.

    Each turn is one message, of one or several lines. The one who begins is the user.

    Raises:
        InputError: the package is not installed.
    """
    spec = importlib.util.find_spec("chitchat_dataset")
    if spec is None or not spec.submodule_search_locations:
        raise InputError("data: chitchat needs its package; pip install chitchat-dataset")
    path = (
        Path(spec.submodule_search_locations[0]) / "dataset.json"
    )  # importing it loads a framework
    for chat in json.loads(path.read_text(encoding="utf-8")).values():
        senders = [{part["sender"] for part in turn} for turn in chat["messages"]]
        texts = ["\n".join(part["text"].strip() for part in turn) for turn in chat["messages"]]
        in_turn = all(len(a | b) == 2 for a, b in itertools.pairwise(senders))
        alone = all(len(s) == 1 for s in senders)
        if len(texts) < 4 or not alone or not in_turn or len(set.union(*senders)) != 2:
            continue
        if all(texts) and not any(map(CONTACT.search, texts)):
            roles = itertools.cycle(("user", "assistant"))
            yield [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]


# ---- the Hub ----------------------------------------------------------------------------------


@functools.cache
def hub_is_there() -> bool:
    """Whether the Hub answers; if not, its libraries are set to use only their caches.

    They would otherwise retry and print for a minute.
    """
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=10)
    except Exception:  # the library of the connection is not known
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        datasets.config.HF_HUB_OFFLINE = True
    return not huggingface_hub.constants.HF_HUB_OFFLINE


def unreachable(what: str, name: str, option: str) -> InputError:
    """The error for what only the Hub has."""
    hub, kind = huggingface_hub.constants.ENDPOINT, "--repo-type dataset " * (what == "data")
    return InputError(
        f"{what}: cannot reach {hub} for {name!r}, which is not in the local cache; on a machine "
        f"with a network run hf download {kind}{name} --local-dir FOLDER, copy the folder here, "
        f"and give {option} FOLDER"
    )


def _from_hub(name: str, config: str | None, split: str, streaming: bool) -> Data:
    there = hub_is_there()
    try:
        data: Data = datasets.load_dataset(name, config, split=split, streaming=streaming)
    except (ConnectionError, OSError, ValueError) as error:
        if not there:
            raise unreachable("data", name, "--data") from error
        reason = " ".join(str(error).split())
        raise InputError(
            f"data: {name!r} is not a file here, and the Hub has no such dataset: {reason}"
        ) from error
    return data
