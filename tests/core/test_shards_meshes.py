"""Four ranks, uneven and empty shards, HSDP, tensor parallelism: what one process does in float64.

And one rank of 1,024, by torch's process group without the others.
"""

import pytest
import torch
import torch.distributed as dist
from problems import RETURNS
from sharding import BASES, advance, assert_close, assert_equal, net, wrapped
from torch import nn, optim
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.debug import CommDebugMode

from paceline import PACE, Pullback

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")

ENGINES = ("fsdp", "hsdp", "tp")
IN_EVERY_ENGINE = ("PACE", "AdamW", "SGD")
OPTIMIZERS = {
    "PACE": {"returns": RETURNS, "fused": False, "track_stats": True},
    "PACE, kernel": {"fused": True, "nonfinite": "skip", "return_kappa": 0.7},
    "PACE, auto": {"pullback": "auto"},
    "AdamW": {"returns": RETURNS, "track_stats": True},
    "AdamW, own": {"gain": "own", "averaging": "bema:start=1"},
    "SGD": {"nonfinite": "raise", "averaging": "lawa:window=2"},
}


def made(model, name, options):
    base = name.partition(",")[0]
    options = {"pullback": 2.0} | options
    if base == "PACE":
        return PACE(model.parameters(), lr=0.05, **options)
    return Pullback(BASES[base](model.parameters()), **options)


def place(x):
    """Where in a whole tensor the part of it begins and ends that this rank holds."""
    if not isinstance(x, DTensor):
        return (slice(None),) * x.ndim
    shape, begin = compute_local_shape_and_global_offset(x.shape, x.device_mesh, x.placements)
    return tuple(slice(b, b + n) for b, n in zip(begin, shape, strict=True))


def part(x, like):
    """Of a whole tensor what this rank holds, laid out like another."""
    mine = x[place(like)].clone()
    if not isinstance(like, DTensor):
        return mine
    layout = like.device_mesh, like.placements
    return DTensor.from_local(mine, *layout, run_check=False, shape=x.shape, stride=x.stride())


def held(model, opt):
    """What this rank holds of parameters and their state, in order; no rank waits for another."""

    def mine(x):
        x = x.detach()
        return (x.to_local() if isinstance(x, DTensor) else x).clone()

    state = [{key: mine(value) for key, value in opt.state[p].items()} for p in model.parameters()]
    return [mine(p) for p in model.parameters()], state


def cut(moment, places):
    """Of what one process holds the part of a rank."""
    params, states = moment
    cut = [
        {key: x[where] if x.ndim else x for key, x in state.items()}
        for state, where in zip(states, places, strict=True)
    ]
    return [x[where] for x, where in zip(params, places, strict=True)], cut


def give_fault(model):
    """Gradients of 1, and one NaN: in the last row of the first weight."""
    for i, p in enumerate(model.parameters()):
        grad = torch.ones(p.shape, dtype=p.dtype)
        if i == 0:
            grad[-1, 3] = float("nan")
        p.grad = part(grad, p)


def trained(engine, name, options):
    """What is held after each step and a fault, and with each average in; exports; reports."""
    model = wrapped(net(torch.float64), engine)
    opt = made(model, name, options)
    moments, stats = [], []

    def step(number):
        advance(model, opt, engine, 1, first=number)
        moments.append(held(model, opt))
        stats.append(opt.stats())

    step(0)
    step(1)
    give_fault(model)
    error = None
    try:
        opt.step()
    except FloatingPointError as raised:
        error = str(raised)
    moments.append(held(model, opt))
    stats.append(opt.stats())
    opt.zero_grad()
    step(2)
    exports = [opt.averaged_state_dict(model, opt.returns[-1])]
    for average in opt.returns:
        opt.eval(average)
        moments.append(held(model, opt))
    exports.append(opt.averaged_state_dict(model, opt.returns[-1]))
    opt.train()
    assert_equal(held(model, opt), moments[3])  # no bit is lost
    for p in model.parameters():
        shaped = [x for key, x in opt.state[p].items() if "step" not in key and key != "idle"]
        assert all(getattr(x, "placements", None) == getattr(p, "placements", None) for x in shaped)
    places = [place(p) for p in model.parameters()]
    return moments, places, exports, stats, error


