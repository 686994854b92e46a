"""Lightning: what is validated, saved and left in the module is the average; resume is exact."""

import copy
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("lightning.pytorch")

import lightning.pytorch as pl
from lightning.pytorch.callbacks import (
    Callback,
    Checkpoint,
    EarlyStopping,
    ModelCheckpoint,
    OnExceptionCheckpoint,
)
from lightning.pytorch.callbacks.weight_averaging import EMAWeightAveraging
from pytorch_optimizer import ScheduleFreeWrapper
from safetensors.torch import load_file

from paceline import PACE, snapshot_steps, snapshots
from paceline.integrations.lightning import ReturnAverage

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice

BATCHES, EPOCHS = 6, 3
OPTIMIZERS = {
    "pace": lambda params: PACE(params, lr=0.05, pullback=0.3),
    "schedule-free": lambda params: ScheduleFreeWrapper(torch.optim.SGD(params, lr=0.05)),
}


def data(part):
    generator = torch.Generator().manual_seed(part)
    x = torch.randn(4 * BATCHES, 3, generator=generator)
    return TensorDataset(x, x.sin().sum(1, keepdim=True))


def batches(part):
    return DataLoader(data(part), batch_size=4)


class Module(pl.LightningModule):
    """Regression by a small network; keeps the losses of its training batches."""

    def __init__(self, kind="pace"):
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
        self.seen = []

    def loss(self, batch):
        x, y = batch
        return (self.net(x) - y).square().mean()

    def training_step(self, batch, index):
        loss = self.loss(batch)
        self.seen.append(loss.item())
        return loss

    def validation_step(self, batch, index):
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch, index):
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch, index):
        return self.net(batch[0])

    def configure_optimizers(self):
        return OPTIMIZERS[self.kind](list(self.parameters()))

    def measured(self, part=1):
        """Its loss on held-out data, as it is now."""
        with torch.no_grad():
            return sum(self.loss(batch).item() for batch in batches(part)) / BATCHES


class Notes(Callback):
    """What was logged at the end of each validation, as other callbacks see it."""

    def __init__(self):
        self.found = []

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.found.append({k: x.item() for k, x in trainer.callback_metrics.items()})


def trainer(*callbacks, **options):
    defaults = {
        "accelerator": "cpu",
        "max_epochs": EPOCHS,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(x, Checkpoint) for x in callbacks),
    }
    return pl.Trainer(callbacks=list(callbacks), **defaults | options)


def by_hand():
    """A plain loop: module, optimizer, and losses of average and live weights after each epoch."""
    module = Module()
    opt = module.configure_optimizers()
    losses = []
    for _ in range(EPOCHS):
        for batch in batches(0):
            opt.zero_grad()
            loss = module.training_step(batch, 0)
            loss.backward()
            opt.step()
        live = module.measured()
        opt.eval()
        losses.append((module.measured(), live))
        opt.train()
    opt.eval()
    return module, opt, losses


def same(module, other):
    pairs = zip(module.state_dict().items(), other.state_dict().items(), strict=True)
    return all(k == name and torch.equal(x, y) for (k, x), (name, y) in pairs)


# Other optimizers, and validation of the live weights besides: tests/core/test_testing_hosts.py.
def test_validation_and_the_module_after_fit_are_the_average():
    module, notes = Module(), Notes()
    trainer(ReturnAverage(), notes).fit(module, batches(0), batches(1))
    expected, _, losses = by_hand()
    assert module.seen == expected.seen  # training is not disturbed
    assert [x["val_loss"] for x in notes.found] == pytest.approx([a for a, _ in losses])
    assert all(abs(a - b) > 1e-4 for a, b in losses)  # the two can be told apart
    assert all("live_val_loss" not in x for x in notes.found)
    assert same(module, expected)


def test_metrics_to_watch_are_the_averages(tmp_path):
    module = Module()
    best = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=-1)
    stop = EarlyStopping("val_loss", patience=EPOCHS)
    trainer(ReturnAverage(live=True), best, stop).fit(module, batches(0), batches(1))
    losses = [a for a, _ in by_hand()[2]]
    assert best.best_model_score.item() == pytest.approx(min(losses))
    assert stop.best_score.item() == pytest.approx(min(losses))
    assert len(best.best_k_models) == EPOCHS  # one a validation: none of live weights


@pytest.mark.parametrize("weights_only", [False, True])
def test_checkpoints_hold_the_average(tmp_path, weights_only):
    saved = ModelCheckpoint(tmp_path, save_weights_only=weights_only)
    module = Module()
    trainer(ReturnAverage(), saved).fit(module, batches(0), batches(1))
    loaded = Module.load_from_checkpoint(saved.best_model_path, weights_only=True)
    assert same(loaded, by_hand()[0])
    fresh = trainer()
    found = fresh.test(Module(), batches(1), ckpt_path=saved.best_model_path, verbose=False)
    assert found[0]["test_loss"] == pytest.approx(loaded.measured())
    predicted = fresh.predict(Module(), batches(1), ckpt_path=saved.best_model_path)
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(predicted), loaded.net(data(1).tensors[0]))


