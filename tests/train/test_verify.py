"""`paceline verify-resume`: the certificate, and what it compares."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("trl")

from safetensors.torch import load_file, save_file
from training import STEPS, assert_ended_alike, near, read, weights, write_recipe

from paceline.cli import main
from paceline.sums import write_sums
from paceline.train import InputError, verify
from paceline.train.verify import compare_runs

pytestmark = pytest.mark.usefixtures("surroundings")


@pytest.fixture
def forks(forked, monkeypatch):
    """Each run is a fork of a process that has imported all."""

    def run(command, stdout, **options):
        python, *launcher, module, moment, place = command
        assert (python, launcher[-1], module) == (sys.executable, "-m", verify.__name__)
        several = launcher[:-1]  # -m torch.distributed.run --standalone --nproc-per-node N
        processes = int(several[-1]) if several else 1
        status = forked([module, moment, place], processes, stdout.name, stdout.name)
        return SimpleNamespace(returncode=status)

    monkeypatch.setattr(verify, "subprocess", SimpleNamespace(run=run))


def flip(path, last=False):
    """One bit of the first or last tensor of a file."""
    tensors = load_file(path)
    name = sorted(tensors)[-last]
    tensors[name].view(torch.int32).view(-1)[0] ^= 1
    save_file(tensors, path, metadata={"format": "pt"})


def flip_optimizer(path):
    saved = torch.load(path, weights_only=True)
    saved["state"][0]["exp_avg"].view(torch.int32).view(-1)[0] ^= 1
    torch.save(saved, path)


def change_state(what):
    def change(path):
        state = read(path)
        what(state)
        path.write_text(json.dumps(state))

    return change


def other_order(state):
    state["stateful_callbacks"]["paceline"]["order"] += 1


def other_loss(key):
    def change(state):
        entry = [entry for entry in state["log_history"] if key in entry][1]
        entry[key] = math.nextafter(entry[key], 9)

    return change


LAST = f"checkpoints/checkpoint-{STEPS}"

SPOILT = {
    "live": ("live weights", "live/model.safetensors", flip),
    "model": ("returned model", "model/model.safetensors", flip),
    "model's last": ("returned model", "model/model.safetensors", lambda p: flip(p, last=True)),
    "optimizer": ("optimizer", f"{LAST}/optimizer.pt", flip_optimizer),
    "order": ("data order", f"{LAST}/trainer_state.json", change_state(other_order)),
    "loss": (
        "evaluation losses",
        f"{LAST}/trainer_state.json",
        change_state(other_loss("eval_loss")),
    ),
    "live loss": (
        "evaluation losses",
        f"{LAST}/trainer_state.json",
        change_state(other_loss("eval_live_loss")),
    ),
}


@pytest.mark.parametrize("spoilt", SPOILT)
def test_the_comparison_tells_what_is_not_equal(finished, copied, spoilt):
    alike = list(compare_runs(finished, copied))
    assert all(row["equal"] and not row["drift"] for row in alike)
    what, path, change = SPOILT[spoilt]
    change(copied / path)
    with pytest.raises(InputError, match=f"{path} is damaged"):
        list(compare_runs(finished, copied))
    write_sums((copied / path).parent)
    rows = list(compare_runs(finished, copied))
    assert [row["what"] for row in rows if not row["equal"]] == [what]
    assert all(bool(row["drift"]) for row in rows if row["what"] == what)


def test_the_comparison_tells_what_is_missing_or_of_another_kind(finished, copied):
    tensors = weights(copied / "live")
    first, *_ = tensors
    save_file({k: x for k, x in tensors.items() if k != first}, copied / "live/model.safetensors")
    tensors = weights(copied / "model")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].double()
    save_file(tensors, copied / "model/model.safetensors")
    for name in ("live", "model"):
        write_sums(copied / name)
    rows = {row["what"]: row for row in compare_runs(finished, copied)}
    assert not rows["live weights"]["equal"]
    assert not rows["returned model"]["equal"]
    assert rows["optimizer"]["equal"]


@pytest.mark.slow
def test_verify_resume_kills_and_certifies(values, forks, tmp_path, capsys):
    recipe, out = write_recipe(tmp_path / "recipe.yaml", values), tmp_path / "out"
    assert main(["verify-resume", str(recipe), "--kills", "3", "--out", str(out)]) == 0
    assert capsys.readouterr().out.count("bit for bit equal") == 5
    certificate = read(out / "certificate.json")
    assert certificate["passed"]
    assert [row["what"] for row in certificate["rows"]] == [
        *("live weights", "returned model", "optimizer", "data order", "evaluation losses")
    ]
    assert all(row["equal"] for row in certificate["rows"])
    assert [kill["at"] for kill in certificate["kills"]] == ["evaluation", "save", "step"]
    begun = read(out / "killed" / "manifest.json")["resumed"]
    assert len(begun) == 3  # so each kill happened, and before the end
    assert begun[-1]["from"] == certificate["kills"][-1]["resumed from"]
    assert_ended_alike(out / "whole", out / "killed")


@pytest.mark.slow
def test_verify_resume_at_another_number_of_processes(values, forks, tmp_path, capsys):
    recipe = write_recipe(tmp_path / "recipe.yaml", values, context=2000)
    out = tmp_path / "out"
    options = ["--kills", "1", "--resume-processes", "2", "--out", str(out)]
    assert main(["verify-resume", str(recipe), *options]) == 0
    said = capsys.readouterr().out
    assert "of the norm apart" in said
    assert "trained with context 64, which fits" in said
    certificate = read(out / "certificate.json")
    assert certificate["processes"] == [1, 2]
    assert read(out / "killed" / "manifest.json")["resumed"][-1]["processes"] == 2
    near(out / "killed", out / "whole")
