"""Gradients that are not finite: held, skipped, raised or let through, on every path."""

import contextlib
import sys
import warnings

import pytest
import torch
from problems import advance, assert_same, problem, snapshot
from torch.nn import Parameter

from paceline import PACE, Pullback, kernels, update
from paceline.kernels import cpu

BAD = [float("nan"), float("inf"), -float("inf")]
SIZE = 300  # with slices of 128, two whole ones and a rest

PATHS = {
    "kernel": {"fused": True},
    "together": {"fused": False},
    "capturable": {"capturable": True},
    "measured": {"track_stats": True},
    "as on a device": {"fused": False},
}
FORMS = {
    "float32": (torch.float32, {}),
    "float64": (torch.float64, {}),
    "bfloat16": (torch.bfloat16, {}),
    "float32, narrow": (torch.float32, {"state_dtype": torch.bfloat16}),
    "bfloat16, narrow": (torch.bfloat16, {"state_dtype": torch.bfloat16}),
    "stochastic": (torch.bfloat16, {"state_dtype": torch.bfloat16, "stochastic_round": True}),
    "no pull": (torch.float32, {"pullback": 0.0}),
}


def trained(form, options, faults, monkeypatch):
    """Four steps; `faults` puts into the third's gradient what it will."""
    dtype, more = FORMS[form]
    monkeypatch.setattr(update, "TOGETHER_ON_CPU", 128)
    torch.manual_seed(0)
    p, q = Parameter(torch.randn(SIZE).to(dtype)), Parameter(torch.randn(7).to(dtype))
    opt = PACE([p, q], lr=0.05, **{"pullback": 2.0, **options, **more})
    seen = []
    for step in range(4):
        p.grad, q.grad = torch.randn(SIZE).to(dtype), torch.randn(7).to(dtype)
        if step == 2:
            faults(p.grad)
        opt.step()
        seen.append(snapshot(ModelOf(p, q), opt))
    return seen, opt.stats()


class ModelOf:
    def __init__(self, *params):
        self.parameters = lambda: iter(params)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("path", PATHS)
def test_the_guard_holds_what_a_bad_gradient_would_move_and_nothing_else(
    path, form, kernel, monkeypatch
):
    if path == "as on a device":  # where the host may not look at a value
        monkeypatch.setattr(update, "squared_norm", lambda grads: torch.tensor(float("nan")))
    bad = {5: BAD[0], 130: BAD[1], 131: BAD[2], SIZE - 1: 1e30}
    large = 1e300 if FORMS[form][0] == torch.float64 else 1e30  # their squares are infinite
    options = PATHS[path]

    def faults(grad):
        for i, value in bad.items():
            grad[i] = large if value == 1e30 else value

    seen, stats = trained(form, options, faults, monkeypatch)
    usual, _ = trained(form, options, lambda grad: None, monkeypatch)
    held = torch.zeros(SIZE, dtype=torch.bool)
    held[list(bad)] = True
    before, after, expected = seen[1], seen[2], usual[2]
    tensors = [name for name, x in after[1][0].items() if x.ndim]
    for get in (lambda x: x[0][0], *(lambda x, n=name: x[1][0][n] for name in tensors)):
        assert torch.equal(get(after)[held], get(before)[held])
        assert torch.equal(get(after)[~held], get(expected)[~held])
        assert get(seen[3]).isfinite().all()
    assert torch.equal(after[0][1], expected[0][1])  # the other parameter
    assert [state["step"] for state in after[1]] == [3, 3]
    counts = {"guarded_coordinates": 4, "guarded_steps": 1, "skipped_steps": 0}
    assert {key: stats[key] for key in counts} == counts


@pytest.mark.parametrize("path", ["kernel", "together", "capturable"])
def test_without_the_guard_a_nan_takes_weights_and_average(path, kernel, monkeypatch):
    def faults(grad):
        grad[5] = float("nan")

    options = {**PATHS[path], "nonfinite": "ignore"}
    seen, stats = trained("float32", options, faults, monkeypatch)
    weights, states = seen[3]
    assert weights[0].isnan().nonzero().tolist() == [[5]]
    assert states[0]["average"].isnan().nonzero().tolist() == [[5]]
    assert stats["guarded_steps"] == 0


