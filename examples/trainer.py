"""transformers' Trainer, returning the average: the three lines marked <- are all that is new.

    pip install '.[train]'
    python examples/trainer.py --out runs/trainer

Runs offline in seconds: a random GPT-2 of 10,000 parameters learns to count, from rows in which a
fifth of the numbers is wrong. The folder then loads with `AutoModelForCausalLM.from_pretrained`;
its checkpoints hold the average, too.
"""

import argparse

import torch
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments, set_seed

from paceline import PACE
from paceline.integrations.transformers import PaceTrainer  # <- 1

parser = argparse.ArgumentParser()
parser.add_argument("--out", required=True, help="folder to write the model to")
out = parser.parse_args().out

set_seed(0)
# Your model and data come here: AutoModelForCausalLM.from_pretrained(...), load_dataset(...).
config = GPT2Config(n_embd=24, n_layer=1, n_head=2, vocab_size=16, bos_token_id=0, eos_token_id=0)
model = GPT2LMHeadModel(config)
rows = (torch.randint(16, (256, 1)) + torch.arange(12)) % 16
rows = torch.where(torch.rand(rows.shape) < 0.2, torch.randint(16, rows.shape), rows)
rows = [{"input_ids": row, "labels": row} for row in rows]

trainer = PaceTrainer(  # <- 2: it was Trainer
    model,
    TrainingArguments(
        out,
        max_steps=300,
        per_device_train_batch_size=8,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=15,
        eval_strategy="steps",
        eval_steps=100,
        save_steps=100,
        save_total_limit=2,
        report_to=[],
    ),
    train_dataset=rows[:224],
    eval_dataset=rows[224:],
    # <- 3. Three to five times AdamW's rate. {"pullback": 0.0} is AdamW's EMA.
    optimizer_cls_and_kwargs=(PACE, {"lr": 3e-2}),
)
# After a kill, trainer.train(resume_from_checkpoint=True) goes on bit for bit.
trainer.train()

metrics = trainer.evaluate()  # both models, on the same batches
print(f"live weights {metrics['eval_live_loss']:.3f}, returned {metrics['eval_loss']:.3f}")
trainer.save_model(out)  # the average; trainer.save_live_model(...) saves the live weights
