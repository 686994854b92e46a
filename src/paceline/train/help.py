"""The help of a command, made of its options: its own first, then others by subject; completion."""

import datetime
import inspect
import shutil
from argparse import SUPPRESS, ArgumentParser, RawDescriptionHelpFormatter
from functools import partial
from pathlib import Path
from textwrap import fill, wrap
from types import NoneType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import tyro
from pydantic.fields import FieldInfo
from rich.console import Console
from tyro.constructors import PrimitiveConstructorSpec

from . import Options
from .options import Completion

OWN = "options"  # the title of a command's own options
WORDS: dict[Any, str] = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}
WORDS[datetime.date] = "YYYY-MM-DD"
[POSITIONAL] = tyro.conf.Positional[int].__metadata__  # type: ignore[attr-defined]
ArgConfig = type(tyro.conf.arg())


def help_of(command: str, options: type[Options], values: Options | None = None) -> str:
    """The help of a command.

    Args:
        command: its name.
        options: of it; `Options.sections` has the titles, attributes' docstrings the text.
        values: what the defaults are, as of a recipe that is named. None: those of the class.
    """
    width = min(shutil.get_terminal_size().columns, 100) - 2
    paragraphs = inspect.getdoc(options).split("\n\n")  # type: ignore[union-attr]
    groups: dict[str, list[str]] = {"arguments": [], OWN: []}
    for kind in options.__mro__:
        title = OWN
        for name in inspect.get_annotations(kind):
            if name not in options.model_fields:
                continue
            title = kind.__dict__.get("sections", {}).get(name, title)
            is_argument = POSITIONAL in options.model_fields[name].metadata
            names = groups.setdefault("arguments" if is_argument else title, [])
            names += [name] if not any(name in x for x in groups.values()) else []
    parser = ArgumentParser(
        usage=" ".join(
            [f"paceline {command}"]
            + [_argument(name, options.model_fields[name]) for name in groups["arguments"]]
            + ["[OPTIONS]"]
        ),
        description="\n\n".join(
            fill(" ".join(x.split()), width, break_on_hyphens=False) for x in paragraphs
        ),
        add_help=False,
        formatter_class=partial(_Formatter, max_help_position=26, width=width),
    )
    for title, names in groups.items():
        group = parser.add_argument_group(title)
        for name in names:
            _add(group, name, options.model_fields[name], values)
        if title == OWN:
            group.add_argument("-h", "--help", action="help", help="Print this.")
    return parser.format_help()


class _Formatter(RawDescriptionHelpFormatter):
    """Names such as tiny-gpt2 stay in one piece."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return wrap(text, width, break_on_hyphens=False)


def _argument(name: str, field: FieldInfo) -> str:
    """A positional argument in the line of usage."""
    word = _config(field, "metavar") or name.upper()
    return word if field.is_required() else f"[{word}]"


def _type(field: FieldInfo) -> Any:
    """A field's annotation as it was written."""
    return Annotated[(field.annotation, *field.metadata, None)]


def _config(field: FieldInfo, key: str) -> Any:
    """What `tyro.conf.arg` says of a field; None if it says nothing."""
    found = (getattr(x, key) for x in field.metadata if isinstance(x, ArgConfig))
    return next((x for x in found if x is not None), None)


def _add(group: Any, name: str, field: FieldInfo, values: Options | None) -> None:
    about = " ".join((_config(field, "help") or field.description or "").split())
    default = field.default if values is None else getattr(values, name)
    if field.is_required():
        about += " (required)"
    elif default is not None and default != () and default is not False:
        about += f" (default: {_text(default, field)})"
    about = about.replace("%", "%%")
    if POSITIONAL in field.metadata:
        group.add_argument(name, metavar=_config(field, "metavar") or name.upper(), help=about)
        return
    option = (_config(field, "name") or name).replace("_", "-")
    if field.annotation is bool:
        no = [f"--no-{option}"]
        group.add_argument(f"--{option}", *no, action="store_true", default=SUPPRESS, help=about)
        return
    metavar = _config(field, "metavar") or _metavar(_type(field))
    group.add_argument(f"--{option}", metavar=metavar, help=about)


def _text(value: Any, field: FieldInfo) -> str:
    """A default as it is written on the command line."""
    if spec := _spec(_type(field)):
        return str(spec.str_from_instance(value)[0])
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return "on" if value is True else f"{value:g}" if isinstance(value, float) else str(value)


def _spec(annotation: Any) -> PrimitiveConstructorSpec[Any] | None:
    """How a value is written, where its type does not say it."""
    if get_origin(annotation) is Annotated:
        for part in annotation.__metadata__:
            if isinstance(part, PrimitiveConstructorSpec):
                return part
        return _spec(annotation.__origin__)
    parts = (x for x in get_args(annotation) if get_origin(annotation) is not Literal)
    return next((found for x in parts if (found := _spec(x))), None)


def _metavar(annotation: Any) -> str:
    """What an option takes, in a word; None is left out."""
    if spec := _spec(annotation):
        return str(spec.metavar)
    while get_origin(annotation) is Annotated:
        annotation = annotation.__origin__
    parts = get_args(annotation)
    if get_origin(annotation) is Literal:
        return parts[0] if len(parts) == 1 else "{" + ",".join(map(str, parts)) + "}"
    if get_origin(annotation) is tuple:
        if parts[-1] is ...:
            word = _metavar(parts[0])
            return f"{word} [{word} …]"
        return " ".join(map(_metavar, parts))
    if parts:  # a union
        return "|".join(_metavar(x) for x in parts if x is not NoneType)
    return WORDS.get(annotation, "VALUE")


# ---- completion ---------------------------------------------------------------------------------


def print_completion(options: Completion, console: Console) -> None:
    """Print the script that completes all commands in a shell."""
    from ..cli import COMMANDS, options_of

    tree: dict[str, Any] = {}  # a command with subcommands has a tree of its own
    for name, command in COMMANDS.items():
        first, _, second = name.partition(" ")
        place = tree.setdefault(first, {}) if second else tree
        place[second or first] = options_of(command)
    tyro.cli(
        _either(tree),
        prog="paceline",
        args=["--tyro-print-completion", options.shell],
        config=(tyro.conf.OmitArgPrefixes,),
    )


def _either(tree: dict[str, Any]) -> Any:
    """A type of which tyro makes a subcommand for each entry."""
    kinds = []
    for name, kind in tree.items():
        kind = _either(kind) if isinstance(kind, dict) else kind
        kinds.append(Annotated[kind, tyro.conf.subcommand(name, prefix_name=False)])
    return Union[tuple(kinds)]  # noqa: UP007 - of as many as there are
