"""Elastic: two and four workers do what NumPy does; what is sent; resuming."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from workers import advance, give, gradient, held, made, simulated, start, trajectory

from paceline import PACE, Elastic, load_checkpoint, save_checkpoint

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")

STEPS = 9


def assert_close(mine, theirs, tolerance=1e-12):
    for a, b in zip(mine, theirs, strict=True):
        for x, y in zip(a, b, strict=True):
            for p, q in zip(x, y, strict=True):
                np.testing.assert_allclose(np.asarray(p.double()), q, tolerance, tolerance)


# ---- the algorithms -----------------------------------------------------------------------------

CASES = {
    "EASGD": ("SGD", {"every": 3}),
    "EASGD, a pull": ("SGD", {"every": 2, "pull": 0.1}),
    "EAMSGD": ("Nesterov", {"every": 2}),
    "EASGD around PACE": ("PACE", {"every": 2}),
    "DiLoCo": ("SGD", {"every": 3, "exchange": "diloco"}),
    "DiLoCo, other numbers": (
        "Nesterov",
        {"every": 1, "exchange": "diloco", "outer_lr": 0.5, "outer_momentum": 0.6},
    ),
    "DiLoCo around PACE": ("PACE", {"every": 2, "exchange": "diloco"}),
    "PACE across workers": ("PACE", {"every": 2, "exchange": "average"}),
    "PACE across workers, H = 1": ("PACE", {"every": 1, "exchange": "average", "pull": 0.2}),
    "a pull of Pullback's": ("Pullback", {"every": 3, "exchange": "average"}),
    "local steps": ("Nesterov", {"every": 4, "exchange": "average", "pull": 1.0}),
}


@pytest.mark.parametrize("case", CASES)
def test_two_workers_do_what_the_simulation_does_at_every_step(case, ranks):
    base, options = CASES[case]
    theirs = simulated(base, options, STEPS, 2)
    for mine, want in zip(ranks(trajectory, base, options, STEPS), theirs, strict=True):
        assert_close(mine, want)


@pytest.mark.parametrize("case", ["EASGD", "DiLoCo around PACE", "PACE across workers", "EAMSGD"])
def test_four_workers_do_what_the_simulation_does_at_every_step(case, four):
    base, options = CASES[case]
    found = four(trajectory, base, options, STEPS)
    for mine, want in zip(found, simulated(base, options, STEPS, 4), strict=True):
        assert_close(mine, want)
    for others in found[1:]:  # all have the same center, bit for bit
        for one, other in zip(found[0], others, strict=True):
            for x, y in zip(one[1] + one[2], other[1] + other[2], strict=True):
                assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrower_weights_have_a_center_in_float32(dtype, ranks):
    options = {"every": 2, "exchange": "diloco"}
    close = {torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    want = simulated("SGD", options, 6, 2)
    for mine, theirs in zip(ranks(trajectory, "SGD", options, 6, dtype), want, strict=True):
        assert_close(mine, theirs, close)
        live, centers, returned = mine[-1]
        for x, z, returned_x in zip(live, centers, returned, strict=True):
            assert (x.dtype, z.dtype) == (dtype, torch.float32)
            assert torch.equal(x, z.to(dtype))
            assert torch.equal(returned_x, x)


def test_what_is_lost_in_bfloat16_is_of_the_movements_size(ranks):
    options = {"every": 2, "exchange_dtype": torch.bfloat16}
    want = simulated("SGD", options, 2, 2)[0][-1][1]
    mine = ranks(trajectory, "SGD", options, 2)[0][-1][1]
    for x, z, begin in zip(mine, want, start(), strict=True):
        lost = np.abs(x.numpy() - z).max()
        assert 0 < lost < 2**-7 * np.abs(z - begin).max()


# ---- plain averaging ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"every": 1, "exchange": "average", "pull": 1.0},
        {"every": 1, "exchange": "diloco", "outer_lr": 1.0, "outer_momentum": 0.0},
    ],
)
def test_at_every_step_with_pull_1_it_is_plain_averaging(options, ranks):
    """SGD on the mean of the workers' gradients, as DDP has it."""
    weights = start()
    for step in range(1, STEPS + 1):
        for place, x in enumerate(weights):
            g = sum(gradient(x, worker, step, place) for worker in range(2)) / 2
            weights[place] = x - 0.05 * g
    for mine in ranks(trajectory, "SGD", options, STEPS):
        assert_close([mine[-1]], [[weights] * 3])


