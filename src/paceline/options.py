"""Options of parameter groups: what they may be, and how a parameter is named in a message."""

import math
import re
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from itertools import groupby
from numbers import Real
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .averaging import EMA, Averaging, PowerEMA, parse

Group: TypeAlias = dict[str, Any]

# Of a parameter: of its state.
DTYPES = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}
AVERAGE = "average"  # the name of the average that the pull goes toward
AUTO = "auto"  # a pullback that sets itself
# Of κ, where nothing is said of averages; with a pull that sets itself, of the one that it goes
# toward and of the one to return: what benchmarks/regret.py tried.
POWER, AUTO_POWER, AUTO_RETURNS = 0.5, 0.3, 0.6
NAMED = re.compile(r"[A-Za-z][A-Za-z0-9]*=")  # begins what `returns` is written as
NONFINITE = ("guard", "skip", "raise", "ignore")
# PACE's own names for the options of a power or constant EMA, where no other average is asked for.
EMA_OPTIONS: dict[str, Any] = {
    "ema_power": POWER,
    "ema_beta": None,
    "ema_rate": 1.0,
    "ema_start": 0,
    "ema_every": 1,
}


def averaging_of(group: Group) -> Averaging:
    """The rule of a group of PACE's or Pullback's."""
    rule = group["averaging"]
    if rule is not None:  # text, but for what was set between steps
        return rule if isinstance(rule, Averaging) else parse(rule)
    return _ema(*(group[name] for name in EMA_OPTIONS))


def returns_of(group: Group) -> dict[str, Averaging]:
    """The averages that a group keeps besides its own, by name; the first is what it returns."""
    return _named(_as_set(group))


def averages_of(group: Group) -> dict[str, Averaging]:
    """All averages of a group, by the name that each has in the state of a parameter."""
    return _every(averaging_of(group), _as_set(group))


def kept_by(average: str, rule: Averaging) -> dict[str, str]:
    """What a rule keeps besides its average: names in the state -> its own names for them."""
    return {average + name.removeprefix(AVERAGE): name for name in rule.keeps}


def further_state(group: Group) -> frozenset[str]:
    """Names in the state of a parameter of all averages but its own, and of what rules keep."""
    return _further(averaging_of(group), _as_set(group))


def _as_set(group: Group) -> str | None:
    """`returns` as text; what was set between steps may not be."""
    returns = group.get("returns") if group.get("average", True) else None
    plain = returns is None or (isinstance(returns, str) and NAMED.match(returns))
    return returns if plain else as_text(returns)


# Asked for at every step of every parameter; what they return is not to be changed.


@lru_cache(maxsize=256)
def _named(returns: str | None) -> dict[str, Averaging]:
    parts = (part.split("=", 1) for part in returns.split(",")) if returns else ()
    return {name: parse(rule) for name, rule in parts}


@lru_cache(maxsize=256)
def _every(own: Averaging, returns: str | None) -> dict[str, Averaging]:
    return {AVERAGE: own} | {f"return_{name}": rule for name, rule in _named(returns).items()}


@lru_cache(maxsize=256)
def _further(own: Averaging, returns: str | None) -> frozenset[str]:
    every = _every(own, returns)
    kept = (kept_by(name, rule) for name, rule in every.items())
    return frozenset(every.keys() - {AVERAGE}).union(*kept)


def as_text(returns: Any) -> str | None:
    """The option `returns` as text: `name=rule,name=rule`.

    Raises:
        ValueError: it names no averages.
    """
    if returns is None:
        return None
    if isinstance(returns, str) and NAMED.match(returns):  # as we write it ourselves
        parts = [part.partition("=")[::2] for part in returns.split(",")]
        if len(dict(parts)) < len(parts):
            raise ValueError(f"returns must have each name once, got {returns!r}")
        returns = dict(parts)
    if isinstance(returns, (str, Averaging)):
        returns = {"returned": returns}
    kinds = isinstance(returns, dict) and all(
        isinstance(rule, (str, Averaging)) for rule in returns.values()
    )
    if not kinds or not returns:
        raise ValueError(
            "returns must be an average of paceline.averaging, its text, or a dict of such by "
            f"name, got {returns!r}"
        )
    for name in returns:
        if not NAMED.fullmatch(f"{name}=") or name in (AVERAGE, "live"):
            raise ValueError(
                "returns must have names of letters and digits, not 'average' or 'live', "
                f"got {name!r}"
            )
    return ",".join(f"{name}={parse(str(rule))}" for name, rule in returns.items())


