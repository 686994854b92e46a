"""The one-pass kernel: the same step, built once, or a clear word why not; and the memory."""

import ctypes
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch.nn import Parameter

from paceline import PACE, kernels, swap, update
from paceline.kernels import cpu

SHAPES = [(150, 151), (7,), (), (0,), (50, 400)]

DTYPES = [  # of parameters, of state, stochastic rounding of parameters
    (torch.float32, None, False),
    (torch.float32, torch.bfloat16, False),
    (torch.bfloat16, None, False),
    (torch.bfloat16, None, True),
    (torch.bfloat16, torch.bfloat16, True),
    (torch.float64, None, False),
]

RULES = [
    {"pullback": 0.3},
    {"pullback": 30.0, "averaging": "ema:every=3", "clip": False, "maximize": True},
    {"pullback": 0.0, "averaging": "ema:start=5"},
]


def train(steps=12, *, dtype=torch.float32, shapes=SHAPES, **options):
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]
    opt = PACE(params, **{"lr": 1e-2, "pullback": 0.3, **options})
    for t in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
        opt.param_groups[0]["lr"] = 1e-2 * (1 - t / 20)
        opt.step()
    return params, opt


def assert_close(one, other):
    """Equal but for rounding: of the arithmetic everywhere, of the storage at few coordinates."""
    for p, q in zip(one[0], other[0], strict=True):
        s, t = one[1].state[p], other[1].state[q]
        assert s.keys() == t.keys()
        assert s["step"] == t["step"]
        tensors = [name for name in s if name not in ("step", "idle_steps")]
        for x, y in [(p, q), *((s[name], t[name]) for name in tensors)]:
            assert x.dtype == y.dtype
            if x.numel() == 0:
                continue
            x, y = x.detach(), y.detach()
            unit = torch.finfo(x.dtype).eps * y.double().abs().max()
            off = (x.double() - y.double()).abs()
            if x.dtype == torch.bfloat16:
                assert off.max() <= 4 * unit
                assert (off > 0).double().mean() < 0.02
            elif any(v.dtype == torch.bfloat16 for v in (p, *s.values())):
                assert off.mean() < 20 * unit  # a rounding that went the other way, seldom
            else:
                assert off.max() <= 20 * unit


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(("dtype", "state_dtype", "stochastic"), DTYPES, ids=str)
def test_every_path_takes_the_same_step(dtype, state_dtype, stochastic, rule, kernel):
    options = {
        "dtype": dtype,
        "state_dtype": state_dtype,
        "stochastic_round": stochastic,
        **rule,
    }
    expected = train(fused=False, **options)
    assert_close(train(fused=True, **options), expected)
    assert_close(train(capturable=True, **options), expected)


@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16])
def test_threads_and_pieces_change_nothing(state_dtype, kernel, monkeypatch):
    threads = torch.get_num_threads()
    ends = []
    try:
        for count, openmp in ((1, cpu._openmp()), (2, cpu._openmp()), (5, None)):
            torch.set_num_threads(count)
            monkeypatch.setattr(cpu, "_openmp", lambda found=openmp: found)
            ends.append(train(5, fused=True, state_dtype=state_dtype, shapes=[(700, 1000), (3,)]))
    finally:
        torch.set_num_threads(threads)
    for size in (100, 2**30):
        monkeypatch.setattr(update, "TOGETHER_ON_CPU", size)
        ends.append(train(5, fused=False, state_dtype=state_dtype, shapes=[(70, 100), (3,)]))
    for first, second in ((0, 1), (0, 2), (3, 4)):
        for p, q in zip(ends[first][0], ends[second][0], strict=True):
            assert torch.equal(p, q)


def test_none_chooses_the_kernel_for_large_models_that_it_can_step(kernel, monkeypatch):
    calls = []
    made = cpu.Kernel
    monkeypatch.setattr(
        cpu, "Kernel", lambda slots, counts: calls.append(len(slots)) or made(slots, counts)
    )
    large, small = [(300, 1000), (5,)], [(9, 9)]
    for count, options in (
        (1, {"shapes": large}),
        (0, {"shapes": small}),
        (1, {"shapes": small, "fused": True}),
        (0, {"shapes": large, "fused": False}),
        (1, {"shapes": large, "foreach": True}),  # which is taken, and not needed
        (1, {"shapes": small, "fused": True, "foreach": False}),
        (0, {"shapes": large, "track_stats": True}),
        (0, {"shapes": large, "dtype": torch.float16}),
    ):
        calls.clear()
        train(1, **options)
        assert len(calls) == count, options
    strided, dense = Parameter(torch.randn(600, 601).t()), Parameter(torch.randn(600, 601))
    strided.grad, dense.grad = torch.ones_like(strided), torch.ones_like(dense)
    calls.clear()
    PACE([strided, dense], pullback=0.1).step()
    assert calls == [1]  # the one that it can step