# ---- what is sent -------------------------------------------------------------------------------


class Collectives(TorchDispatchMode):
    """Names and sizes of what is sent."""

    def __init__(self):
        super().__init__()
        self.sent = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            tensors = args[0] if isinstance(args[0], list) else [args[0]]
            name = function.name().removeprefix("c10d::")
            self.sent.append((name, sum(x.numel() for x in tensors), tensors[0].dtype))
        return function(*args, **(kwargs or {}))


def sent(base, options, steps):
    params, opt = made(base, options, torch.float32)
    counted = []
    for step in range(1, steps + 1):
        give(params, dist.get_rank(), step)
        with Collectives() as mode:
            opt.step()
            with opt.averaged():
                opt.state_dict()
        counted.append(mode.sent)
    return counted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("base", "exchange"), [("SGD", "easgd"), ("PACE", "average"), ("PACE", "diloco")]
)
def test_an_all_reduce_of_a_model_and_one_of_8_numbers_are_sent_each_h_steps(
    base, exchange, dtype, ranks
):
    options = {"every": 3, "exchange": exchange}
    options |= {"exchange_dtype": dtype} if dtype != torch.float32 else {}
    for first, *others in ranks(sent, base, options, STEPS):
        assert [(name, size <= 8) for name, size, _ in first] == [("allreduce_", True)]
        for step, counted in enumerate(others, 2):
            model = [("allreduce_", 8, torch.int64), ("allreduce_", 12 + 5, dtype)]
            assert counted == (model if step % 3 == 0 else [])


FAKE = """
import torch, torch.distributed as dist
import torch.testing._internal.distributed.fake_pg
from test_elastic import Collectives
from paceline import Elastic
workers, billions = 1024, 7
dist.init_process_group("fake", store=dist.HashStore(), rank=3, world_size=workers)
shapes = [(4096, 4096)] * 128 + [(11008, 4096)] * 96 + [(32000, 4096)] * 2
params = [torch.nn.Parameter(torch.empty(s, device="meta")) for s in shapes]
n = sum(p.numel() for p in params)
assert 6.5e9 < n < 7e9
base = torch.optim.AdamW(params, foreach=False)
opt = Elastic(base, every=2, exchange="diloco", exchange_dtype=torch.bfloat16)
for group in opt.param_groups:
    group["nonfinite"] = "ignore"
sizes = []
for step in range(4):
    for p in params:
        p.grad = torch.empty_like(p)
    with Collectives() as mode:
        opt.step()
    sizes.append(sum(size * dtype.itemsize for _, size, dtype in mode.sent if size > 8))
state = sum(x.nbytes for p in params for x in opt.state[p].values() if x.ndim)
print(n, sizes, state)
"""


def test_the_bytes_of_1024_workers_of_a_model_of_7b(tmp_path):
    """By torch's fake process group, on tensors without data."""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", FAKE],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    n, rest = done.stdout.split(maxsplit=1)
    n = int(n)
    # In bfloat16 2 bytes a parameter at an exchange; AdamW's m and v, center and outer momentum.
    assert rest.split() == f"[0, {2 * n}, 0, {2 * n}] {16 * n}".split()


# ---- saving and resuming ------------------------------------------------------------------------


def resumed(base, options, folder, swapped, dtype=torch.float64):
    """What is held at the end, without and with a stop after five steps."""
    params, opt = made(base, options, dtype)
    model = nn.ParameterList(params)
    advance(params, opt, 5)
    path = f"{folder}/{dist.get_rank()}.pt"
    if swapped:
        opt.eval()
    save_checkpoint(path, model, opt)
    opt.train()
    advance(params, opt, 4, first=6)
    again, other = made(base, options, dtype)
    load_checkpoint(path, nn.ParameterList(again), other)
    advance(again, other, 4, first=6)
    return held(params, opt), held(again, other)


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("case", ["EAMSGD", "DiLoCo around PACE", "PACE across workers"])
def test_resume_is_bit_for_bit(case, swapped, ranks, tmp_path):
    for a, b in ranks(resumed, *CASES[case], str(tmp_path), swapped):
        for x, y in zip(a, b, strict=True):
            assert all(map(torch.equal, x, y))