@lru_cache(maxsize=256)  # asked for at every step of every parameter, and checked when made
def _ema(
    power: float | None, beta: float | None, rate: float, start: float, every: int
) -> Averaging:
    if beta is not None:
        return EMA(beta, every=every)
    return PowerEMA(POWER if power is None else power, rate, start, every)


def require(options: Group, name: str, ok: bool, range_: str) -> None:
    """Raises: ValueError: the option is not `ok`; the message names it, its range and its value."""
    if not ok:
        raise ValueError(f"{name} must be {range_}, got {options[name]!r}")


def require_one_return(options: Group) -> None:
    """Raises: ValueError: what is to be returned is given in two ways."""
    twice = options.get("return_power") is not None and options.get("returns") is not None
    require(options, "returns", not twice, "left out with return_power")


def number(value: object) -> float:
    """The value as a float, or NaN, which no range contains, for what is no real number."""
    if isinstance(value, Real) and not isinstance(value, bool):
        with suppress(OverflowError):
            return float(value)
    return math.nan


def check_pull(options: Group, *, auto: bool = False) -> None:
    """Check what every optimizer with a pull has, and make it plain numbers and text.

    Args:
        options: of a group, or the defaults; changed.
        auto: whether the pull may set itself.

    Raises:
        ValueError: names the first option out of its range, and its value.
    """
    if not auto or options["pullback"] != AUTO:
        strength = number(options["pullback"])
        range_ = f"a finite number >= 0{f', or {AUTO!r}' * auto}"
        require(options, "pullback", 0 <= strength < math.inf, range_)
        options["pullback"] = strength
    rule = options["averaging"]
    if rule is not None:
        text = isinstance(rule, (str, Averaging))
        require(options, "averaging", text, "an average of paceline.averaging, or its text")
        options["averaging"] = str(parse(str(rule)))
    power = options.pop("return_power", None)  # of a group, or of the defaults
    options["returns"] = as_text(options["returns"] if power is None else PowerEMA(power))
    known = f"one of {', '.join(NONFINITE)}"
    require(options, "nonfinite", options["nonfinite"] in NONFINITE, known)


