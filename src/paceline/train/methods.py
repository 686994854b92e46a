"""The methods and learning-rate schedules that can be trained and compared.

A method is one class: its name, its help (the docstring), its options with ranges and defaults, and
either the average that reads its model out of plain AdamW (`averaging`) or the optimizer that
trains it (`build`). Defining the class puts it into `METHODS`, from which commands, help, labels,
the comparison and the sweeps follow. A schedule is an entry of `LR_SCHEDULES`, and an optimizer of
`pullback:NAME` is a line of `BASES`.

Methods are written as text, `name[:schedule][:option=value]...`, as in `ema:twin:lr=3e-3`,
`pace:pullback=10:kappa=0.3` or `pullback:muon:pullback=1`: `parse_method` reads it, and
`Method.written` writes it.
"""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from functools import cache, partial
from importlib import import_module
from inspect import get_annotations
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Self

import tyro
from pydantic import AfterValidator, BeforeValidator, Field, model_validator

import paceline  # which imports a name when it is used: help is printed without torch

from .. import defaults
from . import (
    BelowOne,
    Gain,
    InputError,
    NonNegative,
    Number,
    Options,
    Positive,
    Power,
    nearest,
    reporting,
    unknown,
)

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LambdaLR

    from paceline import PACE, Averaging

WSD_DECAY_SHARE = 0.2  # of the steps, linearly to zero
MAX_WINDOW = 1000  # as LAWA has it

# ---- schedules ----------------------------------------------------------------------------------


class LRSchedule(NamedTuple):
    """A learning-rate schedule after a linear warm-up that starts from a step at rate 0."""

    summary: str  # for the help
    make: Callable[[Optimizer, Method, int, int], LambdaLR]  # of method, warm-up and steps
    options: tuple[str, ...] = ()  # that a method with this schedule has, besides its own


def _library(name: str, optimizer: Optimizer, _: Method, warmup: int, steps: int) -> LambdaLR:
    """A schedule of transformers."""
    from transformers import get_scheduler

    decay = {"num_decay_steps": round(WSD_DECAY_SHARE * steps), "decay_type": "linear"}
    own = decay if name == "warmup_stable_decay" else None
    return get_scheduler(name, optimizer, warmup, steps, own)


def _falling(optimizer: Optimizer, method: Method, warmup: int, steps: int) -> LambdaLR:
    """The rate that falls with β_t = (1 + t)^-κ, as a pull makes it fall."""
    from torch.optim.lr_scheduler import LambdaLR

    from ..theory.twin import twin_rate

    assert method.kappa is not None
    average, gain = paceline.PowerEMA(method.kappa), method.twin_gain

    def factor(done: int) -> float:
        beta = float(average.weight(done + 1))
        ramp = done / warmup if done < warmup else 1.0
        return ramp * (beta if gain is None else float(twin_rate(beta, gain)))

    return LambdaLR(optimizer, factor)


LR_SCHEDULES = {
    "constant": LRSchedule("constant", partial(_library, "constant_with_warmup")),
    "cosine": LRSchedule("to 0 along a cosine", partial(_library, "cosine")),
    "wsd": LRSchedule(
        "constant, then linear to 0 over the last fifth", partial(_library, "warmup_stable_decay")
    ),
    "power": LRSchedule("lr·β with β = (1+t)^-kappa", _falling, ("kappa",)),
    "twin": LRSchedule(
        "lr·β/(β + twin_gain·(1-β)) with that β, the rate that a pull of this gain amounts to",
        _falling,
        ("kappa", "twin_gain"),
    ),
}


def steps_of(warmup: float, steps: int) -> int:
    """Steps of a warm-up that is a number of steps, or below 1 a share of all steps."""
    return round(warmup if warmup >= 1 else warmup * steps)


def _known_schedule(name: str) -> str:
    if name not in LR_SCHEDULES:
        raise InputError(f"schedule: {unknown(name, LR_SCHEDULES, 'schedule')}")
    return name


