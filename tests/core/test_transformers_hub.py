"""PaceTrainer: what it hands on to the Hub, and to Ray's trials."""

import threading
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("trl")

import transformers.trainer
from huggingface_hub.utils import filter_repo_objects
from problems import same
from safetensors.torch import load, load_file
from trainers import SFT, on, prepare, prepare_sft, weights, which
from transformers import Trainer

from paceline.integrations import transformers as ours
from paceline.integrations.transformers import PaceTrainer

pytestmark = pytest.mark.usefixtures("quick")


class Hub:
    """Stands for the Hub: an upload reads its folder when the gate is open, in another thread."""

    def __init__(self):
        self.gate, self.pool = threading.Event(), ThreadPoolExecutor(1)
        self.jobs, self.uploads = [], []  # path there, names of files, weights
        self.fault = None

    def create_repo(self, name, **_):
        return type("Url", (), {"repo_id": name})()

    def upload_folder(self, *, folder_path, path_in_repo=None, ignore_patterns=None, **given):
        def upload():
            assert self.gate.wait(60)
            if self.fault:
                raise self.fault
            folder = Path(folder_path)
            files = [x.relative_to(folder).as_posix() for x in folder.rglob("*") if x.is_file()]
            files = list(filter_repo_objects(files, ignore_patterns=ignore_patterns))
            read = load((folder / "model.safetensors").read_bytes())
            self.uploads.append((path_in_repo, files, read))

        job = self.pool.submit(upload)
        if given["run_as_future"]:
            self.jobs.append(job)
            return job
        self.gate.set()
        return job.result()

    def open(self):
        """Let all uploads that were begun end now."""
        self.gate.set()
        wait(self.jobs)


@pytest.fixture
def hub(monkeypatch):
    made = Hub()
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda *_, **__: made)
    monkeypatch.setattr(Trainer, "create_model_card", lambda *_, **__: None)
    monkeypatch.setattr(SFT, "create_model_card", lambda *_, **__: None)
    yield made
    made.open()
    made.pool.shutdown()


def pushing(folder, strategy, make=prepare, **given):
    options = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "push_to_hub": True,
        "hub_model_id": "a/b",
        "hub_strategy": strategy,
        "hub_always_push": True,
    }
    return make(folder, **options | given)


CHECKPOINTS = {
    "end": [],
    "every_save": [],
    "checkpoint": ["last-checkpoint", "last-checkpoint"],
    "all_checkpoints": ["checkpoint-2", "checkpoint-4"],
}


@pytest.mark.parametrize("make", [prepare, prepare_sft])
@pytest.mark.parametrize("strategy", CHECKPOINTS)
def test_what_is_uploaded_is_whole_when_it_is_read(strategy, make, hub, tmp_path, monkeypatch):
    trainer = pushing(tmp_path, strategy, make)
    save = Trainer._save_rng_state

    def read_meanwhile(self, folder):
        save(self, folder)
        if self.state.global_step == 4:  # in the middle of the next save
            hub.open()

    monkeypatch.setattr(Trainer, "_save_rng_state", read_meanwhile)
    trainer.train()
    hub.open()
    assert [job.exception() for job in hub.jobs] == [None] * len(hub.jobs)
    assert [path for path, *_ in hub.uploads if path] == CHECKPOINTS[strategy]
    assert len(hub.jobs) - len(CHECKPOINTS[strategy]) == (0 if strategy == "end" else 2)
    checkpoints = [tmp_path / f"checkpoint-{step}" for step in (2, 4)]
    returned = [load_file(folder / "model.safetensors") for folder in checkpoints]
    for number, (path, files, read) in enumerate(hub.uploads):
        assert same(read, returned[2 * number // len(hub.uploads)])
        if path:
            assert {*files} == {x.name for x in checkpoints[1].iterdir()}
        else:
            assert not [x for x in files if "/" in x]
    hub.uploads.clear()
    trainer.push_to_hub()
    trainer.save_model()
    assert [path for path, *_ in hub.uploads] == [None, None]
    for _, files, read in hub.uploads:
        assert not [x for x in files if "/" in x]
        assert same(read, returned[1])


def test_a_push_within_the_training_is_of_the_returned_model(hub, tmp_path):
    trainer = pushing(tmp_path, "end", save_strategy="no")

    def push(step, model, **_):
        if step == 3:
            trainer.push_to_hub()
            assert which(model, "pace", 3) == "live"

    trainer.add_callback(on("on_step_end", push))
    trainer.train()
    ((_, _, read),) = hub.uploads
    assert which(read, "pace", 3) == "returned"


def test_rotation_waits_for_the_upload_of_what_it_removes(hub, tmp_path, monkeypatch):
    def waits(jobs):
        jobs = [*jobs]
        if jobs:
            hub.open()
        return wait(jobs)

    monkeypatch.setattr(ours, "wait", waits)
    trainer = pushing(tmp_path, "all_checkpoints", save_total_limit=1)
    seen = []
    trainer.add_callback(on("on_save", lambda *_, **__: seen.append(hub.gate.is_set())))
    trainer.add_callback(on("on_save", lambda step, **_: hub.open() if step == 4 else None))
    trainer.train()
    assert [job.exception() for job in hub.jobs] == [None] * 4
    assert [path for path, *_ in hub.uploads if path] == ["checkpoint-2", "checkpoint-4"]
    assert seen == [False, True]  # the first had nothing to wait for
    assert {x.name for x in tmp_path.glob("check*")} == {"checkpoint-4"}


class Opening(PaceTrainer):
    """Opens the gate where it waits for the end of the uploads."""

    def _finish_current_push(self):
        self.hub.open()
        super()._finish_current_push()


def test_the_end_of_a_run_waits_for_uploads_before_it_removes_checkpoints(hub, tmp_path):
    trainer = pushing(
        tmp_path,
        "all_checkpoints",
        cls=Opening,
        save_total_limit=1,
        eval_strategy="steps",
        eval_steps=2,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
    )
    trainer.hub = hub
    trainer.train()
    assert [job.exception() for job in hub.jobs] == [None] * 4
    assert {x.name for x in tmp_path.glob("check*")} == {"checkpoint-2"}


def test_a_failed_upload_is_told(hub, tmp_path, caplog):
    hub.fault = OSError("no network")
    hub.gate.set()
    pushing(tmp_path, "checkpoint").train()
    told = [x.getMessage() for x in caplog.records if x.name == ours.__name__]
    assert told == ["an upload to the Hub failed: no network"] * 4


def test_a_trial_of_ray_resumes_from_the_live_weights(tmp_path):
    trainer, live = prepare(tmp_path / "a", max_steps=4), {}

    def note(step, model, **_):
        live[step] = weights(model)
        if step == 2:
            trainer._tune_save_checkpoint(str(tmp_path / "ray"))
            assert same(weights(model), live[2])

    trainer.add_callback(on("on_step_end", note))
    trainer.train()
    checkpoint = tmp_path / "ray" / "checkpoint-2"
    assert which(load_file(checkpoint / "model.safetensors"), "pace", 2) == "returned"
    resumed = prepare(tmp_path / "b", max_steps=4)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert same(weights(resumed.model), weights(trainer.model))
