"""DeepSpeed: the average reaches the model, files and exports at ZeRO stages 1, 2 and 3."""

import os
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("deepspeed")

from sharding import net

from paceline import PACE, Pullback
from paceline.snapshots import save_averages
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


def started(stage, kind="pace", *, bf16=True, task=None, offload=()):
    """A real engine on the CPU, and the optimizer in it."""
    import deepspeed

    rank, count = dist.get_rank(), dist.get_world_size()
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count}
    os.environ |= {name: str(x) for name, x in place.items()} | {"DS_ACCELERATOR": "cpu"}
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo; it would be compiled
    model = task.model() if task else net()
    opt = (task.optimizer if task else KINDS[kind])(list(model.parameters()))
    config = {
        "train_micro_batch_size_per_gpu": 4 if task else 8,
        # At stage 3 biases stay whole, and matrices are in parts.
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 8},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": bf16},
        "gradient_clipping": 0.0 if task else 1.0,  # 1.0 is DeepSpeed's default
    }
    config["zero_optimization"] |= {f"offload_{what}": {"device": "cpu"} for what in offload}
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=opt, config=config, dist_init_required=False
    )
    return engine, opt


def batch(t):
    return torch.randn(16, 6, generator=torch.Generator().manual_seed(100 + t))


def step(engine, t):
    x = batch(t).chunk(dist.get_world_size())[dist.get_rank()]
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


def held(engine):
    """The model's own weights, whole."""
    from deepspeed import zero

    params = list(engine.module.parameters())
    with zero.GatheredParameters(params):
        return [p.detach().clone() for p in params]


def fill_padding(engine):
    """Partitions end in memory that DeepSpeed has not written: anything may be there."""
    if engine.zero_optimization_stage() < 3:
        return
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


def averages_in_the_model(stage, kind, bf16):
    from paceline.integrations.deepspeed import attach, averaged_state_dict

    engine, opt = started(stage, kind, bf16=bf16)
    fill_padding(engine)
    attach(engine)
    average = watched(engine, kind, 5)
    exported = averaged_state_dict(engine)
    live = held(engine)
    names = [name for name, _ in engine.module.named_parameters()]
    close = {"rtol": 2e-3, "atol": 2e-3} if kind == "bfloat16 state" else {}
    with opt.averaged():
        assert opt.swapped
        averaged = held(engine)
    for name, now, x, y, a in zip(names, held(engine), live, averaged, average, strict=True):
        assert torch.equal(now, x)
        assert not torch.equal(x, y)
        if dist.get_rank() == 0:
            whole = exported[name]
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
        *((3, kind, True) for kind in KINDS),
        (3, "pace", False),
    ],
)
def test_the_average_reaches_the_model_and_goes_without_a_trace(stage, kind, bf16, ranks):
    ranks(averages_in_the_model, stage, kind, bf16)


