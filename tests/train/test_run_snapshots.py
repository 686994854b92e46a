"""`paceline train --snapshots`: averages kept on the way, and others rebuilt from them."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("trl")

from merged import average
from safetensors.torch import load_file
from training import Recorder, go, go_on, read, weights
from transformers import AutoModelForCausalLM

from paceline.averaging import parse
from paceline.train import InputError
from paceline.train.recipe import Recipe

pytestmark = pytest.mark.usefixtures("surroundings")
METHOD = "pace:kappa=0.5:return_kappa=0.9"


@pytest.fixture(scope="module")
def kept(surroundings, values, tmp_path_factory):
    """A run with snapshots of two averages, and its live weights at each step."""
    recorder = Recorder()
    run = tmp_path_factory.mktemp("kept") / "run"
    assert go(run, values, recorder, method=METHOD, snapshots=6, steps=30)
    return run, recorder


def test_any_average_of_the_run_is_rebuilt(kept, tmp_path):
    run, recorder = kept
    assert sorted(int(x.name[5:]) for x in (run / "averages").iterdir()) == [9, 17, 22, 27, 29, 30]
    out = tmp_path / "out"
    average(run / "averages", "--rule", "ema:kappa=0.7", "--out", out)
    shares = parse("ema:kappa=0.7").coefficients(30)
    wanted = {
        name: torch.einsum("t,t...->...", shares, torch.stack([x[name] for x in recorder.weights]))
        for name in recorder.weights[0]
    }
    found = weights(out)
    missed = sum(float((found[n].double() - x).square().sum()) for n, x in wanted.items())
    last = recorder.weights[-1]
    far = sum(float((last[n] - x).square().sum()) for n, x in wanted.items())
    assert (missed / far) ** 0.5 < 0.05
    AutoModelForCausalLM.from_pretrained(out)
    assert read(out / "paceline.json")["expected_error"] < 0.05
    # the one that was kept is the model
    kept_one = load_file(run / "averages" / "step-30" / "average.safetensors")
    assert kept_one.keys() >= weights(run / "model").keys()


def test_their_cost_is_in_the_manifest(kept):
    run, _ = kept
    facts = read(run / "manifest.json")["snapshots"]
    files = (run / "averages" / "step-30").glob("*.safetensors")
    assert facts["bytes_each"] == sum(x.nbytes for f in files for x in load_file(f).values())
    assert 0 < facts["seconds"] < 60


def test_what_a_killed_run_kept_before_its_first_checkpoint_is_removed(values, tmp_path):
    run = tmp_path / "run"

    class Killed(Recorder):
        def on_step_end(self, args, state, control, **given):
            if state.global_step == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(run, values, Killed(), snapshots=12, steps=4, evaluations=1)
    assert sorted(x.name for x in (run / "averages").iterdir()) == ["step-1", "step-2"]

    assert go_on(run) == 0
    assert sorted(x.name for x in (run / "averages").iterdir()) == [
        f"step-{n}" for n in range(1, 5)
    ]


@pytest.mark.parametrize("method", ["adamw", "schedule-free", "lawa:window=3", "bema"])
def test_methods_without_such_an_average_are_refused(method, values):
    with pytest.raises(InputError, match=r"^snapshots: .* keeps no average that others can be"):
        Recipe(**{**values, "method": method, "snapshots": 3})


@pytest.mark.parametrize(
    "method", ["ema", "uniform", "swa:every=2", "pace", "pullback:sgd", "pace:pullback=auto"]
)
def test_methods_with_one_are_not(method, values):
    assert Recipe(**{**values, "method": method, "snapshots": 3}).snapshots == 3
