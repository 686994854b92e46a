"""TRL's SFTTrainer, returning the average: the three lines marked <- are all that is new.

    pip install '.[train]'
    python examples/sft_trainer.py --out runs/sft

Runs offline in seconds: a random GPT-2 of 10,000 parameters learns sums. The folder then loads with
`AutoModelForCausalLM.from_pretrained`; its checkpoints hold the average, too. With
`peft_config=LoraConfig(...)` the adapters are averaged, and nothing else changes.
"""

import argparse

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer

from paceline import PACE
from paceline.integrations.transformers import PaceTrainer  # <- 1

parser = argparse.ArgumentParser()
parser.add_argument("--out", required=True, help="folder to write the model to")
out = parser.parse_args().out


class Mine(PaceTrainer, SFTTrainer):  # <- 2: PaceTrainer comes first
    """SFTTrainer, or any other of TRL's."""


set_seed(0)
# Your model, tokenizer and data come here.
words = ["<end>", "<unknown>", "+", "=", *map(str, range(20))]
split = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unknown>"))
split.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=split, eos_token="<end>", pad_token="<end>", unk_token="<unknown>"
)
ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
config = GPT2Config(n_embd=24, n_layer=1, n_head=2, n_positions=16, vocab_size=24, **ends)
sums = [{"prompt": f"{a} + {b} =", "completion": f" {a + b}"} for a in range(10) for b in range(10)]
data = Dataset.from_list(sums).train_test_split(20, seed=0)

trainer = Mine(
    GPT2LMHeadModel(config),
    SFTConfig(out, max_steps=300, eval_strategy="steps", eval_steps=100, save_steps=100,
              lr_scheduler_type="constant_with_warmup", warmup_steps=15, report_to=[],
              activation_checkpointing=False, bf16=torch.cuda.is_available()),
    train_dataset=data["train"],
    eval_dataset=data["test"],
    processing_class=tokenizer,
    optimizer_cls_and_kwargs=(PACE, {"lr": 3e-2}),  # <- 3: about four times AdamW's rate
)  # fmt: skip
trainer.train()

metrics = trainer.evaluate()  # both models, on the same batches
print(f"live weights {metrics['eval_live_loss']:.3f}, returned {metrics['eval_loss']:.3f}")
trainer.save_model(out)  # the average; trainer.save_live_model(...) saves the live weights
