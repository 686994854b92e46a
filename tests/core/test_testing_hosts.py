"""The table of docs/hosts.md, by the conformance kit: each row is a run of it."""

import re
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import trainers
from accelerate import Accelerator
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from problems import RETURNS
from pytorch_optimizer import ScheduleFreeWrapper
from safetensors.torch import load_file
from sharding import KIT, pass_the_kit
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import TrainingArguments

from paceline import PACE, Pullback, load_checkpoint, save_checkpoint
from paceline.integrations.accelerate import attach
from paceline.integrations.lightning import ReturnAverage
from paceline.integrations.transformers import PaceTrainer
from paceline.testing.hosts import Driven, check_host

pytestmark = pytest.mark.filterwarnings("ignore")  # advice of the hosts

OPTIMIZERS = {
    "pace": lambda params: PACE(params, lr=0.05, pullback=0.3),
    "returns": lambda params: PACE(params, lr=0.05, pullback=0.3, returns=RETURNS),
    "bfloat16 state": lambda params: PACE(
        params, lr=0.05, pullback=0.3, state_dtype=torch.bfloat16
    ),
    "pullback": lambda params: Pullback(
        torch.optim.SGD(params, lr=0.05, momentum=0.9), pullback=0.1
    ),
    "schedule-free": lambda params: ScheduleFreeWrapper(torch.optim.SGD(params, lr=0.3)),
}


def read(task, weights):
    """The parameters of a file's model."""
    model = task.model()
    model.load_state_dict(weights)
    return model.parameters()


def loop(task, model, opt, stop, start, save):
    """A loop of one's own: losses, and those of average and live weights."""
    losses, evaluated, live = [], [], []
    for _ in range(start, stop):
        for batch in task.batches():
            opt.zero_grad()
            loss = task.loss(model, batch)
            loss.backward()
            opt.step()
            losses.append(loss.item())
        with torch.no_grad():
            live.append(task.loss(model, task.held_out).item())
            with opt.averaged():
                evaluated.append(task.loss(model, task.held_out).item())
        save()
    return losses, evaluated, live


def plain(task, folder, stop, resume):
    model = task.model()
    opt, file = task.optimizer(model.parameters()), folder / "run.pt"
    start = load_checkpoint(file, model, opt)["epoch"] if resume else 0
    losses, evaluated, live = loop(
        task, model, opt, stop, start, lambda: save_checkpoint(file, model, opt, epoch=stop)
    )
    return Driven(
        losses, evaluated, read(task, torch.load(file)["model"]), model.parameters(), live
    )


def accelerated(task, folder, stop, resume):
    accelerator = Accelerator(cpu=True)
    model = task.model()
    model, opt = accelerator.prepare(model, task.optimizer(model.parameters()))
    attach(accelerator)
    if resume:
        accelerator.load_state(folder)
    losses, evaluated, live = loop(
        task, model, opt, stop, int(resume), lambda: accelerator.save_state(folder)
    )
    saved = load_file(folder / "model.safetensors")
    return Driven(losses, evaluated, read(task, saved), model.parameters(), live)


class Module(pl.LightningModule):
    def __init__(self, task):
        super().__init__()
        self.task, self.net, self.seen = task, task.model(), []

    def training_step(self, batch, index):
        loss = self.task.loss(self.net, batch)
        self.seen.append(loss.item())
        return loss

    def validation_step(self, batch, index):
        self.log("loss", self.task.loss(self.net, batch))

    def configure_optimizers(self):
        return self.task.optimizer(self.parameters())


class Notes(Callback):
    def __init__(self):
        self.found = []

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.found.append({k: x.item() for k, x in trainer.callback_metrics.items()})


def lightning(task, folder, stop, resume):
    module, notes, saved = Module(task), Notes(), ModelCheckpoint(folder, save_last=True)
    callbacks = [ReturnAverage(live=True), notes, saved]
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(accelerator="cpu", max_epochs=stop, callbacks=callbacks, **quiet)
    data = (TensorDataset(*task.train), TensorDataset(*task.held_out))
    loaders = [DataLoader(x, batch_size=4) for x in data]
    last = folder / "last.ckpt" if resume else None
    trainer.fit(module, *loaders, ckpt_path=last)
    found = Module.load_from_checkpoint(folder / "last.ckpt", task=task, weights_only=True)
    evaluated, live = ([x[name] for x in notes.found] for name in ("loss", "live_loss"))
    return Driven(module.seen, evaluated, found.parameters(), module.parameters(), live)


class Headed(nn.Module):
    """As transformers' Trainer wants a model."""

    def __init__(self, task):
        super().__init__()
        self.net, self.task = task.model(), task

    def forward(self, x, labels):
        return {"loss": self.task.loss(self.net, (x, labels)), "logits": self.net(x)}