def test_tensors_at_rest_ask_for_no_kernel(kernel, monkeypatch):
    large, small = Parameter(torch.ones(600, 600)), Parameter(torch.ones(3))
    opt = PACE([large, small], pullback=0.1, fused=False)
    large.grad, small.grad = torch.ones_like(large), torch.ones_like(small)
    opt.step()
    opt.param_groups[0]["fused"], large.grad = None, None
    asked = []
    monkeypatch.setattr(kernels, "_available", lambda *_: asked.append(1))
    opt.step()
    assert opt.state[large]["idle_steps"] == 1
    assert not asked


# ---- building ----------------------------------------------------------------------------------


@pytest.fixture
def unbuilt(tmp_path, monkeypatch):
    """As on a machine that has never built the kernel."""
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))
    cpu.build.cache_clear()
    cpu.available.cache_clear()
    yield tmp_path / "cache"
    cpu.build.cache_clear()
    cpu.available.cache_clear()


def test_builds_once_whatever_changes(unbuilt, kernel, monkeypatch):
    builds = []
    run = subprocess.run
    monkeypatch.setattr(cpu.subprocess, "run", lambda *a, **k: builds.append(1) or run(*a, **k))
    for dtype, state_dtype, stochastic in DTYPES:
        for shapes in ([(3,)], [(300, 1000), (2, 2)], SHAPES):  # and the rate changes in each
            train(
                3,
                dtype=dtype,
                state_dtype=state_dtype,
                stochastic_round=stochastic,
                fused=True,
                shapes=shapes,
            )
    assert len(builds) == 1
    cpu.build.cache_clear()  # another process
    train(1, fused=True)
    assert len(builds) == 1
    assert [path.suffix for path in unbuilt.iterdir()] == [".so"]


def test_builds_where_nothing_can_be_kept(unbuilt, kernel, monkeypatch):
    unbuilt.write_text("a file where the folder should be")
    train(1, fused=True)
    assert unbuilt.read_text() == "a file where the folder should be"


WITHOUT = {
    "no compiler": ("", r"no C\+\+ compiler was found; install g\+\+"),
    "a failing one": ("false", "false failed: no message"),
    "none such": ("/nowhere/c++ -O2", r"No such file or directory: '/nowhere/c\+\+'"),
    "one that makes nothing": ("true", "true: .*No such file or directory"),
}


@pytest.mark.parametrize("case", WITHOUT)
def test_without_a_kernel_true_raises_and_none_warns_once(unbuilt, monkeypatch, case):
    compiler, message = WITHOUT[case]
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    p = Parameter(torch.ones(600, 600))
    with pytest.raises(RuntimeError, match=message) as error:
        PACE([p], pullback=0.1, fused=True)
    assert "\n" not in str(error.value)
    opt = PACE([p], pullback=0.1)
    with pytest.raises(RuntimeError, match=message):
        opt.add_param_group({"params": [Parameter(torch.ones(1))], "fused": True})
    assert len(opt.param_groups) == 1
    p.grad = torch.ones_like(p)
    with pytest.warns(UserWarning, match=f"slower: .*{message}"):
        opt.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step()  # says it once
    assert opt.state[p]["step"] == 2
    opt.param_groups[0]["fused"] = True
    with pytest.raises(RuntimeError, match=message):
        opt.step()
    assert opt.state[p]["step"] == 2  # nothing changed
    assert not list(unbuilt.glob("*.so"))


