"""torchtitan's containers: what is validated and saved is the average, and resume is exact.

torchtitan asks for an older datasets than is tested here, so CI is without it. Last run: torchtitan
0.3.0 beside torch 2.13.0, on the CPU, by one process and by two with FSDP2.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from sharding import advance, assert_equal, held, net, whole, wrapped

pytest.importorskip("torchtitan", reason="torchtitan is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")


def trained(folder, engine=None, last_model_only=True, mode="disabled", **options):
    """A net with torchtitan's containers around it, built by their configurations."""
    from torchtitan.components.optimizer import LRSchedulersContainer

    from paceline.integrations.torchtitan import ReturnCheckpoints, pace

    model = wrapped(net(), engine)
    options = {"lr": 0.05, "weight_decay": 0.01, "pullback": 2.0} | options
    optimizers = pace(**options).build(model_parts=[model])
    schedulers = LRSchedulersContainer.Config(warmup_steps=0, decay_ratio=0.0).build(
        optimizers=optimizers, training_steps=100
    )
    config = ReturnCheckpoints.Config(
        enable=True, interval=3, last_save_model_only=last_model_only, async_mode=mode
    )
    checkpoints = config.build(
        dataloader=None, model_parts=[model], optimizers=optimizers, lr_schedulers=schedulers,
        states={}, sd_adapter=None, base_folder=folder,
    )  # fmt: skip
    return model, optimizers, schedulers, checkpoints


def on_and_on(folder, engine=None, **options):
    """Train 3 steps, save, 3 more; and the same from the file. Returns the saved model."""
    model, optimizers, schedulers, checkpoints = trained(folder, engine, **options)
    [opt] = optimizers
    for step in range(1, 7):
        advance(model, optimizers, engine, 1, first=step)
        schedulers.step()
        before = held(model, opt)
        saved = checkpoints.save(step)
        assert saved == (step % 3 == 0)
        checkpoints.maybe_wait_for_saving()
        assert not opt.swapped
        assert_equal(held(model, opt), before)
        if step == 3:
            with opt.averaged():
                average = [whole(p) for p in model.parameters()]
    end = held(model, opt)
    checkpoints.save(7, last_step=True)
    with opt.averaged():
        last = [whole(p) for p in model.parameters()]
    again, optimizers, schedulers, checkpoints = trained(folder, engine, **options)
    assert checkpoints.load(step=3)
    assert not optimizers.optimizers[0].swapped
    for step in range(4, 7):
        advance(again, optimizers, engine, 1, first=step)
        schedulers.step()
    assert_equal(held(again, optimizers.optimizers[0]), end)
    for number, expected in ((3, average), (7, last)):
        found = {name: torch.zeros_like(x) for name, x in again.state_dict().items()}
        dcp.load(found, checkpoint_id=f"{folder}/checkpoint/step-{number}")
        assert all(map(torch.equal, map(whole, found.values()), expected))


@pytest.mark.parametrize(
    "options",
    [
        {"fused": True},
        {"return_kappa": 0.9, "last_model_only": False},
        {"state_dtype": torch.bfloat16},
        {"pullback": "auto"},
    ],
    ids=str,
)
def test_checkpoints_have_the_average_and_resume_bit_for_bit(options, tmp_path, ranks):
    ranks(on_and_on, str(tmp_path), **options)


@pytest.mark.parametrize("mode", ["disabled", "async"])  # pinned memory wants an accelerator
def test_so_they_do_of_shards(mode, tmp_path, ranks):
    ranks(on_and_on, str(tmp_path), "fsdp", mode=mode)


def test_the_validator_sees_the_average(monkeypatch):
    from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig
    from torchtitan.components.validate import Validator

    from paceline.integrations.torchtitan import PaceOptimizers, ReturnValidator

    model = net()
    groups = [  # PACE beside another
        ParamGroupConfig(pattern="^0", optimizer_name="AdamW", optimizer_kwargs={"lr": 0.05}),
        ParamGroupConfig(
            pattern=".*", optimizer_name="PACE", optimizer_kwargs={"lr": 0.05, "pullback": 0.1}
        ),
    ]
    config = PaceOptimizers.Config(param_groups=groups, implementation="foreach")
    optimizers = config.build(model_parts=[model])
    assert isinstance(optimizers, OptimizersContainer)
    adamw, opt = optimizers
    assert type(adamw) is torch.optim.AdamW
    advance(model, optimizers, None, 4)
    live, seen = [whole(p) for p in model.parameters()], []
    with opt.averaged():
        average = [whole(p) for p in model.parameters()]

    def validate(self, model_parts, step):
        seen.extend(whole(p) for p in model_parts[0].parameters())

    monkeypatch.setattr(Validator, "validate", validate)  # the rest of it wants a language model
    validator = ReturnValidator.__new__(ReturnValidator)
    validator.metrics_processor = SimpleNamespace(optimizers=optimizers)  # as the Trainer sets it
    validator.validate([model], 4)
    assert all(map(torch.equal, seen, average))
    assert not all(map(torch.equal, seen, live))
    assert all(map(torch.equal, model.parameters(), live))
    assert ReturnValidator.Config(enable=True, steps=1)._owner is ReturnValidator


def test_options_out_of_range_and_fsdp1_are_refused():
    from paceline.integrations.torchtitan import pace

    model = net()
    with pytest.raises(ValueError, match="pullback must be given"):
        pace(gain="adam").build(model_parts=[model])
    model[0].weight._fsdp_flattened = True
    with pytest.raises(ValueError, match="flattened by FSDP1"):
        pace(pullback=0.1).build(model_parts=[model])