@pytest.mark.filterwarnings("ignore:.*view tensor:UserWarning")
@pytest.mark.parametrize(
    ("engine", "name"),
    [(x, name) for x in ENGINES for name in OPTIMIZERS if x == "fsdp" or name in IN_EVERY_ENGINE],
)
def test_four_ranks_do_what_one_process_does_in_float64(engine, name, four, request):
    options = OPTIMIZERS[name]
    if options.get("fused"):
        request.getfixturevalue("kernel")
    moments, _, exports, stats, error = trained(None, name, options)
    found = four(trained, engine, name, options)
    for rank, (mine, places, exported, *_) in enumerate(found):
        for a, b in zip(mine, moments, strict=True):
            assert_close(a, cut(b, places), 1e-12, 1e-12)
        for ours, alone in zip(exported, exports, strict=True):
            assert ours.keys() == (alone.keys() if rank == 0 else set())
            for key, x in ours.items():
                torch.testing.assert_close(x, alone[key], atol=1e-12, rtol=1e-12)
    # Every element is on one rank; with HSDP on two, with tensor parallelism a norm's, too.
    copies = torch.zeros(5, 6)
    for _, places, *_ in found:
        copies[places[0]] += 1
    assert (copies == (2 if engine == "hsdp" else 1)).all()
    reports = [report for *_, report, _ in found]
    for alone, *own in zip(stats, *reports, strict=True):
        assert all(x["skipped_steps"] == alone["skipped_steps"] for x in own)
        own = own[:2] if engine == "hsdp" else own  # ranks 2 and 3 have the replicas
        assert sum(x["guarded_coordinates"] for x in own) == alone["guarded_coordinates"]
        some = [x for x in own if "groups" in x] if engine != "tp" else []
        for key in alone.keys() & {"adamw_norm", "base_norm", "pull_norm", "distance"}:
            assert not some or sum(x[key] ** 2 for x in some) == pytest.approx(alone[key] ** 2)
        for key, of_all in (("gain_min", min), ("gain_max", max)):
            assert not some or of_all(x[key] for x in some) == pytest.approx(alone[key])
    said = [error for *_, error in found]
    assert [x is None for x in said] == [error is None] * 4
    if error:
        # Rows 0, 1 | 2, 3 | 4 | none; rows 0-2 | 3, 4, twice; and rows 0, 1 | 3 | 2 | 4.
        where = {"fsdp": [2], "hsdp": [1, 3], "tp": [3]}[engine]
        assert [rank for rank, x in enumerate(said) if "parameter 0 of group 0" in x] == where
        assert sum("on another rank" in x for x in said) == 4 - len(where)


def test_a_rank_without_any_of_a_group_measures_nothing_of_it(four):
    """Of 5 rows rank 3 has none, and of 1 row rank 0 alone has some."""
    for rank, stats in enumerate(four(measured)):
        groups = stats.get("groups", [None, None])
        assert [x is not None for x in groups] == [rank < 3, rank == 0]
        assert ("gain_min" in stats) == (rank < 3)
        if rank == 1:
            assert stats["gain_min"] == groups[0]["gain_min"] > 0


def measured():
    model = wrapped(net(), "fsdp")
    params = list(model.parameters())
    groups = [{"params": params[:4]}, {"params": params[4:]}]
    opt = PACE(groups, lr=0.05, pullback=2.0, track_stats=True)
    advance(model, opt, "fsdp", 1)
    return opt.stats()


def trained_in_bfloat16(engine, name):
    """Float32 weights with bfloat16 state, or bfloat16 weights rounded stochastically."""
    dtype = torch.float32 if name == "state_dtype" else torch.bfloat16
    options = {"state_dtype": torch.bfloat16} if name == "state_dtype" else {}
    model = wrapped(net(dtype), engine)
    opt = PACE(model.parameters(), lr=0.05, pullback=2.0, stochastic_round=True, seed=3, **options)
    for step in range(3):  # equal gradients whatever the engine
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.grad = part(torch.randn(p.shape, generator=generator).to(dtype), p)
        opt.step()
    live = held(model, opt)
    opt.eval()
    returned = held(model, opt)
    exported = opt.averaged_state_dict(model)
    opt.train()
    assert_equal(held(model, opt), live)
    return live, returned, [place(p) for p in model.parameters()], exported


@pytest.mark.parametrize("name", ["state_dtype", "stochastic_round"])
@pytest.mark.parametrize("engine", ENGINES)
def test_rows_round_as_in_one_process(engine, name, four):
    live, returned, _, exported = trained_in_bfloat16(None, name)
    rows = [i for i in range(6) if engine != "tp" or i != 4]  # that one is split by columns
    for mine, averaged, places, export in four(trained_in_bfloat16, engine, name):
        for own, alone in ((mine, live), (averaged, returned)):
            (params, states), (expected, theirs) = own, cut(alone, places)
            for i in rows:
                assert torch.equal(params[i], expected[i])
                assert all(torch.equal(x, theirs[i][key]) for key, x in states[i].items())
        for i, key in enumerate(export):
            assert i not in rows or torch.equal(export[key], exported[key])


