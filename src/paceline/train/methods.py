"""The methods and learning-rate schedules that can be compared, by name and options."""

from collections.abc import Callable
from typing import Annotated, Any, Literal, cast, get_args

import pytorch_optimizer
import schedulefree
import torch
from pydantic import Field
from torch.nn import Module, Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from ..auto import AUTO, AUTO_KAPPA, AUTO_RETURN_KAPPA
from ..averaging import BEMA, EMA, LAWA, SWA, Averaging, PowerEMA, Uniform
from ..optimizer import PACE
from ..pullback import Pullback
from . import InputError, Options

Name = Literal[
    "adamw",
    "ema",
    "uniform",
    "swa",
    "lawa",
    "bema",
    "lookahead",
    "schedule-free",
    "pace",
    "pullback",
]
Schedule = Literal["constant", "cosine", "wsd", "power", "twin"]
Rate = Annotated[float, Field(gt=0)]
Strength = Annotated[float, Field(ge=0)]
Power = Annotated[float, Field(ge=0, le=1)]
Gain = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
State = Literal["fp32", "bf16"]
WSD_DECAY_SHARE = 0.2  # of the steps, linearly to zero

# Optimizers that `pullback:NAME` goes around, from parameter groups and the learning rate. Not
# here is SophiaH: it differentiates the gradients, which no Trainer's loop keeps the graph for.
BASES: dict[str, Callable[[list[dict[str, Any]], float], Optimizer]] = {
    "sgd": lambda groups, lr: torch.optim.SGD(groups, lr=lr, momentum=0.9),
    "adam": lambda groups, lr: torch.optim.Adam(groups, lr=lr),
    "adamw": lambda groups, lr: torch.optim.AdamW(groups, lr=lr),
    "nadam": lambda groups, lr: torch.optim.NAdam(groups, lr=lr, decoupled_weight_decay=True),
    "radam": lambda groups, lr: torch.optim.RAdam(groups, lr=lr, decoupled_weight_decay=True),
    "adafactor": lambda groups, lr: torch.optim.Adafactor(groups, lr=lr),
    # One rate for both of its parts, with Muon's updates scaled like AdamW's.
    "muon": lambda groups, lr: pytorch_optimizer.Muon(
        groups, lr=lr, adamw_lr=lr, use_adjusted_lr=True
    ),
    "soap": lambda groups, lr: pytorch_optimizer.SOAP(groups, lr=lr),
    "shampoo": lambda groups, lr: pytorch_optimizer.Shampoo(
        groups, lr=lr, weight_decouple=True, preconditioning_compute_steps=10
    ),
    "ademamix": lambda groups, lr: pytorch_optimizer.AdEMAMix(groups, lr=lr, weight_decouple=True),
    "lion": lambda groups, lr: pytorch_optimizer.Lion(groups, lr=lr),
}
# What else a method has, and its default; None: left out; ...: from the command line.
OPTIONS: dict[str, dict[str, Any]] = {
    "adamw": {"eps": None},
    "ema": {"kappa": ..., "half_life": None, "eps": None, "state": None},
    "uniform": {"start": 0.75, "eps": None},
    "swa": {"start": 0.75, "every": 50, "eps": None},
    "lawa": {"window": 10, "every": 40, "eps": None},
    "bema": {"kappa": 0.5, "eta": 0.2, "every": None, "eps": None},
    "lookahead": {"k": 5, "alpha": 0.5},
    "schedule-free": {},
    "pace": {
        **{"c": ..., "kappa": ..., "every": None, "eps": None, "state": None},
        **{"gain": None, "return_kappa": None},
    },
    "pullback": {"c": ..., "kappa": ..., "gain": None, "return_kappa": None},
}


