"""PaceTrainer(snapshots=...): the averages on the way, also through a resume."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("trl")

from safetensors.torch import load_file
from trainers import OPTIMIZERS, adapted, prepare, trained

from paceline import PACE
from paceline.integrations.transformers import PaceTrainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),  # peft
    pytest.mark.usefixtures("quick"),
]


def keeping(count, folder=None, **options):
    """A PaceTrainer with snapshots, as `prepare` makes one."""

    def make(*args, **given):
        return PaceTrainer(*args, snapshots=count, snapshot_dir=folder, **options, **given)

    return make


def tensors(folder):
    found = {path: load_file(path) for path in sorted(folder.glob("*/*.safetensors"))}
    return {path: {name: x.clone() for name, x in own.items()} for path, own in found.items()}


def two(params):
    return PACE(params, lr=0.05, pullback=0.1, returns={"slow": "ema:kappa=0.9"})


def test_averages_are_kept_closer_together_toward_the_end(tmp_path):
    trainer = prepare(tmp_path, two, cls=keeping(3))
    told = []
    trainer.snapshots.tell = told.append
    trainer.train()
    folder = tmp_path / "averages"
    assert sorted(path.name for path in folder.iterdir()) == ["step-3", "step-5", "step-6"]
    last = load_file(folder / "step-6" / "slow.safetensors")
    assert last.keys() == trained(trainer.model).keys()
    optimizer = trainer.bare_optimizer
    with optimizer.averaged("slow"):
        for name, p in trained(trainer.model).items():
            assert torch.equal(last[name], p)
    size = sum(x.nbytes for x in last.values()) * 2 / 2**20
    cost = f"3 of {size:.4g} MiB each, {3 * size:.4g} MiB in all"
    [said] = told
    begin = f"Snapshots of the averages: {cost}, in {folder}; to write one takes some "
    assert said.startswith(begin)
    assert 0 < float(said.removeprefix(begin).removesuffix(" s.")) < 10
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == []
    assert trainer.snapshots.seconds > 0


def test_of_adapters_alone_and_in_bfloat16(tmp_path):
    make = keeping(1, tmp_path / "kept", snapshot_dtype=torch.bfloat16)
    trainer = prepare(tmp_path / "out", model=adapted(), cls=make)
    trainer.train()
    found = load_file(tmp_path / "kept" / "step-6" / "average.safetensors")
    assert found.keys() == trained(trainer.model).keys()
    assert all("lora_" in name and x.dtype == torch.bfloat16 for name, x in found.items())
    assert not (tmp_path / "out" / "averages").exists()


def test_resumed_they_are_those_of_the_whole_run(tmp_path):
    """What was kept after the checkpoint, of steps that were undone, is gone or written anew."""
    whole = prepare(tmp_path / "whole", two, cls=keeping(3), save_strategy="steps", save_steps=4)
    whole.train()
    expected = tensors(tmp_path / "whole" / "averages")
    stale = tmp_path / "whole" / "averages" / "step-5"
    for path in stale.iterdir():
        path.write_bytes(b"")
    again = prepare(tmp_path / "whole", two, cls=keeping(3))
    seen = []
    again.snapshots.tell = lambda _: seen.append(stale.exists())
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert seen == [False]
    found = tensors(tmp_path / "whole" / "averages")
    assert found.keys() == expected.keys()
    for path, own in found.items():
        assert all(torch.equal(x, expected[path][name]) for name, x in own.items())


@pytest.mark.parametrize("kind", ["adamw", "schedule-free", "lawa"])
def test_without_an_average_it_is_refused(kind, tmp_path):
    def lawa(params):
        return PACE(params, lr=0.1, pullback=0.1, averaging="lawa:window=2")

    trainer = prepare(tmp_path, OPTIMIZERS.get(kind, lawa), cls=keeping(3))
    with pytest.raises(ValueError, match=r"^snapshots needs PACE or Pullback with an average of"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert not (tmp_path / "averages").exists()


def test_snapshots_of_an_earlier_run_are_not_mixed_with(tmp_path):
    prepare(tmp_path, cls=keeping(2)).train()
    before = {path: path.read_bytes() for path in (tmp_path / "averages").glob("*/*")}
    with pytest.raises(ValueError, match="averages has snapshots of an earlier run; resume that,"):
        prepare(tmp_path, cls=keeping(2)).train()
    assert {path: path.read_bytes() for path in (tmp_path / "averages").glob("*/*")} == before