ScheduleName = Annotated[
    str,
    AfterValidator(_known_schedule),
    tyro.conf.arg(
        metavar="{" + ",".join(LR_SCHEDULES) + "}",
        help="Learning-rate schedule of methods that name none. "
        + "; ".join(f"{name}: {schedule.summary}" for name, schedule in LR_SCHEDULES.items())
        + ".",
    ),
]

# Where fp32 is written out, the method is the same as without.
State = Annotated[
    Literal["fp32", "bf16"] | None, AfterValidator(lambda x: None if x == "fp32" else x)
]

# ---- half-lives of data --------------------------------------------------------------------------

AMOUNT = re.compile(r"(\d+\.?\d*(?:e[+-]?\d+)?) ?([kMBT]?) ?(tokens|samples)")
THOUSANDS = {"": 1.0, "k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def _amount(text: str) -> tuple[float, str] | None:
    """Of a text like 4M tokens the number and the unit."""
    found = AMOUNT.fullmatch(text)
    return (float(found[1]) * THOUSANDS[found[2]], found[3]) if found else None


def _readable_half_life(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        amount = _amount(value)
    if amount is None or not 0 < amount[0] < math.inf:
        raise InputError(
            f"half_life: give steps > 0, as in 200, or data, as in 4M tokens or 2000 samples, "
            f"got {value!r}"
        )
    return value


HalfLife = Annotated[Number | str, BeforeValidator(_readable_half_life)]

# ---- methods ------------------------------------------------------------------------------------


class Setup(NamedTuple):
    """What a method builds its optimizer from."""

    model: Any
    decayed: set[str]  # names of the parameters that decay
    weight_decay: float  # of these; decoupled, except in sgd, adam and adafactor
    warmup: int  # steps, for optimizers with their own warm-up
    steps: int  # of the run
    betas: tuple[float, float] = defaults.BETAS  # of Adam's moments, except in bases of pullback
    stochastic_round: bool = False  # of bfloat16 parameters, where PACE writes them
    scale: float = 1.0  # the batch over the one that the averages are for, as in Averaging.scaled

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The trained parameters, those that decay and the others."""
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        decayed = [p for name, p in named if name in self.decayed]
        others = [p for name, p in named if name not in self.decayed]
        decays = {"params": decayed, "weight_decay": self.weight_decay}
        return [decays, {"params": others, "weight_decay": 0.0}]


METHODS: dict[str, type[Method]] = {}


class Method(Options):
    """One way to train, and the model to return.

    A subclass has a `name`, a docstring for the help, its options, and `averaging` or `build`. An
    option named `base` is written behind the name, without `base=`. An option without a default
    comes from the command, unless the text gives it.
    """

    name: ClassVar[str]
    takes_schedule: ClassVar[bool] = True

    lr: Number  # peak learning rate η
    schedule: ScheduleName = "constant"
    kappa: Power | None = None  # κ of the average, and of the schedules power and twin
    twin_gain: Gain | None = None  # of the pull that the schedule twin stands for

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        if "name" in cls.__dict__:
            METHODS[cls.name] = cls

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, values: dict[str, Any]) -> dict[str, Any]:
        return cls.fallbacks(values) | values

    @classmethod
    def from_command(cls, given: dict[str, Any]) -> set[str]:
        """The options that the command gives: those without a default, and the schedule's."""
        schedule = LR_SCHEDULES[_known_schedule(given.get("schedule", "constant"))]
        required = {name for name, field in cls.model_fields.items() if field.is_required()}
        return required | set(schedule.options)

    @classmethod
    def fallbacks(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Options that neither text nor command gives, with their values."""
        of_schedule = {"kappa": defaults.KAPPA, "twin_gain": defaults.TWIN_GAIN}
        wanted = cls.from_command(given)
        return {option: x for option, x in of_schedule.items() if option in wanted}

    def averaging(self, steps: int) -> Averaging | None:
        """The average of the trajectory's weights that it returns after a run of so many steps.

        None if it returns what the optimizer of the trajectory returns.
        """
        return None

    @property
    def pulled_toward(self) -> Averaging | None:
        """The average that its live weights are pulled toward."""
        return None

    def rules(self, steps: int, scale: float = 1.0) -> list[Averaging]:
        """The averages that its optimizer keeps; the last is returned, the first pulls if any does.

        Args:
            steps: of the run.
            scale: the batch over the one that the method's options are for. The average that a
                pull goes toward stays as it is: results/batch-scaling has what it costs to change.

        Raises:
            ValueError: one has no such scaling.
        """
        # A share of the steps is the same share of the data.
        pulled_toward, returned = self.pulled_toward, self.averaging(round(scale * steps))
        if pulled_toward is not None and not self.pulls:
            pulled_toward = pulled_toward.scaled(scale)
        rules = (pulled_toward, None if returned is None else returned.scaled(scale))
        return [rule for rule in rules if rule is not None]

    def in_steps(self, samples: int, tokens: int | None) -> Self:
        """The method with a half-life of data in steps.

        Args:
            samples: sequences a step.
            tokens: a step; None where steps have different numbers.

        Raises:
            InputError: it is in tokens, and those of a step are None.
        """
        return self

    @property
    def trajectory(self) -> Method:
        """The method whose live weights are this one's: plain AdamW if it only averages those."""
        return self

    @property
    def returned_kappa(self) -> float | None:
        """κ of the power EMA that it returns; None if it returns none."""
        kappa: float | None = self.get("return_kappa")
        return self.get("kappa") if kappa is None else kappa

    @property
    def pulls(self) -> bool:
        """Whether its live weights are pulled toward an average."""
        return bool(self.get("pullback"))

    @property
    def is_saturated(self) -> bool:
        """Whether its live weights are pulled all the way to the average, before each step."""
        return self.get("gain") == "scalar" and self.get("pullback") == 1

    @abstractmethod
    def build(self, setup: Setup) -> Optimizer:
        """The optimizer that trains it.

        If the method returns other weights than the live ones, `eval()` of the optimizer puts them
        into the parameters, and `train()` puts the live weights back.
        """

    def make_scheduler(self, optimizer: Optimizer, warmup: int, steps: int) -> LambdaLR:
        """The learning-rate schedule, with a linear warm-up unless the optimizer has its own."""
        warmup = warmup if self.takes_schedule else 0
        return LR_SCHEDULES[self.schedule].make(optimizer, self, warmup, steps)

    @classmethod
    @cache
    def options(cls, schedule: str = "constant") -> list[str]:
        """Names of its options, those that the command gives first; then the schedule's, and lr."""
        classes = [c for c in cls.__mro__ if issubclass(c, Method) and c is not Method]
        fields = cls.model_fields
        own = [name for c in classes for name in get_annotations(c) if name in fields]
        own.sort(key=lambda name: not fields[name].is_required())
        names = dict.fromkeys([*own, *LR_SCHEDULES[schedule].options, "lr"])
        return [name for name in names if name not in ("base", "schedule")]

    def get(self, option: str) -> Any:
        """The value of an option; None if it is not set, or the method does not have it."""
        return getattr(self, option) if option in type(self).model_fields else None

    @property
    def row(self) -> dict[str, Any]:
        """Its name and the value of every option of every method, as columns of a table."""
        return {"name": self.name, **{option: self.get(option) for option in all_options()}}

    @property
    def written(self) -> str:
        """The text that `parse_method` reads, with every option that is set."""
        return ":".join(self._parts(str))

    @property
    def label(self) -> str:
        """A short text for people: all but the learning rate."""
        return " ".join(self._parts(lambda x: f"{x:g}" if isinstance(x, float) else str(x), "lr"))

    def _parts(self, text: Callable[[Any], str], *without: str) -> list[str]:
        head = [self.name, self.get("base"), self.schedule if self.schedule != "constant" else None]
        options = [name for name in self.options(self.schedule) if name not in without]
        values = [(name, self.get(name)) for name in options]
        return [x for x in head if x] + [f"{k}={text(x)}" for k, x in values if x is not None]

    def build_pace(self, setup: Setup, averaging: Averaging, **options: Any) -> PACE:
        """PACE with the options that its methods share, and these."""
        import torch

        return paceline.PACE(
            setup.groups,
            lr=self.lr,
            betas=setup.betas,
            eps=self.get("eps") or 1e-8,
            averaging=averaging,
            state_dtype=torch.bfloat16 if self.get("state") else None,
            stochastic_round=setup.stochastic_round,
            **options,
        )


class AveragedMethod(Method):
    """AdamW whose average is returned; all such methods of one trajectory share one training."""

    eps: Number | None = None  # ε beside Adam's √v̂, instead of 1e-8

    @property
    def trajectory(self) -> Method:
        of_schedule = {k: self.get(k) for k in LR_SCHEDULES[self.schedule].options}
        return AdamWMethod(lr=self.lr, schedule=self.schedule, eps=self.eps, **of_schedule)

    def build(self, setup: Setup) -> Optimizer:
        if rules := self.rules(setup.steps, setup.scale):
            return self.build_pace(setup, *rules, pullback=0.0)
        import torch

        return torch.optim.AdamW(setup.groups, lr=self.lr, betas=setup.betas, eps=self.eps or 1e-8)


class AdamWMethod(AveragedMethod):
    """AdamW, which returns its live weights."""

    name = "adamw"


class EMAMethod(AveragedMethod):
    """The EMA of AdamW's weights, with power kappa or a half_life, as in 200 or 4M tokens."""

    name = "ema"

    kappa: Power | None = None
    half_life: HalfLife | None = None
    state: State = None  # dtype of m, v and the average
    return_kappa: Power | None = None  # of the average, where kappa is the schedule's

    @classmethod
    def from_command(cls, given: dict[str, Any]) -> set[str]:
        return super().from_command(given) | (set() if given.get("half_life") else {"kappa"})

    @classmethod
    def fallbacks(cls, given: dict[str, Any]) -> dict[str, Any]:
        found = super().fallbacks(given)
        if given.get("half_life") or given.get("kappa") is not None:
            return found
        of_schedule = "kappa" in LR_SCHEDULES[given.get("schedule", "constant")].options
        return found | {"return_kappa" if of_schedule else "kappa": defaults.RETURN_KAPPA}

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if self.kappa is not None and self.half_life is not None:
            raise InputError("half_life and kappa say the same thing; give one of them")
        if self.return_kappa is not None and "kappa" not in LR_SCHEDULES[self.schedule].options:
            raise InputError(f"return_kappa: the schedule {self.schedule} has no kappa; give kappa")
        return self

    @property
    def trajectory(self) -> Method:
        return self if self.state else super().trajectory

    def in_steps(self, samples: int, tokens: int | None) -> Self:
        amount = _amount(self.half_life) if isinstance(self.half_life, str) else None
        if amount is None:
            return self
        a_step = {"samples": samples, "tokens": tokens}[amount[1]]
        if a_step is None:
            raise InputError(
                "half_life: conversations have different numbers of tokens, and so have steps; "
                f"give samples or --packing, got {self.half_life!r}"
            )
        return self.model_copy(update={"half_life": amount[0] / a_step})

    def averaging(self, steps: int) -> Averaging:
        assert not isinstance(self.half_life, str)  # else it is for in_steps
        if self.half_life is not None:
            return paceline.EMA(half_life=self.half_life)
        kappa = self.kappa if self.return_kappa is None else self.return_kappa
        assert kappa is not None
        return paceline.PowerEMA(kappa)


class UniformMethod(AveragedMethod):
    """The mean of AdamW's weights from start on, a share of the steps."""

    name = "uniform"

    start: BelowOne = 0.75

    def averaging(self, steps: int) -> Averaging:
        return paceline.Uniform(round(self.start * steps))


class SWAMethod(UniformMethod):
    """Stochastic weight averaging: AdamW's mean weights, every so many steps from start on."""

    name = "swa"

    every: Positive = 50

    def averaging(self, steps: int) -> Averaging:
        return paceline.SWA(round(self.start * steps), self.every)


class LAWAMethod(AveragedMethod):
    """Latest weight averaging: the mean of the last `window` snapshots of AdamW's weights."""

    name = "lawa"

    window: Annotated[Positive, Field(le=MAX_WINDOW)] = 10
    every: Positive = 40

    def averaging(self, steps: int) -> Averaging:
        return paceline.LAWA(self.window, self.every)


class BEMAMethod(AveragedMethod):
    """The bias-corrected EMA of AdamW's weights."""

    name = "bema"

    kappa: Power = 0.5
    bias_power: Power = 0.2
    every: Positive | None = None

    def averaging(self, steps: int) -> Averaging:
        return paceline.BEMA(self.kappa, self.bias_power, every=self.every or 1)


class LookaheadMethod(Method):
    """Lookahead around AdamW: its slow weights move by alpha every so many steps."""

    name = "lookahead"

    every: Positive = 5
    alpha: Gain = 0.5

    def rules(self, steps: int, scale: float = 1.0) -> list[Averaging]:
        if scale != 1:
            raise ValueError(f"lookahead has no scaling by {scale:g}")
        return []

    def build(self, setup: Setup) -> Optimizer:
        import torch

        from .lookahead import SwappedLookahead

        base = torch.optim.AdamW(setup.groups, lr=self.lr, betas=setup.betas)
        return SwappedLookahead(base, k=self.every, alpha=self.alpha)


class ScheduleFreeMethod(Method):
    """Schedule-Free AdamW, which has its own warm-up and no schedule."""

    name = "schedule-free"
    takes_schedule = False

    def build(self, setup: Setup) -> Optimizer:
        import schedulefree

        return schedulefree.AdamWScheduleFree(
            setup.groups, lr=self.lr, betas=setup.betas, warmup_steps=setup.warmup
        )


class PulledMethod(Method):
    """A pull toward the average of the weights."""

    pullback: NonNegative | Literal["auto"]
    kappa: Power
    return_kappa: Power | None = None  # of another average, which is returned instead

    @classmethod
    def fallbacks(cls, given: dict[str, Any]) -> dict[str, Any]:
        found = super().fallbacks(given)
        if given.get("pullback") is None:
            with reporting("gain", ValueError):
                found |= defaults.pull(given)
        if given.get("kappa") is None:
            strength: Any = given.get("pullback")
            with suppress(TypeError, ValueError):  # None, auto, or what is refused later
                strength = float(strength)
            kappas = defaults.kappas(strength, given.get("gain"))
            found |= {"kappa": kappas.own, "return_kappa": kappas.returned}
        return found

    @model_validator(mode="after")
    def _scalar(self) -> Self:
        c = self.pullback
        if self.get("gain") == "scalar" and isinstance(c, float) and c > 1:
            raise InputError(
                f"pullback: with gain=scalar it is the gain itself, in [0, 1], got {c:g}"
            )
        return self

    @property
    def trajectory(self) -> Method:
        return self.model_copy(update={"return_kappa": None})

    @property
    def pulled_toward(self) -> Averaging:
        return paceline.PowerEMA(self.kappa, every=self.get("every") or 1)

    def averaging(self, steps: int) -> Averaging | None:
        return None if self.return_kappa is None else paceline.PowerEMA(self.return_kappa)


class PACEMethod(PulledMethod):
    """AdamW with a pull toward its own average; pullback=auto sets the pull by itself."""

    name = "pace"

    every: Positive | None = None
    eps: Number | None = None
    state: State = None  # dtype of m, v and the average
    gain: Literal["adam", "scalar"] | None = None

    @classmethod
    def from_command(cls, given: dict[str, Any]) -> set[str]:
        own = {"kappa"} if given.get("pullback") == "auto" else set()
        return super().from_command(given) - own

    def build(self, setup: Setup) -> Optimizer:
        own, *others = self.rules(setup.steps, setup.scale)
        return self.build_pace(
            setup,
            own,
            pullback=self.pullback,
            gain=self.gain or "adam",
            returns=others[0] if others else None,
        )


class PullbackMethod(PulledMethod):
    """The same pull around another optimizer, as in pullback:muon."""

    name = "pullback"

    base: str
    gain: Literal["adam", "own", "scalar"] | None = None

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.base not in BASES:
            known = ", ".join(BASES)
            raise InputError(f"unknown optimizer {self.base!r}; pullback:NAME knows {known}")
        if self.pullback == "auto":
            raise InputError("pullback=auto is only for pace; give a number >= 0")
        return self

    def build(self, setup: Setup) -> Optimizer:
        groups = setup.groups if self.base != "muon" else _split_for_muon(setup)
        assert isinstance(self.pullback, float)
        own, *others = self.rules(setup.steps, setup.scale)
        return paceline.Pullback(
            BASES[self.base].make(groups, self.lr),
            self.pullback,
            own,
            gain=self.gain or "adam",
            returns=others[0] if others else None,
        )


class Base(NamedTuple):
    """An optimizer of `pullback:NAME`: `module.kind(groups, lr=lr, **options)`."""

    module: str
    kind: str
    options: dict[str, Any] = {}  # noqa: RUF012 - nothing changes it
    rates: tuple[str, ...] = ("lr",)  # the options that get the learning rate

    def make(self, groups: list[dict[str, Any]], lr: float) -> Optimizer:
        """The optimizer of these parameter groups."""
        kind: Any = getattr(import_module(self.module), self.kind)
        made: Optimizer = kind(groups, **dict.fromkeys(self.rates, lr), **self.options)
        return made


# SophiaH is left out: it differentiates the gradients, and the Trainer's loop does not keep their
# graph. Muon has one rate for both of its parts, with its updates scaled like AdamW's.
BASES = {
    "sgd": Base("torch.optim", "SGD", {"momentum": 0.9}),
    "adam": Base("torch.optim", "Adam"),
    "adamw": Base("torch.optim", "AdamW"),
    "nadam": Base("torch.optim", "NAdam", {"decoupled_weight_decay": True}),
    "radam": Base("torch.optim", "RAdam", {"decoupled_weight_decay": True}),
    "adafactor": Base("torch.optim", "Adafactor"),
    "muon": Base("pytorch_optimizer", "Muon", {"use_adjusted_lr": True}, ("lr", "adamw_lr")),
    "soap": Base("pytorch_optimizer", "SOAP"),
    "shampoo": Base(
        "pytorch_optimizer",
        "Shampoo",
        {"weight_decouple": True, "preconditioning_compute_steps": 10},
    ),
    "ademamix": Base("pytorch_optimizer", "AdEMAMix", {"weight_decouple": True}),
    "lion": Base("pytorch_optimizer", "Lion"),
}


def _split_for_muon(setup: Setup) -> list[dict[str, Any]]:
    """The groups with the hidden matrices apart from the rest, which Muon's AdamW steps."""
    import torch

    head = setup.model.get_output_embeddings()
    outer = {
        id(module.weight)
        for module in setup.model.modules()
        if module is head or isinstance(module, torch.nn.Embedding)
    }
    return [
        {**group, "params": params, "use_muon": use}
        for group in setup.groups
        for use in (True, False)
        if (params := [p for p in group["params"] if use == (p.ndim == 2 and id(p) not in outer)])
    ]


# ---- the table ----------------------------------------------------------------------------------


def all_options() -> list[str]:
    """Names of the options that any method has."""
    return list(dict.fromkeys(name for kind in METHODS.values() for name in kind.model_fields))


# How to write an option that has no default.
EXAMPLES = {
    "gain": "pace:gain=scalar:pullback=1",
    "return_kappa": "pace:return_kappa=0.7",
    "state": "pace:state=bf16",
    "half_life": "ema:half_life=200",
    "eps": "pace:eps=1e-6",
    "base": "pullback:muon",
}


def goes_into_method(name: str, keys: Collection[str], flag: str = "--method") -> str | None:
    """How to give an option of methods that is none of a command's keys, in one clause.

    Returns:
        None where the name is, or looks more like, a key; or looks like no option.
    """
    own = {*all_options()} - {*keys}
    meant = nearest(name, {*own, *keys}, 0.6)
    if meant is None or meant not in own:
        return None
    kind = next(kind for kind in METHODS.values() if meant in kind.model_fields)
    default = kind.model_fields[meant].default
    value = f"{default:g}" if isinstance(default, int | float) else "VALUE"
    example = EXAMPLES.get(meant, f"{kind.name}:{meant}={value}")
    return f"{meant} goes into the method, as in {flag} {example}"


def methods_help() -> str:
    """A paragraph a method: its name, its summary, and its options with their defaults."""
    lines = []
    for name, kind in METHODS.items():
        shown = []
        for option in kind.options()[:-1]:  # without lr
            default = kind.model_fields[option].default
            shown += [f"{option}={default:g}" if isinstance(default, int | float) else option]
        about = " ".join((kind.__doc__ or "").split())
        lines.append(f"{name}: {about}" + f" Options: {', '.join(shown)}." * bool(shown))
    return "\n\n".join([*lines, f"NAME of pullback: {', '.join(BASES)}."])


def beside_the_pull(pulled: Method, ema: Method) -> set[str]:
    """The options, besides the pull, in which a pulled AdamW and an EMA of AdamW differ.

    Where there are none, the EMA is what the pulled method would be without its pull: the same
    training, and the same average returned.
    """
    names = {"lr", "schedule", "twin_gain", "every", "state", "eps", "half_life"}
    names |= {"kappa"} if "kappa" in LR_SCHEDULES[ema.schedule].options else set()
    found = {name for name in names if pulled.get(name) != ema.get(name)}
    return found | ({"return_kappa"} if pulled.returned_kappa != ema.returned_kappa else set())


def method_of_row(row: Mapping[str, Any]) -> Method:
    """The method whose `Method.row` is in a row of a table; None and NaN stand for no value."""
    kind = METHODS[row["name"]]
    values = {k: row[k] for k in kind.model_fields if k in row}
    return kind(**{k: x for k, x in values.items() if x is not None and x == x})


def parse_method(text: str, *, schedule: str = "constant", **given: Any) -> Method:
    """A method from its text.

    Args:
        text: `name[:schedule][:option=value]...`.
        schedule: of a method that names none.
        given: the command's options, by name, for what text and method leave open. None is
            left out.

    Raises:
        InputError: an unknown name, base, schedule or option, one that is given twice, an option
            that the method does not have, or a value out of its range.
    """
    kind, own, taken = _read(text, schedule)
    left = {k: x for k, x in given.items() if k in taken and x is not None}
    try:
        return kind(**left | own)
    except InputError as error:
        raise InputError(f"method {text!r}: {error}") from error


def refuse_untaken(given: Iterable[str], texts: Collection[str], schedule: str) -> None:
    """Refuse options of a command that none of its methods takes from it.

    Args:
        given: names of options of methods, given on the command line.
        texts: the methods.
        schedule: of those that name none.

    Raises:
        InputError: names the first such option, and what to do.
    """
    taken = {name for text in texts for name in _read(text, schedule)[2]}
    for name in sorted(given):
        if name not in taken:
            why = "has its own, or none" if len(texts) == 1 else "have their own, or none"
            raise InputError(f"{name}: {', '.join(sorted(texts))} {why}; leave {name} out")


def _read(text: str, schedule: str) -> tuple[type[Method], dict[str, str], set[str]]:
    """A method's class, its own options, and the names of those that the command gives."""
    name, *parts = text.strip().split(":")
    if name not in METHODS:
        raise InputError(unknown(name, METHODS, "method"))
    kind = METHODS[name]
    schedules = LR_SCHEDULES if kind.takes_schedule else {}
    head: dict[str, str] = {}  # what is written without its name
    if "base" in kind.model_fields:
        head["base"] = parts.pop(0) if parts else ""
    own: dict[str, str] = {}
    for part in parts:
        option, equals, value = part.partition("=")
        if not equals:
            if part not in schedules:
                why = (
                    unknown(part, schedules, "schedule") if schedules else f"{name} has no schedule"
                )
                raise InputError(f"method {text!r}: {why}")
            option, value = "schedule", part
        given = own if equals else head
        if option in given:
            raise InputError(f"method {text!r} gives {option!r} twice")
        given[option] = value
    left = {"schedule"} if schedules and "schedule" not in head else set()
    head.setdefault("schedule", schedule if schedules else "constant")
    options = kind.options(_known_schedule(head["schedule"]))
    for option in own:
        if option not in options:
            raise InputError(f"method {text!r} has no option {option!r}; it has {options}")
    own |= head
    return kind, own, (kind.from_command(own) - own.keys()) | left