class Method(Options):
    """One way to train, and so one model to return.

    Written `name[:schedule][:option=value]...`, as in `pace:c=10:kappa=0.3`, `ema:twin:lr=3e-3` or
    `pullback:muon:c=1`.
    """

    name: Name
    schedule: Schedule = "constant"
    lr: Rate  # peak learning rate η
    base: str | None = None  # of pullback
    c: Strength | Literal["auto"] | None = None  # of the pull; it sets itself only in pace
    kappa: Power | None = None  # κ of the average, and of power and twin
    return_kappa: Power | None = None  # κ of a slower average to return than the pull's own
    g: Gain | None = None  # whose schedule `twin` is
    gain: Literal["adam", "own", "scalar"] | None = None  # of pullback
    start: Share | None = None  # of uniform and swa, as a share of the steps
    every: Count | None = None  # steps between the iterates that the average takes in
    window: Count | None = None  # snapshots of lawa
    half_life: Rate | None = None  # of ema instead of κ, steps
    eta: Power | None = None  # η of bema's correction
    k: Count | None = None  # steps between lookahead's
    alpha: Gain | None = None  # of lookahead
    eps: Rate | None = None  # ε beside Adam's √v̂, instead of 1e-8
    state: State | None = None  # what m, v and the average are kept in

    @property
    def label(self) -> str:
        """Name and the options that matter to it, but for the learning rate."""
        parts: list[str] = [self.name]
        parts += [self.base] if self.base else []
        parts += [self.schedule] if self.schedule != "constant" else []
        shown = {"c": self.c, "g": self.g, "κ": self.kappa, "η": self.eta, "start": self.start}
        shown |= {"every": self.every, "window": self.window, "half-life": self.half_life}
        shown |= {"k": self.k, "α": self.alpha, "ε": self.eps, "returned-κ": self.return_kappa}
        parts += [f"{k}={_short(v)}" for k, v in shown.items() if v is not None]
        parts += [f"gain={self.gain}"] if self.gain else []
        return " ".join(parts + (["state=bf16"] if self.state == "bf16" else []))

    @property
    def written(self) -> str:
        """The form that `parse_method` reads, all that it says spelled out."""
        parts = [self.name, *([self.base] if self.base else [])]
        parts += [self.schedule] if self.schedule != "constant" else []
        values = self.model_dump(exclude={"name", "base", "schedule"}, exclude_none=True)
        return ":".join([*parts, *(f"{k}={x}" for k, x in values.items())])

    @property
    def only_watches(self) -> bool:
        """Whether it is an average of plain AdamW's weights, or those themselves."""
        averages = ("adamw", "ema", "uniform", "swa", "lawa", "bema")
        return self.name in averages and self.state != "bf16"

    @property
    def trajectory(self) -> "Method":
        """The method whose live weights are this one's: AdamW, if it only watches, else itself."""
        if not self.only_watches:
            return self.model_copy(update={"return_kappa": None})
        follows = self.schedule in ("power", "twin")
        kappa = self.kappa if follows else None
        return Method(
            name="adamw",
            schedule=self.schedule,
            lr=self.lr,
            kappa=kappa,
            g=self.g,
            eps=self.eps,
        )

    def averaging(self, steps: int) -> Averaging | None:
        """The average that it returns after a run of so many steps, if that only watches."""
        if self.return_kappa is not None:
            return PowerEMA(self.return_kappa)
        since = round((self.start or 0) * steps)
        every = self.every or 1
        if self.name == "ema" and self.half_life is not None:
            return EMA(half_life=self.half_life)
        if self.name == "ema" and self.kappa is not None:
            return PowerEMA(self.kappa)
        if self.name == "bema" and self.kappa is not None and self.eta is not None:
            return BEMA(self.kappa, self.eta, every=every)
        if self.name == "lawa" and self.window is not None:
            return LAWA(self.window, every)
        return {"uniform": Uniform(since), "swa": SWA(since, every)}.get(self.name)


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def parse_method(text: str, *, schedule: Schedule = "constant", **defaults: float) -> Method:
    """A method from its written form; schedule and options that it leaves open are given beside it.

    Options that do not matter to the method are left out of it.

    Raises:
        InputError: an unknown name, base, schedule or option, one that the method does not have, or
            a value out of its range.
    """
    name, *parts = text.strip().split(":")
    if name not in get_args(Name):
        raise InputError(f"unknown method {name!r}; known: {', '.join(get_args(Name))}")
    values: dict[str, Any] = {"name": name}
    if name == "pullback":
        values["base"] = parts.pop(0) if parts else ""
        if values["base"] not in BASES:
            raise InputError(
                f"unknown optimizer {values['base']!r} in method {text!r}; "
                f"pullback:NAME knows {', '.join(BASES)}"
            )
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
    if own.get("c") == AUTO and name != "pace":
        raise InputError(f"method {text!r}: c=auto is of pace alone")
    if own.get("c") == AUTO and "kappa" not in own:  # as PACE has it
        own = {"kappa": str(AUTO_KAPPA), "return_kappa": str(AUTO_RETURN_KAPPA)} | own
    options = {"lr": ..., **OPTIONS[name]}
    if schedule in ("power", "twin"):  # whose κ is also the average's
        options["kappa"] = ...
    if schedule == "twin":
        options["g"] = ...
    for option in own:
        if option not in options:
            raise InputError(f"method {text!r} has no option {option!r}; it has {list(options)}")
    if "half_life" in own:
        if "kappa" in own or schedule in ("power", "twin"):
            raise InputError(f"method {text!r}: half_life and kappa are two ways to say one thing")
        del options["kappa"]
    for option, default in options.items():
        values[option] = own.get(option, defaults.get(option) if default is ... else default)
    try:
        return Method(**values, schedule=schedule)
    except InputError as error:
        raise InputError(f"method {text!r}: {error}") from error


