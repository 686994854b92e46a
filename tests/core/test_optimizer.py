"""PACE as an optimizer: state, swapping, exports, checkpoints, errors."""

import copy
import io
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from problems import advance, assert_same, problem, snapshot
from torch import nn
from torch.nn import Parameter

from paceline import EMA, PACE, Pullback

# ---- state -----------------------------------------------------------------------------------


def test_state_comes_with_the_first_gradient_of_each_parameter():
    model, generator = problem()
    frozen, late = model[1].weight, model[3].bias
    frozen.requires_grad_(False)
    opt = PACE(model.parameters(), pullback=0.1)
    assert not opt.state
    late.requires_grad_(False)
    advance(model, opt, generator, 3)
    late.requires_grad_(True)
    advance(model, opt, generator, 2)
    assert frozen not in opt.state
    assert opt.state[late]["step"] == 2
    assert opt.state[model[0].weight]["step"] == 5
    assert set(opt.state[late]) == {"step", "idle_steps", "exp_avg", "exp_avg_sq", "average"}


def test_parameters_without_gradients_are_left_alone():
    used, unused = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    opt = PACE([used, unused], pullback=0.5, weight_decay=0.1)
    used.grad = torch.ones(3)
    opt.step()
    assert torch.equal(unused, torch.ones(3))
    assert unused not in opt.state
    assert not torch.equal(used, torch.ones(3))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)])
def test_scalars_and_empty_parameters_step_and_swap(shape):
    p = Parameter(torch.ones(shape))
    opt = PACE([p], pullback=0.5, track_stats=True)
    p.grad = torch.ones(shape)
    opt.step()
    live = p.detach().clone()
    assert (live < 1).all()
    with opt.averaged():
        assert (p > live).all()
    assert torch.equal(p, live)
    assert p.shape == shape
    assert ("gain_mean" in opt.stats()) == (p.numel() > 0)  # of no coordinates there is none


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_non_contiguous_parameters(dtype):
    torch.manual_seed(0)
    start = torch.randn(4, 3).to(dtype)
    dense, strided = Parameter(start.clone()), Parameter(start.t().contiguous().t())
    assert not strided.is_contiguous()
    for p in (dense, strided):
        opt = PACE([p], lr=0.1, pullback=1.0)
        for seed in range(5):
            p.grad = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)).to(dtype)
            opt.step()
        opt.eval()
    assert torch.equal(dense, strided)


def test_groups_have_options_of_their_own():
    a, b, c = (Parameter(torch.ones(4)) for _ in range(3))
    opt = PACE(
        [
            {"params": [a]},
            {"params": [b], "averaging": EMA(0.2)},
            {"params": [c], "kappa": 0.3},
        ],
        pullback=0.3,
        averaging=EMA(0.1),
    )
    rules = [group["averaging"] for group in opt.param_groups]
    assert rules == ["ema:beta=0.1", "ema:beta=0.2", "ema:kappa=0.3"]
    for p in (a, b, c):
        p.grad = torch.ones(4)
    opt.step()
    # after one step ema = 1 + weight·(θ - 1)
    for p, weight in ((a, 0.1), (b, 0.2), (c, 2**-0.3)):
        expected = 1 + weight * (p.detach() - 1)
        torch.testing.assert_close(opt.state[p]["average"], expected)


def test_added_group_joins_mid_run():
    model, generator = problem()
    head = model[3]
    opt = PACE([*model[0].parameters(), *model[1].parameters()], pullback=0.2)
    advance(model, opt, generator, 3)
    opt.add_param_group({"params": list(head.parameters()), "lr": 0.5})
    advance(model, opt, generator, 2)
    assert opt.state[head.weight]["step"] == 2
    assert opt.state[model[0].weight]["step"] == 5
    # Adam's first steps are of about the learning rate: the group's own
    start = opt.state[head.weight]["average"]
    assert (head.weight - start).abs().max() > 0.1


