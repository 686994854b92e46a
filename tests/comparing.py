"""A text and methods for the tests of the comparison and its trainer."""

import io
import os
import signal

import torch
from rich.console import Console
from safetensors.torch import load_file

from paceline.train.data import Corpus, blocks, make_tokenizer, tokenize
from paceline.train.methods import parse_method
from paceline.train.model import make_gpt2
from paceline.train.trainer import MethodTrainer, train_blocks

DEFAULTS = {"lr": 1e-2, "pullback": 3.0, "kappa": 0.3, "twin_gain": 0.5}

TEXT = "\n".join(f"line {i}: the quick brown fox jumps over {i * i} lazy dogs" for i in range(400))


def method_of(text):
    return parse_method(text, **DEFAULTS)


def schedule_of(text, warmup=0, steps=50):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=DEFAULTS["lr"])
    schedule = method_of(text).make_scheduler(optimizer, warmup, steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"] / DEFAULTS["lr"])
        optimizer.step()
        schedule.step()
    return rates


OTHER = TEXT[::-1]


def pretrained(folder, kill_after=None):
    """The tiny model that a comparison starts from, made in a cache of its own.

    Args:
        folder: of the cache.
        kill_after: SIGKILL this process once so many checkpoints are there.
    """
    from paceline.study.compare import Comparison, _pretrained

    os.environ["PACELINE_CACHE"] = str(folder)
    save = MethodTrainer._save_checkpoint
    saved = []

    def save_and_die(trainer, *args):
        save(trainer, *args)
        saved.append(args)
        if len(saved) == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)

    MethodTrainer._save_checkpoint = save_and_die
    said = io.StringIO()
    try:
        tokenizer = make_tokenizer([TEXT, OTHER], 300)
        tokens = tokenize(Corpus([TEXT], [OTHER]), tokenizer)
        sizes = {"width": 16, "layers": 1, "heads": 2, "positions": 16, "context": 16}
        options = Comparison(**sizes, pretrain_steps=20, eval_tokens=512)
        start = _pretrained(options, tokens, tokenizer, Console(file=said, width=300))
    finally:
        MethodTrainer._save_checkpoint = save
    return start, said.getvalue(), len(saved)


def tiny_runs(tmp_path_factory):
    """Tokens of two different texts, and a function that trains a fresh tiny model on them."""
    tokenizer = make_tokenizer([TEXT, OTHER], 300)
    tokens = load_file(tokenize(Corpus([TEXT], [OTHER]), tokenizer))

    def run(text, **options):
        model = make_gpt2(tokenizer, width=16, layers=1, heads=2, positions=16, seed=0)
        seen = {True: [], False: []}
        model.register_forward_pre_hook(
            lambda model, _, inputs: seen[model.training].append(inputs["input_ids"].clone()),
            with_kwargs=True,
        )
        options = {
            "steps": 12,
            "batch": 2,
            "context": 16,
            "warmup": 2,
            "weight_decay": 0.1,
            "max_grad_norm": 1.0,
            "seed": 3,
            "evaluations": 3,
            "eval_tokens": 512,
            **options,
        }
        methods = [method_of(part) for part in text.split(",")]
        trained = train_blocks(model, tokens, methods, tmp_path_factory.mktemp("log"), **options)
        trained.trainer.curve = trained.trainer.curves[0]
        return trained, seen

    return tokens, run


def loss_by_hand(model, tokens):
    """Mean over the predicted tokens of 32 blocks from all over the validation part."""
    ids = blocks(tokens["validation"], 16)
    ids = ids[:: max(1, len(ids) // 32)][:32]
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids, labels=ids).loss.item()
