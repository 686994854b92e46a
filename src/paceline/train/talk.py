"""`paceline chat`: talk to what was trained; and the samples in a run's report."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError
from transformers import AutoTokenizer, GenerationConfig

from . import InputError, folder, reporting
from .build import RunTrainer
from .evaluate import COMPARED, day_of, find_device
from .model import check_files, load_model
from .options import Chat
from .recipe import Recipe
from .sandbox import clock
from .terminal import quiet, say, tell

# Of the report: so many prompts of at most so many tokens, and tokens of each answer.
SAMPLES, PROMPT, ANSWER = 3, 192, 32
TEXT = 24  # tokens of a text that is continued, for pretrain
LOOKED_AT = 50  # sequences among which prompts are found that are short enough


# ---- text from a model --------------------------------------------------------------------------


@torch.no_grad()
def generate(
    model: Any, tokenizer: Any, ids: Sequence[int], most: int, temperature: float = 0.0
) -> list[int]:
    """What a model says after these tokens, without its end.

    Args:
        model: a causal language model; it computes in evaluation mode, and its mode is put back.
        tokenizer: of the model; its end of text ends an answer, and so do those of the model.
        ids: at least one token.
        most: tokens at most. It is fewer where the model's positions end.
        temperature: 0 takes the most probable token each time; else torch's generator draws.

    Raises:
        InputError: there is no position left.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = most if positions is None else min(most, positions - len(ids))
    if room < 1:
        raise InputError(
            f"{len(ids)} tokens fill the model's {positions} positions; an empty line begins anew"
        )
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    draw = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    settings = GenerationConfig(
        max_new_tokens=room,
        eos_token_id=sorted(ends) or None,
        pad_token_id=tokenizer.pad_token_id or next(iter(ends), 0),
        **(draw if temperature else {"do_sample": False}),
    )
    given = torch.tensor([[*ids]], device=model.device)
    own, was_training = model.generation_config, model.training
    model.generation_config = settings  # nothing of the model's own is mixed in
    try:
        found = model.eval().generate(given, attention_mask=torch.ones_like(given))
    finally:
        model.generation_config = own
        model.train(was_training)
    said: list[int] = found[0, len(ids) :].tolist()
    return said[:-1] if said and said[-1] in ends else said


# ---- paceline chat ------------------------------------------------------------------------------


class _Speaker:
    """A model, and its own side of the conversation."""

    def __init__(self, path: Path, options: Chat, device: str) -> None:
        name = str(path)
        folder.require_whole(path, "run")
        check_files("run", name)
        with reporting(f"run: {path} cannot be loaded", OSError, ValueError, SafetensorError):
            self.model = load_model(name, dtype="auto").to(device)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        self.options, self.turns = options, list[dict[str, str]]()

    def answer(self, question: str) -> str:
        """The answer by the chat template; or the plain continuation, where there is none."""
        tokenizer = self.tokenizer
        if tokenizer.chat_template is None:
            ids = tokenizer(question)["input_ids"]
        else:
            asked = [*self.turns, {"role": "user", "content": question}]
            with reporting("chat_template", Exception):  # a template can fail in any way
                text = tokenizer.apply_chat_template(
                    asked, tokenize=False, add_generation_prompt=True
                )
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        torch.manual_seed(self.options.seed)
        found = generate(self.model, tokenizer, ids, self.options.tokens, self.options.temperature)
        said = str(tokenizer.decode(found, skip_special_tokens=True)).strip("\n")
        if tokenizer.chat_template is not None:
            self.turns = [*asked, {"role": "assistant", "content": said}]
        return said


def talk(options: Chat, console: Console) -> int:
    """Answer line by line until the input ends; an exit status.

    Raises:
        InputError: the folder cannot be used.
    """
    quiet()
    paths = _models(options)
    device = find_device(options.device)
    speakers = {name: _Speaker(path, options, device) for name, path in paths.items()}
    has_template = next(iter(speakers.values())).tokenizer.chat_template is not None
    if is_terminal := sys.stdin.isatty():
        how = "by its chat template" if has_template else "no chat template: it continues your text"
        say(
            console, f"{next(iter(paths.values()))}, {how}. Ctrl-D ends, an empty line begins anew."
        )
    with clock(day_of(options.run)):
        try:
            for question in _lines(console if is_terminal else None):
                for name, speaker in speakers.items():
                    if not question:
                        speaker.turns = []
                        continue
                    try:
                        said = _printable(speaker.answer(question))
                    except InputError as error:  # a context that is full, a turn that is refused
                        tell(str(error))
                        continue
                    say(console, f"{name + ':':9} {said}" if len(speakers) > 1 else said)
        except KeyboardInterrupt:
            say(console, "")
            return 130
    return 0