# ---- swapping --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_swap_is_an_idempotent_and_in_place(dtype):
    model, generator = problem(dtype)
    opt = PACE(model.parameters(), lr=0.05, pullback=0.1)
    opt.eval()
    opt.train()  # nothing to swap yet
    advance(model, opt, generator, 10)
    before = snapshot(model, opt)
    pointers = [t.data_ptr() for p in model.parameters() for t in (p, opt.state[p]["average"])]
    for _ in range(3):
        opt.eval()
        opt.eval()
        for p, state in zip(model.parameters(), before[1], strict=True):
            rounding = torch.finfo(dtype).eps if dtype.itemsize == 2 else 0
            torch.testing.assert_close(
                p.to(state["average"].dtype), state["average"], rtol=rounding, atol=2**-24
            )
            assert len(opt.state[p]) == 5  # no third copy
        opt.train()
        opt.train()
        assert_same(snapshot(model, opt), before)
    assert pointers == [
        t.data_ptr() for p in model.parameters() for t in (p, opt.state[p]["average"])
    ]


def test_averaged_restores_what_it_found_whatever_happens_inside():
    model, generator = problem()
    opt = PACE(model.parameters(), lr=0.05, pullback=0.1)
    advance(model, opt, generator, 5)
    before = snapshot(model, opt)
    for exception in (KeyError, KeyboardInterrupt):
        with pytest.raises(exception), opt.averaged():
            raise exception
        assert_same(snapshot(model, opt), before)
    with opt.averaged():
        with opt.averaged():
            inner = snapshot(model, opt)
        assert_same(snapshot(model, opt), inner)  # the inner one leaves the outer's average
        opt.train()
    assert_same(snapshot(model, opt), before)
    opt.eval()
    with opt.averaged():
        pass
    assert_same(snapshot(model, opt), inner)


def test_step_while_swapped_raises_and_changes_nothing():
    model, generator = problem()
    opt = PACE(model.parameters(), lr=0.05, pullback=0.1)
    advance(model, opt, generator, 5)
    opt.eval()
    before = snapshot(model, opt)
    closures = []
    with pytest.raises(RuntimeError, match=r"call train\(\) first"):
        opt.step(lambda: closures.append("called"))
    assert not closures
    assert_same(snapshot(model, opt), before)
    opt.train()
    advance(model, opt, generator, 1)
    assert opt.state[model[0].weight]["step"] == 6


def test_dtypes_may_not_change_while_swapped_or_after_the_first_step():
    model, generator = problem()
    opt = PACE(model.parameters(), lr=0.05, pullback=0.1)
    advance(model, opt, generator, 5)
    opt.eval()
    model.half()
    before = snapshot(model, opt)
    with pytest.raises(
        RuntimeError, match="parameter of torch.float32, which is torch.float16 now"
    ):
        opt.train()
    assert_same(snapshot(model, opt), before)
    model.float()
    opt.train()
    model.double()
    before = snapshot(model, opt)
    with pytest.raises(
        RuntimeError, match="is torch.float64 now, which does not go with its torch.float32 average"
    ):
        opt.eval()
    assert_same(snapshot(model, opt), before)
    # The same for a checkpoint that was saved while swapped.
    narrow, generator = problem(torch.float16)
    opt = PACE(narrow.parameters(), lr=0.05, pullback=0.1)
    advance(narrow, opt, generator, 5)
    opt.eval()
    wide, _ = problem()
    other = PACE(wide.parameters(), lr=0.05, pullback=0.1)
    other.load_state_dict(opt.state_dict())
    with pytest.raises(
        RuntimeError, match="into a parameter of torch.float16, which is torch.float32 now"
    ):
        other.train()


