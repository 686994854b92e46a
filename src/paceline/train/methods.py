"""The methods and learning-rate schedules that can be compared, by name and options."""

from collections.abc import Callable
from typing import Annotated, Any, Literal, cast, get_args

import schedulefree
import torch
from pydantic import Field
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from ..averaging import PowerEMA
from ..optimizer import PACE
from . import InputError, Options

Name = Literal["adamw", "ema", "schedule-free", "pace"]
Schedule = Literal["constant", "cosine", "wsd", "power", "twin"]
Rate = Annotated[float, Field(gt=0)]
Strength = Annotated[float, Field(ge=0)]
Power = Annotated[float, Field(ge=0, le=1)]
Gain = Annotated[float, Field(gt=0, le=1)]
State = Literal["fp32", "bf16"]
WSD_DECAY_SHARE = 0.2  # of the steps, linearly to zero


class Method(Options):
    """One way to train, and so one model to return.

    Written `name[:schedule][:option=value]...`, as in `pace:c=10:kappa=0.3` or `ema:twin:lr=3e-3`.
    """

    name: Name
    schedule: Schedule = "constant"
    lr: Rate  # peak learning rate η
    c: Strength | None = None  # of PACE's pull
    kappa: Power | None = None  # κ of the average, and of power and twin
    g: Gain | None = None  # whose schedule `twin` is
    state: State | None = None  # what m, v and the average are kept in

    @property
    def label(self) -> str:
        """Name and the options that matter to it, but for the learning rate."""
        parts: list[str] = [self.name]
        if self.schedule != "constant":
            parts.append(self.schedule)
        shown = {"c": self.c, "g": self.g, "κ": self.kappa}
        parts += [f"{k}={v:g}" for k, v in shown.items() if v is not None]
        return " ".join(parts + (["state=bf16"] if self.state == "bf16" else []))


def parse_method(text: str, *, schedule: Schedule = "constant", **defaults: float) -> Method:
    """A method from its written form; schedule and options that it leaves open are given beside it.

    Options that do not matter to the method are left out of it.

    Raises:
        InputError: an unknown name, schedule or option, one that the method does not have, or a
            value out of its range.
    """
    name, *parts = text.strip().split(":")
    if name not in get_args(Name):
        raise InputError(f"unknown method {name!r}; known: {', '.join(get_args(Name))}")
    own: dict[str, str] = {}
    if name == "schedule-free":
        schedule = "constant"
    for part in parts:
        option, equals, value = part.partition("=")
        if not equals and option in get_args(Schedule) and name != "schedule-free":
            schedule = cast(Schedule, option)
        elif equals:
            own[option] = value
        else:
            known = "none" if name == "schedule-free" else ", ".join(get_args(Schedule))
            raise InputError(f"unknown schedule {part!r} in method {text!r}; known: {known}")
    options = ["lr"]
    options += ["c"] if name == "pace" else []
    options += ["kappa"] if name in ("ema", "pace") or schedule in ("power", "twin") else []
    options += ["g"] if schedule == "twin" else []
    options += ["state"] if name in ("ema", "pace") else []
    for option in own:
        if option not in options:
            raise InputError(f"method {text!r} has no option {option!r}; it has {options}")
    values: dict[str, Any] = {option: own.get(option, defaults.get(option)) for option in options}
    values |= {"name": name, "schedule": schedule}
    try:
        return Method(**values)
    except InputError as error:
        raise InputError(f"method {text!r}: {error}") from error


def optimizer_and_options(
    method: Method, warmup: int
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """The optimizer's class and its options, without the parameters."""
    if method.name == "adamw":
        return torch.optim.AdamW, {"lr": method.lr}
    if method.name == "schedule-free":
        return schedulefree.AdamWScheduleFree, {"lr": method.lr, "warmup_steps": warmup}
    return PACE, {
        "lr": method.lr,
        "pullback": method.c if method.name == "pace" else 0.0,
        "ema_power": method.kappa,
        "state_dtype": torch.bfloat16 if method.state == "bf16" else None,
    }


def scheduler(
    method: Method, optimizer: torch.optim.Optimizer, warmup: int, steps: int
) -> LambdaLR:
    """The method's learning-rate schedule, after a linear warm-up.

    `constant`; `cosine` to zero; `wsd` constant, then linear to zero over the last fifth; `power`
    lr·β_t and `twin` lr·β_t/(β_t + g), with β_t = (1 + t)^-κ: what a pull amounts to as its gain
    saturates, and at a gain of g. The warm-up starts from a step at rate 0; Schedule-Free has its
    own, which is one step ahead.
    """
    if method.name == "schedule-free":  # warms up by itself
        return get_scheduler("constant", optimizer)
    if method.schedule in ("power", "twin"):
        return LambdaLR(optimizer, _implicit(method, warmup))
    names = {"constant": "constant_with_warmup", "wsd": "warmup_stable_decay"}
    decay = {"num_decay_steps": round(WSD_DECAY_SHARE * steps), "decay_type": "linear"}
    return get_scheduler(
        names.get(method.schedule, method.schedule),
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=steps,
        scheduler_specific_kwargs=decay if method.schedule == "wsd" else None,
    )


def _implicit(method: Method, warmup: int) -> Callable[[int], float]:
    def factor(done: int) -> float:
        assert method.kappa is not None
        beta = float(PowerEMA(method.kappa).weight(done + 1))
        ramp = done / warmup if done < warmup else 1.0
        return ramp * (beta if method.g is None else beta / (beta + method.g))

    return factor
