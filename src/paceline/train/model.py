"""Models to start from: new ones and saved ones, with checks of both."""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.peft_utils import find_adapter_config_file

from . import InputError, reporting
from .manifest import read_json
from .merge import QUANTIZED_NAME
from .terminal import tell

# Objects of JSON in a folder, which the libraries take for granted.
OBJECTS = (
    *("config.json", "generation_config.json", "adapter_config.json"),
    *("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json"),
)
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SIZES = (  # of a configuration, by the names that transformers has for all models; and some others
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
    *("n_inner", "ffn_dim", "d_model", "d_ff"),
)
MAX_SIZE, MAX_LAYERS = 2**31 - 1, 10_000

# ---- saved models -------------------------------------------------------------------------------


def check_files(what: str, name: str) -> None:
    """Look into the JSON files of a folder of a model or tokenizer; its libraries trust them.

    Args:
        what: begins the messages.
        name: of the folder; other names are let through.

    Raises:
        InputError: a file is not JSON, or not what it should be.
    """
    for file in (*OBJECTS, *INDEXES):
        path = Path(name, file)
        if not path.is_file():
            continue
        try:
            values = read_json(path)
        except (InputError, RecursionError) as error:
            raise InputError(f"{what}: {path}: {_short(error)}") from error
        if not isinstance(values.get("model_type", ""), str):
            raise InputError(f"{what}: model_type in {path} must be a text")
        if file in INDEXES and not isinstance(values.get("weight_map"), dict):
            raise InputError(f"{what}: {path} has no weight_map of tensors to files")


def load_model(name: str, **options: Any) -> Any:
    """A causal language model from a folder or the Hub, with all weights as they are there.

    Args:
        name: of the folder, or on the Hub; of an adapter, its base model is checked, too.
        options: of `from_pretrained`.

    Raises:
        InputError: a tensor is missing, of another shape, or not finite; or its files are damaged.
        OSError, ValueError: it cannot be found, or transformers refuses it.
    """
    cannot = f"model: {name} cannot be loaded"
    model: Any
    # What transformers says of an adapter's loading says nothing of its base model.
    adapter = None if Path(name, "config.json").is_file() else find_adapter_config_file(name)
    if adapter is not None:
        base = read_json(Path(adapter)).get("base_model_name_or_path")
        if not isinstance(base, str):
            raise InputError(f"model: {adapter} names no base_model_name_or_path")
        model = load_model(base, **options)
        with one_line(cannot, but=(OSError, ValueError)):
            info = model.load_adapter(name).to_dict()
    else:
        with one_line(cannot, but=(OSError, ValueError)):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                name,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused here, by name
                trust_remote_code=False,
                **options,
            )
        model, info = loaded
    unused = sorted(info["unexpected_keys"])
    for tensor in unused:
        if QUANTIZED_NAME.search(tensor):
            raise InputError(f"model: {name} has the tensor {tensor!r} of a quantized model")
    for tensor, found, needed in sorted(info["mismatched_keys"]):
        raise InputError(
            f"model: tensor {tensor!r} of {name} is of shape {tuple(found)}, and its configuration "
            f"needs {tuple(needed)}"
        )
    missing = set(info["missing_keys"])
    tied = {tensor for tensor, to in model.all_tied_weights_keys.items() if to in missing}
    for tensor in sorted(missing - tied):
        more = f", nor {len(missing) - 1} others" if len(missing) > 1 else ""
        raise InputError(
            f"model: {name} has no tensor {tensor!r}{more}, which its configuration needs"
        )
    for error in info["error_msgs"]:
        raise InputError(f"model: {name}: {_short(error)}")
    weights = {tensor for tensor, _ in model.named_parameters()}
    prefix = f"{model.base_model_prefix}."  # which files of a model without a head lack
    weights |= {tensor.removeprefix(prefix) for tensor in weights}
    for file in Path(name).glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            for tensor in weights.intersection(opened.keys()):
                dtype = opened.get_slice(tensor).get_dtype()
                if dtype not in ("F64", "F32", "F16", "BF16"):
                    raise InputError(f"model: tensor {tensor!r} of {name} is quantized to {dtype}")
    if unused:
        tell(
            f"{name} has {len(unused)} tensors that its configuration does not use, such as "
            f"{unused[0]!r}; they are left out"
        )
    for tensor, x in model.state_dict().items():
        if not _is_finite(x):
            raise InputError(f"model: tensor {tensor!r} of {name} holds a NaN or infinity")
    return model


