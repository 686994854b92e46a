"""diffusers: our power EMA is `EMAModel`'s warm-up, and the example writes the average."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

from paceline import PACE
from paceline.averaging import MIN_WEIGHT, PowerEMA

pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers
EXAMPLE = Path(__file__).parents[2] / "examples" / "diffusers_unet.py"


@pytest.mark.parametrize("steps", [range(1, 60), range(190_000, 240_000, 5_000)], ids=str)
def test_the_warm_up_is_the_power_ema_one_step_later(steps):
    """With γ = 1 and κ = 0.75, and the same floor, which is reached after 215,443 steps."""
    from diffusers.training_utils import EMAModel

    theirs = EMAModel([], use_ema_warmup=True, power=0.75, decay=1 - MIN_WEIGHT)
    ours, later = PowerEMA(0.75), PowerEMA(0.75, start=1)
    for t in steps:
        assert 1 - theirs.get_decay(t + 1) == pytest.approx(ours.weight(t), rel=1e-9)
        assert 1 - theirs.get_decay(t) == pytest.approx(later.weight(t), rel=1e-9)


def test_in_place_of_their_average_it_is_the_same():
    from diffusers.training_utils import EMAModel

    p = torch.nn.Parameter(torch.linspace(-1, 1, 8))
    opt = PACE([p], lr=0.1, pullback=0.1, returns=PowerEMA(0.75, start=1))
    ema = EMAModel([p], use_ema_warmup=True, power=0.75)
    for t in range(40):
        p.grad = torch.sin(p.detach() + t)
        opt.step()
        ema.step([p])
    [theirs] = ema.shadow_params
    assert (theirs - p).abs().max() > 1e-3
    with opt.averaged():
        torch.testing.assert_close(p.detach(), theirs, atol=1e-6, rtol=1e-6)


def test_the_example_writes_the_average(tmp_path, monkeypatch, capsys):
    from diffusers import UNet2DModel

    monkeypatch.setattr(sys, "argv", ["unet", "--out", str(tmp_path / "unet")])
    ended = runpy.run_path(str(EXAMPLE))
    assert "live weights" in capsys.readouterr().out
    saved = UNet2DModel.from_pretrained(tmp_path / "unet")
    average = ended["opt"].averaged_state_dict(ended["unet"])
    for name, p in ended["unet"].named_parameters():
        assert torch.equal(saved.get_parameter(name), average[name])
        assert not torch.equal(p, average[name])