def check_options(options: Group) -> None:
    """Make PACE's options plain numbers, so that checkpoints load with `weights_only=True`.

    Raises:
        ValueError: names the first option out of its range, and its value.
    """

    def check(name: str, ok: bool, range_: str) -> None:
        require(options, name, ok, range_)

    check_pull(options, auto=True)
    lr = options["lr"]
    if isinstance(lr, Tensor):
        finite = lr.ndim == 0 and bool(lr.isfinite())
        check("lr", finite and bool(lr >= 0), "a finite number >= 0, or a 0-dim tensor of one")
    for name in ("eps", "weight_decay") + (() if isinstance(lr, Tensor) else ("lr",)):
        check(name, 0 <= number(options[name]) < math.inf, "a finite number >= 0")
        options[name] = float(options[name])
    check("gain", options["gain"] in ("adam", "scalar"), "one of adam, scalar")
    betas = options["betas"]
    pair = isinstance(betas, (tuple, list)) and len(betas) == 2
    check("betas", pair and all(0 <= number(b) < 1 for b in betas), "two numbers in [0, 1)")
    options["betas"] = (float(betas[0]), float(betas[1]))
    power, beta = options["ema_power"], options["ema_beta"]
    check("ema_power", power is None or 0 <= number(power) <= 1, "None or in [0, 1]")
    check("ema_beta", beta is None or 0 < number(beta) <= 1, "None or in (0, 1]")
    options["ema_power"] = None if power is None else float(power)
    options["ema_beta"] = None if beta is None else float(beta)
    check("ema_rate", 0 < number(options["ema_rate"]) < math.inf, "a finite number > 0")
    check("ema_start", 0 <= number(options["ema_start"]) < math.inf, "a number of steps >= 0")
    for name in ("ema_rate", "ema_start"):
        options[name] = float(options[name])
    every = options["ema_every"]
    whole = isinstance(every, int) and not isinstance(every, bool)
    check("ema_every", whole and every >= 1, "a whole number of steps >= 1")
    for name, default in EMA_OPTIONS.items():
        if options["averaging"] is not None and options[name] != default:
            raise ValueError(
                f"{name} must be left out where averaging is given, got {options[name]!r} beside "
                f"averaging={options['averaging']!r}"
            )
    for name in ("clip", "average", "capturable", "stochastic_round", "maximize", "track_stats"):
        check(name, isinstance(options[name], bool), "True or False")
    for name in ("fused", "foreach"):
        choice = options[name]
        check(name, choice is None or isinstance(choice, bool), "None, True or False")
    if options["fused"] and (options["foreach"] is not None or options["track_stats"]):
        raise ValueError(
            "fused=True needs foreach=None and track_stats=False: "
            "the one-pass kernel takes all tensors its own way, and measures nothing"
        )
    if options["state_dtype"] == "bfloat16":  # as checkpoints have it
        options["state_dtype"] = torch.bfloat16
    narrow = options["state_dtype"] in (None, torch.bfloat16)
    check("state_dtype", narrow, "None or torch.bfloat16")
    for name in ("state_dtype", "capturable"):
        if options["average"] and options[name] and averaging_of(options).keeps:
            raise ValueError(
                f"averaging={options['averaging']!r} needs {name} left out, got {options[name]!r}: "
                "it keeps more tensors than the average, and reads its steps on the host"
            )
    if options["capturable"] and (kept := [x for x in returns_of(options).values() if x.keeps]):
        raise ValueError(
            f"returns={options['returns']!r} needs capturable left out: {kept[0].name} reads its "
            "steps on the host"
        )
    seed = options["seed"]
    check("seed", isinstance(seed, int) and not isinstance(seed, bool), "a whole number")
    if not options["average"] and options["pullback"] != 0:
        raise ValueError(
            f"average=False needs pullback=0, got pullback={options['pullback']!r}: "
            "a pull needs an average to pull toward"
        )
    if not options["average"] and options["returns"]:
        raise ValueError(
            f"average=False needs returns left out, got {options['returns']!r}: it keeps no average"
        )


def fill_in(defaults: Group) -> None:
    """The averages of PACE's defaults where nothing is said of them."""
    if defaults["ema_power"] is not None or defaults["ema_beta"] is not None:
        return
    auto = defaults["pullback"] == AUTO and defaults["averaging"] is None
    defaults["ema_power"] = AUTO_POWER if auto else POWER
    if auto and defaults["returns"] is None:
        defaults.setdefault("return_power", AUTO_RETURNS)


def encoded(words: Iterable[str]) -> str:
    """Words without commas and stars as one string, runs of one word in short."""
    return ",".join(f"{word}*{len(list(run))}" for word, run in groupby(words)) or "*0"


def decoded(text: str) -> list[str]:
    """The words of `encoded`; none of an empty string, which that never is."""
    runs = [run.split("*") for run in text.split(",") if run]
    return [word for word, count in runs for _ in range(int(count))]


def describe(groups: list[Group], group: int, index: int) -> str:
    """A parameter by its name where the user gave names, else by its place; and its shape."""
    names = groups[group].get("param_names")
    name = f"parameter {names[index]!r}" if names else f"parameter {index} of group {group}"
    return f"{name} of shape {tuple(groups[group]['params'][index].shape)}"