class Tied(nn.Module):
    """Tied weights, a frozen parameter and buffers."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.norm = nn.BatchNorm1d(4)
        self.frozen = Parameter(torch.randn(4), requires_grad=False)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.norm(self.embedding(x) * self.frozen))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_averaged_state_dict(dtype):
    torch.manual_seed(0)
    model = Tied().to(dtype)
    opt = PACE([p for p in model.parameters() if p.requires_grad], lr=0.05, pullback=0.1)
    for _ in range(8):
        opt.zero_grad()
        model(torch.arange(7)).float().square().mean().backward()
        opt.step()
    before = copy.deepcopy(model.state_dict())
    returned = opt.averaged_state_dict(model)
    assert {k: v.dtype for k, v in returned.items()} == {k: v.dtype for k, v in before.items()}
    assert returned["head.weight"] is returned["embedding.weight"]
    average = opt.state[model.head.weight]["average"]
    assert torch.equal(returned["head.weight"], average.to(dtype))
    assert not torch.equal(returned["head.weight"], before["head.weight"])
    for name in ("frozen", "norm.running_mean", "norm.num_batches_tracked"):
        assert torch.equal(returned[name], before[name])
    for name, value in model.state_dict().items():  # the live weights are untouched
        assert torch.equal(value, before[name])
    with opt.averaged():
        swapped = opt.averaged_state_dict(model)
    for name, value in returned.items():
        torch.testing.assert_close(swapped[name], value, rtol=torch.finfo(dtype).eps, atol=1e-7)
    kept = copy.deepcopy(returned)
    model(torch.arange(7)).float().square().mean().backward()
    opt.step()
    for name, value in returned.items():  # a snapshot: later steps do not reach it
        assert torch.equal(value, kept[name])
    fresh = Tied().to(dtype)
    fresh.load_state_dict(returned)
    assert fresh.head.weight is fresh.embedding.weight


def test_averaged_state_dict_of_a_model_that_is_not_ours():
    model, generator = problem()
    opt = PACE(model.parameters(), pullback=0.1)
    advance(model, opt, generator, 1)
    with pytest.raises(ValueError, match="model must hold parameters of this optimizer"):
        opt.averaged_state_dict(nn.Linear(2, 2))

    def detach(module, state, prefix, _):
        state[prefix + "weight"] = state[prefix + "weight"].detach()

    model[0].register_state_dict_post_hook(detach)
    with pytest.raises(ValueError, match="another tensor for 0.weight"):
        opt.averaged_state_dict(model)  # rather than the live weights unnoticed


# ---- stats -----------------------------------------------------------------------------------


def test_stats_say_what_the_step_did():
    torch.manual_seed(0)
    p, q, idle = Parameter(torch.randn(40)), Parameter(torch.randn(3, 5)), Parameter(torch.ones(2))
    groups = [{"params": [p, q]}, {"params": [idle]}]
    opt = PACE(groups, lr=0.2, pullback=8.0, weight_decay=0.1)
    faults = {"guarded_coordinates": 0, "guarded_steps": 0, "skipped_steps": 0}
    assert opt.stats() == faults
    for group in opt.param_groups:
        group["track_stats"] = True
    for _ in range(5):
        before = torch.cat([p.detach().flatten(), q.detach().flatten()])
        average = torch.cat([opt.state[x].get("average", x).flatten() for x in (p, q)]).detach()
        p.grad, q.grad = torch.randn(40), torch.randn(3, 5)
        opt.step()
    after = torch.cat([p.detach().flatten(), q.detach().flatten()])
    new_average = torch.cat([opt.state[x]["average"].flatten() for x in (p, q)])
    m = torch.cat([opt.state[x]["exp_avg"].flatten() for x in (p, q)]) / (1 - 0.9**5)
    v = torch.cat([opt.state[x]["exp_avg_sq"].flatten() for x in (p, q)]) / (1 - 0.999**5)
    gain = (0.2 * 8 * 6**-0.5 / (v.sqrt() + 1e-8)).clamp(max=1)
    pull = gain * (average - before)
    adamw = -0.2 * 0.1 * before - 0.2 * m / (v.sqrt() + 1e-8)
    expected = {
        "gain_mean": gain.mean(),
        "gain_min": gain.min(),
        "gain_max": gain.max(),
        "clipped": (gain == 1).float().mean(),
        "adamw_norm": adamw.norm(),
        "pull_norm": pull.norm(),
        "update_norm": (after - before).norm(),
        "distance": (after - new_average).norm(),
    }
    stats = opt.stats()
    groups = stats.pop("groups")
    assert {key: stats.pop(key) for key in faults} == faults
    assert stats == pytest.approx({k: v.item() for k, v in expected.items()}, rel=1e-4)
    assert 0 < stats["clipped"] < 1  # the case shows both sides of the clip
    assert groups == [stats, None]
    # Two groups that differ, one without a clip: the whole is made of the two.
    opt.add_param_group({"params": [r := Parameter(torch.randn(9))], "clip": False, "lr": 5.0})
    p.grad, q.grad, r.grad = torch.randn(40), torch.randn(3, 5), torch.randn(9)
    opt.param_groups[2]["track_stats"] = True
    opt.step()
    whole = opt.stats()
    first, none, third = whole["groups"]
    assert none is None
    assert third["clipped"] == 0
    assert third["gain_max"] > 1 >= first["gain_max"]
    assert whole["gain_max"] == third["gain_max"]
    assert whole["gain_mean"] == pytest.approx(
        (55 * first["gain_mean"] + 9 * third["gain_mean"]) / 64, rel=1e-5
    )
    assert whole["update_norm"] == pytest.approx(
        math.hypot(first["update_norm"], third["update_norm"]), rel=1e-5
    )
    for group in opt.param_groups:
        group["track_stats"] = False
    opt.step()
    assert opt.stats() == faults  # measurements are not those of an earlier step


def test_stats_of_narrow_parameters_are_of_the_step_before_rounding():
    norms = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        p = Parameter(torch.randn(1000).to(dtype).add(2))
        opt = PACE([p], lr=1e-5, weight_decay=0, pullback=0.1, track_stats=True)
        p.grad = torch.randn(1000).to(dtype)
        opt.step()
        norms.append(opt.stats()["adamw_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=0.05)
    assert opt.stats()["update_norm"] < norms[0] / 2  # too small for bfloat16 to be stored


# ---- hooks, schedulers, arguments ------------------------------------------------------------


def test_schedulers_hooks_and_closures():
    model, generator = problem()
    opt = PACE(model.parameters(), lr=0.1, pullback=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=20)
    calls = []
    opt.register_step_pre_hook(lambda *_: calls.append("pre"))
    opt.register_step_post_hook(lambda *_: calls.append("post"))
    x = torch.randn(8, 6, generator=generator)

    def closure():
        opt.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    first = opt.step(closure)
    rates = set()
    for _ in range(19):
        loss = opt.step(closure)
        schedule.step()
        rates.add((opt.param_groups[0]["lr"], opt.param_groups[0]["betas"]))
    assert loss < first
    assert len(rates) > 10
    assert calls == ["pre", "post"] * 20


def test_learning_rate_as_a_tensor():
    rates = (0.05, torch.tensor(0.05))
    ends = []
    for lr in rates:
        model, generator = problem()
        advance(model, PACE(model.parameters(), lr=lr, pullback=0.3), generator, 3)
        ends.append(model[0].weight)
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-7)


# ---- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1.0},
        {"lr": math.nan},
        {"lr": "fast"},
        {"lr": True},
        {"lr": 10**400},
        {"lr": torch.tensor([0.1, 0.1])},
        {"lr": torch.tensor(-0.1)},
        {"eps": -1e-8},
        {"weight_decay": -0.1},
        {"betas": (0.9, 1.0)},
        {"betas": 0.9},
        {"betas": (0.9,)},
        {"betas": (torch.tensor([0.9, 0.9]), 0.999)},
        {"betas": (torch.tensor(1.0), 0.999)},
        {"betas": "0.9"},
        {"pullback": -0.1},
        {"pullback": math.inf},
        {"pullback": torch.tensor(0.1)},
        {"kappa": 1.5},
        {"kappa": -0.1},
        {"kappa": True},
        {"return_kappa": "slow"},
        {"clip": 3},
        {"foreach": "yes"},
        {"foreach": 1.0},
        {"fused": "yes"},
        {"capturable": None},
        {"state_dtype": torch.float16},
        {"state_dtype": "float16"},
        {"stochastic_round": 1},
        {"seed": 0.5},
        {"maximize": None},
        {"track_stats": 2},
    ],
    ids=str,
)
def test_bad_arguments_are_named_with_their_value(options):
    (name, value), p = next(iter(options.items())), Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=rf"^{name} must be .*got ") as error:
        PACE([p], **{"pullback": 0.1, **options})
    assert repr(value) in str(error.value)
    good = PACE([p], pullback=0.1)
    with pytest.raises(ValueError, match=f"^{name} must be"):
        good.add_param_group({"params": [Parameter(torch.ones(1))], **options})
    assert len(good.param_groups) == 1


def test_options_become_plain_numbers():
    p = Parameter(torch.ones(2))
    opt = PACE(
        [p],
        lr=np.float64(0.1),
        betas=[np.float32(0.5), 0],
        pullback=1,
        kappa=np.int64(1),
    )
    p.grad = torch.ones(2)
    opt.step()
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    group = torch.load(file, weights_only=True)["param_groups"][0]
    assert (group["lr"], group["betas"], group["pullback"]) == (0.1, (0.5, 0.0), 1.0)


def test_contradictions():
    p = [Parameter(torch.ones(2))]
    with pytest.raises(ValueError, match="^pullback must be given with gain='adam'"):
        PACE(p, gain="adam")
    for other in ({"foreach": True}, {"track_stats": True}):
        with pytest.raises(ValueError, match=f"fused=True needs {next(iter(other))}"):
            PACE(p, pullback=0.1, fused=True, **other)


def test_parameters_to_train_must_be_of_16_bits_or_more():
    narrow = Parameter(torch.ones(3).to(torch.float8_e5m2))
    with pytest.raises(ValueError, match=r"floating-point tensors, got torch.float8_e5m2"):
        PACE([narrow], pullback=0.1)
    opt = PACE([narrow.requires_grad_(False)], pullback=0.1)
    narrow.grad = torch.ones(3).to(torch.float8_e5m2)
    with pytest.raises(RuntimeError, match=r"floating-point tensors, got torch.float8_e5m2"):
        opt.step()


def test_a_module_in_place_of_its_parameters_is_refused():
    module = torch.nn.Linear(2, 1)
    for given, name in ((module, "Linear"), (module.parameters, "method")):
        with pytest.raises(TypeError, match=rf"as of model\.parameters\(\); got {name}$"):
            PACE(given)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_given_twice_is_refused():
    p = Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="params must be given once each"):
        PACE([p, p], pullback=0.1)


@pytest.mark.parametrize("kind", ["sparse", "complex"])
def test_unsupported_gradients_change_nothing(kind):
    good = Parameter(torch.ones(3))
    bad = Parameter(torch.ones(4, 2, dtype=torch.complex64 if kind == "complex" else None))
    opt = PACE([("good", good), ("tokens", bad)], pullback=0.1)
    good.grad = torch.ones(3)
    bad.grad = torch.ones_like(bad).to_sparse() if kind == "sparse" else torch.ones_like(bad)
    with pytest.raises(RuntimeError, match=rf"{kind} gradients.*'tokens' of shape \(4, 2\)"):
        opt.step()
    assert not opt.state
    assert torch.equal(good, torch.ones(3))


def test_core_imports_with_torch_alone():
    """All that the extras bring is blocked once torch has loaded; PACE imports and steps."""
    code = """