class Other(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: torch.ones(3, 4).t(), "contiguous"),
        (lambda: torch.ones(3, 4).to_sparse(), "not sparse"),
        (lambda: torch.ones(3, 4, dtype=torch.complex64), "not torch.complex64"),
        (lambda: torch.ones(3, 4, dtype=torch.float16), "not torch.float16"),
        (lambda: torch.ones(3, 4).as_subclass(Other), "plain tensors, not Other"),
        (lambda: torch._neg_view(torch.ones(3, 4)), "contiguous"),
    ],
)
def test_what_the_kernel_cannot_step_is_named(make, reason, kernel):
    good, bad = Parameter(torch.ones(2)), Parameter(make())
    with pytest.raises(ValueError, match=rf"^fused=True takes .*{reason}.*'bad' of shape"):
        PACE([("good", good), ("bad", bad)], pullback=0.1, fused=True)
    # Asked for later, it is found before anything changes.
    opt = PACE([("good", good), ("bad", bad)], pullback=0.1)
    opt.param_groups[0]["fused"] = True
    good.grad, bad.grad = torch.ones(2), make()
    with pytest.raises(RuntimeError, match=rf"^fused=True takes .*{reason}.*nothing was changed"):
        opt.step()
    assert torch.equal(good, torch.ones(2))
    assert not opt.state


@pytest.mark.parametrize(
    ("grad", "kind"),
    [(torch.ones(30).as_subclass(Other), "Other"), (torch._neg_view(torch.ones(30)), "Tensor")],
)
def test_a_gradient_of_another_kind_goes_through_torch(grad, kind, kernel, monkeypatch):
    monkeypatch.setattr(kernels, "WORTH_BUILDING", 0)
    monkeypatch.setattr(cpu, "Kernel", None)
    p, q = Parameter(torch.ones(30)), Parameter(torch.ones(30))
    p.grad, q.grad = grad, grad.as_subclass(torch.Tensor).resolve_neg().clone()
    PACE([p], lr=0.1, pullback=0.1).step()
    PACE([q], lr=0.1, pullback=0.1, fused=False).step()
    assert torch.equal(p, q)
    opt = PACE([p], lr=0.1, pullback=0.1)
    opt.param_groups[0]["fused"] = True
    with pytest.raises(RuntimeError, match=f"takes plain gradients, not {kind} of another kind"):
        opt.step()
    assert torch.equal(p, q)


def test_a_strided_gradient_is_no_obstacle(kernel):
    ends = []
    for strided in (False, True):
        p = Parameter(torch.ones(30, 40))
        opt = PACE([p], pullback=0.1, fused=True)
        g = torch.randn(30, 40, generator=torch.Generator().manual_seed(0))
        p.grad = g.t().contiguous().t() if strided else g
        opt.step()
        ends.append(p)
    assert torch.equal(*ends)


# ---- other devices -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"track_stats": True},
        {"state_dtype": torch.bfloat16},
        {"capturable": True},
        {"capturable": True, "averaging": "ema:every=2", "state_dtype": torch.bfloat16},
        {"capturable": True, "state_dtype": torch.bfloat16},
    ],
    ids=str,
)
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_a_step_never_waits_for_the_device(options, tensor_lr):
    """On the meta device no value can be read, so that whatever asked for one would fail."""
    params = [Parameter(torch.empty(s, device="meta")) for s in SHAPES]
    opt = PACE(params, **{"pullback": 0.1, **options})
    if tensor_lr:
        opt.param_groups[0]["lr"] = torch.empty((), device="meta")
    for _ in range(3):
        for p in params:
            p.grad = torch.empty_like(p)
        opt.step()
    counts = opt.state[params[0]]["step"]
    assert counts.device.type == ("meta" if options.get("capturable") else "cpu")


def test_capturable_steps_count_for_each_parameter():
    ends = []
    for capturable in (False, True):
        params, opt = train(3, capturable=capturable, lr=torch.tensor(1e-2))
        late = Parameter(torch.ones(5))
        opt.add_param_group({"params": [late]})
        for p in (*params, late):
            p.grad = torch.ones_like(p)
        opt.step()
        assert opt.state[late]["step"] == 1
        ends.append([*params, late])
        saved = opt.state_dict()
        opt.load_state_dict(saved)
        assert opt.state[late]["step"].dtype == torch.float64
    for p, q in zip(*ends, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_without_triton_true_raises_and_none_warns_once(monkeypatch):
    monkeypatch.setattr(kernels, "device_kind", lambda device: "gpu")
    monkeypatch.setattr(kernels, "WORTH_BUILDING", 0)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "paceline.kernels.gpu", raising=False)
    monkeypatch.delattr(kernels, "gpu", raising=False)
    kernels._fault_on_gpu.cache_clear()
    kernels._warn.cache_clear()
    p = Parameter(torch.ones(9))
    with pytest.raises(RuntimeError, match=r"triton.*; pip install 'paceline\[gpu\]'$") as error:
        PACE([p], pullback=0.1, fused=True)
    assert "\n" not in str(error.value)
    opt = PACE([p], pullback=0.1)
    p.grad = torch.ones_like(p)
    with pytest.warns(UserWarning, match=r"slower: .*triton.*; pip install 'paceline\[gpu\]'$"):
        opt.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step()  # says it once
        PACE([p], pullback=0.1).step()
    assert opt.state[p]["step"] == 2
    kernels._fault_on_gpu.cache_clear()
    kernels._warn.cache_clear()