def by_the_kit(stage, kind):
    """The row of docs/hosts.md in float32; both ranks train on the same batches."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

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
        saved = task.model()
        saved.load_state_dict(get_fp32_state_dict_from_zero_checkpoint(shared[0], f"{stop}"))
        if stage < 3:
            file = f"{shared[0]}/{stop}/mp_rank_00_model_states.pt"
            same = torch.load(file, weights_only=False)["module"]
            assert all(torch.equal(x, same[name]) for name, x in saved.state_dict().items())
        dist.barrier()
        return Driven(losses, evaluated, saved.parameters(), held(engine), live)

    report = check_host(drive, KINDS[kind], after="live")
    assert report.passed, str(report)


@pytest.mark.parametrize("kind", ["pace", "pullback"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_engine_passes_the_conformance_kit(stage, kind, ranks):
    ranks(by_the_kit, stage, kind)


def resumed(stage, kind, folder):
    from paceline.integrations.deepspeed import attach, averaged_state_dict

    whole, _ = started(stage, kind)
    losses = [step(whole, t) for t in range(1, 8)]
    engine, opt = started(stage, kind)
    fill_padding(engine)
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
    for (key, _), x in zip(again.module.named_parameters(), held(again), strict=True):
        if dist.get_rank() == 0 and kind != "bfloat16 state":
            assert torch.equal(x, exported[key].to(x.dtype))
    assert opt.swapped
    opt.train()
    assert [step(again, t) for t in range(5, 8)] == losses[4:]
    for x, y in zip(masters(again), masters(whole), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("stage", "kind"),
    [*((stage, kind) for stage in (1, 3) for kind in KINDS), (2, "pace"), (2, "pullback")],
)
def test_a_checkpoint_holds_the_average_and_resumes_bit_for_bit(stage, kind, ranks, tmp_path):
    ranks(resumed, stage, kind, str(tmp_path))


def partly():
    """A model of which one group gets no gradient but zeros, and some weights are frozen."""
    model = net()
    model.register_parameter("unused", torch.nn.Parameter(torch.ones(1)))  # 1 for 2 ranks
    for p in (model[0].weight, model[1].bias):
        p.requires_grad_(False)
    return model


def in_groups(params):
    options = {"return_kappa": 0.9, "weight_decay": 0.1}
    groups = [
        {"params": params[:1]},
        {"params": params[1:4]},
        {"params": params[4:], "lr": 0.01, "pullback": 1.0},
    ]
    return PACE(groups, lr=0.05, pullback=0.3, **options)


def warmed_up(opt, step):
    """Four steps, of which the first has a rate of 0."""
    for t in range(4):
        rates = [group["lr"] for group in opt.param_groups]
        for group in opt.param_groups:
            group["lr"] *= bool(t)
        step(t)
        for group, rate in zip(opt.param_groups, rates, strict=True):
            group["lr"] = rate


def partly_stepped(stage):
    from paceline.integrations.deepspeed import attach, averaged_state_dict

    def exports(expected, name=None):
        found = averaged_state_dict(engine, name)
        assert list(found) == (list(expected) if dist.get_rank() == 0 else [])
        torch.testing.assert_close(found, expected if found else {})

    engine, opt = started(
        stage, bf16=False, task=SimpleNamespace(model=partly, optimizer=in_groups)
    )
    plain = partly()
    by_hand = in_groups(list(plain.parameters()))
    in_the_model = ("update_lp_params", "checkpoint_event_prologue")
    for method in in_the_model:  # not called, for the model is left alone
        setattr(engine.optimizer, method, None)
    exports(plain.state_dict())
    for method in in_the_model:
        delattr(engine.optimizer, method)

    def step_by_hand(t):
        (plain(batch(t)) - batch(t)[:, :1]).square().mean().backward()
        plain.unused.grad = torch.zeros(1)  # as DeepSpeed has it
        by_hand.step()
        by_hand.zero_grad()

    warmed_up(by_hand, step_by_hand)
    warmed_up(opt, lambda t: step(engine, t))
    for name in (None, "average"):
        exports(by_hand.averaged_state_dict(plain, name), name)
    attach(engine)
    live, returned = held(engine), by_hand.averaged_state_dict(plain)
    for p in engine.module.parameters():
        p.requires_grad_(False)  # for an evaluation
    with opt.averaged():
        torch.testing.assert_close(held(engine), list(returned.values()))
        exports(by_hand.averaged_state_dict(plain, "average"), "average")
        torch.testing.assert_close(held(engine), list(returned.values()))
        exports(returned)
    exports(returned)
    assert all(map(torch.equal, held(engine), live))
    assert not any(p.requires_grad for p in engine.module.parameters())
    if stage < 3:  # where DeepSpeed itself ends with an error
        engine.module.added = torch.nn.Linear(1, 1)
        exports(returned | engine.module.added.state_dict(prefix="added."))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_weights_that_have_not_stepped_are_exported_as_they_are(stage, ranks):
    ranks(partly_stepped, stage)


def refused(stage, folder):
    from paceline.integrations.deepspeed import attach, averaged_state_dict

    engine, opt = started(stage)
    if stage == 3:  # the model's own weights are empty
        with pytest.raises(ValueError, match="export it by .*deepspeed.averaged_state_dict"):
            opt.averaged_state_dict(engine.module)
    step(engine, 1)
    for export in (opt.averaged_state_dict, lambda model: save_averages(folder, model, opt)):
        with pytest.raises(ValueError, match="export it by .*deepspeed.averaged_state_dict"):
            export(engine.module)
    before = [*masters(engine), *held(engine)]
    exported = averaged_state_dict(engine)
    assert bool(exported) == (dist.get_rank() == 0)
    for method in (opt.eval, lambda: opt.choose(lambda: 0.0), lambda: opt.averaged().__enter__()):
        with pytest.raises(RuntimeError, match="flat copies.*deepspeed.attach"):
            method()
    assert not opt.swapped
    after = [*masters(engine), *held(engine)]
    assert all(map(torch.equal, before, after))
    attach(engine)
    with pytest.raises(ValueError, match="name must be one of average, got 'slow'"):
        averaged_state_dict(engine, "slow")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_without_attach_an_average_is_refused(stage, ranks, tmp_path):
    ranks(refused, stage, tmp_path)


def other_optimizers():
    import deepspeed

    from paceline.integrations.deepspeed import attach, averaged_state_dict

    KINDS["adamw"] = lambda params: torch.optim.AdamW(params, lr=0.05)
    engine, _ = started(1, "adamw")
    for function in (attach, averaged_state_dict):
        with pytest.raises(ValueError, match="must step PACE or Pullback, got AdamW"):
            function(engine)
    KINDS["auto"] = lambda params: PACE(params, lr=0.05, pullback="auto")
    with pytest.warns(UserWarning, match="experimental"):
        engine, _ = started(1, "auto")
    with pytest.raises(ValueError, match="pullback='auto' does not go with ZeRO"):
        attach(engine)
    engine, _ = started(0)
    for function in (attach, averaged_state_dict):
        with pytest.raises(ValueError, match="got stage 0 and FP16_UnfusedOptimizer"):
            function(engine)
    engine, opt = started(0, bf16=False)
    assert isinstance(engine, deepspeed.DeepSpeedEngine)
    attach(engine)
    step(engine, 1)
    live = held(engine)
    with opt.averaged():  # stage 0 in float32 steps the model's own weights
        assert not all(map(torch.equal, held(engine), live))
    for stage, what in ((1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "param")):
        engine, _ = started(stage, offload=[what])
        with pytest.raises(ValueError, match=f"ZeRO without offloading, got stage {stage}"):
            attach(engine)


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


def hangs_in_an_export(folder):
    """Rank 1 does not take part; the timeout of DeepSpeed's group is set, which is half an hour."""
    from paceline.integrations.deepspeed import attach, averaged_state_dict

    engine, opt = started(2)
    attach(engine)
    step(engine, 1)
    before = [
        x.detach().clone() for x in (*engine.module.parameters(), *opt.param_groups[0]["params"])
    ]
    if dist.get_rank() == 1:
        while not (folder / "over").exists():
            time.sleep(0.1)
        return
    group = engine.optimizer.real_dp_process_group[0]
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1), group)
    with pytest.raises(RuntimeError, match="(?i)timed out"):
        averaged_state_dict(engine)
    assert not opt.swapped
    assert all(
        map(torch.equal, before, (*engine.module.parameters(), *opt.param_groups[0]["params"]))
    )
    (folder / "over").touch()


def test_a_rank_that_hangs_in_an_export_ends_it_at_the_timeout(ranks, tmp_path):
    ranks(hangs_in_an_export, tmp_path, last=True)
