"""Recipes: every setting of a training run, typed, with its role; and files of them."""

import datetime
import json
import re
from collections import Counter
from collections.abc import Collection
from enum import Enum
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import tyro
import yaml
from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, model_validator

from .. import defaults
from . import (
    LARGEST,
    BelowOne,
    Gain,
    InputError,
    NonNegative,
    Number,
    Options,
    Positive,
    Power,
    folder,
    read_small,
    reporting,
    unknown,
)
from .methods import (
    METHODS,
    Method,
    PulledMethod,
    ScheduleName,
    goes_into_method,
    parse_method,
    refuse_untaken,
)

if TYPE_CHECKING:
    from ..averaging import Averaging

# ---- YAML ---------------------------------------------------------------------------------------


MOST_VALUES = 100_000  # in a YAML text, those of an alias counted each time


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML in which 1e-3 is a number, and which refuses a key that is given twice.

    It refuses aliases that repeat each other to many values, or that hold themselves.
    """

    def get_single_node(self) -> Any:
        root = super().get_single_node()
        count, found = 0, [] if root is None else [root]
        while found:
            count += 1
            if count > MOST_VALUES:
                raise yaml.YAMLError(
                    f"it has more than {MOST_VALUES:,} values, or a part that holds itself"
                )
            value = found.pop().value
            if isinstance(value, list):  # of nodes, or of pairs of them
                found += [
                    x for part in value for x in (part if isinstance(part, tuple) else (part,))
                ]
        return root

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for key, count in keys.items():
            if count > 1:
                raise yaml.YAMLError(f"{key!r} is given twice in one mapping")
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """The loader's counterpart: it writes a text like 1e-3 in quotes."""


EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")  # PyYAML wants a dot and a sign
for side in (_Loader, _Dumper):
    side.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+.0123456789"))


def parse_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        ValueError: the text is not YAML; in one line.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except Exception as error:  # PyYAML raises many kinds, as for !!bool x
        raise ValueError(" ".join(f"{error}".split()) or type(error).__name__) from error


# ---- the recipe ---------------------------------------------------------------------------------

# On the command line one argument: names separated by commas, or a mapping in YAML.
Names = tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar="A,B,…",
    instance_from_str=lambda arguments: tuple(arguments[0].split(",")),
    is_instance=lambda value: isinstance(value, tuple),
    str_from_instance=lambda value: [",".join(map(str, value))],
)
Mapping = tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar="{KEY: VALUE, …}",
    instance_from_str=lambda arguments: parse_yaml(arguments[0]),
    is_instance=lambda value: isinstance(value, dict),
    str_from_instance=lambda value: [json.dumps(value)],
)
MethodHelp = tyro.conf.arg(
    help="name[:schedule][:option=value]..., as in pace:pullback=auto, pace:return_kappa=0.7 (which "
    "returns another average than it pulls toward) or ema:wsd:kappa=0.7; paceline compare --help "
    f"has all options. Names: {', '.join(METHODS)}."
)
# What `paceline.defaults` fills in where they are None.
Pull = Annotated[
    NonNegative | Literal["auto"] | None,
    tyro.conf.arg(
        help="Strength c >= 0 of the pull of pace and pullback, in the unit of a gradient; or auto, "
        "with which pace sets it itself and, unless kappa is given, pulls toward κ = 0.3 and "
        "returns κ = 0.6. Default: one gain of 1 for all coordinates, which has no unit."
    ),
]
Kappa = Annotated[
    Power | None,
    tyro.conf.arg(
        help="Power κ in [0, 1] of the average of pace, ema and pullback, which is returned unless "
        "the method has a return_kappa; and of the schedules power and twin. Default: the pull and "
        "the schedules have κ = 0.3, and κ = 0.7 is returned; with --pullback C both are κ = 0.5."
    ),
]
Text = BeforeValidator(lambda value: str(value) if type(value) is int else value)
Split = BeforeValidator(lambda value: tuple(value.split(",")) if isinstance(value, str) else value)