FORMS = {  # options, and what a GPU's kernel is compiled for then
    "as it is": ({}, {}),
    "two averages more": ({"returns": {"slow": "ema:kappa=0.7", "mean": "uniform"}}, {"extra": 2}),
    "one gain": ({"gain": "scalar"}, {"uniform_gain": True}),
    "auto": ({"pullback": "auto"}, {"extra": 1, "uniform_gain": True}),
    "stochastic": ({"stochastic_round": True}, {"stochastic": True}),
    "narrow state": ({"state_dtype": torch.bfloat16}, {"state_dtype": torch.bfloat16}),
    "skip": ({"nonfinite": "skip"}, {"skip": None}),
    "raise": ({"nonfinite": "raise"}, {"skip": False}),
    "ignore": ({"nonfinite": "ignore"}, {"skip": False}),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_gpu_is_asked_for_just_what_it_will_step(form, monkeypatch):
    options, expected = FORMS[form]
    p = Parameter(torch.ones(3, dtype=torch.bfloat16))
    (group,) = PACE([p], **{"pullback": 0.3, **options}).param_groups
    dtype = group["state_dtype"] or torch.float32
    asked = []
    monkeypatch.setattr(kernels, "device_kind", lambda device: "gpu")
    monkeypatch.setattr(kernels, "_fault_on_gpu", asked.append)
    assert kernels._available(p, dtype, group)
    plain = kernels.Variant(p.device, p.dtype, torch.float32, 0, False, False, skip=True)
    assert asked == [plain._replace(**expected)]
    kernels.prepare(p, dtype, group)
    assert asked[1:] == asked[:1]
    monkeypatch.setattr(kernels, "capturing", lambda device: True)
    assert not kernels._available(p, dtype, group)
    with pytest.raises(kernels.BuildError, match="before one that goes into a CUDA graph"):
        kernels.prepare(p, dtype, group)
    assert len(asked) == 2


def test_fused_on_a_device_without_a_kernel_is_refused():
    """As torch's AdamW refuses it, before anything has changed."""
    p = Parameter(torch.empty(5, device="meta"))
    p.grad = torch.empty_like(p)
    with pytest.raises(RuntimeError, match="fused=True"):
        torch.optim.AdamW([p], fused=True).step()
    message = (
        r"^fused=True takes tensors on CPUs and CUDA GPUs, not on meta, got parameter 0 of .*;"
    )
    with pytest.raises(ValueError, match=message) as error:
        PACE([p], pullback=0.1, fused=True)
    assert "\n" not in str(error.value)
    opt = PACE([p], pullback=0.1)
    opt.param_groups[0]["fused"] = True
    with pytest.raises(RuntimeError, match=message):
        opt.step()
    assert not opt.state


# ---- memory ------------------------------------------------------------------------------------


def scratch(work):
    """Bytes that torch holds at the worst moment of `work`, beyond what it held before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    held = peak = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@pytest.mark.parametrize("options", [{"fused": True}, {"fused": False}], ids=str)
@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16])
def test_state_is_12_or_6_bytes_and_scratch_less_than_the_largest_parameter(
    options, state_dtype, kernel
):
    shapes = [(3000, 1500), (1500, 1500), (1500,)]
    params, opt = train(1, shapes=shapes, state_dtype=state_dtype, **options)
    elements = sum(p.numel() for p in params)
    kept = sum(x.nbytes for p in params for x in opt.state[p].values() if x.ndim)
    assert kept == (6 if state_dtype else 12) * elements
    assert all(opt.state[p]["step"].nbytes == 8 for p in params)
    largest = params[0].nbytes
    assert largest > 16 * swap.SLICE
    assert scratch(opt.step) < (4096 if options["fused"] else largest)
    for change in (opt.eval, opt.train):
        assert scratch(change) <= (4096 if options["fused"] else 16 * swap.SLICE)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux's memory map")
def test_large_state_asks_for_huge_pages():
    params, opt = train(1, shapes=[(1500, 1500), (3,)])
    opt.load_state_dict(opt.state_dict())
    maps = Path("/proc/self/smaps").read_text()
    regions = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) .*?^VmFlags: (.*?)$", maps, re.M | re.S)
    for name in ("exp_avg", "exp_avg_sq", "average"):
        middle = opt.state[params[0]][name].data_ptr() + 1500 * 1500 * 2
        flags = [f for low, high, f in regions if int(low, 16) <= middle < int(high, 16)]
        assert "hg" in flags[0].split(), name


def test_batches_are_bounded_and_cover_everything():
    tensors = [torch.arange(float(n)).view(-1, 2) for n in (10, 4000, 6, 2, 300)]
    slots = [update.Slot(x, x, x, x, x) for x in tensors]
    batches = list(update.batches(slots, 100))
    assert max(sum(slot.param.numel() for slot in batch) for batch in batches) <= 100
    flat = torch.cat([slot.param.reshape(-1) for batch in batches for slot in batch])
    assert torch.equal(flat, torch.cat([x.reshape(-1) for x in tensors]))
    starts = [slot.start for batch in batches for slot in batch]
    assert starts == [0, *range(0, 4000, 100), 0, 0, 0, 100, 200]
    strided = torch.arange(600.0).view(6, 100).t()
    (slot,) = [update.Slot(strided, strided, strided, strided, strided)]
    pieces = list(slot.pieces(120))
    assert torch.equal(torch.cat([piece.param for piece in pieces]), strided)
    assert [piece.start for piece in pieces] == list(range(0, 600, 120))


def test_the_library_is_what_the_source_says(kernel):
    """Argument types are declared: ctypes would cut 64-bit addresses to 32 otherwise."""
    assert cpu.build().step.argtypes[0] is ctypes.c_void_p


@pytest.mark.parametrize("how", ["loaded", "made contiguous"])
def test_state_follows_the_layout_of_its_parameter(how, kernel):
    """The kernel takes elements by their places in memory."""
    torch.manual_seed(0)
    start, grads = torch.randn(6, 5), torch.randn(4, 6, 5)
    p, q = Parameter(start.t().contiguous().t()), Parameter(start.clone())
    opts = [PACE([x], lr=0.1, pullback=1.0, fused=f) for x, f in ((p, None), (q, True))]
    for i, grad in enumerate(grads):
        if i == 2 and how == "loaded":
            saved, p = opts[0].state_dict(), Parameter(p.detach().contiguous())
            opts[0] = PACE([p], lr=0.1, pullback=1.0, fused=True)
            opts[0].load_state_dict(saved | {"param_groups": opts[0].state_dict()["param_groups"]})
        elif i == 2:
            p.data = p.data.contiguous()
            opts[0].param_groups[0]["fused"] = True
        p.grad, q.grad = grad.clone(), grad.clone()
        for opt in opts:
            opt.step()
    torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-6)
    for key, value in opts[1].state[q].items():
        torch.testing.assert_close(opts[0].state[p][key], value, atol=1e-6, rtol=1e-6)


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="a newer torch has it")
def test_gradients_wider_than_their_parameters_are_not_given_to_the_kernel(kernel, monkeypatch):
    monkeypatch.setattr(kernels, "WORTH_BUILDING", 0)
    p, q, r = (Parameter(torch.ones(40, dtype=torch.bfloat16)) for _ in range(3))
    p.grad_dtype = torch.float32
    p.grad, q.grad = torch.linspace(-1, 1, 40), torch.ones_like(q)
    opt = PACE([p, q], lr=0.1, pullback=1.0)
    opt.step()
    assert torch.equal(opt.state[p]["exp_avg"], torch.zeros(40).lerp(p.grad, 0.1))
    assert torch.equal(opt.state[q]["exp_avg"], torch.full((40,), 1.0 - 0.9))
    opt = PACE([r], lr=0.1, pullback=1.0, fused=True)
    r.grad_dtype = torch.float32
    r.grad = torch.ones(40)
    with pytest.raises(RuntimeError, match="gradients of the parameter's dtype, not torch.float32"):
        opt.step()
    assert not opt.state