def transformers(task, folder, stop, resume):
    def rows(data):
        return [{"x": x, "labels": y} for x, y in zip(*data, strict=True)]

    arguments = TrainingArguments(
        str(folder), num_train_epochs=stop, per_device_train_batch_size=4, max_grad_norm=0.0,
        train_sampling_strategy="sequential", lr_scheduler_type="constant", logging_steps=1,
        eval_strategy="epoch", save_strategy="epoch", report_to=[], disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    model = Headed(task)
    data = {"train_dataset": rows(task.train), "eval_dataset": rows(task.held_out)}
    optimizers = (task.optimizer(model.parameters()), None)
    trainer = PaceTrainer(model, arguments, optimizers=optimizers, **data)
    trainer.train(resume_from_checkpoint=resume)
    [*_, last] = sorted(folder.glob("checkpoint-*"))
    names = ("loss", "eval_loss", "eval_live_loss")
    losses, evaluated, live = (
        [x for step, x in trainers.logged(trainer, name).items() if step > 3 * resume]
        for name in names
    )
    saved = load_file(last / "model.safetensors")
    saved = {name.removeprefix("net."): x for name, x in saved.items()}
    return Driven(losses, evaluated, read(task, saved), model.parameters(), live)


def ignite(task, folder, stop, resume):
    """As docs/recipes.md has it."""
    pytest.importorskip("ignite")
    from ignite.engine import Events, create_supervised_evaluator, create_supervised_trainer
    from ignite.handlers import Checkpoint, DiskSaver
    from ignite.metrics import Loss

    model, losses, evaluated = task.model(), [], []
    opt = task.optimizer(model.parameters())
    trainer = create_supervised_trainer(model, opt, nn.functional.mse_loss)
    evaluator = create_supervised_evaluator(model, {"loss": Loss(nn.functional.mse_loss)})
    parts = {"model": model, "optimizer": opt, "trainer": trainer}
    save = Checkpoint(parts, DiskSaver(folder, require_empty=False), filename_pattern="run.pt")
    trainer.add_event_handler(Events.EPOCH_COMPLETED, save)

    @trainer.on(Events.ITERATION_COMPLETED)
    def note():
        losses.append(trainer.state.output)

    @trainer.on(Events.EPOCH_COMPLETED)
    def evaluate():
        with opt.averaged():
            evaluated.append(evaluator.run([task.held_out]).metrics["loss"])

    if resume:
        Checkpoint.load_objects(parts, torch.load(folder / "run.pt"))
    trainer.run(task.batches(), max_epochs=stop)
    saved = torch.load(folder / "run.pt")["model"]
    return Driven(losses, evaluated, read(task, saved), model.parameters())


LIVE = {"checkpoint": "live", "after": "live"}
HOSTS = {  # its row of the table
    plain: LIVE,
    accelerated: {"after": "live"},
    lightning: {},
    transformers: {},
    ignite: LIVE,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.__name__)
def test_a_host_is_as_its_row_says(host, kind, dtype, quick):
    if kind == "schedule-free" and host in (plain, accelerated, ignite):
        pytest.skip("it has no averaged()")
    report = check_host(host, OPTIMIZERS[kind], dtype=dtype, **HOSTS[host])
    assert report.passed, report


@pytest.mark.parametrize("kind", KIT)
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_two_ranks_are_as_their_row_says(engine, kind, ranks):
    ranks(pass_the_kit, engine, kind)


# ---- every check can fail: a plain loop with one thing broken ----------------------------------


def broken(**changes):
    """A drive of a plain loop whose outcome is changed: by its own, and by which call it was."""

    def drive(task, folder, stop, resume):
        found = plain(task, folder, stop, resume)
        for name, change in changes.items():
            setattr(found, name, change(found, resume))
        return found

    return drive


def moved(values):
    return [x + 1e-3 for x in values]


BROKEN = {
    "trajectory": broken(losses=lambda found, resume: moved(found.losses)),
    "evaluation": broken(evaluated=lambda found, resume: found.live),
    "live evaluation": broken(live=lambda found, resume: found.evaluated),
    "checkpoints": broken(checkpoint=lambda found, resume: moved(found.checkpoint)),
    "after training": broken(after=lambda found, resume: moved(found.after)),
    "resume": broken(losses=lambda found, resume: [x + 1e-7 * resume for x in found.losses]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_every_check_fails_for_what_it_is_about(name):
    report = check_host(BROKEN[name], **LIVE)
    assert name in [check.name for check in report.failures], report
    assert len(report.checks) == len(BROKEN)


@pytest.mark.parametrize("column", ["evaluated", "checkpoint", "after"])
def test_another_column_than_the_hosts_is_seen(column):
    row = {"evaluated": "average", **LIVE}
    other = {"live": "average", "average": "live"}[row[column]]
    report = check_host(plain, **row | {column: other})
    assert len(report.failures) == 1, report


def test_one_model_is_no_fault_and_two_alike_are_said():
    report = check_host(broken(live=lambda *_: None), **LIVE)
    assert report.passed
    assert [check.reason for check in report.checks if check.outcome == "not run"] == [
        "the host measures one model"
    ]
    with pytest.raises(ValueError, match="average is far from its live weights"):
        check_host(plain, lambda params: PACE(params, lr=1e-7, pullback=0.1))


def test_the_code_of_the_page_runs():
    page = (Path(__file__).parents[2] / "docs" / "conformance.md").read_text()
    [code] = re.findall(r"(?s)## Hosts.*?```python\n(.*?)```", page)
    exec(code, {})