def _of_run(name: str | None, info: ValidationInfo) -> str | None:
    """A model or tokenizer, that of a run where its folder is named."""
    return name and folder.model_of_run(name, str(info.field_name))


OfRun = AfterValidator(_of_run)
DATA_FILES = (".jsonl", ".parquet", ".csv", ".txt")  # never recipes; a recipe may be JSON
TIMES_TO_CHOOSE = 12  # that averages are kept where --choose asks for some


class Role(Enum):
    """What a recipe's key is for; a key without a role decides the training and not the data."""

    DATA = "the data as they are prepared depend on it"
    METHOD = "a sweep varies it: its methods and seeds set it"
    MEASURING = "how often losses are measured and logged; no loss depends on it"
    RESUMABLE = "how the run is computed and saved; it may change on resume"


DATA, METHOD, MEASURING, RESUMABLE = Role


class Recipe(Options):
    """What is trained, on which data, and how."""

    sections = {  # noqa: RUF012 - a ClassVar of Options
        "task": "model",
        "data": "data",
        "method": "method",
        "batch": "batches and steps",
        "precision": "how it is computed",
        "evaluations": "evaluations, checkpoints and logs",
    }

    task: Annotated[Literal["sft", "pretrain"], DATA] = "sft"
    """sft: conversations, with the loss on the assistant's turns; pretrain: text, with the loss on all of it."""

    model: Annotated[str | None, OfRun, DATA] = None
    """Model to start from: a folder of a model or of a run, or a name on the Hub."""
    config: Annotated[dict[str, Any], Mapping] | None = None
    """Configuration of a new model, with its model_type; or changes to the configuration of --model."""
    from_scratch: bool = False
    """Start from random weights, with the configuration of --model."""
    tokenizer: Annotated[str | None, OfRun, DATA] = None
    """Folder or name on the Hub; or bpe, which is trained on the data. Default: the model's."""
    vocabulary: Annotated[int, Field(ge=260, le=2**20), DATA] = 4096
    """Entries of --tokenizer bpe, from 260 to 2^20."""
    chat_template: Annotated[str | None, DATA] = None
    """chatml, or a Jinja file. Default: the tokenizer's own, or chatml if it has none."""
    date: Annotated[datetime.date | None, DATA] = None
    """Day on the clock of a chat template that has one, as in 2026-11-29. Default: the day a run begins."""

    data: Annotated[Annotated[tuple[str, ...], Names, Split] | None, DATA] = None
    """Separated by commas: files (JSONL, JSON, Parquet, CSV; text for pretrain), folders of them, names of Hub datasets, or built-in data that need no network: chitchat for sft, python and torch for pretrain. Default: chitchat or python. Conversations are messages (role, content), ShareGPT's conversations (from, value), prompt and completion, or Alpaca's instruction, input and output."""
    data_config: Annotated[str | None, DATA] = None
    """Configuration (subset) of a Hub dataset."""
    split: Annotated[str, DATA] = "train"
    """Split of a Hub dataset."""
    text_column: Annotated[str, DATA] = "text"
    """Column of the text, for pretrain."""
    streaming: Annotated[bool, DATA] = False
    """Read a Hub dataset while training, without storing it."""
    eval_data: Annotated[Annotated[tuple[str, ...], Names, Split] | None, DATA] = None
    """Data to evaluate on, given as --data is. Default: a part of the data is held out."""
    eval_split: Annotated[str | None, DATA] = None
    """Split of a Hub dataset to evaluate on."""
    eval_examples: Annotated[Positive, DATA] = 512
    """Sequences to evaluate on at most, >= 1. At most a tenth of the data is held out."""
    examples: Annotated[Positive | None, DATA] = None
    """Examples (conversations, documents) to train on at most, >= 1."""
    skip_bad_rows: Annotated[bool, DATA] = False
    """Leave out rows that cannot be used, and say how many and why, instead of stopping at the first."""
    context: Annotated[int, Field(ge=2, le=2**30), DATA] = 1280
    """Tokens a sequence, >= 2. Longer conversations are cut off; text is cut into pieces of this length."""
    packing: Annotated[bool, DATA] = False
    """Put several conversations into one sequence; needs an attention that keeps them apart."""

    method: Annotated[str, MethodHelp, METHOD] = "pace"
    lr: Annotated[Number, METHOD] = defaults.LR
    """Peak learning rate, > 0. With the default pull, about four times the rate that AdamW likes."""
    schedule: Annotated[ScheduleName, METHOD] = "constant"
    pullback: Annotated[Pull, METHOD] = None
    kappa: Annotated[Kappa, METHOD] = None
    twin_gain: Annotated[Gain, METHOD] = defaults.TWIN_GAIN
    """Gain in (0, 1] of the pull that the schedule twin stands for."""
    betas: tuple[BelowOne, BelowOne] = defaults.BETAS
    """β1 and β2 of Adam's moments, each in [0, 1)."""
    weight_decay: NonNegative = defaults.WEIGHT_DECAY
    """Decoupled weight decay >= 0, on matrices."""
    max_grad_norm: NonNegative = defaults.MAX_GRAD_NORM
    """Gradients are clipped to this 2-norm, >= 0; 0 turns it off."""
    warmup: Annotated[float, Field(ge=0, le=LARGEST)] = defaults.WARMUP
    """Linear warm-up, >= 0: a number of steps, or below 1 a share of all steps."""
    batch: Annotated[Positive, DATA] = 128
    """Sequences a step, >= 1, summed over processes and accumulation."""
    average_batch: Positive | None = None
    """Batch, >= 1, that the average's options are for. With another --batch the averages change to stay the same function of the data. The average that a pull goes toward, --lr and --pullback do not; docs/averages.md has their rules. Default: batch."""
    micro_batch: Annotated[Positive | None, RESUMABLE] = None
    """Sequences that a process computes at a time, >= 1. Fewer take less memory and give the same result. Default: batch divided by the processes."""
    steps: Positive | None = None
    """Steps, >= 1. Give one of steps, epochs and tokens. Default: one epoch."""
    epochs: Annotated[float, Field(gt=0, le=10**6)] | None = None
    """Passes over the data, > 0 and at most 10^6."""
    tokens: Annotated[float, Field(gt=0, le=LARGEST)] | None = None
    """Tokens to train on, > 0, as in 2.5e9."""
    seed: Annotated[int, Field(ge=0, lt=2**32), METHOD] = 0
    """Seed >= 0 of new weights and of the order of the data."""

    precision: Literal["fp32", "bf16", "pure-bf16"] = "fp32"
    """fp32; bf16: computed in bfloat16, with weights in float32; pure-bf16: weights in bfloat16, too. Methods that keep an average then round the weights stochastically."""
    attention: Annotated[str | None, RESUMABLE] = None
    """Implementation by its name in transformers: sdpa, flash_attention_2, eager, ... Default: transformers' choice."""
    gradient_checkpointing: Annotated[bool, RESUMABLE] = False
    """Compute activations again in the backward pass, which takes less memory and a third more time."""
    compile: Annotated[bool, RESUMABLE] = False
    """Compile the model."""
    elastic: Annotated[str | None, Text] = None
    """Let each process train a model of its own, and have them meet every so many steps (paceline.Elastic): steps[:exchange][:option=value]..., as in 100, 100:diloco:outer_lr=0.5 or 20:average:pull=0.5. The exchange is easgd, diloco or average, and the center is the model to return. Start the processes by torchrun."""
    fsdp: Annotated[bool, RESUMABLE] = False
    """Shard weights and optimizer over the processes (FSDP2) instead of keeping all in each (DDP)."""
    lora_rank: Annotated[int, Field(ge=0, le=2**16)] = 0
    """Rank, from 0 to 2^16, of adapters (LoRA) on all linear layers, which alone are trained; 0 trains the whole model."""
    lora_alpha: Positive = 16
    """LoRA's scale α, >= 1."""

    evaluations: Annotated[Positive, MEASURING] = 10
    """Evaluations of live and returned weights, >= 1, after the one at the start."""
    save_every: Annotated[Positive | None, RESUMABLE] = None
    """Steps between checkpoints, >= 1. Default: at each evaluation."""
    keep_checkpoints: Annotated[Positive, RESUMABLE] = 2
    """The last so many checkpoints are kept, >= 1."""
    snapshots: Annotated[int, Field(ge=0, le=10**4), RESUMABLE] = 0
    """Times that averages are kept in averages/, closer together toward the end, so that `paceline average` can rebuild others; 0: none. With a second average (return_kappa=0.9) more can be rebuilt."""
    snapshot_dtype: Annotated[Literal["float32", "bfloat16"], RESUMABLE] = "float32"
    """Dtype of those. bfloat16 takes half the room, and loses what a low learning rate changes."""
    choose: Annotated[bool, RESUMABLE] = False
    """Choose the average to return after the training, on half of the evaluation data, as `paceline choose` does. It keeps 12 snapshots where --snapshots is 0, and beside the method's averages a slow one, κ = 0.9, if there is none."""
    log_every: Annotated[Positive, MEASURING] = 10
    """Steps between lines of metrics, >= 1."""
    loaders: Annotated[int, Field(ge=0, le=256), RESUMABLE] = 0
    """Processes that prepare batches, from 0 to 256."""
    report_to: Annotated[tuple[str, ...], Names, Split, RESUMABLE] = ("tensorboard",)
    """Where metrics go besides metrics.jsonl: tensorboard, or another integration of transformers."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if sum(x is not None for x in (self.steps, self.epochs, self.tokens)) > 1:
            raise InputError(
                "steps, epochs, tokens: give only one of them; None takes back a recipe's value"
            )
        if self.steps is not None and self.warmup >= self.steps:
            raise InputError(
                f"warmup: {self.warmup:g} steps must be fewer than the {self.steps} steps of the run"
            )
        if self.streaming and self.steps is None and self.tokens is None:
            name = "streaming" if self.epochs is None else "epochs"
            raise InputError(f"{name}: a stream has no known length; give steps or tokens")
        if self.model is None and (self.config is None or "model_type" not in self.config):
            raise InputError("model: give one, or give a config with the model_type of a new one")
        if self.from_scratch and self.model is None:
            raise InputError(
                "from_scratch: it needs a --model; a config alone starts from random weights anyway"
            )
        if self.model is None and self.tokenizer is None:
            raise InputError("tokenizer: a new model needs one; give a folder, a name, or bpe")
        if self.config is not None and "model_type" in self.config:
            _check_config(self.config)
        if self.packing and self.task == "pretrain":
            raise InputError("packing: it is for conversations; text is always packed")
        if self.lora_rank and (self.model is None or self.from_scratch):
            raise InputError("lora_rank: adapters of random weights learn nothing")
        if self.micro_batch is not None and self.batch % self.micro_batch:
            raise InputError(
                f"micro_batch: {self.micro_batch} does not divide the batch of {self.batch}"
            )
        with reporting("average_batch", ValueError):
            self.rules(10**6)
        if self.times_kept and not self._keeps_averages:
            raise InputError(
                f"{'choose' if self.choose else 'snapshots'}: {self.method} keeps no average that others can be rebuilt from; pace, "
                "pullback, ema, uniform and swa do"
            )
        if options := self.elastic_options:
            from ..options import check_exchange

            with reporting("elastic", ValueError):
                check_exchange(dict(options))
            if self.fsdp:
                raise InputError("elastic: each process holds its model alone; leave out fsdp")
            if self.times_kept:
                raise InputError(
                    "elastic: its averages cannot be rebuilt; leave out snapshots and choose"
                )
            holds = self.parsed.is_saturated or self.parsed.get("pullback") == defaults.AUTO
            if holds and options["every"] > 1:
                raise InputError(
                    f"elastic: {self.parsed.label!r} holds workers at their center, which stands "
                    "still between exchanges; give --pullback C, or --method adamw"
                )
            rules = self.rules(10**6)
            if rules and not self.parsed.pulls and options["exchange"] != "average":
                raise InputError(
                    f"elastic: {options['exchange']} returns its center, and no average of "
                    f"{self.parsed.label!r}; give --method adamw, or the exchange average"
                )
        if "none" in self.report_to and len(self.report_to) > 1:
            raise InputError("report_to: none goes alone")
        if {*self.report_to} - {"tensorboard", "none"}:
            _check_reporters(self.report_to)
        for name in ("data", "eval_data"):
            if "" in (getattr(self, name) or ()) or getattr(self, name) == ():
                raise InputError(f"{name}: give at least one name, and no empty ones")
        if self.parsed.get("base") and self.betas != defaults.BETAS:
            raise InputError(
                f"betas: they do not reach the optimizer in {self.method!r}; leave them out"
            )
        return self

    @classmethod
    def elsewhere(cls, name: str) -> str | None:
        """Of an option of methods that it goes into the method."""
        return goes_into_method(name, cls.model_fields)

    @property
    def data_names(self) -> tuple[str, ...]:
        """What it trains on, also if that is the default."""
        return self.data or (("chitchat",) if self.task == "sft" else ("python",))

    def method_of(self, text: str) -> Method:
        """The method of a text, with the recipe's options where it leaves them open."""
        given = {name: getattr(self, name) for name in keys_with(METHOD) - {"method", "seed"}}
        samples = self.average_batch or self.batch
        full = self.task == "pretrain" or self.packing  # sequences, of as many tokens as --context
        return parse_method(text, **given).in_steps(
            samples, samples * self.context if full else None
        )

    @cached_property
    def parsed(self) -> Method:
        """The method, with all its options."""
        return self.method_of(self.method)

    @property
    def scale(self) -> float:
        """The batch over the one that the average's options are for."""
        return self.batch / (self.average_batch or self.batch)

    def rules(self, steps: int) -> "list[Averaging]":
        """The averages that the optimizer keeps in a run of so many steps, the returned one last."""
        return self.parsed.rules(steps, self.scale)

    @property
    def elastic_options(self) -> dict[str, Any] | None:
        """What `elastic` says, as options of `paceline.Elastic`, or None.

        Raises:
            InputError: a part is none of them.
        """
        if self.elastic is None:
            return None
        from ..options import EXCHANGE

        every, *parts = self.elastic.split(":")
        given: dict[str, Any] = {"every": parse_yaml(every)}
        for i, part in enumerate(parts):
            name, equals, value = (
                part.partition("=") if "=" in part or i else ("exchange", "=", part)
            )
            if not equals or name not in ("every", *EXCHANGE):
                raise InputError(f"elastic: {unknown(name, ('every', *EXCHANGE), 'option')}")
            if name in given:
                raise InputError(f"elastic: give {name} once, got {self.elastic!r}")
            given[name] = value if name == "exchange" else parse_yaml(value)
        return EXCHANGE | given

    @property
    def times_kept(self) -> int:
        """How often averages are kept on the way."""
        return self.snapshots or (TIMES_TO_CHOOSE if self.choose else 0)

    @property
    def _keeps_averages(self) -> bool:
        """Whether the method's optimizer keeps an average without further tensors."""
        rule = self.parsed.averaging(10**6)
        return isinstance(self.parsed, PulledMethod) or (rule is not None and not rule.keeps)

    def to_yaml(self) -> str:
        """All keys with their values, as a recipe file."""
        values = json.loads(self.model_dump_json(include=set(Recipe.model_fields)))
        return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