def load_to_score(path: Path, device: str = "cpu", attention: str | None = None) -> Any:
    """A model from a folder, with its weights as they are there, on a device to be scored on.

    Raises:
        InputError: it cannot be loaded.
    """
    options = {"attn_implementation": attention} if attention else {}
    with reporting(f"{path} cannot be loaded", OSError, ValueError, SafetensorError):
        return load_model(str(path), dtype="auto", **options).eval().to(device)


# peft's names of what it adds, in a model and not in its files.
ADAPTER_NAME = re.compile(r"(\.modules_to_save)?\.default(?=\.|$)")


def tensors_by_name(model: Any, names: Iterable[str]) -> dict[str, Tensor | None]:
    """A model's own parameters and buffers by the names that files and snapshots have for them.

    Args:
        model: as `load_model` has made it.
        names: of tensors in a file of it or of its adapter, or in a snapshot.

    Returns:
        None for a name that the model has no tensor for.
    """
    named: dict[str, Tensor] = dict(model.named_buffers(remove_duplicate=False))
    named |= dict(model.named_parameters(remove_duplicate=False))
    named |= {f"base_model.model.{name}": x for name, x in named.items()}
    prefix = f"{model.base_model_prefix}."  # which files of a model without a head lack
    short = {ADAPTER_NAME.sub("", name).removeprefix(prefix): x for name, x in named.items()}
    return {name: named.get(name, short.get(name)) for name in names}


# ---- new models ---------------------------------------------------------------------------------


def new_model(config: Any, **options: Any) -> Any:
    """A causal language model with random weights.

    Args:
        config: its configuration.
        options: of `from_config`.

    Raises:
        InputError: no such model can be made, or it needs more memory than there is.
    """
    with one_line("model"):
        with torch.random.fork_rng(devices=()), torch.device("meta"):
            parts = AutoModelForCausalLM.from_config(
                config, trust_remote_code=False, **options
            ).parameters()
        size = sum(x.numel() * x.element_size() for x in parts)
    memory = (
        os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if os.name == "posix" else size
    )
    if size > memory:
        raise InputError(
            f"model: its weights need {size / 1e9:.3g} GB, and this machine has {memory / 1e9:.3g}"
        )
    with one_line("model"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False, **options)


def check_sizes(config: Any) -> None:
    """Refuse a configuration with sizes below 1, or with more layers than could be made.

    Raises:
        InputError: names the size.
    """
    text = config.get_text_config()
    for name in SIZES:
        size = getattr(text, name, None)
        most = MAX_LAYERS if name == "num_hidden_layers" else MAX_SIZE
        if isinstance(size, int) and not 1 <= size <= most:
            own = text.attribute_map.get(name, name)
            raise InputError(f"config: {own} must be a whole number from 1 to {most}, got {size}")


def check_output(model: Any) -> None:
    """Compute two tokens, on the CPU, with the sizes and weights that a model has.

    Raises:
        InputError: it cannot be computed, or the result is not finite.
    """
    with one_line("model: its configuration cannot be computed"), torch.no_grad():
        training, _ = model.training, model.eval()
        logits = model(input_ids=torch.zeros((1, 2), dtype=torch.long)).logits
        model.train(training)
    if not _is_finite(logits):
        raise InputError("model: with its configuration it computes a NaN or infinity")


def _is_finite(x: Tensor) -> bool:
    return not x.is_floating_point() or bool(torch.isfinite(x).all())


@contextmanager
def one_line(what: str, but: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Raise errors of any kind, `but` for these, as an InputError of one line."""
    try:
        yield
    except Exception as error:
        if isinstance(error, (InputError, *but)):
            raise
        reason = f"{type(error).__name__}: {_short(error)}"
        if isinstance(error, UnpicklingError):  # which advises to trust the file
            reason = "a pickled file of it is damaged or holds more than tensors; use safetensors"
        raise InputError(f"{what}: {reason}") from error


def _short(error: object) -> str:
    """A message in one line without colours, and of long ones the beginning."""
    text = " ".join(re.sub(r"\x1b\[[\d;]*m", "", str(error)).split())
    return text if len(text) <= 300 else text[:299] + "…"


def make_gpt2(
    tokenizer: PreTrainedTokenizerBase,
    *,
    width: int,
    layers: int,
    heads: int,
    positions: int,
    seed: int,
) -> GPT2LMHeadModel:
    """A randomly initialised GPT-2 without dropout.

    Args:
        tokenizer: its size and its end of text are used.
        width: of the residual stream, a multiple of `heads`.
        layers: number of blocks.
        heads: attention heads of a block.
        positions: longest sequence, tokens.
        seed: of the initial weights.
    """
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=positions,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        activation_function="gelu_pytorch_tanh",  # GPT-2's own, in one kernel
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(seed)
    return GPT2LMHeadModel(config)
