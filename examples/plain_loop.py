"""A training loop of one's own, returning the average; killed at any moment, it goes on exactly.

    pip install '.[train]'
    python examples/plain_loop.py --out runs/plain

Runs offline in seconds: a random GPT-2 of 10,000 parameters learns to count, from rows in which a
fifth of the numbers is wrong. Only the lines marked <- know of the average. Start it again after a
kill, and it ends bit for bit as if undisturbed.
"""

import argparse
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from paceline import PACE, load_checkpoint, save_checkpoint

STEPS = 300

parser = argparse.ArgumentParser()
parser.add_argument("--out", required=True, type=Path, help="folder to write the model to")
out = parser.parse_args().out
out.mkdir(parents=True, exist_ok=True)

torch.manual_seed(0)
config = GPT2Config(n_embd=24, n_layer=1, n_head=2, vocab_size=16, bos_token_id=0, eos_token_id=0)
model = GPT2LMHeadModel(config)
rows = (torch.randint(16, (256, 1)) + torch.arange(12)) % 16
rows = torch.where(torch.rand(rows.shape) < 0.2, torch.randint(16, rows.shape), rows)
train, held_out = rows[:224], rows[224:]

opt = PACE(model.parameters(), lr=3e-2)  # <- about four times AdamW's rate
scheduler = torch.optim.lr_scheduler.LinearLR(opt, 0.1, total_iters=15)  # a warm-up
order = torch.Generator().manual_seed(0)  # of the batches
run, step = out / "run.pt", 0
if run.exists():
    step = load_checkpoint(run, model, opt, scheduler=scheduler, order=order)["step"]

while step < STEPS:
    model.train()
    batch = train[torch.randint(len(train), (8,), generator=order)]
    model(batch, labels=batch).loss.backward()
    opt.step()
    opt.zero_grad()
    scheduler.step()
    step += 1
    if step % 100 == 0:
        save_checkpoint(run, model, opt, scheduler=scheduler, order=order, step=step)
        model.eval()
        with torch.no_grad():
            live = model(held_out, labels=held_out).loss
            with opt.averaged():  # <- the average is in the model, in here
                returned = model(held_out, labels=held_out).loss
        print(f"step {step}: live weights {live:.3f}, returned {returned:.3f}")

with opt.averaged():  # <- what to keep
    model.save_pretrained(out)
