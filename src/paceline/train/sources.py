"""Training data: conversations or texts, from files, the Hub or installed packages."""

import functools
import importlib.util
import itertools
import json
import logging
import os
import random
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import datasets
import huggingface_hub
import pyarrow.compute as pc
from datasets import Dataset, Features, IterableDataset, Value

from . import InputError, counted, read_small
from .conversation import conversation_of, text_of
from .data import (
    content_key,
    files_below,
    read_text,
    standard_library_files,
    torch_files,
    without_ends,
)
from .recipe import Recipe, parse_yaml
from .rows import rows_of
from .terminal import tell

Data: TypeAlias = Dataset | IterableDataset

BUILT_IN = {
    "chitchat": "conversations of two people, of the package chitchat-dataset (MIT)",
    "python": "the sources of Python's standard library",
    "torch": "the sources of the installed torch",
}
READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
# Files that may lie beside the data, as in the folder of a Hub dataset.
BESIDE = {"README.md", "LICENSE", "LICENSE.md", "LICENSE.txt", "dataset_infos.json"}
ABOUT_ROWS = ("left_out", "at", "ignored")  # why a row is left out, where it is, other columns
SKIP_BAD = "--skip-bad-rows leaves out such rows"
TOLD: set[tuple[str, str]] = set()  # of streams: what has been said of them
SHUFFLED_AT_A_TIME = 10_000  # examples of a stream
FEW = 10  # documents; of fewer, the last tenth of each is held out
# datasets caches results by the names of the functions that made them; this adds their source.
MADE_BY = content_key(
    *(
        Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
        for name in ("sources", "conversation", "rows")
    )
)
# Addresses, numbers of ten digits and more, names on other services.
CONTACT = re.compile(
    r"[\w.+-]+@[\w-]+\.\w|(?<!\d)\+?\d(?:[\s().-]{0,3}\d){9,}|(?<!\w)@[a-z_]\w{2,}", re.IGNORECASE
)


class Sources(NamedTuple):
    """Data to train and to evaluate on, with one column: `conversation`, as JSON, or `text`."""

    train: Data
    evaluation: Dataset
    split: str = ""  # how many rows are held out of the others, to be said