@pytest.mark.parametrize("path", ["kernel", "together", "capturable"])
def test_a_large_but_finite_gradient_steps(path, kernel, monkeypatch):
    def faults(grad):
        grad[5] = 1e19  # the largest square root of a float32 is 1.8e19

    seen, stats = trained("float32", PATHS[path], faults, monkeypatch)
    assert stats["guarded_steps"] == 0
    assert seen[2][1][0]["exp_avg_sq"][5] > 1e34


@pytest.mark.parametrize("shape", [(), (1,), (2,)])
@pytest.mark.parametrize("mode", ["guard", "skip", "raise"])
def test_a_square_that_overflows_is_seen_in_tensors_of_any_size(mode, shape):
    p = Parameter(torch.ones(shape))
    opt = PACE([p], lr=0.1, pullback=0.1, nonfinite=mode)
    p.grad = torch.full(shape, 1e25)
    with pytest.raises(FloatingPointError) if mode == "raise" else contextlib.nullcontext():
        opt.step()
    assert (p == 1).all()
    assert sum(opt.stats().values()) == {"guard": p.numel() + 1, "skip": 1, "raise": 0}[mode]


@pytest.mark.parametrize("value", BAD)
def test_skip_changes_nothing_and_does_not_count(value):
    model, generator = problem()
    other, same = problem()
    opt = PACE(model.parameters(), lr=0.05, pullback=0.3, nonfinite="skip")
    plain = PACE(other.parameters(), lr=0.05, pullback=0.3)
    advance(model, opt, generator, 3)
    advance(other, plain, same, 3)
    before = snapshot(model, opt)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model[3].bias.grad[1] = value
    opt.step()
    assert_same(snapshot(model, opt), before)
    assert opt.stats()["skipped_steps"] == 1
    assert opt.stats()["guarded_steps"] == 0
    advance(model, opt, generator, 2)
    advance(other, plain, same, 2)
    assert_same(snapshot(model, opt), snapshot(other, plain))


@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16])
def test_what_a_device_decides_to_skip_is_skipped_without_the_host(state_dtype, monkeypatch):
    """The tensors of an accelerator's step, taken on the CPU."""
    runs = []
    for skipping in (True, False):
        model, generator = problem()
        opt = PACE(
            model.parameters(),
            lr=0.05,
            pullback=0.3,
            nonfinite="skip",
            capturable=True,
            state_dtype=state_dtype,
        )
        for step in range(6):
            skip = torch.tensor(step in (0, 3))
            if skip and not skipping:
                continue
            monkeypatch.setattr(opt, "_skips_step", lambda skip=skip: skip)
            if skip:
                for p in model.parameters():
                    p.grad = torch.full_like(p, float("nan"))
                opt.step()
            else:
                advance(model, opt, generator, 1)
        runs.append(snapshot(model, opt))
        assert opt.stats()["skipped_steps"] == 2 * skipping
        assert opt.stats()["guarded_steps"] == 0
    assert_same(*runs)


def test_skip_reads_no_value_from_an_accelerator():
    p = Parameter(torch.ones(5, device="meta"))  # reading one raises
    opt = PACE([p], pullback=1.0, nonfinite="skip")
    for _ in range(2):
        p.grad = torch.ones_like(p)
        opt.step()
    assert opt.state[p]["step"].device == p.device
    guarded = PACE([p], pullback=1.0)
    guarded.step()


@pytest.mark.parametrize("value", BAD)
def test_raise_names_the_first_parameter_and_changes_nothing(value):
    model, generator = problem()
    opt = PACE(model.named_parameters(), lr=0.05, pullback=0.3, nonfinite="raise")
    advance(model, opt, generator, 3)
    before = snapshot(model, opt)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model[1].weight.grad[2] = model[3].bias.grad[0] = value
    with pytest.raises(FloatingPointError, match=r"gradient of parameter '1.weight' of shape \(5,"):
        opt.step()
    assert_same(snapshot(model, opt), before)
    assert opt.stats() == {"guarded_coordinates": 0, "guarded_steps": 0, "skipped_steps": 0}


