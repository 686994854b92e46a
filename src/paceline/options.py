"""What the options of a parameter group may be; nothing else.

Checked options are plain numbers, booleans and text, so that checkpoints load with
`weights_only=True`: an average is kept as its text.
"""

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any, TypeAlias

import torch
from torch import Tensor

from . import defaults
from .averaging import Averaging, PowerEMA, as_rule, parse
from .defaults import AUTO

Group: TypeAlias = dict[str, Any]

NONFINITE = ("guard", "skip", "raise", "ignore")
PULL, AVERAGES = ("pullback", "gain"), ("averaging", "returns")
SHORT = {"kappa": "averaging", "return_kappa": "returns"}  # what each is short for
EXCHANGES = ("easgd", "diloco", "average")
# The options of an exchange, besides `every`, and their defaults.
EXCHANGE: dict[str, Any] = {
    **{"exchange": "easgd", "pull": None, "outer_lr": None, "outer_momentum": None},
    "exchange_dtype": None,
}
NAMED = re.compile(r"[A-Za-z][A-Za-z0-9]*=")  # how the text of `returns` begins


def require(options: Group, name: str, ok: bool, range_: str) -> None:
    """Raises: ValueError: the option is not `ok`; the message names it, its range and its value."""
    if not ok:
        raise ValueError(f"{name} must be {range_}, got {options[name]!r}")


def number(value: object, *, tensors: bool = False) -> float:
    """A real number as a float, and one in a tensor if asked to; else NaN, which no range has."""
    if tensors and isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return float(value)
    if isinstance(value, Real) and not isinstance(value, bool):
        with suppress(OverflowError):
            return float(value)
    return math.nan


def check_lr(options: Group) -> None:
    """Check a learning rate that may have been set between steps; one on a device is not read.

    Raises:
        ValueError: it is not a finite number >= 0.
    """
    lr = options["lr"]
    if not (isinstance(lr, Tensor) and lr.device.type != "cpu"):
        fine = 0 <= number(lr, tensors=True) < math.inf
        require(options, "lr", fine, "a finite number >= 0")


def expand_short(options: Group) -> None:
    """Write `kappa` as the `averaging` that it is short for, and `return_kappa` as `returns`.

    Raises:
        ValueError: it is not in [0, 1], or both are given.
    """
    for short, long in SHORT.items():
        kappa = options.get(short)
        if kappa is not None:
            require(options, short, 0 <= number(kappa) <= 1, "in [0, 1]")
            require(options, long, options.get(long) is None, f"left out with {short}")
            options[long] = PowerEMA(float(kappa))
        options.pop(short, None)


def check_spelling(group: Group, known: Collection[str]) -> None:
    """Check that no key of a group is a misspelt option; other keys are a user's own.

    Raises:
        ValueError: names the key, and the option.
    """
    for key in group:
        near = get_close_matches(str(key), known, n=1, cutoff=0.85)
        if near and key not in known:
            raise ValueError(f"a parameter group has {key!r}; did you mean {near[0]!r}?")


def fill_in(options: Group, *, pull: bool = True) -> None:
    """Set the averages, and the pull, where nothing is said of them (`paceline.defaults`).

    Raises:
        ValueError: only a gain is given that needs a strength.
    """
    kappas = defaults.kappas(options["pullback"], options["gain"])
    if pull:
        options |= defaults.pull(options)
    if options["averaging"] is None:
        options["averaging"] = PowerEMA(kappas.own)
        if options["returns"] is None and kappas.returned is not None:
            options["returns"] = PowerEMA(kappas.returned)


