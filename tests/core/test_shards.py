"""PACE under DDP and FSDP2: two ranks do what one process does."""

import pytest
import torch
import torch.distributed as dist
from problems import RETURNS
from sharding import (
    AROUND,
    advance,
    assert_close,
    assert_equal,
    held,
    net,
    pullback,
    whole,
    wrapped,
)
from torch import nn
from torch.distributed._functional_collectives import all_reduce
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from paceline import PACE, save_checkpoint, update

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")

STEPS = 6


def run(engine, options, parts=1, clip=None):
    """What is held after each step, and at the end with each average swapped in."""
    model = wrapped(net(), engine)
    opt = PACE(model.parameters(), lr=0.05, pullback=2.0, **options)
    moments = []
    for step in range(STEPS):
        advance(model, opt, engine, 1, first=step, parts=parts, clip=clip)
        moments.append(held(model, opt))
    for name in opt.returns:
        opt.eval(name)
        moments.append(held(model, opt))
    opt.train()
    moments.append(held(model, opt))
    assert_equal(moments[-1], moments[STEPS - 1])  # no bit is lost
    return moments


# ---- trajectories ----------------------------------------------------------------------------


OPTIONS = {
    "default": {},
    "kernel": {"fused": True},
    "eager": {"fused": False},
    "capturable": {"capturable": True},
    "skip": {"nonfinite": "skip"},
    "raise": {"nonfinite": "raise"},
    "uniform": {"averaging": "uniform:start=1"},
    "lawa": {"averaging": "lawa:window=2:every=2"},
    "bema": {"averaging": "bema:start=1"},
    "returns": {"returns": RETURNS},
    "returns, bfloat16 state": {"returns": RETURNS, "state_dtype": torch.bfloat16},
}


@pytest.mark.parametrize(
    ("engine", "options", "parts", "clip"),
    [
        *(("fsdp", options, 1, None) for options in OPTIONS),
        *(("ddp", options, 1, None) for options in ("default", "kernel", "skip", "returns")),
        *((engine, "returns", 2, 0.5) for engine in ("ddp", "fsdp")),
    ],
)
def test_two_ranks_give_the_trajectory_of_one_process(engine, options, parts, clip, ranks, request):
    if options == "kernel":
        request.getfixturevalue("kernel")
    # Gradients round otherwise, which may flip a stochastic rounding: as FORMS has it.
    close = 2**-6 if "state_dtype" in OPTIONS[options] else 1e-6
    alone = run(None, OPTIONS[options], parts, clip)
    for mine in ranks(run, engine, OPTIONS[options], parts, clip):
        for a, b in zip(mine, alone, strict=True):
            assert_close(a, b, close, close)


def run_around(engine, base, around):
    """What is held after each step, with one skipped for a NaN on one rank; and swapped."""
    model = wrapped(net(), engine)
    opt = pullback(model, base, around)
    moments = []
    for step in range(STEPS):
        if step == 2:
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            grad = next(model.parameters()).grad
            grad = grad.to_local() if engine == "fsdp" else grad
            if engine != "fsdp" or dist.get_rank() == 1:
                grad[-1, 3] = float("nan")
            opt.step()
            moments.append(held(model, opt))
            assert opt.stats()["skipped_steps"] == 1
            opt.zero_grad()
        advance(model, opt, engine, 1, first=step)
        moments.append(held(model, opt))
    for name in opt.returns:
        opt.eval(name)
        moments.append(held(model, opt))
    opt.train()
    moments.append(held(model, opt))
    assert_equal(moments[2], moments[1])  # the skipped one
    for p in model.parameters():
        state = opt.state[p]
        if engine == "fsdp":
            shaped = [x for key, x in state.items() if "step" not in key]
            assert all(x.placements == p.placements for x in shaped)
    return moments


@pytest.mark.parametrize(
    ("base", "around"), [*(("AdamW", x) for x in AROUND), ("SGD", "own"), ("SGD", "scalar")]
)
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_around_another_optimizer_two_ranks_go_where_one_process_goes(engine, base, around, ranks):
    alone = run_around(None, base, around)
    for mine in ranks(run_around, engine, base, around):
        for a, b in zip(mine, alone, strict=True):
            assert_close(a, b)


def shapes_of_state():
    model = wrapped(net(), "fsdp")
    opt = PACE(model.parameters(), pullback=1.0)
    advance(model, opt, "fsdp", 1)
    weight = model[3].weight
    mine = [opt.state[weight][key] for key in ("exp_avg", "exp_avg_sq", "average")]
    assert all(x.placements == weight.placements for x in mine)
    return [tuple(x.to_local().shape) for x in mine]