def test_resume_within_an_epoch_is_bit_for_bit(tmp_path):
    # Lightning begins the data anew there: these batches are all the same.
    few = TensorDataset(*(x[:4].repeat(BATCHES, 1) for x in data(0).tensors))
    train, whole, first, second = DataLoader(few, batch_size=4), Module(), Module(), Module()
    trainer(ReturnAverage()).fit(whole, train, batches(1))
    saved = ModelCheckpoint(tmp_path, every_n_train_steps=4)
    trainer(ReturnAverage(), saved, max_steps=4).fit(first, train, batches(1))
    notes = Notes()
    trainer(ReturnAverage(), notes).fit(second, train, batches(1), ckpt_path=saved.best_model_path)
    assert second.seen == whole.seen[4:]
    assert same(second, whole)
    assert notes.found[-1]["val_loss"] == pytest.approx(whole.measured())


def test_a_resume_without_the_callback_is_refused(tmp_path):
    saved = ModelCheckpoint(tmp_path, every_n_train_steps=4)
    trainer(ReturnAverage(), saved, max_steps=4).fit(Module(), batches(0))
    with pytest.raises(RuntimeError, match="averaged weights are in the model; call train"):
        trainer().fit(Module(), batches(0), ckpt_path=saved.best_model_path)


def test_a_checkpoint_of_live_weights_goes_on_with_the_callback(tmp_path):
    whole = Module()
    trainer(ReturnAverage()).fit(whole, batches(0))
    saved = ModelCheckpoint(tmp_path, every_n_train_steps=BATCHES)
    trainer(saved, max_steps=BATCHES).fit(Module(), batches(0))
    second = Module()
    trainer(ReturnAverage()).fit(second, batches(0), ckpt_path=saved.best_model_path)
    assert same(second, whole)


def kept(folder):
    return {path.parent.name: load_file(path) for path in folder.glob("*/average.safetensors")}