@pytest.mark.parametrize("case", ["DiLoCo", "DiLoCo around PACE"])
def test_the_outer_momentum_resumes_in_float32(case, ranks, tmp_path):
    for a, b in ranks(resumed, *CASES[case], str(tmp_path), False, torch.bfloat16):
        for x, y in zip(a, b, strict=True):
            assert all(map(torch.equal, x, y))


def of_other_steps():
    """What is said at the step after each worker has loaded a state, of which one is older."""
    params, opt = made("SGD", {"every": 2})
    states = [copy.deepcopy(opt.state_dict())]
    for step in (1, 2, 3):
        advance(params, opt, 1, first=step)
        states.append(copy.deepcopy(opt.state_dict()))
    opt.load_state_dict(states[3 - 2 * dist.get_rank()])
    try:
        advance(params, opt, 1, first=4)
    except RuntimeError as error:
        return str(error)


def test_files_of_other_steps_are_told_at_the_next_step(ranks):
    said = "workers must have the same step: worker {} has step {}, this one step {}; nothing was"
    for rank, error in enumerate(ranks(of_other_steps)):
        steps = (3, 1)
        assert error.startswith(said.format(1 - rank, steps[1 - rank], steps[rank]))


def saved(base, options, folder):
    params, opt = made(base, options)
    advance(params, opt, 5)
    save_checkpoint(f"{folder}/{dist.get_rank()}.pt", nn.ParameterList(params), opt)
    return held(params, opt)


def gone_on(base, options, folder, files):
    """What is held after a load of one of so many files, and after two steps more."""
    params, opt = made(base, options)
    path = f"{folder}/{dist.get_rank() % files}.pt"
    load_checkpoint(path, nn.ParameterList(params), opt)
    loaded = held(params, opt)
    advance(params, opt, 2, first=6)
    return loaded, held(params, opt)


@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 2)])
def test_a_run_goes_on_with_other_workers_from_the_same_center(before, after, tmp_path, request):
    groups = {2: request.getfixturevalue("ranks"), 4: request.getfixturevalue("four")}
    options = {"every": 2}
    earlier = groups[before](saved, "Nesterov", options, str(tmp_path))
    found = groups[after](gone_on, "Nesterov", options, str(tmp_path), before)
    for rank, (loaded, _) in enumerate(found):
        for x, y in zip(loaded, earlier[rank % before], strict=True):
            assert all(map(torch.equal, x, y))
        assert all(map(torch.equal, loaded[1], earlier[0][1]))
    ends = [end for _, end in found]
    assert all(torch.equal(a, b) for end in ends for a, b in zip(end[1], ends[0][1], strict=True))
    assert not torch.equal(ends[0][1][0], earlier[0][1][0])  # they met at step 6


def start_of_one():
    """A checkpoint of PACE alone, in an Elastic; and that of an Elastic in PACE alone."""
    params = [Parameter(torch.tensor(x)) for x in start()]
    alone = PACE(params, pullback=0.1)
    advance(params, alone, 3, worker=0)
    own, opt = made("PACE", {"every": 2, "exchange": "average"})
    plain = PACE(own, pullback=0.1)
    for p, q in zip(own, params, strict=True):
        p.data.copy_(q.data)
    opt = Elastic(plain, every=2, exchange="average")
    opt.load_state_dict(alone.state_dict())
    centers = [
        torch.equal(opt.state[p]["average"], alone.state[q]["average"])
        for p, q in zip(own, params, strict=True)
    ]
    before = copy.deepcopy(alone.state_dict())
    try:
        alone.load_state_dict(opt.state_dict())
        said = "none"
    except ValueError as error:
        said = str(error)
    same = str(before) == str(alone.state_dict())
    return centers, opt.param_groups[0]["elastic_steps"], said, same


def test_a_checkpoint_of_pace_is_a_start_and_not_the_reverse(ranks):
    for centers, steps, said, same in ranks(start_of_one):
        assert (centers, steps, same) == ([True, True], 3, True)
        assert said.startswith("the checkpoint is of paceline.Elastic, whose averages")
