"""Training language models with the optimizers of this package; needs the extra `[train]`."""

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError


class InputError(Exception):
    """What the user gave cannot be used; the message is one line that says why and what to do."""


class Options(BaseModel):
    """Typed options that refuse unknown keys and wrong values with one line each."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0]) if first["loc"] else "options"
            raise InputError(f"{name}: {first['msg']}, got {first['input']!r}") from error