def test_the_average_is_sharded_like_its_parameter(ranks):
    assert ranks(shapes_of_state) == [[(1, 5)] * 3, [(0, 5)] * 3]


def counted_messages(options):
    """Collectives that step, eval and train send."""
    model = wrapped(net(), "fsdp")
    opt = PACE(model.parameters(), pullback=1.0, **options)
    advance(model, opt, "fsdp", 1)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with CommDebugMode() as messages:
        opt.step()
        for name in opt.returns:
            opt.eval(name)
        opt.train()
        opt.state_dict()
    return messages.get_total_counts()


@pytest.mark.parametrize("options", [{}, {"returns": RETURNS}], ids=str)
def test_nothing_is_gathered_to_step_to_swap_or_to_save(options, ranks):
    assert ranks(counted_messages, options) == [0, 0]


def sharded_steps(placement, options):
    """Equal gradients, given by hand: a sharded parameter and the same one whole."""
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    start = torch.randn(70, 6)
    one = nn.Parameter(start.clone())
    two = nn.Parameter(distribute_tensor(start.clone(), mesh, [placement]))
    opts = [PACE([p], lr=0.05, pullback=2.0, **options) for p in (one, two)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(update, "TOGETHER_ON_CPU", 50)  # shards come in slices, too
        for _ in range(5):
            one.grad = torch.randn(70, 6)
            two.grad = distribute_tensor(one.grad, mesh, [placement])
            for opt in opts:
                opt.step()
    pairs = zip((one, two), opts, strict=True)
    return [[whole(p), *map(whole, opt.state[p].values())] for p, opt in pairs]


@pytest.mark.parametrize("placement", [Shard(0), Shard(1), Replicate()], ids=str)
@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("path", [{"fused": False}, {"fused": True}], ids=str)
def test_any_placement_steps_and_rows_round_as_in_one_process(
    path, state_dtype, placement, ranks, kernel
):
    for one, two in ranks(sharded_steps, placement, {"state_dtype": state_dtype, **path}):
        for x, y in zip(one, two, strict=True):
            if state_dtype is None:
                torch.testing.assert_close(x, y, atol=1e-6, rtol=0)
            elif placement != Shard(1):  # whose elements draw other noise
                # Vectors and their ends may round otherwise, and flip a stochastic rounding.
                assert (x == y).float().mean() > 0.9


def unusual_gradient(kind, fused):
    """One that the ranks have yet to add up, or are about to have added up."""
    mesh = init_device_mesh("cpu", (2,))
    p = nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Replicate()]))
    mine, placement = torch.full((4, 3), 1.0 + dist.get_rank()), Partial()
    if kind == "under way":
        mine, placement = all_reduce(mine, "sum", mesh), Replicate()
        assert type(mine) is not torch.Tensor
    p.grad = DTensor.from_local(mine, mesh, [placement])
    opt = PACE([p], lr=0.1, pullback=1.0, fused=fused)
    opt.step()
    return opt.state[p]["exp_avg"].to_local()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ["partial", "under way"])
def test_gradients_are_brought_into_the_parameters_layout_and_waited_for(
    kind, fused, ranks, kernel
):
    for exp_avg in ranks(unusual_gradient, kind, fused):
        torch.testing.assert_close(exp_avg, torch.full((4, 3), 0.1 * 3.0))


def sharded_after_the_optimizer_was_made():
    """As the Trainer and accelerate do it: the optimizer's parameters are exchanged for shards."""
    model = net()
    opt = PACE(model.parameters(), lr=0.05, pullback=2.0)
    old = dict(zip(model.parameters(), range(10), strict=False))
    model = wrapped(model, "fsdp")
    new = list(model.parameters())
    for group in opt.param_groups:
        group["params"] = [new[old[p]] for p in group["params"]]
    advance(model, opt, "fsdp", STEPS)
    return held(model, opt)


def test_an_optimizer_made_before_the_model_was_sharded(ranks):
    alone = run(None, {})[STEPS - 1]
    for mine in ranks(sharded_after_the_optimizer_was_made):
        assert_close(mine, alone)


# ---- faults ----------------------------------------------------------------------------------


def evaluated(engine, **options):
    """What the model computes while it trains: its forward passes leave weights gathered."""
    model, x = net(), torch.linspace(-1, 1, 24).view(4, 6)
    if engine:
        model = fully_shard(model, mesh=init_device_mesh("cpu", (2,)), **options)
    opt = PACE(model.parameters(), lr=0.1, pullback=2.0)
    seen = []
    for step in range(4):
        advance(model, opt, engine, 1, first=step)
        with torch.no_grad():
            seen.append(model(x))
            with opt.averaged():
                seen += [model(x), model(x)]
            seen.append(model(x))
    exported = opt.averaged_state_dict(model)
    return torch.cat(seen), exported


