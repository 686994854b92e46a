"""DeepSpeed: the average reaches the model and files at ZeRO stages 1 and 2, and exports at 3."""

import os

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("deepspeed")

from sharding import net

from paceline import PACE, Pullback
from paceline.testing.hosts import Driven, check_host

KINDS = {
    "pace": lambda params: PACE(params, lr=0.05, pullback=0.3),
    "returns": lambda params: PACE(params, lr=0.05, pullback=0.3, return_kappa=0.9),
    "bfloat16 state": lambda params: PACE(
        params, lr=0.05, pullback=0.3, state_dtype=torch.bfloat16
    ),
    "pullback": lambda params: Pullback(torch.optim.SGD(params, lr=0.05), pullback=0.1),
}
KAPPA = {"returns": 0.9}  # of the average that is returned; else 0.5


@pytest.fixture(scope="module")
def ranks(ranks_of_deepspeed):
    """Processes of their own, because DeepSpeed is imported."""
    return ranks_of_deepspeed


def started(stage, kind="pace", *, bf16=True, task=None):
    """A real engine on the CPU, and the optimizer in it."""
    import deepspeed

    place = {"RANK": dist.get_rank(), "LOCAL_RANK": dist.get_rank(), "WORLD_SIZE": 2}
    os.environ |= {name: str(x) for name, x in place.items()} | {"DS_ACCELERATOR": "cpu"}
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo; it would be compiled
    model = task.model() if task else net()
    opt = (task.optimizer if task else KINDS[kind])(list(model.parameters()))
    config = {
        "train_micro_batch_size_per_gpu": 4 if task else 8,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": bf16},
        "gradient_clipping": 0.0 if task else 1.0,  # 1.0 is DeepSpeed's default
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=opt, config=config, dist_init_required=False
    )
    return engine, opt


def step(engine, t):
    generator = torch.Generator().manual_seed(100 + t)
    x = torch.randn(16, 6, generator=generator).view(2, 8, 6)[dist.get_rank()]
    x = x.to(next(engine.module.parameters()).dtype)
    loss = (engine(x) - x[:, :1]).square().mean()
    engine.backward(loss)
    engine.step()
    return loss.item()


def masters(engine):
    """The whole float32 weights, as DeepSpeed's own accessor gives them."""
    from deepspeed.utils import safe_get_full_fp32_param

    return [safe_get_full_fp32_param(p).double() for p in engine.module.parameters()]


def watched(engine, kind, steps):
    """Train, and compute the returned average by its formula from the float32 weights."""
    average = masters(engine)
    for t in range(1, steps + 1):
        step(engine, t)
        beta = (1 + t) ** -KAPPA.get(kind, 0.5)
        average = [a + beta * (x - a) for a, x in zip(average, masters(engine), strict=True)]
    return average


def averages_in_the_model(stage, kind, bf16):
    from paceline.integrations.deepspeed import attach, averaged_state_dict

    engine, opt = started(stage, kind, bf16=bf16)
    attach(engine)
    average = watched(engine, kind, 5)
    exported = averaged_state_dict(engine)
    live = [p.detach().clone() for p in engine.module.parameters()]
    close = {"rtol": 2e-3, "atol": 2e-3} if kind == "bfloat16 state" else {}
    with opt.averaged():
        held = [p.detach().clone() for p in engine.module.parameters()]
    for p, x, y, a in zip(engine.module.parameters(), live, held, average, strict=True):
        assert torch.equal(p, x)
        assert not torch.equal(x, y)
        if dist.get_rank() == 0:
            whole = exported[next(k for k, q in engine.module.named_parameters() if q is p)]
            torch.testing.assert_close(whole, a.float(), **close)
            assert torch.equal(whole.to(y.dtype), y) or kind == "bfloat16 state"
        else:
            assert not exported
        rough = {"rtol": 1e-2, "atol": 2e-3} if bf16 else {}
        torch.testing.assert_close(y.double(), a, **(close | rough))
    other, _ = started(stage, kind, bf16=bf16)  # which nobody looks into
    losses = [step(other, t) for t in range(1, 8)]
    assert [step(engine, t) for t in (6, 7)] == losses[5:]


@pytest.mark.parametrize(
    ("stage", "kind", "bf16"),
    [
        *((1, kind, True) for kind in KINDS),
        (2, "returns", True),
    ],
)
def test_the_average_reaches_the_model_and_goes_without_a_trace(stage, kind, bf16, ranks):
    ranks(averages_in_the_model, stage, kind, bf16)


def by_the_kit(stage, kind):
    """The row of docs/hosts.md in float32; both ranks train on the same batches."""
    from paceline.integrations.deepspeed import attach

    def drive(task, folder, stop, resume):
        shared = [str(folder)]  # rank 0's, for both
        dist.broadcast_object_list(shared)
        engine, opt = started(stage, bf16=False, task=task)
        attach(engine)
        if resume:
            engine.load_checkpoint(shared[0], tag=f"{stop - 1}")
            opt.train()
        losses, evaluated, live = [], [], []
        for epoch in range(int(resume), stop):
            for batch in task.batches():
                loss = task.loss(engine, batch)
                engine.backward(loss)
                engine.step()
                losses.append(loss.item())
            with torch.no_grad():
                live.append(task.loss(engine, task.held_out).item())
                with opt.averaged():
                    evaluated.append(task.loss(engine, task.held_out).item())
                    engine.save_checkpoint(shared[0], tag=f"{epoch + 1}")
        file = f"{shared[0]}/{stop}/mp_rank_00_model_states.pt"
        saved = task.model()
        saved.load_state_dict(torch.load(file, weights_only=False)["module"])
        dist.barrier()
        return Driven(losses, evaluated, saved.parameters(), engine.module.parameters(), live)

    report = check_host(drive, KINDS[kind], after="live")
    assert report.passed, str(report)