def load_sources(recipe: Recipe) -> Sources:
    """Load the conversations or documents of a recipe.

    Without data for evaluation, a part of the training data is held out: the first examples of a
    stream, the last tenths of fewer than ten documents, and otherwise a random part, which is the
    same for every seed.

    Raises:
        InputError: data are missing, empty or of another kind.
    """
    names, most, split = recipe.data_names, recipe.eval_examples, recipe.eval_split
    said = ""
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
                    f"data: {', '.join(names)} has {counted(len(held_out), 'usable example')}, and "
                    f"a stream holds out the first {most}; give fewer --eval-examples"
                )
            data = data.skip(most)
        data = data.shuffle(seed=recipe.seed, buffer_size=SHUFFLED_AT_A_TIME)
        data = data if recipe.examples is None else data.take(recipe.examples)
    elif held_out is None:
        if recipe.task == "pretrain" and len(data) < FEW:
            data, held_out = (Dataset.from_dict({"text": x}) for x in without_ends(data["text"]))
        elif len(data) < 2:
            raise InputError(
                f"data: {', '.join(names)} has {counted(len(data), 'usable example')}, and at "
                "least 2 are needed"
            )
        else:
            parts = data.train_test_split(min(most, max(1, len(data) // 10)), seed=0)
            n = len(parts["test"])
            said = f"{n} of {len(data)} rows {'is' if n == 1 else 'are'} held out to evaluate on"
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
    return Sources(data, evaluation, said)


def _read_all(names: Iterable[str], recipe: Recipe, split: str, streaming: bool) -> Data:
    parts = [_read_source(name, recipe, split, streaming) for name in names]
    if len(parts) == 1:
        return parts[0]
    if any(isinstance(part, IterableDataset) for part in parts):
        parts = [p.to_iterable_dataset() if isinstance(p, Dataset) else p for p in parts]
    return datasets.concatenate_datasets(parts)


def _read_source(name: str, recipe: Recipe, split: str, streaming: bool) -> Data:
    if name in BUILT_IN:
        if is_here(name):
            tell(f"data: {name} is the built-in one; what has this name here is ./{name}")
        return _built_in(name, recipe.task)
    if is_here(name):
        found = _here(name, recipe, split)
        if isinstance(found, list):
            return _documents(name, found)
    elif name.startswith((".", "/", "~")) or Path(name).suffix.lower() in (*READERS, ".txt"):
        raise InputError(f"data: no such file or folder: {name}")
    else:
        failed = f"{name!r} is not a file here, and the Hub has no such dataset"
        with from_hub("data", name, failed):
            found = _on_hub(name, recipe.data_config, split, streaming)
    streaming = streaming and not is_here(name)
    column = recipe.text_column if recipe.task == "pretrain" else None
    features = Features(
        dict.fromkeys(["text" if column else "conversation", *ABOUT_ROWS], Value("string"))
    )
    given: dict[str, Any] = {"column": column, "skip_bad": recipe.skip_bad_rows, "made_by": MADE_BY}
    rows: Data
    with _reading(name):
        if isinstance(found, Plain):
            stamps = None if streaming else tuple(map(_stamp, found.files))
            given |= {**found._asdict(), "stamps": stamps}
            kind = IterableDataset if streaming else Dataset
            rows = kind.from_generator(_convert_plain, features=features, gen_kwargs=given)
        else:
            # A stream may not know its columns.
            columns = found.column_names or list(next(iter(found)))
            convert = functools.partial(_convert_typed, name=name, **given)
            rows = found.map(convert, with_indices=True, remove_columns=columns, features=features)
    return usable(rows, name)


# ---- rows -------------------------------------------------------------------------------------


class Plain(NamedTuple):
    """Files of JSON or CSV, whose rows are read without guesses at types."""

    files: list[str]  # paths or addresses
    labels: list[str]  # what messages call them
    kind: str  # json or csv
    separator: str = ","  # of the fields in CSV


def _stamp(file: str) -> tuple[int, int]:
    found = Path(file).stat()
    return found.st_size, found.st_mtime_ns


def _convert_plain(
    files: list[str],
    labels: list[str],
    kind: str,
    separator: str,
    column: str | None,
    skip_bad: bool,
    stamps: object,
    made_by: str,
) -> Iterator[dict[str, Any]]:
    """The rows of files, converted; the last two arguments are for the cache."""
    empty = True
    for file, label in zip(files, labels, strict=True):
        try:
            for place, row, broken in rows_of(file, kind, separator):
                empty = False
                if broken is None:
                    yield _convert(row, f"{label}, {place}", column, skip_bad)
                elif skip_bad:  # without the details, so that they are counted together
                    what = f"the line {broken.partition(':')[0]}"
                    yield _left_out(what, f"{label}, {place}", column)
                else:
                    raise ValueError(f"{place} {broken}; {SKIP_BAD}")
        except UnicodeDecodeError as error:
            raise InputError(f"data: {label} is not UTF-8: {error}") from error
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"data: {label} cannot be read: {reason}") from error
        if empty and label == labels[-1]:
            raise InputError(f"data: {label} has no rows")


def _convert_typed(
    row: dict[str, Any],
    index: int,
    *,
    name: str,
    column: str | None,
    skip_bad: bool,
    made_by: str,
) -> dict[str, Any]:
    """A row of a format with types, converted.

    All objects of a column have the same keys there, with nulls for those that one does not have.
    """
    row = {key: _without_nulls(value) for key, value in row.items()}
    return _convert(row, f"{name}, row {index}", column, skip_bad)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, list):
        return list(map(_without_nulls, value))
    if isinstance(value, dict):
        return {key: _without_nulls(x) for key, x in value.items() if x is not None}
    return value


def _convert(row: Any, where: str, column: str | None, skip_bad: bool) -> dict[str, Any]:
    """The conversation of a row, or its text; and ABOUT_ROWS."""
    try:
        found = conversation_of(row, where) if column is None else text_of(row, where, column)
    except InputError as error:
        if not skip_bad:
            raise InputError(f"{error}; {SKIP_BAD}") from error
        return _left_out(str(error).removeprefix(f"data: {where}: "), where, column)
    if found.left_out:
        return _left_out(found.left_out, where, column)
    ignored = "\n".join(found.ignored) or None
    return {_name_of(column): found.text, "left_out": None, "at": None, "ignored": ignored}


def _left_out(reason: str, where: str, column: str | None) -> dict[str, Any]:
    return {_name_of(column): None, "left_out": reason, "at": where, "ignored": None}


def _name_of(column: str | None) -> str:
    return "text" if column else "conversation"


def usable(rows: Data, name: str) -> Data:
    """The rows that are not left out; says how many are, and why, and what is not used of others.

    Of a stream it says so at the first one.

    Args:
        rows: with the columns ABOUT_ROWS, which the result does not have.
        name: of the data.

    Raises:
        InputError: there are none.
    """
    kept = [column for column in rows.features if column not in ABOUT_ROWS]
    if isinstance(rows, IterableDataset):
        rows = rows.filter(functools.partial(_tell_of_stream, name=name))
        return rows.select_columns(kept)
    reasons, lost = [], 0
    left_out = rows.data.column("left_out")
    for reason, count in _counts(left_out).items():
        lost += count
        first = rows[pc.index(left_out, reason).as_py()]["at"]
        reasons.append(f"{count} left out because {reason} (the first: {first})")
    said = "; ".join(reasons[:3]) + "; ..." * (len(reasons) > 3)
    if lost == len(rows):
        raise InputError(f"data: {name} has no usable examples: {said or 'it is empty'}")
    if lost:
        tell(f"data: {name}: kept {len(rows) - lost} of {len(rows)} rows: {said}")
        rows = rows.filter(lambda reason: reason is None, input_columns=["left_out"])
    _tell_ignored(name, _counts(rows.data.column("ignored")))
    return rows.select_columns(kept)


def _counts(column: Any) -> dict[str, int]:
    """The texts of a column, with their numbers."""
    return {x["values"]: x["counts"] for x in column.value_counts().to_pylist() if x["values"]}


def _tell_ignored(name: str, ignored: Iterable[str]) -> None:
    if names := sorted({x for names in ignored for x in names.split("\n")}):
        tell(f"data: {name}: {len(names)} columns are not used: {', '.join(names)}")


def _tell_of_stream(row: dict[str, Any], *, name: str) -> bool:
    """Whether a row of a stream is kept; tells of the first that is not, and of the first."""
    for what in ("left_out", "ignored"):
        if row[what] and (name, what) not in TOLD:
            TOLD.add((name, what))
            if what == "ignored":
                _tell_ignored(name, [row[what]])
            else:
                tell(f"data: {name}: rows are left out as {row['at']} is: {row[what]}")
    return row["left_out"] is None


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
    return several or (bool(_rows_in(path)) and len(_splits_of(path, config)[0]) > 1)


def _splits_of(path: Path, config: str | None) -> tuple[dict[str, list[Path]], str]:
    """The splits of a folder by its README or the names of its files -> their files.

    Also what separates fields in CSV.
    """
    with _reading(str(path)):
        if (path / "README.md").is_file():
            nothing, *head = read_small(path / "README.md", 10**7).split("---\n")[:2]
            parse_yaml("" if nothing else "".join(head))  # which bounds its aliases
        found: Any = datasets.load_dataset_builder(str(path.resolve()), config).config
    splits = {str(split): list(map(Path, part)) for split, part in found.data_files.items()}
    return splits, getattr(found, "sep", ",")


def _here(name: str, recipe: Recipe, split: str) -> Dataset | Plain | list[Path]:
    """The rows of a file or folder, or the files that are one document each."""
    path = Path(name)
    if (path / "dataset_dict.json").is_file():
        path = path / split
        if not path.is_dir():
            raise InputError(f"data: {name} has no split {split!r}")
    if _saved(path):
        # load_from_disk would let datasets write into the folder.
        with _reading(name):
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))
            files = [path / part["filename"] for part in state["_data_files"]]
        return _load_typed(name, "arrow", files)
    if files := _rows_in(path):
        if path.is_file():
            return _load_files(name, files, [name])
        return _split_of_folder(path, recipe.data_config, split, files)
    if recipe.task == "sft":
        raise InputError(
            f"data: {name} has other files than one kind of {', '.join(READERS)}, from which "
            "conversations are read"
        )
    return files_below([path])