@cache
def keys_with(*roles: Role) -> frozenset[str]:
    """The recipe's keys that have one of the roles."""
    fields = Recipe.model_fields.items()
    return frozenset(name for name, x in fields if any(role in x.metadata for role in roles))


RESUMABLE_CHANGES = keys_with(RESUMABLE)


def _check_reporters(names: tuple[str, ...]) -> None:
    """Refuse names of integrations that transformers does not have."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    known = {"tensorboard", "none", *INTEGRATION_TO_CALLBACK}
    for name in names:
        if name not in known:
            raise InputError(f"report_to: {unknown(name, INTEGRATION_TO_CALLBACK, 'name')}")


def _check_config(config: dict[str, Any]) -> None:
    """Refuse keys that a configuration's model_type lacks; transformers would keep them silently."""
    from transformers import AutoConfig

    kind = config["model_type"]
    try:
        default = AutoConfig.for_model(str(kind))
    except ValueError as error:
        raise InputError(f"config: transformers has no model_type {kind!r}") from error
    known = {*default.to_dict(), *default.attribute_map}
    for key in config:
        if key not in known:
            raise InputError(f"config: {unknown(str(key), known)}")
    try:
        AutoConfig.for_model(**config)
    except Exception as error:  # of many kinds, as of a division by 0
        raise InputError(f"config: {' '.join(str(error).split())}") from error


