"""Recipes: all that decides a training run, typed, in one place; and files of them."""

import json
import re
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tyro
import yaml
from huggingface_hub.errors import StrictDataclassError
from pydantic import BeforeValidator, Field, model_validator
from transformers import AutoConfig
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from . import InputError, Options, unknown
from .methods import Gain, Method, Power, Rate, Schedule, Strength, parse_method

# ---- YAML ---------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML whose keys are given once, and in which 1e-3 is a number."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"{key!r} is given twice in one mapping")
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Writes what the loader reads: a text like 1e-3 in quotes."""


EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")  # PyYAML wants a dot and a sign
for side in (_Loader, _Dumper):
    side.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+.0123456789"))


def parse_yaml(text: str) -> Any:
    """What a YAML text says.

    Raises:
        ValueError: it is no YAML; in one line.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from error


# ---- the recipe ---------------------------------------------------------------------------------

Positive = Annotated[int, Field(ge=1)]
Number = Annotated[float, Field(gt=0)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
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
Split = BeforeValidator(lambda value: tuple(value.split(",")) if isinstance(value, str) else value)


class Recipe(Options):
    """What is trained on what, and how."""

    task: Literal["sft", "pretrain"] = "sft"
    """sft: conversations, with the loss on what the assistant says; pretrain: text, all of it."""

    model: str | None = None
    """Model to start from: a folder, or a name on the Hub."""
    config: Annotated[dict[str, Any], Mapping] | None = None
    """Configuration of a new model, model_type among it; or changes in that of --model."""
    from_scratch: bool = False
    """Start from random weights, with the configuration of --model."""
    tokenizer: str | None = None
    """Folder or name on the Hub; or bpe, learned from the data. Default: the model's."""
    vocabulary: Annotated[int, Field(ge=260)] = 4096
    """Entries of --tokenizer bpe, >= 260."""
    chat_template: str | None = None
    """chatml, or a Jinja file. Default: the tokenizer's own, and chatml where it has none."""

    data: Annotated[tuple[str, ...], Names, Split] | None = None
    """Separated by commas: files (JSONL, JSON, Parquet, CSV; text for pretrain), folders of them, names of Hub datasets, or what needs no network: chitchat for sft, python and torch for pretrain. Default: chitchat or python. Conversations are messages (role, content), ShareGPT's conversations (from, value), or prompt and completion."""
    data_config: str | None = None
    """Configuration (subset) of a Hub dataset."""
    split: str = "train"
    """Split of a Hub dataset."""
    text_column: str = "text"
    """Column of the text, for pretrain."""
    streaming: bool = False
    """Read a Hub dataset as it is needed, and do not store it."""
    eval_data: Annotated[tuple[str, ...], Names, Split] | None = None
    """As data, to evaluate on. Default: a part of the data is held out."""
    eval_split: str | None = None
    """Split of a Hub dataset to evaluate on."""
    eval_examples: Positive = 512
    """Sequences to evaluate on at most, >= 1; no more than a tenth of the data is held out."""
    examples: Positive | None = None
    """Examples (conversations, documents) to train on at most, >= 1."""
    context: Annotated[int, Field(ge=2)] = 1280
    """Tokens a sequence, >= 2. Conversations are cut off there, text is cut into such pieces."""
    packing: bool = False
    """Put several conversations into a sequence, where the model's attention keeps them apart."""

    method: str = "pace"
    """As in paceline compare: name[:option=value]... of pace, ema, adamw, schedule-free, uniform, swa, lawa, bema, lookahead or pullback:NAME."""
    lr: Rate = 1e-3
    """Peak learning rate, > 0."""
    schedule: Schedule = "constant"
    """constant; cosine (to 0); wsd (constant, a last fifth linear to 0); power; twin."""
    c: Strength = 0.1
    """Strength of the pull of pace and pullback, >= 0, in the unit of a gradient."""
    kappa: Power = 0.3
    """Power κ in [0, 1] of the average of pace, ema and pullback."""
    g: Gain = 1.0
    """Gain in (0, 1] that the schedule twin stands for."""
    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
    """β1 and β2 of Adam's moments, in [0, 1)."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled weight decay >= 0, on matrices."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradients are clipped to this 2-norm; 0: not at all."""
    warmup: Annotated[float, Field(ge=0)] = 0.0
    """Linear warm-up: a number of steps, or, below 1, a share of all."""
    batch: Positive = 128
    """Sequences a step, over all processes and accumulation, >= 1."""
    micro_batch: Positive | None = None
    """Sequences a process works on at a time, >= 1. Fewer take less memory; the result is the same. Default: batch, divided by the processes."""
    steps: Positive | None = None
    """Steps, >= 1. One of steps, epochs and tokens; by default one epoch."""
    epochs: Number | None = None
    """Passes over the data, > 0."""
    tokens: Number | None = None
    """Tokens to train on, > 0, as in 2.5e9."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of new weights and of the order of the data, >= 0."""

    precision: Literal["fp32", "bf16", "pure-bf16"] = "fp32"
    """fp32; bf16: computed in bfloat16, with weights in float32; pure-bf16: weights too, which the methods that keep an average then round stochastically."""
    attention: str | None = None
    """As transformers calls it: sdpa, flash_attention_2, eager, ... Default: its own choice."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, a third more time."""
    compile: bool = False
    """Compile the model."""
    fsdp: bool = False
    """With several processes, share out weights and optimizer among them (FSDP2) instead of keeping all in each (DDP)."""
    lora_rank: Annotated[int, Field(ge=0)] = 0
    """Train adapters of this rank only (LoRA) on all linear layers; 0: train the whole model."""
    lora_alpha: Positive = 16
    """LoRA's scale α, >= 1."""

    evaluations: Positive = 10
    """Evaluations of live and returned weights, besides the one at the start, >= 1."""
    save_every: Positive | None = None
    """Steps between checkpoints, >= 1. Default: at each evaluation."""
    keep_checkpoints: Positive = 2
    """Checkpoints kept, the last ones, >= 1."""
    log_every: Positive = 10
    """Steps between lines of metrics, >= 1."""
    loaders: Annotated[int, Field(ge=0)] = 0
    """Processes that prepare batches, >= 0."""
    report_to: Annotated[tuple[str, ...], Names, Split] = ("tensorboard",)
    """Where metrics go, besides metrics.jsonl: tensorboard, and what else transformers knows."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if sum(x is not None for x in (self.steps, self.epochs, self.tokens)) > 1:
            raise InputError(
                "steps, epochs, tokens: give one of them; None takes back a recipe's own"
            )
        if self.steps is not None and self.warmup >= max(1, self.steps):
            raise InputError(f"warmup: {self.warmup:g} steps leave nothing of {self.steps}")
        if self.streaming and self.epochs is not None:
            raise InputError("epochs: a stream has no known length; give steps or tokens")
        if self.streaming and self.steps is None and self.tokens is None:
            raise InputError("streaming: a stream has no known length; give steps or tokens")
        if self.model is None and (self.config is None or "model_type" not in self.config):
            raise InputError("model: give one, or the config of a new one with its model_type")
        if self.from_scratch and self.model is None:
            raise InputError("from_scratch: a config without a model is from scratch anyway")
        if self.model is None and self.tokenizer is None:
            raise InputError("tokenizer: a new model needs one; give a folder, a name, or bpe")
        if self.config is not None and "model_type" in self.config:
            _check_config(self.config)
        if self.packing and self.task == "pretrain":
            raise InputError("packing: text is always packed; it is for conversations")
        if self.lora_rank and (self.model is None or self.from_scratch):
            raise InputError("lora_rank: adapters of random weights learn nothing")
        if self.micro_batch is not None and self.batch % self.micro_batch:
            raise InputError(
                f"micro_batch: {self.micro_batch} does not divide the batch of {self.batch}"
            )
        for name in self.report_to:
            if name not in ("tensorboard", "none", *INTEGRATION_TO_CALLBACK):
                raise InputError(f"report_to: {unknown(name, INTEGRATION_TO_CALLBACK, 'name')}")
        for name in ("data", "eval_data"):
            if "" in (getattr(self, name) or ()) or getattr(self, name) == ():
                raise InputError(f"{name}: give at least one name, and no empty ones")
        if self.parsed.name == "pullback" and self.betas != (0.9, 0.999):
            raise InputError(f"betas: {self.method} has its own")
        return self

    @cached_property
    def parsed(self) -> Method:
        """The method, with all its options."""
        return parse_method(
            self.method, lr=self.lr, c=self.c, kappa=self.kappa, g=self.g, schedule=self.schedule
        )

    def to_yaml(self) -> str:
        """All keys with their values, as a recipe file."""
        values = json.loads(self.model_dump_json(include=set(Recipe.model_fields)))
        return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _check_config(config: dict[str, Any]) -> None:
    """Refuse what the configuration of this type has no such key for; transformers would keep it.

    Raises:
        InputError: an unknown type or key, or a value that it cannot have.
    """
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
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise InputError(f"config: {' '.join(str(error).split())}") from error


def shipped() -> dict[str, Path]:
    """The recipes that come with the package: name -> file."""
    folder = Path(str(files("paceline") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read_recipe(name: str) -> dict[str, Any]:
    """The keys and values of a recipe file, or of a shipped recipe by its name.

    Raises:
        InputError: there is none, or it is no YAML mapping of a recipe's keys.
    """
    path = shipped().get(name, Path(name))
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        hint = unknown(name, shipped(), "recipe")
        raise InputError(f"{hint} (or give the path of a YAML file)") from error
    except OSError as error:
        raise InputError(f"cannot read the recipe {name}: {error.strerror}") from error
    except ValueError as error:  # not UTF-8 among them
        raise InputError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise InputError(f"{path} is not a mapping of keys to values")
    for key in values:
        if key not in Recipe.model_fields:
            raise InputError(f"{path}: {unknown(key, Recipe.model_fields)}")
    return values
