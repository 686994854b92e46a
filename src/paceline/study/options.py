"""The options of the commands of this room; importing them loads neither torch nor transformers."""

import inspect
from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tyro
from pydantic import Field, model_validator

from .. import defaults
from ..train import LARGEST, Gain, InputError, Number, Options, Positive
from ..train.methods import (
    WSD_DECAY_SHARE,
    Method,
    ScheduleName,
    goes_into_method,
    methods_help,
    parse_method,
    refuse_untaken,
    steps_of,
)
from ..train.recipe import Kappa, Names, Pull
from .runs import Run, share_runs

Model = Literal["gpt2", "small", "training", "large"]
Device = Literal["cpu", "cuda"]


class SharedOptions(Options):
    """Options of commands that run cells."""

    sections = {"storage": "storage and work"}  # noqa: RUF012 - a ClassVar of Options

    storage: str | None = None
    """Optuna storage that all workers share, such as postgresql://USER@HOST/NAME; optuna-dashboard shows it. Default: a file in the folder."""
    workers: Positive | None = None
    """Trainings at a time on this machine, >= 1. Default: one a processor core, or one with a GPU."""
    retry_failed: bool = False
    """Try failed trainings again."""


class Comparison(Options):
    """Fine-tune one small language model by several methods, and score the model each returns.

    Every method starts from the same weights and sees the same batches in the same order. The
    validation loss of live weights and returned model is measured on the same text.

    A method is written name[:schedule][:option=value]..., as in ema:twin:twin_gain=0.5,
    pace:pullback=1:kappa=0.5:lr=3e-3 or pace:pullback=auto. All have the option lr. With
    return_kappa a method returns another average than the one of kappa, which it pulls toward.
    Averages of AdamW share one training.

    The default rates and options were chosen on the validation part of the default text.
    """

    sections = {  # noqa: RUF012 - a ClassVar of Options
        "steps": "training",
        "text": "text and model",
        "evaluations": "evaluations and output",
    }

    methods: Annotated[tuple[str, ...], Names] = (
        "adamw:cosine",
        "ema",
        "schedule-free",
        "ema:power",
        "pace",
    )
    """Methods to compare, separated by commas."""
    lr: Annotated[tuple[Number, ...], Names] = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
    """Peak learning rates > 0, separated by commas; each method is run at each of them."""
    schedule: ScheduleName = "constant"
    pullback: Pull = None
    kappa: Kappa = None
    twin_gain: Gain = defaults.TWIN_GAIN
    """Gain in (0, 1] of the pull that the schedule twin stands for."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**32)], ...], Names] = (0,)
    """Seeds >= 0 of the order of the batches (and of the initial weights with --from-scratch), separated by commas; every method is run with each of them."""
    steps: Positive = 2000
    """Fine-tuning steps of each run, >= 1."""
    minutes: Annotated[float, Field(gt=0, le=10**9)] | None = None
    """Time for all fine-tuning runs together, minutes > 0. If they would take longer, a short measurement sets a smaller number of steps for all."""
    warmup: Annotated[float, Field(ge=0, le=LARGEST)] = defaults.WARMUP
    """Linear warm-up, >= 0 and less than four fifths of the steps: a number of steps, or below 1 a share of all steps."""
    batch: Positive = 4
    """Sequences a step, >= 1."""
    context: Annotated[int, Field(ge=2)] = 32
    """Tokens a sequence, from 2 to --positions."""
    weight_decay: Annotated[float, Field(ge=0)] = defaults.WEIGHT_DECAY
    """Decoupled weight decay >= 0, on matrices."""
    max_grad_norm: Annotated[float, Field(gt=0)] = defaults.MAX_GRAD_NORM
    """Gradients are clipped to this 2-norm, > 0."""

    text: tuple[Path, ...] | None = None
    """Files or folders to fine-tune on. Default: the sources of the installed torch package."""
    pretrain_text: tuple[Path, ...] | None = None
    """Files or folders to pretrain on. Default: the standard library's own sources."""
    text_mb: Annotated[float, Field(gt=0, le=10**6)] = 16.0
    """Million characters of each text to use at most, > 0 and at most 10^6; a random part of more."""
    vocabulary: Annotated[int, Field(ge=257, le=2**20)] = 1024
    """Entries of the byte-level BPE, from 257 to 2^20."""
    from_scratch: bool = False
    """Skip the pretraining and start from random weights."""
    pretrain_steps: Annotated[int, Field(ge=10)] = 2000
    """Steps of the pretraining (AdamW with wsd, 16 sequences of --positions tokens a step), >= 10. Its result is kept in the cache."""
    pretrain_lr: Number = 3e-3
    """Peak learning rate of the pretraining, > 0."""
    width: Positive = 64
    """Width of the GPT-2, a multiple of --heads."""
    layers: Positive = 2
    """Layers of the GPT-2, >= 1."""
    heads: Positive = 2
    """Attention heads of each layer, >= 1."""
    positions: Annotated[int, Field(ge=2)] = 64
    """Longest sequence that the model takes, tokens, >= 2."""

    evaluations: Positive = 8
    """Evaluations of live and returned weights, >= 1, after the one at the start."""
    eval_tokens: Positive = 16384
    """Validation tokens that an evaluation reads at most, >= 1, spread over the whole part."""
    workers: Positive | None = None
    """Runs at a time, >= 1. Default: one a processor core, or one with a GPU."""
    out: Path | None = None
    """Folder for the results, new or empty. Default: runs/<time>."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.context > self.positions:
            raise InputError(
                f"context: {self.context} tokens are more than the model's {self.positions} "
                "positions; give a smaller --context or a larger --positions"
            )
        if self.width % self.heads:
            raise InputError(f"width: {self.width} is not a multiple of {self.heads} heads")
        if self.from_scratch and self.pretrain_text is not None:
            raise InputError("pretrain-text: there is no pretraining with --from-scratch")
        for name in ("methods", "lr", "seeds", "text", "pretrain_text"):
            values = getattr(self, name)
            if values is not None and not len(set(values)) == len(values) > 0:
                shown = ", ".join(map(str, values)) or "nothing"
                raise InputError(f"{name}: give at least one, and each only once, got {shown}")
        names = [name for run in share_runs(self.compared, (0,)) for name in run.names]
        if len(set(names)) < len(names):
            raise InputError(f"methods: two of {', '.join(self.methods)} are the same run")
        check_warmup(self.warmup, self.steps)
        return self

    @classmethod
    def elsewhere(cls, name: str) -> str | None:
        """Of an option of methods that it goes into one of them."""
        return goes_into_method(name, cls.model_fields, "--methods")

    def refuse_unused(self, given: Collection[str]) -> None:
        """Refuse options of methods that no method takes."""
        names = {"lr", "pullback", "kappa", "twin_gain", "schedule"}
        refuse_untaken(names.intersection(given), self.methods, self.schedule)

    @cached_property
    def compared(self) -> list[Method]:
        """Every method at each of its rates."""
        compared: list[Method] = []
        given = self.model_dump(include={"pullback", "kappa", "twin_gain", "schedule"})
        for text in self.methods:
            found = (parse_method(text, lr=lr, **given) for lr in self.lr)
            in_steps = [x.in_steps(self.batch, self.batch * self.context) for x in found]
            compared += dict.fromkeys(in_steps)  # one, not one a rate, where the text has its own
        return compared

    @cached_property
    def runs(self) -> list[Run]:
        """Every training, seed by seed, so that an interruption leaves whole seeds."""
        return share_runs(self.compared, self.seeds)

    @property
    def shape(self) -> dict[str, int]:
        """The arguments of `make_gpt2`."""
        return self.model_dump(include={"width", "layers", "heads", "positions"})

    @property
    def recipe(self) -> dict[str, Any]:
        """The arguments of `train_blocks`."""
        names = {"batch", "context", "warmup", "weight_decay", "max_grad_norm", "eval_tokens"}
        return self.model_dump(include=names)


Comparison.__doc__ = f"{inspect.cleandoc(Comparison.__doc__ or '')}\n\n{methods_help()}"


def check_warmup(warmup: float, steps: int) -> None:
    """Refuse a warm-up that leaves no room for the schedule's end.

    Raises:
        InputError: it takes four fifths of the steps, or more.
    """
    ramp = steps_of(warmup, steps)
    if ramp and ramp >= (1 - WSD_DECAY_SHARE) * steps:
        raise InputError(
            f"warmup: {ramp} steps are too many for a run of {steps}; "
            "give a smaller --warmup, or more --steps or --minutes"
        )


class Sweep(SharedOptions):
    """Tune methods by one protocol, and compare them over seeds.

    The YAML file has the keys recipe and methods, and optionally start, change, baseline, sampler
    (grid, random or tpe), trials, seeds and tuning_seeds. The same command resumes after a kill,
    and shares the work with other machines that reach the storage. No training is repeated.
    """

    sweep: tyro.conf.Positional[Path]
    """YAML file of the sweep."""
    out: Path | None = None
    """Folder for tables and curves. Default: runs/<name of the file>."""
    show: bool = False
    """Run nothing; show the results so far."""


class ReportOptions(Options):
    """Make one interactive page of any runs: tables, curves, heat maps, configurations, data.

    It reads the folders that train, compare, sweep and figure write. The page is one file and needs
    no network.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs, or folders with such folders at any depth."""
    out: Path = Path("report.html")
    """The page, NAME.html. Its links to the data are relative to it."""


class Bench(Options):
    """Measure what a step of each optimizer costs, relative to torch's fused AdamW.

    In each round, every optimizer steps the same parameters and gradients, right after a fused
    AdamW, so that a busy machine slows both. Times are medians over the rounds; ratios are medians
    of the ratios to that AdamW. The byte floor is the time to read and write the bytes that a step
    needs, at the bandwidth of an in-place multiplication in the same rounds; "of a copy" is the
    bandwidth that the step reaches, as a share of that of a copy on the device in the same rounds.

    The models: gpt2, the tensors of GPT-2 124M; small, 2,000 tensors of at most 64k elements, like
    those of adapters; training, a small GPT-2 with its forward and backward pass; large, the
    tensors of SmolLM2-1.7B, for GPUs.
    """

    models: tuple[Model, ...] = ("gpt2", "small", "training")
    """Models to measure on."""
    only: tuple[str, ...] = ()
    """Optimizers besides fused AdamW. Default: all except Pullback, auto, BEMA, extra averages."""
    rounds: int = Field(default=15, ge=3)
    """Timed steps of each optimizer, >= 3, after two steps of warm-up."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads, >= 1. Default: torch's own choice."""
    device: Device | None = None
    """cpu or cuda. Default: cuda if there is a GPU."""
    out: Path | None = None
    """JSON file for the results. Default: the table is printed alone."""


class CheckDevice(Options):
    """Check PACE on this machine's accelerator, and measure it: one Markdown file to send in.

    Every form of the step and of the pull around another optimizer is held to the step in float64
    on the CPU; then swap, resume, guard, GradScaler, CUDA graphs and a compiled model. Last comes
    `paceline bench`, with the bandwidth of each optimizer as a share of that of a copy.
    """

    out: Path = Path("device.md")
    """Markdown file for the results."""
    rounds: int = Field(default=15, ge=3)
    """Timed steps of each optimizer, >= 3."""
    bench: bool = True
    """Measure, too, after the checks."""
    seconds: int = Field(default=240, ge=1)
    """What has not begun after so many seconds, >= 1, is left out and named. With 240 all takes
    under five minutes if no part takes one."""