def _printable(text: str) -> str:
    """A text with U+FFFD for what would steer the terminal, which a model may say, too."""
    return "".join(x if x in "\n\t" or x.isprintable() else "\ufffd" for x in text)


def _models(options: Chat) -> dict[str, Path]:
    """The folders to answer by, the returned model first."""
    run = options.run
    if not folder.is_begun(run):
        if not any((run / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise InputError(f"run: {run} is neither the folder of a run nor that of a model")
        if options.live:
            raise InputError(f"live: {run} is no run, and has one model; leave out --live")
        return {"model": run}
    if not folder.is_finished(run):
        raise folder.unfinished(run, "run")
    names = ("returned", "live") if options.live else ("returned",)
    return {name: run / COMPARED[name] for name in names}


def _lines(console: Console | None) -> Iterator[str]:
    """The lines of standard input, stripped; in a terminal, each after a mark."""
    while True:
        if console:
            console.print("> ", end="", markup=False)
        with reporting("the input is not UTF-8", UnicodeError):
            line = sys.stdin.readline()
            line.encode()  # in the C locale Python lets wrong bytes through
        if not line:
            return
        yield line.strip()


# ---- samples of a run ---------------------------------------------------------------------------


def samples(trainer: RunTrainer, recipe: Recipe) -> list[dict[str, str]]:
    """What live weights and returned model say to a few prompts of held-out data, greedily.

    Neither weights nor random numbers change. There are none where the model is in parts (FSDP),
    nor where it cannot generate, which a line says: the run has ended, and is worth more.

    Args:
        trainer: after its training.
        recipe: of the run.

    Returns:
        Of each prompt the texts `prompt`, `data` (what the data say there), `live`, `returned`.
    """
    if recipe.fsdp:
        return []
    try:
        return _samples(trainer, recipe)
    except Exception as error:  # of any model
        tell(f"the report has no samples: {' '.join(f'{type(error).__name__}: {error}'.split())}")
        return []


def _samples(trainer: RunTrainer, recipe: Recipe) -> list[dict[str, str]]:
    tokenizer: Any = trainer.processing_class
    model: Any = trainer.model
    prompts = list(islice(_prompts(trainer, recipe), SAMPLES))
    found = [{"prompt": _shown(tokenizer, a), "data": _shown(tokenizer, b)} for a, b in prompts]
    sides = [("live", trainer.live()), ("returned", trainer.averaged())]
    with torch.random.fork_rng(devices=()):
        for side, holding in sides:
            with holding, _precision(model, recipe):
                for sample, (prompt, _) in zip(found, prompts, strict=True):
                    said = generate(model, tokenizer, prompt, ANSWER)
                    sample[side] = _shown(tokenizer, said)
    return found


def _precision(model: Any, recipe: Recipe) -> Any:
    bf16 = recipe.precision == "bf16"
    return torch.autocast(model.device.type, torch.bfloat16) if bf16 else nullcontext()


def _shown(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip("\n")


def _prompts(trainer: RunTrainer, recipe: Recipe) -> Iterator[tuple[list[int], list[int]]]:
    """Of held-out sequences the tokens up to the first that is learned, and what comes then."""
    data: Any = trainer.eval_dataset
    collate: Any = trainer.data_collator
    model: Any = trainer.model
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = min(PROMPT, (positions or PROMPT + ANSWER) - ANSWER)
    for row in islice(data, LOOKED_AT):
        batch = collate([row])
        ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
        learned = [label != -100 for label in labels]
        if recipe.task == "pretrain":
            start, end = min(TEXT, len(ids) // 2), len(ids)
        elif True in learned:
            start = learned.index(True)
            end = learned.index(False, start) if False in learned[start:] else len(ids)
        else:
            continue
        if 0 < start <= longest:
            yield ids[:start], ids[start : min(end, start + ANSWER)]