@pytest.mark.parametrize("kind", ["pace", "pullback"])
@pytest.mark.parametrize("stage", [1, 2])
def test_an_engine_passes_the_conformance_kit(stage, kind, ranks):
    ranks(by_the_kit, stage, kind)


def resumed(stage, kind, folder):
    from paceline.integrations.deepspeed import attach, averaged_state_dict

    whole, _ = started(stage, kind)
    losses = [step(whole, t) for t in range(1, 8)]
    engine, opt = started(stage, kind)
    attach(engine)
    for t in range(1, 5):
        step(engine, t)
    exported = averaged_state_dict(engine)
    with opt.averaged():
        engine.save_checkpoint(folder, tag="four")
    again, opt = started(stage, kind)
    attach(again)
    step(again, 99)  # so that what is loaded is seen
    again.load_checkpoint(folder, tag="four")
    if dist.get_rank() == 0 and kind != "bfloat16 state":
        for key, x in again.module.named_parameters():
            assert torch.equal(x, exported[key].to(x.dtype))
    assert opt.swapped
    opt.train()
    assert [step(again, t) for t in range(5, 8)] == losses[4:]
    for x, y in zip(masters(again), masters(whole), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("stage", "kind"), [*((1, kind) for kind in KINDS), (2, "pace"), (2, "pullback")]
)
def test_a_checkpoint_holds_the_average_and_resumes_bit_for_bit(stage, kind, ranks, tmp_path):
    ranks(resumed, stage, kind, str(tmp_path))


def fill_padding(engine):
    """Partitions end in memory that DeepSpeed has not written: anything may be there."""
    rank, (group,), (flat,) = (
        dist.get_rank(),
        engine.optimizer.fp16_groups,
        engine.optimizer.fp32_partitioned_groups_flat,
    )
    end = filled = 0
    for p in group:
        end += p.partition_numel()
        padding = max(0, (rank + 1) * p.partition_numel() - p.ds_numel)
        flat.data[end - padding : end] = float("nan")
        filled += padding
    assert end == flat.numel()
    assert filled or rank == 0


def exports_at_stage_3(kind, folder):
    from paceline.integrations.deepspeed import attach, averaged_state_dict

    engine, opt = started(3, kind)
    fill_padding(engine)
    with pytest.raises(ValueError, match="ZeRO stages 1 and 2 without offloading, got stage 3"):
        attach(engine)
    average = watched(engine, kind, 4)
    exported = averaged_state_dict(engine)
    close = {"rtol": 2e-3, "atol": 2e-3} if kind == "bfloat16 state" else {}
    if dist.get_rank() == 0:
        for x, a in zip(exported.values(), average, strict=True):
            torch.testing.assert_close(x, a.float(), **close)
    with pytest.raises(RuntimeError, match="ZeRO stage 3 keeps the weights"):
        opt.eval()
    engine.save_checkpoint(folder, tag="four")
    again, _ = started(3, kind)
    step(again, 99)
    again.load_checkpoint(folder, tag="four")
    assert [step(again, t) for t in range(5, 8)] == [step(engine, t) for t in range(5, 8)]
    for x, y in zip(masters(again), masters(engine), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("kind", KINDS)
def test_stage_3_trains_exports_and_resumes(kind, ranks, tmp_path):
    ranks(exports_at_stage_3, kind, str(tmp_path))


def refused(stage):
    from paceline.integrations.deepspeed import attach, averaged_state_dict

    engine, opt = started(stage)
    with pytest.raises(RuntimeError, match="needs averages; call it after"):
        averaged_state_dict(engine)
    step(engine, 1)
    before = [*masters(engine), *(p.detach().clone() for p in engine.module.parameters())]
    for method in (opt.eval, lambda: opt.choose(lambda: 0.0), lambda: opt.averaged().__enter__()):
        with pytest.raises(RuntimeError, match="flat copies.*deepspeed.attach"):
            method()
    assert not opt.swapped
    after = [*masters(engine), *engine.module.parameters()]
    assert all(map(torch.equal, before, after))
    attach(engine)
    with pytest.raises(ValueError, match="name must be one of average, got 'slow'"):
        averaged_state_dict(engine, "slow")
    with opt.averaged(), pytest.raises(RuntimeError, match="needs the live weights"):
        averaged_state_dict(engine)


@pytest.mark.parametrize("stage", [1, 2])
def test_without_attach_an_average_is_refused(stage, ranks):
    ranks(refused, stage)


def other_optimizers():
    import deepspeed

    from paceline.integrations.deepspeed import attach, averaged_state_dict

    KINDS["adamw"] = lambda params: torch.optim.AdamW(params, lr=0.05)
    engine, _ = started(1, "adamw")
    for function in (attach, averaged_state_dict):
        with pytest.raises(ValueError, match="must step PACE or Pullback, got AdamW"):
            function(engine)
    engine, opt = started(0, bf16=False)
    assert isinstance(engine, deepspeed.DeepSpeedEngine)
    with pytest.raises(ValueError, match="stages 1 and 2 without offloading, got stage 0"):
        attach(engine)
    step(engine, 1)
    with opt.averaged():  # stage 0 in float32 steps the model's own weights
        pass


def test_other_optimizers_and_stages_are_refused_by_name(ranks):
    ranks(other_optimizers)


def test_flat_parameters_of_a_plain_loop_are_served():
    """DeepSpeed is imported; the optimizer's parameters are not its copies."""
    p = torch.nn.Parameter(torch.ones(4))
    opt = PACE([p], lr=0.1, pullback=0.1)
    p.sum().backward()
    opt.step()
    with opt.averaged():
        pass