def _split_of_folder(
    path: Path, config: str | None, split: str, files: list[Path]
) -> Dataset | Plain:
    found, separator = _splits_of(path, config)
    used = {file for part in found.values() for file in part}
    left = [file for file in files if file.resolve() not in used]
    if left and not (path / "README.md").is_file():
        raise InputError(
            f"data: {path} has files named after splits and others such as {left[0]}; give the "
            "files by their names, separated by commas"
        )
    if split not in found:
        raise InputError(f"data: {path} has no split {split!r}, only {', '.join(found)}")
    labels = [str(path / os.path.relpath(file, path.resolve())) for file in found[split]]
    return _load_files(str(path), found[split], labels, separator)


def _load_files(
    name: str, files: list[Path], labels: list[str], separator: str = ","
) -> Dataset | Plain:
    """The rows of files of one kind, or what is needed to read them."""
    kind = READERS[files[0].suffix.lower()]
    if kind != "parquet":
        return Plain(list(map(str, files)), labels, kind, separator)
    try:
        return _load_typed(name, kind, files)
    except InputError:
        for file, label in zip(files, labels, strict=True):  # the message then names the broken one
            _load_typed(label, kind, [file])
        raise


def _load_typed(name: str, reader: str, files: list[Path]) -> Dataset:
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
        for cause in (error, error.__cause__):
            if isinstance(cause, InputError):
                raise cause from error.__cause__
        reason = " ".join(str(error.__cause__ or error).split())
        raise InputError(f"data: {name} cannot be read: {reason or 'it is empty'}") from error


