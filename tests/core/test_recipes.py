"""The page of recipes: each block runs, and leaves the average of its iterates in its model."""

import importlib
import importlib.util
import re
from pathlib import Path

import pytest
import torch
import trainers
from datasets import Dataset
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from paceline.base import AveragedOptimizer

PAGE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
BLOCKS = {
    title: re.findall(r"(?s)```python\n(.*?)```", text)
    for title, text in re.findall(r"(?ms)^## ([^\n]+)\n(.*?)(?=^## |\Z)", PAGE)
}
# What CI does without, because it would bring other versions of what is tested here. Last run on
# the CPU with timm 1.0.31, fastai 2.8.12, litgpt 0.5.13 and torchao 0.18.0 beside torch 2.13.0.
# timm and fastai import torchvision 0.28.0, whose compiled operators do not load beside a torch of
# CPUs. For that run they were declared without a body; neither recipe calls one.
MODULES = {"timm": "timm", "fastai": "fastai", "LitGPT": "litgpt"}
MODULES |= {"torchao: AdamW with 8-bit state": "torchao"}
MODULES |= {"pytorch-ignite": "ignite", "Hydra, omegaconf": "hydra"}  # which CI has
TRL = "TRL: preferences and rewards"
KAPPA = 0.7  # of what is returned
pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries


@pytest.fixture
def iterates():
    """Of each parameter that an optimizer of ours steps, before the first step and after each."""
    found = {}

    def note(optimizer, *_):
        if isinstance(optimizer, AveragedOptimizer):
            for group in optimizer.param_groups:
                for p in group["params"]:
                    found.setdefault(p, []).append(p.detach().double())

    def note_first(optimizer, *_):
        if not found:
            note(optimizer)

    hooks = [
        register_optimizer_step_pre_hook(note_first),
        register_optimizer_step_post_hook(note),
    ]
    yield found
    for hook in hooks:
        hook.remove()


def must_hold_the_average(ended, iterates):
    """What a block has left: the optimizer's average in its model, by the rule's formula."""
    assert ended["opt"].swapped
    assert {p for p in ended["model"].parameters() if p.requires_grad} == set(iterates)
    far = 0.0
    for p, (average, *following) in iterates.items():
        assert len(following) >= 3
        for t, x in enumerate(following, 1):
            average = average + (1 + t) ** -KAPPA * (x - average)
        torch.testing.assert_close(p.double(), average, atol=2e-6, rtol=1e-5)  # float32's rounding
        far = max(far, float((x - average).abs().max()))
    assert far > 1e-4


@pytest.mark.parametrize("title", [x for x in BLOCKS if x != TRL])
def test_a_recipe_leaves_the_average_in_the_model(title, iterates):
    if title in MODULES and not importlib.util.find_spec(MODULES[title]):
        pytest.skip(f"{MODULES[title]} is not installed")
    [code] = BLOCKS[title]
    torch.manual_seed(0)
    ended = {"__name__": "recipe"}
    exec(code, ended)
    must_hold_the_average(ended, iterates)


def test_lora_around_4_bits(iterates, tmp_path):
    """QLoRA. Last run: bitsandbytes 0.50.2, on the CPU."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    size = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=16, num_hidden_layers=1, **size)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    four = BitsAndBytesConfig(load_in_4bit=True)
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=four, device_map="cpu"
    )
    assert type(base.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    [code] = BLOCKS["peft: LoRA and QLoRA"]
    code = re.sub(r"(?m)^base = .*$", "", code)
    code = code.replace('["c_attn"], fan_in_fan_out=True', '["q_proj", "up_proj"]')
    ended = {"base": base}
    exec(code, ended)
    must_hold_the_average(ended, iterates)


# ---- TRL's other trainers: the same block with another name ------------------------------------

PAIR = {"prompt": "1", "chosen": "3", "rejected": "5"}
UNWANTED = {"completion": "5", "label": False}
REWARD = {"reward_funcs": lambda completions, **_: [float(len(x)) for x in completions]}
SAMPLED = {"max_completion_length": 4, "num_generations": 4, "per_device_train_batch_size": 4}
TRAINERS = {  # module, a row of data, options of the configuration, arguments of the trainer
    "DPO": ("trl", PAIR, {}, {}),
    "KTO": ("trl", {"prompt": "1", "completion": "3"}, {}, {}),
    "GRPO": ("trl", {"prompt": "1"}, SAMPLED, REWARD),
    "RLOO": ("trl", {"prompt": "1"}, SAMPLED, REWARD),
    "ORPO": ("trl.experimental.orpo", PAIR, {}, {}),
    "CPO": ("trl.experimental.cpo", PAIR, {}, {}),
}


@pytest.mark.parametrize("name", TRAINERS)
def test_the_recipe_of_trl_is_one_for_all_of_its_trainers(name, iterates, tmp_path):
    module, row, options, arguments = TRAINERS[name]
    found = importlib.import_module(module)
    trainers.small().save_pretrained(tmp_path / "model")  # DPO reads the reference from there
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    rows = [row, row] if name != "KTO" else [row | {"label": True}, row | UNWANTED]
    common = {"max_steps": 3, "use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True}
    config = getattr(found, f"{name}Config")(str(tmp_path / "out"), **common | options)
    ended = {
        "model": model, "arguments": config, "data": Dataset.from_list(4 * rows),
        "tokenizer": trainers.tokens(),
    }  # fmt: skip
    [code] = BLOCKS[TRL]
    code = code.replace("from trl ", f"from {module} ").replace("DPOTrainer", f"{name}Trainer")
    for x in arguments:
        code = code.replace("optimizers=", f"{x}={x}, optimizers=")
    ended |= arguments
    exec(code, ended)
    assert f"{name}Trainer" in {kind.__name__ for kind in type(ended["trainer"]).__mro__}
    must_hold_the_average(ended, iterates)