def test_each_group_has_its_own_way():
    """Two that skip together, one that is guarded, one that is not asked."""
    params = [Parameter(torch.ones(3)) for _ in range(4)]
    modes = ["skip", "guard", "skip", "ignore"]
    groups = [{"params": [p], "nonfinite": m} for p, m in zip(params, modes, strict=True)]
    opt = PACE(groups, lr=0.1, pullback=0.1)
    for p in params:
        p.grad = torch.ones(3)
    params[0].grad[0] = params[1].grad[0] = params[3].grad[0] = float("nan")
    opt.step()
    moved = [(p != 1).tolist() for p in params]
    assert moved == [[False] * 3, [False, True, True], [False] * 3, [True] * 3]
    counts = {"guarded_coordinates": 1, "guarded_steps": 1, "skipped_steps": 1}
    assert opt.stats() == counts
    assert [len(opt.state[p]) for p in (params[0], params[2])] == [0, 0]


def test_an_error_on_the_way_to_the_kernel_leaves_nothing_counted(monkeypatch):
    """Warnings may be errors: no compiler, which is said in the first step that wants one."""
    p, q = Parameter(torch.ones(4, dtype=torch.float16)), Parameter(torch.ones(2**18))
    opt = PACE([p, q], lr=0.1, pullback=0.1)
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    cpu.available.cache_clear()
    with monkeypatch.context() as patch, warnings.catch_warnings():
        patch.setattr(cpu, "build", lambda: (_ for _ in ()).throw(kernels.BuildError("none")))
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="without its one-pass kernel"):
            opt.step()
    cpu.available.cache_clear()
    assert [opt.state[x]["step"].item() for x in (p, q)] == [0, 0]
    assert (p == 1).all()
    assert (q == 1).all()


@pytest.mark.parametrize("mode", ["skips", None, True])
def test_an_unknown_mode_is_refused(mode):
    with pytest.raises(ValueError, match="nonfinite must be one of guard, skip, raise, ignore"):
        PACE([Parameter(torch.ones(1))], pullback=0.1, nonfinite=mode)


class Interrupt:
    """Ctrl-C at the n-th line of the package that is run inside a `with`."""

    def __init__(self, n):
        self.left = n

    def __enter__(self):
        sys.settrace(self.called)
        return self

    def __exit__(self, kind, *_):
        sys.settrace(None)
        return kind is KeyboardInterrupt

    def called(self, frame, event, argument):
        return self.line if "paceline" in frame.f_code.co_filename else None

    def line(self, frame, event, argument):
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self.line


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("make", ["PACE", "Pullback"])
def test_an_interrupt_anywhere_in_a_step_leaves_an_optimizer_that_goes_on(make, steps, kernel):
    """With the kernel a count has moved just where its parameter has."""
    n, done = 0, False
    while not done:
        n += 7
        params = [Parameter(torch.ones(5)), Parameter(torch.ones(3, 2))]
        if make == "PACE":
            opt = PACE(params, lr=0.1, pullback=0.1, fused=True, returns="uniform")
        else:
            opt = Pullback(torch.optim.SGD(params, lr=0.1), 0.1, returns="uniform")
        for p in params:
            p.grad = torch.ones_like(p)
        for _ in range(steps):
            opt.step()
        before = [p.detach().clone() for p in params]
        with Interrupt(n) as interrupt:
            opt.step()
        done = interrupt.left > 0
        for p, was in zip(params, before, strict=True):
            count = float(opt.state.get(p, {}).get("step", 0))
            if make == "PACE":
                assert count == steps + (not torch.equal(p, was))
        opt.step()
        with opt.averaged():
            assert all(p.isfinite().all() for p in params)
        assert len({len(opt.state[p]) for p in params}) == 1
    assert n > 100


@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["eval", "train", "averaged"])
def test_an_interrupt_anywhere_in_a_swap_loses_nothing(method, dtype, state_dtype):
    params = [Parameter(torch.randn(5).to(dtype)), Parameter(torch.randn(3, 2).to(dtype))]
    opt = PACE(params, lr=0.1, pullback=0.1, state_dtype=state_dtype)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        opt.step()
    live = [p.detach().clone() for p in params]
    opt.eval()
    average = [p.detach().clone() for p in params]
    opt.train()
    n, done = 0, False
    while not done:
        n += 3
        if method == "train":
            opt.eval()
        with Interrupt(n) as interrupt:
            if method == "averaged":
                with opt.averaged():
                    pass
            else:
                getattr(opt, method)()
        done = interrupt.left > 0
        expected = average if opt.swapped else live
        assert all(map(torch.equal, params, expected))
        opt.train()
        assert all(map(torch.equal, params, live))
    assert n > 60