import sys, torch, torch._dynamo
for name in ("transformers", "datasets", "accelerate", "tokenizers", "schedulefree", "matplotlib",
             "tensorboard", "rich", "tyro", "pydantic", "numpy", "jinja2", "safetensors",
             "triton"):
    for loaded in [m for m in sys.modules if m.partition(".")[0] == name]:
        del sys.modules[loaded]
    sys.modules[name] = None
from paceline import PACE
p = torch.nn.Parameter(torch.ones(2))
opt = PACE([p], pullback=0.1)
p.grad = torch.ones(2)
opt.step()
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


BEGINNING = {
    "PACE": lambda params: PACE(params, lr=0.1),
    "PACE in one pass": lambda params: PACE(params, lr=0.1, fused=True),
    "bfloat16 state": lambda params: PACE(params, lr=0.1, state_dtype=torch.bfloat16),
    "more averages": lambda params: PACE(
        params, lr=0.1, pullback=1.0, returns={"slow": "ema:kappa=0.7", "bema": "bema:kappa=0.5"}
    ),
    "Pullback": lambda params: Pullback(torch.optim.AdamW(params, lr=0.1), 1.0, gain="scalar"),
    "LAWA": lambda params: Pullback(
        torch.optim.AdamW(params, lr=0.1), averaging="lawa:window=3:every=2"
    ),
}


@pytest.mark.parametrize("name", BEGINNING)
def test_averages_begin_anew_from_weights_that_were_loaded(name):
    """Without it a pull takes them back: the second run, from the same weights, is the control."""
    ends = {}
    for restarts in (True, False):
        p = Parameter(torch.zeros(5, 4))
        opt = BEGINNING[name]([p])
        for step in range(8):
            p.grad = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
            opt.step()
            if step == 4:
                with torch.no_grad():
                    p.fill_(30.0)
                if restarts:
                    opt.restart_averages()
                    with opt.averaged():
                        assert (p == 30.0).all()  # there is none yet
        assert opt.state[p]["step"] == 8
        with opt.averaged():
            with pytest.raises(RuntimeError, match=r"^restart_averages\(\) was called while"):
                opt.restart_averages()
            ends[restarts] = p.detach().clone()
    assert (ends[True] - 30).abs().max() < 0.5
    assert (ends[False] - 30).abs().max() > 2