def make_optimizer(
    method: Method,
    model: Module,
    *,
    decayed: set[str],
    weight_decay: float,
    warmup: int,
    steps: int,
    betas: tuple[float, float] = (0.9, 0.999),
    stochastic_round: bool = False,
) -> Optimizer:
    """The optimizer of a method, which keeps the average that the method returns.

    Args:
        method: what to step by.
        model: whose parameters are to be trained.
        decayed: names of the parameters that decay.
        weight_decay: of those, decoupled (but for sgd, adam and adafactor's own way).
        warmup: steps of warm-up, for optimizers that warm up by themselves.
        steps: of the run, for averages that begin at a share of it.
        betas: of Adam's moments; not for bases of pullback.
        stochastic_round: of bfloat16 parameters, where PACE writes them.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in named.items() if n in decayed], "weight_decay": weight_decay},
        {"params": [p for n, p in named.items() if n not in decayed], "weight_decay": 0.0},
    ]
    eps, pulls = method.eps or 1e-8, method.name in ("pace", "pullback")
    average = None if pulls else method.averaging(steps)
    if method.name == "pace" or average is not None:
        return PACE(
            groups,
            lr=method.lr,
            betas=betas,
            eps=eps,
            pullback=method.c or 0.0,
            gain=method.gain or "adam",
            return_kappa=method.return_kappa,
            state_dtype=torch.bfloat16 if method.state == "bf16" else None,
            stochastic_round=stochastic_round,
            averaging=average or PowerEMA(method.kappa or 0.0, every=method.every or 1),
        )
    if method.name == "schedule-free":
        free: Optimizer = schedulefree.AdamWScheduleFree(
            groups, lr=method.lr, betas=betas, warmup_steps=warmup
        )
        return free
    if method.name == "lookahead":
        assert method.k is not None
        assert method.alpha is not None
        base = torch.optim.AdamW(groups, lr=method.lr, betas=betas)
        return _Lookahead(base, k=method.k, alpha=method.alpha)
    if method.base is None:
        return torch.optim.AdamW(groups, lr=method.lr, betas=betas, eps=eps)
    if method.base == "muon":
        groups = _split_for_muon(groups, model)
    assert isinstance(method.c, float)
    assert method.kappa is not None
    return Pullback(
        BASES[method.base](groups, method.lr),
        method.c,
        PowerEMA(method.kappa),
        gain=method.gain or "adam",
        return_kappa=method.return_kappa,
    )


def _split_for_muon(groups: list[dict[str, Any]], model: Any) -> list[dict[str, Any]]:
    """Hidden matrices apart from the rest, which its AdamW steps."""
    embeddings = [m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    head = model.get_output_embeddings()
    outer = {id(p) for p in [*embeddings, *([] if head is None else [head.weight])]}

    def hidden(p: Parameter) -> bool:
        return p.ndim == 2 and id(p) not in outer

    return [
        {**group, "params": params, "use_muon": matrices}
        for group in groups
        for matrices in (True, False)
        if (params := [p for p in group["params"] if hidden(p) == matrices])
    ]


class _Lookahead(pytorch_optimizer.Lookahead):
    """Lookahead whose slow weights, the model that it returns, go in and out by the usual names."""

    swapped = False

    def eval(self) -> None:
        """Put the slow weights into the parameters."""
        if not self.swapped:
            self.backup_and_load_cache()
            self.swapped = True

    def train(self) -> None:
        """Put the fast weights back."""
        if self.swapped:
            self.clear_and_load_backup()
            self.swapped = False


def scheduler(method: Method, optimizer: Optimizer, warmup: int, steps: int) -> LambdaLR:
    """The method's learning-rate schedule, after a linear warm-up.

    `constant`; `cosine` to zero; `wsd` constant, then linear to zero over the last fifth; `power`
    lr·β_t and `twin` lr·twin_rate(β_t, g), with β_t = (1 + t)^-κ: what a pull amounts to as its
    gain saturates, and at a gain of g. The warm-up starts from a step at rate 0; Schedule-Free has
    its own, which is one step ahead.
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
        return ramp * (beta if method.g is None else twin_rate(beta, method.g))

    return factor


def twin_rate(beta: float, gain: float) -> float:
    """What a pull makes of the learning rate: β / (β + gain·(1 - β)), by the average's weight β.

    Where the optimizer takes the same step d every time, live weights and average come to move by
    that share of d; docs/theory.md has what else an EMA at this rate, the pull's twin, shares with
    it. `paceline.theory.twin_rate` is the same for arrays; it needs SciPy, which training does not.
    """
    return beta / (beta + gain * (1.0 - beta))