def refused(kind):
    """A parameter of Partial placement: given, added, and put in after the optimizer was made."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    partial = nn.Parameter(DTensor.from_local(torch.ones(3, 4), mesh, [Partial()]))
    fine = nn.Parameter(distribute_tensor(torch.ones(3, 4), mesh, [Replicate()]))

    def make(params):
        return made(nn.ParameterList(params), kind, {})

    with pytest.raises(ValueError, match="Partial placement.*parameter 1 of group 0") as said:
        make([fine, partial])
    opt = make([fine])
    with pytest.raises(ValueError, match="Partial placement.*parameter 0 of group 1"):
        opt.add_param_group({"params": [partial]})
    assert len(opt.param_groups) == 1
    opt.param_groups[0]["params"] = [partial]
    partial.grad = DTensor.from_local(torch.ones(3, 4), mesh, [Partial()])
    with pytest.raises(RuntimeError, match=r"Partial placement.*nothing was changed"):
        opt.step()
    assert torch.equal(partial.to_local(), torch.ones(3, 4))
    assert not opt.state
    return str(said.value)


@pytest.mark.parametrize("kind", ["PACE", "SGD"])
def test_a_parameter_that_ranks_are_yet_to_add_up_is_refused(kind, four):
    said = set(four(refused, kind))
    assert len(said) == 1
    assert "redistribute them to Shard or Replicate" in said.pop()


# ---- one rank of many ----------------------------------------------------------------------------


@pytest.fixture
def one_of_1024():
    """Rank 700 of 1,024, whose process group sends nothing and answers at once."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=700, world_size=1024)
    yield init_device_mesh("cpu", (1024,))
    dist.destroy_process_group()


def bytes_of(tensors):
    """Of the memory that tensors keep alive on this rank."""
    mine = [x.to_local() if isinstance(x, DTensor) else x for x in tensors]
    kept = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in mine}
    return sum(kept.values())


ALONE = {
    "PACE": (lambda p: PACE(p, pullback=1.0), 0, 12),
    "PACE, returns": (lambda p: PACE(p, pullback=1.0, return_kappa=0.7), 0, 16),
    "PACE, bfloat16 state": (lambda p: PACE(p, pullback=1.0, state_dtype="bfloat16"), 0, 6),
    "PACE, skip": (lambda p: PACE(p, pullback=1.0, nonfinite="skip"), 1, 12),
    "PACE, auto": (lambda p: PACE(p, pullback="auto"), 1, 16),
    "AdamW": (lambda p: Pullback(optim.AdamW(p), pullback=1.0, nonfinite="ignore"), 0, 12),
    "SGD": (lambda p: Pullback(optim.SGD(p, lr=0.1), pullback=1.0, nonfinite="ignore"), 0, 8),
}


@pytest.mark.parametrize("name", ALONE)
def test_one_rank_of_1024_sends_nothing_and_keeps_its_shard(name, one_of_1024):
    make, messages, bytes_each = ALONE[name]
    model = nn.Sequential(nn.Linear(64, 2048), nn.Linear(2048, 64))
    for module in (*model, model):
        fully_shard(module, mesh=one_of_1024)
    params = list(model.parameters())
    opt = make(params)
    for step in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        with CommDebugMode() as sent:
            opt.step()
        assert sent.get_total_counts() == (messages if step else min(messages, "skip" in name))
    with CommDebugMode() as sent:
        for average in opt.returns:
            opt.eval(average)
        opt.train()
        opt.state_dict()
    assert sent.get_total_counts() == 0
    mine = sum(p.to_local().numel() for p in params)
    assert mine == 2 * 64 + 2  # of 2,048 rows two; of 64 rows none
    states = [opt.state[p] for p in params]
    shaped = [x for state in states for x in state.values() if x.shape == params[0].shape or x.ndim]
    counts = [x for state in states for x in state.values() if not x.ndim]
    assert all(x.placements == (Shard(0),) for x in shaped)
    assert bytes_of(shaped) == bytes_each * mine
    assert bytes_of(counts) <= 8 * len(counts)
    assert bytes_of([p.grad for p in params]) == 4 * mine
