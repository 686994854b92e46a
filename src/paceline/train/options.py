"""The options of the commands of this room; importing them loads neither torch nor transformers."""

import argparse
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tyro
from pydantic import Field, model_validator
from tyro.conf import Positional, arg

from . import InputError, NonNegative, Options, Positive, folder
from .recipe import Names, RecipeCommand

Processes = Annotated[int, Field(ge=1, le=1024)]
INGREDIENTS = arg(metavar="RUN…", help_behavior_hint="(required)")
CHECKPOINTS = arg(metavar="CHECKPOINT…", help_behavior_hint="(required)")
BATCH = 8  # sequences that `paceline eval` computes at a time
LENGTHS = ("steps", "epochs", "tokens")


def keeps_length(run: Path) -> InputError:
    """What to say where another length is given for a run that is resumed."""
    return InputError(
        f"resume: a run that is resumed keeps its length; a new run with --model {run} trains the "
        "finished model longer"
    )


class Train(RecipeCommand):
    """Train a language model by a recipe, and write the model to return.

    A recipe is a YAML file with the keys below, or the name of a shipped one. Options change its
    values, and work without a recipe, too. To train on several processes, start it by torchrun or
    accelerate launch (-m paceline train ...).
    """

    out: Path | None = None
    """Folder for the run, new or empty. Default: runs/<recipe>-<time>."""
    resume: Path | None = None
    """Folder of a run to continue exactly, by its own recipe."""
    from_checkpoint: Annotated[str | None, tyro.conf.arg(name="from")] = None
    """Name of the checkpoint to resume from, checkpoint-STEP; newer ones are set aside. Default: the newest."""
    find_lr: bool = False
    """Find the learning rate first, by a short run over rising rates. Made for a pull of gain 1: --method pace:gain=scalar:pullback=1."""
    print_recipe: Annotated[bool, tyro.conf.arg(name="print")] = False
    """Print the complete recipe and stop."""

    @model_validator(mode="before")
    @classmethod
    def _keeps_length(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Refuse another length of a resumed run before the lengths contradict each other."""
        if sum(values.get(name) is not None for name in LENGTHS) > 1 and values.get("resume"):
            raise keeps_length(values["resume"])
        return values

    @classmethod
    def starting(cls, arguments: list[str]) -> Self | None:
        """The options of the recipe that the arguments name, or of the run to resume."""
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--resume", nargs="?", type=Path)
        if run := parser.parse_known_args(arguments)[0].resume:
            return cls(resume=run, **folder.recipe_of(run))
        return super().starting(arguments)


class Show(RecipeCommand):
    """Show examples that a recipe trains on, with the tokens that count in the loss in green."""

    show: Positive = 3
    """Examples to show, >= 1."""


class Verify(RecipeCommand):
    """Check that a run of a recipe that is killed and resumed ends as one that is not.

    Trains by the recipe once without a break, and once killed with SIGKILL and resumed: in the
    middle of an evaluation, of a save, of a step, and so on. Prints what is equal bit for bit, and
    how far apart the rest is.
    """

    out: Path | None = None
    """Folder for both runs, new or empty. Default: runs/verify-<time>."""
    kills: Positive = 3
    """How often the second run is killed, >= 1."""
    processes: Processes = 1
    """Processes of both runs, from 1 to 1,024, started by torchrun."""
    resume_processes: Processes | None = None
    """Processes after the first kill, up to 1,024. If they differ, only the data order is exact."""


class Evaluation(Options):
    """Score a model on tasks of lm-eval; of a run, its live weights and its returned model.

    MODEL is the folder of a run of `paceline train`, whose live weights (live/) and returned model
    (model/) are compared on the same examples; or any folder of a model, or a name on the Hub.

    The number after ± is a standard error. That of a difference is paired: it is over the
    differences of each example's two scores. A metric that is not a mean over examples has none.

    Log-likelihoods are summed in float32, where lm-eval alone would round those of bfloat16 models
    to bfloat16.
    """

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """Folder of a run or of a model, or a name on the Hub."""
    tasks: Annotated[tuple[str, ...], Names]
    """Names of tasks, groups or tags, separated by commas."""
    include: Path | None = None
    """Folder with your own task files (YAML); tasks on local data need no network."""
    limit: Positive | None = None
    """First so many examples of each task, >= 1. Default: all."""
    few_shot: Annotated[int, Field(ge=0)] | None = None
    """Solved examples in each prompt, >= 0; zero-shot tasks get none. Default: the task's own."""
    batch: Positive = BATCH
    """Sequences computed at a time, >= 1."""
    chat: bool = False
    """Put each request into the model's chat template."""
    device: str | None = None
    """Device: cpu, cuda, cuda:1, mps, ... Default: an accelerator, if there is one."""
    out: Path | None = None
    """JSON file to write or replace. Default: eval.json in the folder of a run, otherwise none."""


class Scoring(Options):
    """Options that say what models are scored on."""

    data: Annotated[tuple[str, ...], Names] | None = None
    """Held-out data, given as --eval-data of paceline train is. Default: those of the run."""
    task: str | None = None
    """A task of lm-eval to choose by, in place of the loss: a name as for paceline eval."""
    metric: str | None = None
    """The task's metric as paceline eval prints it: a mean over examples. Default: its only one."""
    include: Path | None = None
    """Folder with your own task files (YAML)."""
    examples: Positive | None = None
    """Sequences or examples at most, >= 1. Default: as many as the run evaluated on, or all of the
    task."""
    device: str | None = None
    """Device: cpu, cuda, cuda:1, mps, ... Default: an accelerator, if there is one."""


class Choose(Scoring):
    """Choose the average that a run returns, on held-out data, after its training.

    RUN is the folder of a finished run of `paceline train`, with snapshots of averages
    (--snapshots 12, or --choose). Without snapshots, the averages in its checkpoints are taken.

    Tried are power EMAs of eight κ, rebuilt from the snapshots; the averages that were kept; the
    live weights; and the default, which is what the run returned. Each is scored by its loss on the
    first half of the held-out sequences, or with --task by a metric on the first half of a task's
    examples. The best becomes model/, and the former model is kept in model-before-choice/. Best
    and default are then scored on the other half, and the difference is printed with its 95 %
    interval (Student's t, paired by example).

    Where the interval of their difference on the first half contains 0 the curve is flat, and the
    default stays. So it does with fewer than 30 examples in a half.

    choice.json, choice.svg and choice.png have the scores. A choice can be made again.
    """

    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """Folder of a finished run."""
    rules: Annotated[tuple[str, ...], Names] | None = None
    """Averages to try in place of the eight, as in ema:half_life=200,uniform:start=900."""


class Soup(Scoring):
    """Average several models that were trained from one start, and write the result.

    RUN is the folder of a run of `paceline train`, of which the returned model is taken; or any
    folder of a model, a checkpoint or an adapter. Their rates, seeds or data differ, and they were
    trained from the same weights. Where the folders say that architecture, tokenizer, base model
    or start differ, they are refused.

    Each is scored by its loss on the first half of the held-out sequences, or with --task by a
    metric on the first half of a task's examples. The uniform soup is the mean of all. The greedy
    soup begins with the best one. From the second best to the worst, each is added if the mean
    with it has a better score. Both soups and the best one are then scored on the other half, and
    the differences from the best one are printed with their 95 % intervals (Student's t, paired by
    example).

    The model card and paceline.json of the result name all ingredients and their scores.
    """

    ingredients: Annotated[Positional[tuple[Path, ...]], INGREDIENTS]
    """Folders of runs, models or adapters, two or more."""
    out: Path
    """Folder to make for the result; it must not exist."""
    kind: Literal["greedy", "uniform"] = "greedy"
    """Which soup to write; both are scored."""
    recipe: str | None = None
    """Recipe by which --data are read, with its task and context. Default: that of the first
    run, or else conversations."""


class Merge(Options):
    """Merge checkpoints into one model, which is their average.

    Checkpoints are folders of a model (model.safetensors, whole or in shards), folders of an
    adapter (adapter_model.safetensors), or .safetensors files, all of one kind. One folder with
    checkpoint-N folders, or the folder of a run, stands for all of those. Those of a run hold what
    its method returns, which is mostly an average already; this is said. Checkpoints whose names
    differ only in numbers,
    such as step_500 and step_1000, are put in the order of the numbers. Others stay in the order
    given, in which the last number of a name must not fall.

    They count as the iterates of steps 1, 2, ..., and the first also as the weights before step 1.
    So start, every, window, lag and half_life of a rule count checkpoints. Rules are written
    name[:option=value]...:

    uniform[:start=0], the mean of all;

    ema[:kappa=0.5][:rate=1][:start=0][:every=1], or ema:beta=B or ema:half_life=H [:every=1];

    swa[:start=0][:every=1], the mean of every so-many-th;

    lawa:window=K[:every=1], the mean of the last K;

    bema[:kappa=0.5][:bias_power=0.2][:lag=10][:rate=1][:start=0][:every=1].

    Averages at a step, as a run with snapshots keeps them in averages/step-N, are recognised, alone
    or by the folder that holds them. From them the average of the rule is rebuilt at the last of
    their steps, whichever rule it is; its options then count steps, as in training. The expected
    error is printed, and above 5 % of the distance from the live weights it is refused.

    Sums are made in float32, or in float64 for float64 tensors, and rounded once. A
    counter, a single integer, is taken from the last checkpoint; other integers and masks must be
    equal in all. The last checkpoint's configuration and tokenizer are copied.
    """

    checkpoints: Annotated[Positional[tuple[Path, ...]], CHECKPOINTS]
    """Two or more, or one folder that holds them."""
    rule: str = "uniform"
    """Averaging rule; its start, every and so on count checkpoints."""
    out: Path
    """Folder to make, or file if the checkpoints are .safetensors files; it must not exist."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of floating-point tensors. Default: as in the checkpoints; float32 in a file rebuilt from averages."""
    model: Path | None = None
    """Folder of the model that averages at a step are of, for what was not trained. Default: model/ in their run."""


class Chat(Options):
    """Talk to the model of a run, or to any folder of a model.

    Each line is a turn, and the model answers by the chat template that it was trained with. A
    model without one, as after --task pretrain, continues the line as plain text, which is then not
    remembered. An empty line begins a new conversation; Ctrl-D ends. Questions can come through a
    pipe, one a line.
    """

    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """Folder of a finished run, or of a model."""
    live: bool = False
    """Answer by the live weights, too, below the returned model."""
    tokens: Positive = 128
    """Tokens of an answer at most, >= 1."""
    temperature: NonNegative = 0.0
    """Temperature of the sampling, >= 0; 0 takes the most probable token each time."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed >= 0 of the sampling."""
    device: str | None = None
    """Device: cpu, cuda, cuda:1, mps, ... Default: an accelerator, if there is one."""


class Doctor(Options):
    """Print versions, devices, kernels, cache and extras, in the form of a bug report.

    It takes no options, and works without any extra.
    """


class Completion(Options):
    """Print a script that completes commands and options in a shell.

    Make the folder first, by mkdir -p, where it is not there.

    For bash: paceline completion bash > ~/.local/share/bash-completion/completions/paceline

    For zsh, in a folder of $fpath: paceline completion zsh > ~/.zfunc/_paceline

    For fish: paceline completion fish > ~/.config/fish/completions/paceline.fish
    """

    shell: Positional[Literal["bash", "zsh", "fish"]]
    """bash, zsh or fish."""
