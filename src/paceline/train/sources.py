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

from . import InputError, reporting
from .data import (
    content_key,
    files_below,
    read_text,
    standard_library_files,
    torch_files,
    without_ends,
)
from .recipe import Recipe

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


def load_sources(recipe: Recipe) -> Sources:
    """Load the conversations or documents of a recipe.

    Without data for evaluation, a part of the training data is held out: the first examples of a
    stream, the last tenths of fewer than ten documents, and otherwise a random part, which is the
    same for every seed.

    Raises:
        InputError: data are missing, empty or of another kind.
    """
    names, most, split = recipe.data_names, recipe.eval_examples, recipe.eval_split
    data = _read_all(names, recipe, recipe.split, recipe.streaming)
    held_out: Data | None = None
    if recipe.eval_data is not None:
        held_out = _read_all(recipe.eval_data, recipe, split or recipe.split, streaming=False)
    elif split is not None and (
        having := [name for name in names if _has_splits(name, recipe.data_config)]
    ):
        held_out = _read_all(having, recipe, split, recipe.streaming)
    if isinstance(data, IterableDataset):
        if held_out is None:
            held_out = Dataset.from_list(list(data.take(most)))
            if len(held_out) < most:
                raise InputError(
                    f"data: {', '.join(names)} has {len(held_out)} usable examples, and a stream "
                    f"holds out the first {most}; give fewer --eval-examples"
                )
            data = data.skip(most)
        data = data.shuffle(seed=recipe.seed, buffer_size=SHUFFLED_AT_A_TIME)
        data = data if recipe.examples is None else data.take(recipe.examples)
    elif held_out is None:
        if recipe.task == "pretrain" and len(data) < FEW:
            data, held_out = (Dataset.from_dict({"text": x}) for x in without_ends(data["text"]))
        elif len(data) < 2:
            raise InputError(
                f"data: {', '.join(names)} has {len(data)} usable examples, and at least 2 are "
                "needed"
            )
        else:
            parts = data.train_test_split(min(most, max(1, len(data) // 10)), seed=0)
            data, held_out = parts["train"], parts["test"]
    if isinstance(data, Dataset) and recipe.examples is not None:
        data = data.select(range(min(recipe.examples, len(data))))
    if isinstance(held_out, IterableDataset):
        held_out = Dataset.from_list(list(held_out.take(most)))
    evaluation = held_out.select(range(min(most, len(held_out))))
    parts_of = {"train": (names, data), "evaluate": (recipe.eval_data or names, evaluation)}
    for what, (given, part) in parts_of.items():
        if isinstance(part, Dataset) and not len(part):
            raise InputError(f"data: {', '.join(given)} has no usable examples to {what} on")
    return Sources(data, evaluation)


def _read_all(names: Iterable[str], recipe: Recipe, split: str, streaming: bool) -> Data:
    parts = [_read_source(name, recipe, split, streaming) for name in names]
    if len(parts) == 1:
        return parts[0]
    if any(isinstance(part, IterableDataset) for part in parts):
        parts = [p.to_iterable_dataset() if isinstance(p, Dataset) else p for p in parts]
    return datasets.concatenate_datasets(parts)


def _read_source(name: str, recipe: Recipe, split: str, streaming: bool) -> Data:
    if name in BUILT_IN:
        return _built_in(name, recipe.task)
    rows: Any
    if is_here(name):
        rows = _here(name, recipe, split)
        if isinstance(rows, list):
            return _documents(name, rows)
    elif name.startswith((".", "/", "~")) or Path(name).suffix.lower() in (*READERS, ".txt"):
        raise InputError(f"data: no such file or folder: {name}")
    else:
        failed = f"{name!r} is not a file here, and the Hub has no such dataset"
        with from_hub("data", name, failed):
            rows = datasets.load_dataset(name, recipe.data_config, split=split, streaming=streaming)
    with reporting(f"data: {name} is not UTF-8", UnicodeDecodeError):
        # A stream may not know them.
        columns = rows.column_names
        columns = list(next(iter(rows))) if columns is None else columns
        if recipe.task == "pretrain":
            return _text_rows(rows, columns, name, recipe.text_column)
        return _conversations(rows, columns, name)


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
    rows = rows.map(wrapped, with_indices=True, remove_columns=columns, features=TALKS)
    return rows.filter(lambda row: bool(row["messages"]))


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
    if not path.is_dir() or _saved(path):
        return False
    several = (path / "dataset_dict.json").is_file()
    return several or (bool(_rows_in(path)) and len(_splits_of(path, config)) > 1)


def _splits_of(path: Path, config: str | None) -> dict[str, list[Path]]:
    """The splits of a folder by its README or the names of its files -> their files."""
    with _reading(str(path)):
        found: Any = datasets.load_dataset_builder(str(path.resolve()), config).config.data_files
    return {str(split): list(map(Path, part)) for split, part in found.items()}


def _here(name: str, recipe: Recipe, split: str) -> Dataset | list[Path]:
    """The rows of a file or folder, or the files that are one document each."""
    path = Path(name)
    if (path / "dataset_dict.json").is_file():
        path = path / split
        if not path.is_dir():
            raise InputError(f"data: {name} has no split {split!r}")
    if _saved(path):
        # load_from_disk would let datasets write into the folder.
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        files = [path / part["filename"] for part in state["_data_files"]]
        return _load_files(name, "arrow", files)
    if files := _rows_in(path):
        if path.is_file():
            return _load_files(name, READERS[path.suffix.lower()], files)
        return _split_of_folder(path, recipe.data_config, split, files)
    if recipe.task == "sft":
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
            return datasets.load_dataset(str(path.resolve()), config, split=split)
    except InputError:
        for file in found[split]:  # the message then names the broken file
            _load_files(str(file), READERS[file.suffix.lower()], [file])
        raise


def _load_files(name: str, reader: str, files: list[Path]) -> Dataset:
    with _reading(name):
        return datasets.load_dataset(reader, data_files=list(map(str, files)), split="train")


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


def _built_in(name: str, task: str) -> Dataset:
    right = [known for known in BUILT_IN if (known == "chitchat") == (task == "sft")]
    if name not in right:
        raise InputError(f"data: {name} is {BUILT_IN[name]}; this task takes {', '.join(right)}")
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
    # Importing it loads a framework.
    path = Path(spec.submodule_search_locations[0], "dataset.json")
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


@contextmanager
def from_hub(what: str, name: str, failed: str, *, local: bool = False) -> Iterator[None]:
    """Report in one line why what is on the Hub, or `local`, cannot be loaded.

    The recipe's key `what` has its name. `failed` begins the message where a network does not help.
    """
    there = local or hub_is_there()
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        if there:
            raise InputError(f"{what}: {failed}: {' '.join(str(error).split())}") from error
        hub, kind = huggingface_hub.constants.ENDPOINT, "--repo-type dataset " * (what == "data")
        raise InputError(
            f"{what}: cannot reach {hub} for {name!r}, which is not in the local cache; on a "
            f"machine with a network run hf download {kind}{name} --local-dir FOLDER, copy the "
            f"folder here, and give --{what} FOLDER"
        ) from error
