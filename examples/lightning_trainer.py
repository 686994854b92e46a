"""Lightning's Trainer, returning the average: the lines marked <- are all that is new.

    pip install '.[lightning]'
    python examples/lightning_trainer.py --out runs/lightning

Runs offline in seconds: a small network learns a sine. The checkpoint's weights are the average.
"""

import argparse

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from paceline import PACE
from paceline.integrations.lightning import ReturnAverage  # <- 1


class Sine(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1))

    def loss(self, batch):
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def training_step(self, batch, index):
        return self.loss(batch)

    def validation_step(self, batch, index):
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        return PACE(self.parameters(), lr=1e-2)  # <- 2: it was AdamW, at a third


parser = argparse.ArgumentParser()
parser.add_argument("--out", required=True, help="folder to write checkpoints to")
out = parser.parse_args().out

pl.seed_everything(0)
x = torch.rand(1024, 1) * 6
data = TensorDataset(x, x.sin() + 0.1 * torch.randn_like(x))
train, held_out = torch.utils.data.random_split(data, (896, 128))

saved = ModelCheckpoint(out, monitor="val_loss")
trainer = pl.Trainer(
    max_epochs=10,
    callbacks=[ReturnAverage(live=True), saved],
    logger=False,  # <- 3
)
module = Sine()
trainer.fit(module, DataLoader(train, batch_size=32, shuffle=True), DataLoader(held_out, 128))

metrics = trainer.callback_metrics
print(f"live weights {metrics['live_val_loss']:.4f}, returned {metrics['val_loss']:.4f}")
best = Sine.load_from_checkpoint(saved.best_model_path, weights_only=True)  # the average, too