@pytest.mark.parametrize("options", [{}, {"reshard_after_forward": False}], ids=str)
def test_a_sharded_model_computes_with_the_weights_that_are_in_it(options, ranks):
    alone, average = evaluated(None)
    for rank, (seen, exported) in enumerate(ranks(evaluated, "fsdp", **options)):
        torch.testing.assert_close(seen, alone, atol=1e-5, rtol=1e-5)
        assert exported.keys() == (average.keys() if rank == 0 else set())
        for name, value in exported.items():
            torch.testing.assert_close(value, average[name], atol=1e-5, rtol=1e-5)


def refused_file(folder):
    model = wrapped(net(), "fsdp")
    opt = PACE(model.parameters(), pullback=1.0)
    with pytest.raises(ValueError, match=r"sharded; save it by torch.distributed.checkpoint"):
        save_checkpoint(f"{folder}/run.pt", model, opt)


def test_a_sharded_model_is_not_saved_into_one_file(ranks, tmp_path):
    ranks(refused_file, str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def partial_fault():
    """Gradients yet to be added up into shards; one rank's becomes a NaN."""
    mesh = init_device_mesh("cpu", (2,))
    params = [nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)])) for _ in range(3)]
    opt = PACE(params, lr=0.1, pullback=1.0, nonfinite="raise")
    for i, p in enumerate(params):
        mine = torch.ones(4, 3)
        mine[3, i] = float("nan") if i == 1 else 1.0  # of the second rank's shard
        p.grad = DTensor.from_local(mine, mesh, [Partial()])
    with pytest.raises(FloatingPointError) as raised:
        opt.step()
    return str(raised.value)


def test_ranks_that_name_a_fault_do_not_leave_others_waiting(ranks):
    first, second = ranks(partial_fault)
    assert "a parameter on another rank" in first
    assert "parameter 1 of group 0" in second


def one_ranks_zeros():
    """A first step at rate 0, as a warm-up's, with zeros for gradients on one rank."""
    mesh = init_device_mesh("cpu", (2,))
    plain = nn.Parameter(torch.ones(3))
    sharded = nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))
    opt = PACE([plain, sharded], lr=0.0, pullback=1.0)
    plain.grad = torch.full((3,), float(dist.get_rank()))
    whole_grad = torch.zeros(4, 3)
    whole_grad[3, 0] = 1.0  # of the second rank's shard
    sharded.grad = distribute_tensor(whole_grad, mesh, [Shard(0)])
    opt.step()
    return [opt.state[p]["step"].item() for p in (plain, sharded)]


def test_ranks_agree_that_a_first_step_at_rate_zero_counts(ranks):
    assert ranks(one_ranks_zeros) == [[1.0, 1.0]] * 2


def faulty_step(mode, engine):
    """One NaN, in the second rank's part only (in DDP, where gradients are equal, in both)."""
    model = wrapped(net(), engine)
    opt = PACE(model.parameters(), lr=0.05, pullback=2.0, nonfinite=mode)
    advance(model, opt, engine, 2)
    before = held(model, opt)
    for i, p in enumerate(model.parameters()):
        p.grad = torch.ones_like(p)
        if i == 0:
            grad = p.grad.to_local() if engine == "fsdp" else p.grad
            if engine == "ddp" or dist.get_rank() == 1:
                grad[-1, 3] = float("nan")
    error = None
    try:
        opt.step()
    except FloatingPointError as raised:
        error = str(raised)
    stats = opt.stats()
    after = held(model, opt)
    opt.zero_grad()
    advance(model, opt, engine, 1)
    assert all(x.isfinite().all() for x in held(model, opt)[0])
    return before, after, error, stats


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
@pytest.mark.parametrize("mode", ["skip", "raise"])
def test_all_ranks_skip_or_raise_for_a_fault_on_one(mode, engine, ranks):
    for rank, (before, after, error, stats) in enumerate(ranks(faulty_step, mode, engine)):
        assert_equal(before, after)
        assert stats["skipped_steps"] == (mode == "skip")
        if mode == "raise":
            here = engine == "ddp" or rank == 1
            name = "parameter 0 of group 0 of shape (5, 6)" if here else "on another rank"
            assert name in error
        else:
            assert error is None


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_the_guard_holds_one_coordinate_of_a_shard(engine, ranks):
    for rank, (before, after, error, stats) in enumerate(ranks(faulty_step, "guard", engine)):
        assert error is None
        assert stats["guarded_coordinates"] == (engine == "ddp" or rank == 1)
        changed = before[0][0] != after[0][0]
        assert (~changed).nonzero().tolist() == [[4, 3]]
