"""Training language models with the optimizers of this package; needs the extra `[train]`."""

import errno
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

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

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

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
            first = error.errors()[0]
            name = str(first["loc"][0]) if first["loc"] else "options"
            if first["type"] == "extra_forbidden":
                raise InputError(unknown(name, type(self).model_fields)) from error
            raise InputError(f"{name}: {first['msg']}, got {first['input']!r}") from error


def _is_text(value: Any) -> bool:
    """Whether a value, and all that is in it, is without what no path or file of text can hold."""
    if isinstance(value, str | os.PathLike):
        text = os.fspath(value)
        return "\0" not in text and not any("\ud800" <= x <= "\udfff" for x in text)
    if isinstance(value, Mapping):
        return all(map(_is_text, (*value, *value.values())))
    return all(map(_is_text, value)) if isinstance(value, list | tuple) else True


def unknown(name: str, known: Iterable[str], what: str = "key") -> str:
    """The message for an unknown name, with the nearest known one."""
    known = sorted(known)
    near = get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
    return f"unknown {what} {name!r}; {hint}"