def shipped() -> dict[str, Path]:
    """The recipes that come with the package: name -> file."""
    place = Path(str(files("paceline") / "recipes"))
    return {path.stem: path for path in sorted(place.glob("*.yaml"))}


def read_recipe(name: str) -> dict[str, Any]:
    """The keys and values of a recipe file, or of a shipped recipe by its name.

    Raises:
        InputError: it cannot be found or read, or is not a YAML mapping of a recipe's keys.
    """
    path = shipped().get(name, Path(name))
    kind = path.suffix.lower()
    is_data = f"{name} is data; give it by --data"
    if kind in DATA_FILES:
        raise InputError(is_data)
    try:
        values = parse_yaml(read_small(path))
    except FileNotFoundError as error:
        hint = unknown(name, shipped(), "recipe")
        raise InputError(f"{hint} (or give the path of a YAML file)") from error
    except IsADirectoryError as error:
        how = "by --data or --model"
        if folder.is_begun(path):
            how = f"by --model to start from its model, by --resume to go on, or {path}/{folder.RECIPE}"
        raise InputError(f"{name} is a folder and no recipe; give it {how}") from error
    except OSError as error:
        raise InputError(f"cannot read the recipe {name}: {error.strerror}") from error
    except ValueError as error:  # not UTF-8 among them
        if kind == ".json":
            raise InputError(is_data) from error
        raise InputError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise InputError(
            is_data if kind == ".json" else f"{path} is not a mapping of keys to values"
        )
    for key in values:
        if key not in Recipe.model_fields:
            raise InputError(f"{path}: {Recipe.unknown_key(key)}")
    return values


class RecipeCommand(Recipe):
    """Options of a command that works by a recipe, whose values the other options change."""

    recipe: Annotated[
        tyro.conf.Positional[str | None],
        tyro.conf.arg(help=f"YAML file, or one of the shipped: {', '.join(shipped())}."),
    ] = None

    @classmethod
    def starting(cls, arguments: list[str]) -> Self | None:
        """The options with the values of the recipe that the arguments name; None without one."""
        before = ""
        for name in arguments:
            option = before.startswith("--") and "=" not in before
            field = cls.model_fields.get(before.strip("-").removeprefix("no-").replace("-", "_"))
            switch = before == "--print" or (field is not None and field.annotation is bool)
            if not name.startswith("-") and (switch or not option):
                return cls(**{"recipe": name, **read_recipe(name)})
            before = name
        return None

    def refuse_unused(self, given: Collection[str]) -> None:
        """Refuse options of methods that the recipe's method does not take."""
        names = (keys_with(METHOD) - {"method", "seed"}) & set(given)
        refuse_untaken(names, [self.method], self.schedule)

    @property
    def plain(self) -> Recipe:
        """The recipe alone."""
        return Recipe(**self.model_dump(include=set(Recipe.model_fields)))