def _documents(name: str, files: list[Path]) -> Dataset:
    """The text files as documents, in a random order that is always the same."""
    texts = {file: read_text(file) for file in files}
    documents = [text for text in dict.fromkeys(texts.values()) if text]
    if not documents:
        raise InputError(f"data: {name} has no files of UTF-8 text")
    if name not in BUILT_IN and len(documents) < len(files):
        others = [str(file) for file, text in texts.items() if not text]
        copies = len(files) - len(documents) - len(others)
        first = f" (the first: {others[0]})" if others else ""
        tell(
            f"data: {name}: kept {len(documents)} of {len(files)} files: {len(others)} are not "
            f"UTF-8 text{first}, {copies} are copies of others"
        )
    random.Random(0).shuffle(documents)
    return Dataset.from_dict({"text": documents})


# ---- without a network ------------------------------------------------------------------------


def _built_in(name: str, task: str) -> Dataset:
    right = [known for known in BUILT_IN if (known == "chitchat") == (task == "sft")]
    if name not in right:
        raise InputError(f"data: {name} is {BUILT_IN[name]}; this task takes {', '.join(right)}")
    if name == "chitchat":
        talks = ({"messages": messages} for messages in chitchat())
        return Dataset.from_dict({"conversation": list(map(json.dumps, talks))})
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


def _on_hub(name: str, config: str | None, split: str, streaming: bool) -> Data | Plain:
    """The rows of a dataset of the Hub, or what is needed to read them."""
    builder = datasets.load_dataset_builder(name, config)
    if builder.name not in ("json", "csv"):
        return datasets.load_dataset(name, config, split=split, streaming=streaming)
    found = {str(x): list(map(str, files)) for x, files in builder.config.data_files.items()}
    if split not in found:
        raise InputError(f"data: {name} has no split {split!r}, only {', '.join(found)}")
    files = found[split]
    labels = [f"{name}/{file.rpartition('/')[2]}" for file in files]
    if not streaming:
        manager = datasets.DownloadManager()
        folders = [list(manager.iter_files(x)) for x in manager.download_and_extract(files)]
        labels = [label for label, part in zip(labels, folders, strict=True) for _ in part]
        files = [file for part in folders for file in part]
    return Plain(files, labels, builder.name, getattr(builder.config, "sep", ","))


@contextmanager
def from_hub(what: str, name: str, failed: str, *, local: bool = False) -> Iterator[None]:
    """Report in one line why what is on the Hub, or `local`, cannot be loaded.

    The recipe's key `what` has its name. `failed` begins the message where a network does not help.
    """
    there = local or hub_is_there()
    try:
        yield
    except Exception as error:  # a damaged file of a model or tokenizer can raise any
        memory = isinstance(error, RuntimeError) and not isinstance(error, RecursionError)
        if memory or isinstance(error, InputError | MemoryError):
            raise
        if there:
            raise InputError(f"{what}: {failed}: {' '.join(str(error).split())}") from error
        hub, kind = huggingface_hub.constants.ENDPOINT, "--repo-type dataset " * (what == "data")
        raise InputError(
            f"{what}: there is no {name!r} here or in the local cache, and {hub} cannot be "
            f"reached; on a machine with a network run hf download {kind}{name} --local-dir "
            f"FOLDER, copy the folder here, and give its path as the {what}"
        ) from error