def averages_left_open(groups: Iterable[Group], given: Group, *, pace: bool = False) -> Group:
    """`averaging` and `returns` of all groups that leave both open, so that they return one model.

    They follow from the pull that all are given; else from that of the first such group that pulls,
    or of the first.

    Args:
        groups: as given, each with options of its own.
        given: the options where a group has none.
        pace: whether the pull may set itself, or be left open.

    Returns:
        Both options as text; empty if none leaves them open.
    """
    said = (*AVERAGES, *SHORT)
    if any(given.get(name) is not None for name in said):
        return {}
    pulls = [
        {name: group.get(name, given[name]) for name in PULL}
        for group in groups
        if all(group.get(name) is None for name in said)
    ]
    if not pulls:
        return {}
    if given["pullback"] is not None:
        pulls.insert(0, {name: given[name] for name in PULL})
    pulls.sort(key=lambda x: x["pullback"] == 0)
    options = pulls[0] | dict.fromkeys(AVERAGES) | {"nonfinite": given["nonfinite"]}
    check_average_and_pull(options, pace=pace)
    return {name: options[name] for name in AVERAGES}


def returns_text(returns: Any) -> str | None:
    """The option `returns` as text: `name=rule,name=rule`, or None.

    Raises:
        ValueError: it is no average, no text of one, and no mapping of names to such.
    """
    if returns is None:
        return None
    if isinstance(returns, str) and NAMED.match(returns):
        parts = [part.partition("=")[::2] for part in returns.split(",")]
        if len(dict(parts)) < len(parts):
            raise ValueError(f"returns must have each name once, got {returns!r}")
        returns = dict(parts)
    if isinstance(returns, (str, Averaging)):
        returns = {"returned": returns}
    rules = isinstance(returns, Mapping) and all(
        isinstance(rule, (str, Averaging)) for rule in returns.values()
    )
    if not rules or not returns:
        raise ValueError(
            "returns must be an average of paceline.averaging, its text, or a mapping of names to "
            f"such, got {returns!r}"
        )
    for name in returns:
        if not NAMED.fullmatch(f"{name}=") or name in ("average", "live"):
            raise ValueError(
                "returns must have names of letters and digits, not 'average' or 'live', "
                f"got {name!r}"
            )
    return ",".join(f"{name}={as_rule(rule)}" for name, rule in returns.items())


def parse_returns(text: str | None) -> dict[str, Averaging]:
    """The rules in a text of `returns_text`, by name; the first is the model to return."""
    parts = (part.split("=", 1) for part in text.split(",")) if text else ()
    return {name: parse(rule) for name, rule in parts}


def check_average_and_pull(options: Group, *, pace: bool = False) -> None:
    """Fill in and check the options that PACE and Pullback share; makes them numbers and text.

    Args:
        options: of a group, or the defaults; changed.
        pace: whether the pull may set itself, or be left open.

    Raises:
        ValueError: names the first option out of its range, and its value.
    """
    fill_in(options, pull=pace)
    if not pace or options["pullback"] != AUTO:
        strength = number(options["pullback"])
        range_ = f"a finite number >= 0{f', or {AUTO!r}' * pace}"
        require(options, "pullback", 0 <= strength < math.inf, range_)
        options["pullback"] = strength
    rule = isinstance(options["averaging"], (str, Averaging))
    require(options, "averaging", rule, "an average of paceline.averaging, or its text")
    options["averaging"] = str(as_rule(options["averaging"]))
    options["returns"] = returns_text(options["returns"])
    known = f"one of {', '.join(NONFINITE)}"
    require(options, "nonfinite", options["nonfinite"] in NONFINITE, known)


def check_scalar(options: Group, clip: bool) -> None:
    """Check a scalar gain, which is `pullback` itself: one that is clipped to 1 is not above it.

    Raises:
        ValueError: it is.
    """
    if options["gain"] == "scalar" and clip and options["pullback"] != AUTO:
        require(options, "pullback", options["pullback"] <= 1, "in [0, 1] with gain='scalar'")


