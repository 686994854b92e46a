"""Training language models with the optimizers of this package; needs the extra `[train]`."""

import errno
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

# Hugging Face's libraries count uses and loads by the network unless this is set at their import.
for _name, _value in {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_UPDATE_DOWNLOAD_COUNTS": "0"}.items():
    os.environ.setdefault(_name, _value)

LARGEST = 2**53  # up to here a float holds every integer

Positive = Annotated[int, Field(ge=1, le=LARGEST)]
Number = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Power = Annotated[float, Field(ge=0, le=1)]
Gain = Annotated[float, Field(gt=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]


class InputError(Exception):
    """The user's input cannot be used; the message is one line that says why and what to do."""


@contextmanager
def reporting(what: str, *errors: type[Exception]) -> Iterator[None]:
    """Raise these errors as an InputError: `what`, a colon, and the reason in one line."""
    try:
        yield
    except errors as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise InputError(f"{what}: {reason}") from error


@contextmanager
def reporting_disk(path: Path) -> Iterator[None]:
    """Raise what cannot be read or written as an InputError, which names the file or this path."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{error.filename or path}: {error.strerror or error}") from error


def read_small(path: Path, most: int = 10**6) -> str:
    """The text of a file of a few pages; a device that never ends is not read to its end.

    Raises:
        OSError: it cannot be read, or has more than `most` characters.
        UnicodeDecodeError: it is not UTF-8.
    """
    with path.open(encoding="utf-8") as file:
        text = file.read(most + 1)
    if len(text) > most:
        raise OSError(errno.EFBIG, f"it has more than {most:,} characters")
    return text


class Options(BaseModel):
    """Typed options that refuse unknown keys and wrong values with one line each."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )
    sections: ClassVar[Mapping[str, str]] = {}
    """In the help, titles of the class's own fields: the first field under each, and the title."""

    def __init__(self, **values: Any) -> None:
        for name, value in values.items():
            if not _is_text(value):
                raise InputError(f"{name}: {value!r} has a NUL or a byte that is not UTF-8")
        for name, value in values.items():  # in YAML, yes and off are switches and not 1 and 0
            field = type(self).model_fields.get(name)
            if isinstance(value, bool) and field and field.annotation is not bool:
                raise InputError(f"{name}: expected a value that is not true or false, got {value}")
        try:
            super().__init__(**values)
        except ValidationError as error:
            found = error.errors()
            # A wrong name explains a missing one.
            first = next((x for x in found if x["type"] == "extra_forbidden"), found[0])
            name = str(first["loc"][0]) if first["loc"] else "options"
            if first["type"] == "extra_forbidden":
                raise InputError(type(self).unknown_key(name)) from error
            if first["type"] == "missing":
                raise InputError(f"{name}: it is missing; give it") from error
            own = [x for x in found if x["loc"] and x["loc"][0] == name] or [first]
            raise InputError(f"{name}: {reason(own)}") from error

    @classmethod
    def refuse(cls, name: str, words: Sequence[str]) -> None:
        """Refuse what a command line gives for one field, whatever the others are.

        Raises:
            InputError: the field cannot have the value.
        """
        field = cls.model_fields[name]
        kinds = (field.annotation, *get_args(field.annotation))
        value = words if any(get_origin(x) is tuple for x in kinds) else " ".join(words)
        kind: Any = Annotated[field.annotation, field]
        try:
            TypeAdapter(kind).validate_python(value)
        except ValidationError as error:
            raise InputError(f"{name}: {reason(error.errors())}") from error

    @classmethod
    def elsewhere(cls, name: str) -> str | None:
        """Where a name that is no key goes instead, in one clause; None where nobody knows."""
        return None

    @classmethod
    def unknown_key(cls, name: str) -> str:
        """The message for a key that there is not."""
        if said := cls.elsewhere(name):
            return f"unknown key {name!r}; {said}"
        return unknown(name, cls.model_fields)

    def refuse_unused(self, given: Collection[str]) -> None:
        """Refuse options that were given and change nothing; by default there are none.

        Args:
            given: names of the options on the command line.

        Raises:
            InputError: names the first of them.
        """


def reason(errors: Sequence[Mapping[str, Any]]) -> str:
    """Why a field's value is refused: one reason for each type that the value may have."""
    if errors[0]["type"] == "missing":
        return "it is missing"
    first = errors[0]["input"]
    said = [x["msg"].partition(", unable to parse")[0] for x in errors if x["input"] is first]
    allowed = dict.fromkeys(x.removeprefix("Input should be ") for x in said)
    allowed.pop("None", None)
    must = "must be " if all(x.startswith("Input should be ") for x in said) else ""
    return f"{must}{' or '.join(allowed)}, got {first!r}"


def _is_text(value: Any) -> bool:
    """Whether a value, and all that is in it, is without what no path or file of text can hold."""
    if isinstance(value, str | os.PathLike):
        text = os.fspath(value)
        return "\0" not in text and not any("\ud800" <= x <= "\udfff" for x in text)
    if isinstance(value, Mapping):
        return all(map(_is_text, (*value, *value.values())))
    return all(map(_is_text, value)) if isinstance(value, list | tuple) else True


def counted(number: int, noun: str) -> str:
    """A number of things: 1 row, 2 rows."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


# What other trainers and the paper call our keys.
ALSO_CALLED = {
    **{"c": "pullback", "η": "lr", "learning_rate": "lr", "peak_lr": "lr", "optimizer": "method"},
    **{"lr_scheduler_type": "schedule", "scheduler": "schedule", "warmup_steps": "warmup"},
    **{"warmup_ratio": "warmup", "max_steps": "steps", "num_train_epochs": "epochs"},
    **{"batch_size": "batch", "per_device_train_batch_size": "micro_batch", "dataset": "data"},
    **{"max_length": "context", "max_seq_length": "context", "block_size": "context"},
    **{"model_name_or_path": "model", "output_dir": "out", "lora_r": "lora_rank"},
    **{"grad_clip": "max_grad_norm", "logging_steps": "log_every", "save_steps": "save_every"},
    **{"resume_from_checkpoint": "resume", "random_seed": "seed", "wd": "weight_decay"},
    **{"averaging": "method", "returns": "return_kappa", "state_dtype": "state"},
}


FEW = 16  # known names of which all are listed


def nearest(name: str, known: Iterable[str], cutoff: float = 0.5) -> str | None:
    """The known name that is meant by this one, or looks like it; None if none does."""
    known = sorted(known)
    if (also := ALSO_CALLED.get(name.lower())) in known:
        return also
    # Of two or three letters, all names look alike.
    spelt = {x: y for x, y in ALSO_CALLED.items() if y in known and len(x) > 3}
    spelt |= {_plain(x): x for x in known}
    return next((spelt[x] for x in get_close_matches(_plain(name), spelt, 1, cutoff)), None)


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")


def unknown(name: str, known: Iterable[str], what: str = "key") -> str:
    """The message for an unknown name, with the nearest known one, or those that there are."""
    known = sorted(known)
    is_few = len(known) <= FEW
    if near := nearest(name, known, 0.6 if is_few else 0.5):
        hint = f"did you mean {near!r}?"
    elif is_few:
        hint = f"known: {', '.join(known)}"
    else:
        hint = f"the nearest of {len(known)}: {', '.join(get_close_matches(name, known, 3, 0))}"
    return f"unknown {what} {name!r}; {hint}"
