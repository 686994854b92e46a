"""The command line: finds the command, parses its options, calls it."""

import contextlib
import io
import os
import re
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple


class Command(NamedTuple):
    """A command; its module is imported when it is called, which may take seconds."""

    module: str  # of the function
    options: str  # class that tyro parses, in options.py of the module's folder or of train/
    function: str  # name of the function, which takes options and a console; may return a status
    summary: str
    extra: str = "train"  # extra of the package that it needs


COMMANDS = {
    "train": Command("train.run", "Train", "train_command", "train a language model by a recipe"),
    "data": Command("train.run", "Show", "show_command", "show examples of a recipe's data"),
    "verify-resume": Command(
        "train.verify", "Verify", "verify", "check that a killed run resumes exactly"
    ),
    "eval": Command("train.evaluate", "Evaluation", "evaluate", "score models on tasks of lm-eval"),
    "choose": Command(
        "train.choose", "Choose", "choose_command", "choose the average that a run returns"
    ),
    "soup": Command(
        "train.soup", "Soup", "soup_command", "average models that were trained from one start"
    ),
    "average": Command("train.merge", "Merge", "merge", "merge the checkpoints of a run"),
    "compare": Command("study.compare", "Comparison", "compare_command", "compare methods"),
    "sweep": Command(
        "study.sweep", "Sweep", "sweep_command", "tune methods by one protocol", "study"
    ),
    "figure": Command(
        "paper.figures", "FigureOptions", "figure_command", "make a figure of the paper", "study"
    ),
    "report": Command(
        "study.explore", "ReportOptions", "report_command", "explore runs in one page", "study"
    ),
    "bench": Command("study.bench", "Bench", "bench", "measure what optimizers cost"),
    "check-device": Command(
        "study.device", "CheckDevice", "check_device", "check and measure PACE on an accelerator"
    ),
    "chat": Command("train.talk", "Chat", "talk", "talk to a model that was trained"),
    "doctor": Command("doctor", "Doctor", "report", "print what a bug report needs", ""),
    "completion": Command(
        "train.help", "Completion", "print_completion", "print what completes commands in a shell"
    ),
    **{
        f"theory {name}": Command(
            "theory.lab", f"{name.title()}Options", "run_theory", summary, "theory"
        )
        for name, summary in (
            ("limit", "the limiting error, three ways"),
            ("family", "instances of unbounded improvement over an EMA"),
            ("control", "from the optimal controller to PACE's gain"),
            ("frontier", "each method at its own best parameters"),
            ("twin", "the EMA that a pull amounts to"),
            ("rate", "the rate on a convex Lipschitz problem"),
            ("batch", "steps and losses against the batch size"),
            ("river", "a valley with a river: along it, and above it"),
        )
    },
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `paceline`.

    Returns:
        The exit status: 0; 1 if a run failed, or for an error that nothing foresaw; 2 if the input
        cannot be used; 130 after Ctrl-C; 141 if nobody reads the output any more.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    traced = "--trace" in arguments or os.environ.get("PACELINE_TRACE", "0") not in ("", "0")
    try:
        try:
            return _main([word for word in arguments if word != "--trace"], traced)
        finally:
            if sys.stdout:
                sys.stdout.flush()
    except BrokenPipeError:
        _drop_output()
        return 141
    except SystemExit as stop:  # of tyro; or of rich, after a broken pipe
        if isinstance(stop.__context__, BrokenPipeError):
            return 141
        raise
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            _say("interrupted before there were results")
        return 130
    except BaseException as error:  # of libraries in Rust, a panic is no Exception
        if traced:
            traceback.print_exception(error)
        else:
            _say(_unforeseen(error))
        _drop_output()
        return 1


def _main(arguments: list[str], traced: bool) -> int:
    if arguments == ["--version"]:
        print(f"paceline {version('paceline')}")
        return 0
    if arguments == ["doctor"]:  # works without any extra
        from .doctor import report

        print(report())
        return 0
    group = arguments[:-1] if arguments[-1:] in (["-h"], ["--help"]) else arguments
    if group in ([], ["theory"]):
        print("usage: paceline COMMAND [OPTIONS]\n\nTrain the model you return.\n")
        for name, command in COMMANDS.items():
            if name.split()[: len(group)] == group:
                print(f"  {name:16} {command.summary}")
        print("\npaceline COMMAND --help explains the options of each, and")
        print("paceline completion --help how a shell completes them.")
        print("With --trace, or PACELINE_TRACE=1, errors show where they arose.")
        return 0
    prints = os.environ.get("RANK", "0") == "0"  # one process does
    try:
        from rich.console import Console

        from .train import InputError, unknown
    except ModuleNotFoundError as error:
        return _missing(error, "theory" if arguments[0] == "theory" else "train")
    words = 2 if arguments[0] == "theory" else 1  # theory has subcommands
    name, rest = " ".join(arguments[:words]), arguments[words:]
    try:
        if name not in COMMANDS:
            raise InputError(unknown(name, COMMANDS, "command"))
        command = COMMANDS[name]
        options = _parse(name, options_of(command), rest)
        if options is None:  # the help was printed
            return 0
        module = import_module(f"paceline.{command.module}")
        status = getattr(module, command.function)(options, Console(quiet=not prints))
        return status if isinstance(status, int) else 0
    except ModuleNotFoundError as error:
        return _missing(error, COMMANDS[name].extra)
    except InputError as error:
        if traced:
            traceback.print_exception(error)
        if prints:
            _say(str(error))
        return 2


def _say(message: str) -> None:
    """Print a message to stderr as one line that no character in it can break."""
    line = "".join(x if x.isprintable() else repr(x)[1:-1] for x in " ".join(message.split()))
    with contextlib.suppress(OSError, AttributeError):  # stderr is closed
        print(f"paceline: {line}", file=sys.stderr, flush=True)


def _unforeseen(error: BaseException) -> str:
    """The message for an error without one of its own: what it is, and where it arose."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"{frame.filename}:{frame.lineno}" for frame in frames]
    ours = [place for place in places if place.startswith(str(Path(__file__).parent))]
    where = ", from ".join(dict.fromkeys([*places[-1:], *ours[-1:]]))
    return f"{type(error).__name__}: {error} ({where}; --trace shows the whole trace)"


def _drop_output() -> None:
    """Give what is still to be printed to nobody, so that the interpreter's end is silent."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # stdout is closed or no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _missing(error: ModuleNotFoundError, extra: str) -> int:
    _say(f"{error}; pip install 'paceline[{extra}]'")
    return 2


def options_of(command: Command) -> Any:
    """The class of a command's options. To import it takes no torch, so that help comes at once."""
    folder = command.module.partition(".")[0] if "." in command.module else "train"
    return getattr(import_module(f"paceline.{folder}.options"), command.options)


def _parse(name: str, options: Any, arguments: list[str]) -> Any:
    """The options of a command; None after its help was printed, which was asked for.

    Raises:
        InputError: tyro refused them; its boxed message in one line.
    """
    import tyro

    from .train import InputError, nearest

    # The defaults are those of the recipe that is named, if one is.
    starting = getattr(options, "starting", lambda arguments: None)(arguments)
    if {"-h", "--help"}.intersection(arguments):
        from .train.help import help_of

        print(help_of(name, options, starting), end="")
        return None
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            found: Any = tyro.cli(
                options,
                prog=f"paceline {name}",
                args=arguments,
                default=tyro.MISSING_NONPROP if starting is None else starting,
                config=(tyro.conf.OmitArgPrefixes,),
            )
        words = [word.partition("=")[0] for word in arguments if word.startswith("--")]
        found.refuse_unused({word.strip("-").replace("-", "_") for word in words})
        return found
    except SystemExit as stop:
        if stop.code != 2:
            raise
    # tyro prints a title, then sections between rules, in a frame of │ and ─ or of blanks and -.
    _, *lines = [line.strip("╭╮╰╯│ ") for line in said.getvalue().splitlines()]
    text = "\n".join("" if not line.strip("─-") else line for line in lines)
    message, *hints = [" ".join(part.split()) for part in re.split(r"\n\n+", text.strip())]
    if wrong := re.match(r"(?:Error parsing|invalid choice .* for argument) '?--([\w-]+)", message):
        name = wrong[1].replace("-", "_")
        if name in options.model_fields:
            options.refuse(name, _given(f"--{wrong[1]}", arguments))
    near = re.findall(r"Perhaps you meant: (--[\w-]+)", " ".join(hints))
    if wrong := re.match(r"Unrecognized options: --([\w-]+)", message):
        name = wrong[1].replace("-", "_")
        if said := options.elsewhere(name):
            raise InputError(f"{message}; {said}")
        meant = nearest(name, options.model_fields, 0.6)
        near = [f"--{meant.replace('_', '-')}"] if meant else near
    raise InputError(message + (f"; did you mean {near[0]}?" if near else ""))


def _given(option: str, arguments: list[str]) -> list[str]:
    """The words that the arguments give for an option; the last time, as it counts."""
    places = [i for i, word in enumerate(arguments) if word.partition("=")[0] == option]
    if not places:
        return []
    _, is_joined, first = arguments[places[-1]].partition("=")
    rest = takewhile(lambda word: not word.startswith("--"), arguments[places[-1] + 1 :])
    return [first] if is_joined else list(rest)