def check_pace(options: Group) -> None:
    """Check PACE's options, and make them plain numbers and text.

    Args:
        options: of a group, or the defaults; changed.

    Raises:
        ValueError: names the first option out of its range, and its value.
    """

    def check(name: str, ok: bool, range_: str) -> None:
        require(options, name, ok, range_)

    check_average_and_pull(options, pace=True)
    lr = number(options["lr"], tensors=True)
    check("lr", 0 <= lr < math.inf, "a finite number >= 0, or a one-element tensor of one")
    if not isinstance(options["lr"], Tensor):
        options["lr"] = lr
    for name in ("eps", "weight_decay"):
        check(name, 0 <= number(options[name]) < math.inf, "a finite number >= 0")
        options[name] = float(options[name])
    check("gain", options["gain"] in ("adam", "scalar"), "one of adam, scalar")
    check_scalar(options, options["clip"])
    betas = options["betas"]
    pair = isinstance(betas, Sequence) and not isinstance(betas, str) and len(betas) == 2
    fine = pair and all(0 <= number(b, tensors=True) < 1 for b in betas)
    check("betas", fine, "two numbers in [0, 1)")
    options["betas"] = tuple(b if isinstance(b, Tensor) else float(b) for b in betas)
    if not options["eps"] and not options["clip"]:
        raise ValueError("clip=False needs eps > 0, got eps=0.0: a gain would have no bound")
    for name in ("clip", "capturable", "stochastic_round", "maximize", "track_stats"):
        check(name, isinstance(options[name], bool), "True or False")
    fused = options["fused"]
    check("fused", fused is None or isinstance(fused, bool), "None, True or False")
    foreach = options.setdefault("foreach", None)
    check("foreach", foreach is None or isinstance(foreach, bool), "None, True or False")
    if options.pop("foreach") and fused:
        raise ValueError("fused=True needs foreach left out or False, got foreach=True")
    if fused and options["track_stats"]:
        raise ValueError("fused=True needs track_stats=False: the one-pass kernel measures nothing")
    if options["state_dtype"] == "bfloat16":  # as checkpoints have it
        options["state_dtype"] = torch.bfloat16
    narrow = options["state_dtype"] in (None, torch.bfloat16)
    check("state_dtype", narrow, "None or torch.bfloat16")
    seed = options["seed"]
    check("seed", isinstance(seed, int) and not isinstance(seed, bool), "a whole number")

    own = parse(options["averaging"])
    for name in ("state_dtype", "capturable"):
        if options[name] and own.keeps:
            raise ValueError(
                f"averaging={options['averaging']!r} needs {name} left out, got {options[name]!r}: "
                "it keeps more tensors than the average, and reads its steps on the host"
            )
    if options["capturable"] and any(x.keeps for x in parse_returns(options["returns"]).values()):
        raise ValueError(
            f"returns={options['returns']!r} needs capturable left out: an average that keeps more "
            "tensors reads its steps on the host"
        )
    if options["capturable"] and any(isinstance(b, Tensor) for b in options["betas"]):
        raise ValueError(f"capturable=True needs betas that are numbers, got {options['betas']!r}")


def check_exchange(options: Group, workers: int = 1) -> None:
    """Check options of an exchange, and make them plain numbers and text.

    Args:
        options: of a group, or given; changed.
        workers: N, which bounds the pull of easgd.

    Raises:
        ValueError: names the first option out of its range, and its value.
    """
    every, kind = options["every"], options["exchange"]
    whole = isinstance(every, Integral) and not isinstance(every, bool)
    require(options, "every", whole and int(every) >= 1, "a whole number of steps >= 1")
    options["every"] = int(every)
    require(options, "exchange", kind in EXCHANGES, f"one of {', '.join(EXCHANGES)}")

    def check(name: str, ok: bool, fits: Callable[[float], bool], range_: str) -> None:
        if options[name] is not None:
            require(options, name, ok, f"left out with {kind}")
            value = number(options[name], tensors=True)
            require(options, name, fits(value), range_)
            options[name] = value

    most = 1.0 / workers if kind == "easgd" else 1.0
    named = f"at most 1/{workers} for {workers} workers" if most < 1 else "in [0, 1]"
    check("pull", kind != "diloco", lambda x: 0 <= x <= most, f"a number {named}")
    check("outer_lr", kind == "diloco", lambda x: 0 < x < math.inf, "a number > 0")
    check("outer_momentum", kind == "diloco", lambda x: 0 <= x < 1, "in [0, 1)")
    fine = options["exchange_dtype"] in (None, torch.bfloat16, "bfloat16")
    require(options, "exchange_dtype", fine, "None or torch.bfloat16")
    options["exchange_dtype"] = None if options["exchange_dtype"] is None else "bfloat16"