def test_snapshots_are_of_the_averages_at_their_steps(tmp_path, monkeypatch):
    """Batches that accumulate are one step; after a resume they are those of the whole run."""
    written = []
    save = snapshots.save_averages
    monkeypatch.setattr(
        snapshots, "save_averages", lambda *a, **k: written.append(save(*a, **k).name)
    )
    how = {"accumulate_grad_batches": 2, "default_root_dir": tmp_path}
    saved = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=5, save_top_k=-1)
    whole = Module()
    trainer(ReturnAverage(snapshots=3), saved, **how).fit(whole, batches(0))
    found = kept(tmp_path / "averages")
    assert written == [f"step-{n}" for n in snapshot_steps(EPOCHS * BATCHES // 2, 3)]
    assert sorted(found) == sorted(written)
    last = found[f"step-{EPOCHS * BATCHES // 2}"]
    assert all(torch.equal(p, last[name]) for name, p in whole.named_parameters())
    assert {x.dtype for x in last.values()} == {torch.float32}

    again = ReturnAverage(
        snapshots=3, snapshot_dir=tmp_path / "again", snapshot_dtype=torch.bfloat16
    )
    trainer(again, max_steps=5, accumulate_grad_batches=2).fit(Module(), batches(0))
    assert {x.dtype for x in kept(tmp_path / "again")["step-5"].values()} == {torch.bfloat16}

    path = next((tmp_path / "saved").glob("*step=5.ckpt"))
    trainer(ReturnAverage(snapshots=3), **how).fit(Module(), batches(0), ckpt_path=path)
    resumed = kept(tmp_path / "averages")
    assert resumed.keys() == found.keys()
    with pytest.raises(ValueError, match="has snapshots of an earlier run; resume that, or name"):
        trainer(ReturnAverage(snapshots=3), **how).fit(Module(), batches(0))


@pytest.mark.parametrize(
    ("make", "how", "message"),
    [
        (lambda: Pair(), {}, "snapshots needs one optimizer, got 2; paceline.snapshots.save_aver"),
        (lambda: Module("schedule-free"), {}, "snapshots needs PACE or Pullback with an average"),
        (Module, {"max_epochs": -1}, "snapshots needs max_steps or max_epochs, to know when"),
    ],
)
def test_snapshots_that_cannot_be_kept(make, how, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer(ReturnAverage(snapshots=3, snapshot_dir=tmp_path / "x"), **how).fit(
            make(), batches(0)
        )
    assert not (tmp_path / "x").exists()


class Pair(pl.LightningModule):
    """Two networks with an optimizer each, one of which averages, stepped by hand."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.one, self.other = nn.Linear(3, 1), nn.Linear(3, 1)

    def training_step(self, batch, index):
        for opt, net in zip(self.optimizers(), (self.one, self.other), strict=True):
            opt.zero_grad()
            self.manual_backward((net(batch[0]) - batch[1]).square().mean())
            opt.step()

    def validation_step(self, batch, index):
        for name in ("one", "other"):
            loss = (getattr(self, name)(batch[0]) - batch[1]).square().mean()
            self.log(f"val_{name}", loss)

    def configure_optimizers(self):
        adamw = torch.optim.AdamW(self.other.parameters(), lr=0.05)
        return PACE(self.one.parameters(), lr=0.05, pullback=0.3), adamw


def test_several_optimizers_and_manual_optimization(tmp_path):
    saved, notes = ModelCheckpoint(tmp_path), Notes()
    module = Pair()
    trainer(ReturnAverage(live=True), saved, notes).fit(module, batches(0), batches(1))
    last = notes.found[-1]
    assert last["val_one"] != last["live_val_one"]
    assert last["val_other"] == last["live_val_other"]
    assert same(Pair.load_from_checkpoint(saved.best_model_path, weights_only=True), module)
    opt = module.optimizers()[0].optimizer
    before = copy.deepcopy(module.one.state_dict())
    opt.train()
    assert not torch.equal(before["weight"], module.one.weight)


def test_bfloat16_autocast_and_accumulated_gradients(tmp_path):
    module, notes = Module(), Notes()
    trainer(ReturnAverage(live=True), notes, precision="bf16-mixed", accumulate_grad_batches=2).fit(
        module, batches(0), batches(1)
    )
    assert all(math.isfinite(x["val_loss"]) for x in notes.found)
    assert notes.found[-1]["val_loss"] != notes.found[-1]["live_val_loss"]
    opt = module.optimizers().optimizer
    assert {int(s["step"]) for s in opt.state_dict()["state"].values()} == {EPOCHS * BATCHES // 2}


def test_two_processes_give_one_processs_average(tmp_path):
    """Both ranks take the same batches, so that they are one."""
    module, saved = Module(), ModelCheckpoint(tmp_path)
    options = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False}
    trainer(ReturnAverage(), saved, **options).fit(module, batches(0), batches(1))
    loaded = Module.load_from_checkpoint(saved.best_model_path, weights_only=True)
    for x, y in zip(loaded.parameters(), by_hand()[0].parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("which", [1, 2])  # of the two validations, live weights and average
def test_after_an_error_a_file_holds_the_average_and_the_callback_goes_on(tmp_path, which):
    class Failing(Module):
        fails = which * BATCHES

        def validation_step(self, batch, index):
            self.fails -= 1
            if not self.fails:
                raise ZeroDivisionError
            super().validation_step(batch, index)

    module = Failing()
    saved = OnExceptionCheckpoint(tmp_path)
    callback = ReturnAverage(live=True)
    used = trainer(callback, saved, num_sanity_val_steps=0)
    with pytest.raises(ZeroDivisionError):
        used.fit(module, batches(0), batches(1))
    assert "log" not in vars(module)
    opt = used.optimizers[0]
    opt.eval()
    loaded = Failing.load_from_checkpoint(saved.ckpt_path, weights_only=True)
    assert same(loaded, module)
    again = Module()
    trainer(callback).fit(again, batches(0), batches(1))
    assert same(again, by_hand()[0])
    assert "save_checkpoint" not in vars(used)


def test_saved_by_hand_after_fit(tmp_path):
    module, used = Module(), trainer(ReturnAverage())
    used.fit(module, batches(0))
    used.save_checkpoint(tmp_path / "x.ckpt")
    loaded = Module.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    assert same(loaded, by_hand()[0])


def test_what_cannot_be_served_is_refused_before_anything_is_trained():
    class Plain(Module):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters())

    module = Plain()
    with pytest.raises(ValueError, match="needs an optimizer that averages.*got AdamW"):
        trainer(ReturnAverage()).fit(module, batches(0))
    assert not module.seen
    module = Module()
    with pytest.raises(ValueError, match="got EMAWeightAveraging|got WeightAveraging"):
        trainer(ReturnAverage(), EMAWeightAveraging()).fit(module, batches(0))
    assert not module.seen


def test_batchnorm_is_warned_of():
    class Normed(Module):
        def __init__(self):
            super().__init__()
            self.net.insert(1, nn.BatchNorm1d(8))

    with pytest.warns(UserWarning, match="running statistics"):
        trainer(ReturnAverage()).fit(Normed(), batches(0))


def test_the_example_runs(tmp_path):
    script = Path(__file__).parents[2] / "examples" / "lightning_trainer.py"
    command = [sys.executable, script, "--out", tmp_path / "run"]
    found = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert re.search(r"live weights 0\.\d+, returned 0\.\d+", found.stdout)
    assert list((tmp_path / "run").glob("*.ckpt"))
