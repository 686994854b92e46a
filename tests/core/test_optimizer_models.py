"""PACE on the shapes that real models and training loops have, beside torch, transformers, peft."""

import copy
import io
import re

import pytest
import torch
from problems import advance, assert_same, pace_options, problem, snapshot
from reference import Reference
from torch import nn
from torch.nn import Parameter
from torch.optim import AdamW, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from paceline import PACE, Pullback, kernels
from paceline.testing import SCHEDULERS

RULE = {"pullback": 0.3, "ema_power": 0.4, "weight_decay": 0.1}
LR = 0.05


class Beside:
    """PACE, and for each parameter a reference that takes the same gradients."""

    def __init__(self, params, tolerance=1e-12):  # some 5,000 units of float64
        self.opt = PACE(params, lr=LR, **pace_options(RULE))
        self.refs = {}
        self.tolerance = tolerance

    def step(self, step=None, grads=None):
        """One step of both, and the comparison; `grads` is for the references alone."""
        params = [p for group in self.opt.param_groups for p in group["params"]]
        for p, g in zip(params, grads or [p.grad for p in params], strict=True):
            if g is not None:
                start = p.detach().double().numpy()  # the weights of this moment
                self.refs.setdefault(p, Reference(start, **RULE)).step(g.double().numpy(), LR)
            elif p in self.refs:
                self.refs[p].rest()
        (step or self.opt.step)()
        self.compare()

    def compare(self):
        assert set(self.opt.state) == set(self.refs)
        for p, ref in self.refs.items():
            assert self.opt.state[p]["step"] == ref.t
            self.assert_close(p, ref.theta)
            self.assert_close(self.opt.state[p]["average"], ref.ema)

    def assert_close(self, ours, exact):
        exact = torch.as_tensor(exact, dtype=torch.float64)
        tolerance = {"rtol": self.tolerance, "atol": self.tolerance}
        torch.testing.assert_close(ours.detach().double(), exact, **tolerance)


def random_grads(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def tiny_gpt2(dtype=torch.float32):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 8, "vocab_size": 50}
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = transformers.GPT2Config(**sizes, **drops, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(config).to(dtype)


def backward(model, seed):
    tokens = torch.randint(50, (2, 8), generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    model(input_ids=tokens, labels=tokens).loss.backward()


def test_tied_embeddings_have_one_state_and_stay_tied(tmp_path):
    model = tiny_gpt2(torch.float64)
    head, embedding = model.lm_head, model.transformer.wte
    run = Beside(model.parameters())
    opt = run.opt
    for seed in range(8):
        backward(model, seed)
        run.step()
    assert len(opt.state) == len(set(model.parameters())) < len(model.state_dict())
    saved = opt.averaged_state_dict(model)
    assert saved["lm_head.weight"] is saved["transformer.wte.weight"]
    model.save_pretrained(tmp_path / "exported", state_dict=saved)
    with opt.averaged():
        assert head.weight is embedding.weight
        run.assert_close(head.weight, run.refs[head.weight].ema)  # swapped once, not for each name
        model.save_pretrained(tmp_path / "swapped")
    assert head.weight is embedding.weight
    run.compare()
    for folder in ("exported", "swapped"):
        loaded = type(model).from_pretrained(tmp_path / folder, dtype=torch.float64)
        assert loaded.lm_head.weight is loaded.transformer.wte.weight
        for p, q in zip(model.parameters(), loaded.parameters(), strict=True):
            assert torch.equal(q, opt.state[p]["average"])


# peft asks transformers for an attribute by its old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", [{}, {"use_dora": True}, {"modules_to_save": ["ln_f"]}], ids=str)
def test_an_adapter_is_saved_as_its_average(kind, tmp_path):
    peft = pytest.importorskip("peft")
    safetensors = pytest.importorskip("safetensors.torch")
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, **kind)
    model = peft.get_peft_model(tiny_gpt2(), config)
    frozen = {p: p.detach().clone() for p in model.parameters() if not p.requires_grad}
    trainable = set(model.parameters()) - set(frozen)
    opt = PACE(model.parameters(), lr=LR, pullback=0.05)
    for seed in range(6):
        backward(model, seed)
        opt.step()
    assert set(opt.state) == trainable
    tokens = torch.arange(8)[None]
    exported = peft.get_peft_model_state_dict(model, state_dict=opt.averaged_state_dict(model))
    with opt.averaged():
        model.save_pretrained(tmp_path)
        expected = model(input_ids=tokens).logits
        assert all(torch.equal(p, x) for p, x in frozen.items())
    assert all(torch.equal(p, x) for p, x in frozen.items())
    saved = safetensors.load_file(tmp_path / "adapter_model.safetensors")
    # Under the names of the file, the parameters themselves.
    params = {n: p for n, p in model.state_dict(keep_vars=True).items() if p in trainable}
    params = peft.get_peft_model_state_dict(model, state_dict=params)
    assert saved.keys() == exported.keys() == params.keys()
    assert len(saved) == len(trainable) > 0
    for name, p in params.items():
        assert torch.equal(saved[name], opt.state[p]["average"])
        assert torch.equal(saved[name], exported[name])
        assert not torch.equal(saved[name], p)
    again = peft.PeftModel.from_pretrained(tiny_gpt2(), tmp_path)
    assert torch.equal(again(input_ids=tokens).logits, expected)


def test_unfrozen_and_added_parameters_begin_where_they_are():
    torch.manual_seed(0)
    model = nn.ParameterList(torch.randn(3, 4, dtype=torch.float64) for _ in range(4))
    steady, thawed, added, frozen = model
    thawed.requires_grad_(False)
    frozen.requires_grad_(False)
    run = Beside([steady, thawed, frozen])
    opt = run.opt

    def train(steps):
        for _ in range(steps):
            model.zero_grad()
            sum((p - i).square().sum() for i, p in enumerate(model)).backward()
            run.step()  # a reference begins with its parameter's first gradient

    train(5)
    with torch.no_grad():  # the average begins from these weights, not from those at construction
        thawed.mul_(2)
    idle = {"1": thawed, "2": added, "3": frozen}
    before = copy.deepcopy(idle)
    with opt.averaged():
        assert not torch.equal(steady, opt.state[steady]["average"])
        exports = [opt.averaged_state_dict(model)]
        opt.add_param_group({"params": [added]})  # may come while the average is in the model
        exports += [opt.averaged_state_dict(model), idle]
    for export in (*exports, opt.averaged_state_dict(model), idle):
        assert all(torch.equal(export[name], x) for name, x in before.items())
    assert exports[0]["3"] is not frozen
    thawed.requires_grad_(True)
    train(3)
    assert [opt.state[p]["step"] for p in (steady, thawed, added)] == [8, 3, 3]
    thawed.requires_grad_(False)  # and frozen again: it stays, and so does its average
    train(2)
    assert [opt.state[p]["step"] for p in (steady, thawed, added)] == [10, 3, 5]
    assert frozen not in opt.state
    assert torch.equal(frozen, before["3"])


PATHS = {"kernel": {}, "together": {"fused": False}}


@pytest.mark.parametrize("path", PATHS)
def test_each_of_mixed_dtypes_shapes_and_devices_steps_as_it_would_alone(path, kernel, monkeypatch):
    stepped = []

    class Seen(kernels.cpu.Kernel):
        def __init__(self, slots, counts):
            super().__init__(slots, counts)
            self.params = [slot.param for slot in slots]

        def step(self, *arguments, **options):
            stepped.extend(self.params)
            return super().step(*arguments, **options)

    monkeypatch.setattr(kernels.cpu, "Kernel", Seen)
    monkeypatch.setattr(kernels, "WORTH_BUILDING", 0)  # small models take the kernel, too

    def make():
        torch.manual_seed(0)
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            whole = [torch.randn(shape).to(dtype) for shape in ((9, 7), (), (0,), (3, 0), (5,))]
            strided = [torch.randn(6, 8).to(dtype).t(), torch.randn(10, 6).to(dtype)[::2, 1:4]]
            yield from map(Parameter, whole[:3] + strided + whole[3:])

    params, copies = list(make()), list(make())
    assert sum(not p.is_contiguous() for p in params) == 8
    meta = Parameter(torch.ones(3, device="meta"))
    options = {"lr": LR, **pace_options(RULE), **PATHS[path]}
    together, alone = PACE([*params, meta], **options), [PACE([q], **options) for q in copies]
    for t in range(6):
        random_grads(params, t)
        meta.grad = torch.ones_like(meta)
        if t < 2:
            params[0].grad = params[9].grad = None  # step counts differ, too
        for p, q, opt in zip(params, copies, alone, strict=True):
            if (g := p.grad) is not None:
                q.grad = g
                p.grad = g.t().contiguous().t() if g.ndim == 2 else g  # lies otherwise in memory
            opt.step()
        stepped.clear()
        together.step()
        fit = [p for p in params if p.is_contiguous() and p.dtype != torch.float16]
        fit = {p for p in fit if p.grad is not None and path == "kernel"}
        assert set(stepped) == fit
    for _ in range(2):  # live, then with the average swapped in
        for p, q, opt in zip(params, copies, alone, strict=True):
            assert_same(([p], [together.state[p]]), ([q], [opt.state[q]]))
            opt.eval()
        assert together.state[meta]["step"] == 6
        assert together.state[meta]["average"].device == meta.device
        together.eval()


@pytest.mark.parametrize("nonfinite", ["guard", "skip", "raise"])
@pytest.mark.parametrize("options", [{}, {"fused": True}, {"track_stats": True}], ids=str)
def test_groups_without_parameters(options, nonfinite, kernel):
    options = {**pace_options(RULE), **options, "lr": LR, "nonfinite": nonfinite}
    p, q = Parameter(torch.ones(4)), Parameter(torch.ones(4))
    plain, opt = PACE([p], **options), PACE([{"params": []}, {"params": [q]}], **options)
    nothing = PACE([{"params": []}], **options)
    for t in range(5):
        random_grads([p], t)
        q.grad = p.grad
        for one in (plain, opt, nothing):
            one.step()
        stats, expected = opt.stats(), plain.stats()
        if "track_stats" in options:
            assert [x for x in stats.pop("groups") if x] == expected.pop("groups")
        assert stats == expected
        assert set(nothing.stats().values()) == {0}
        for swap in ("eval", "train"):
            for one in (plain, opt, nothing):
                one.load_state_dict(one.state_dict())
                getattr(one, swap)()
            assert_same(([q], [opt.state[q]]), ([p], [plain.state[p]]))
            if t == 1:
                opt.add_param_group({"params": [], "lr": 0.5})
    assert [group["lr"] for group in opt.param_groups] == [LR, LR, 0.5, 0.5]
    assert nothing.averaged_state_dict(nn.Module()) == {}


@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_models_train_and_export_as_their_originals(in_place):
    (plain, generator), (original, same) = problem(), problem()
    compiled = original if in_place else torch.compile(original, backend="eager")
    if in_place:
        original.compile(backend="eager")
    opts = [PACE(m.parameters(), lr=LR, pullback=0.3) for m in (plain, compiled)]
    advance(plain, opts[0], generator, 8)
    advance(compiled, opts[1], same, 8)
    assert_same(snapshot(original, opts[1]), snapshot(plain, opts[0]))
    expected = opts[0].averaged_state_dict(plain)
    for model, prefix in ((original, ""), (compiled, "" if in_place else "_orig_mod.")):
        returned = opts[1].averaged_state_dict(model)
        assert list(returned) == [prefix + name for name in expected]
        assert all(map(torch.equal, returned.values(), expected.values()))
    x = torch.ones(4, 6)
    live = plain(x)
    assert torch.equal(compiled(x), live)
    with opts[0].averaged(), opts[1].averaged():  # the compiled one sees the swap
        assert torch.equal(compiled(x), plain(x))
        assert not torch.equal(compiled(x), live)


@pytest.mark.parametrize("whole", [False, True], ids=["the step", "all of it"])
@pytest.mark.parametrize("kind", ["PACE", "Pullback"])
def test_a_compiled_step_is_the_step(kind, whole):
    """Dynamo never traces the step, whatever the learning rate is."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    graphs, frames, ends = [], [], []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    for compiles in (False, True):
        model, _ = problem()
        params = model.parameters()
        options = {"pullback": 0.3, "returns": "slow=ema:kappa=0.7"}
        base = [AdamW(params)] if kind == "Pullback" else [params]
        opt = (Pullback if kind == "Pullback" else PACE)(*base, **options)

        def train(model=model, opt=opt):
            model(torch.ones(4, 6)).square().mean().backward()
            return opt.step()

        work = train if whole else opt.step
        work = torch.compile(work, backend=count) if compiles else work
        for t in range(12):
            opt.param_groups[0]["lr"] = LR / (1 + t)
            if not whole:
                random_grads(model.parameters(), t)
            assert work() is None
            frames.append(sum(counters["frames"].values()))
            opt.zero_grad()
        ends.append(snapshot(model, opt))
    assert_same(*ends)
    traced = [node for graph in graphs for node in graph.graph.nodes if node.op != "output"]
    names = " ".join(str(node.target) for node in traced)
    assert not re.search("foreach|addcdiv|lerp|sqrt", names)
    assert whole or not graphs
    assert frames[13] == frames[-1] > 0  # once the first two steps have made what there is
    torch._dynamo.reset()


def test_the_table_has_every_scheduler_of_torch():
    classes = {n: x for n, x in vars(lr_scheduler).items() if isinstance(x, type) and n[0] != "_"}
    found = {n for n, x in classes.items() if issubclass(x, LRScheduler)} - {"LRScheduler"}
    assert found == set(SCHEDULERS)


def scheduled(kind, name, **options):
    generator = torch.Generator().manual_seed(0)
    model = nn.ParameterList(torch.randn(shape, generator=generator) for shape in [(4, 3), (5,)])
    opt = kind([{"params": [model[0]]}, {"params": [model[1]], "lr": 0.02}], lr=LR, **options)
    return model, opt, SCHEDULERS[name](opt)


def stepping(model, opt, schedule, steps):
    """The rates and betas of each step, after it."""
    for t in steps:
        random_grads(model, t)
        rates = [(group["lr"], group["betas"]) for group in opt.param_groups]
        opt.step()
        # Metrics that fall for ten steps, and no more.
        schedule.step(
            *([max(0, 10 - t)] if isinstance(schedule, lr_scheduler.ReduceLROnPlateau) else [])
        )
        yield rates


@pytest.mark.parametrize("name", SCHEDULERS)
def test_under_each_scheduler_it_is_adamw_and_its_average(name):
    ours, theirs = scheduled(PACE, name, pullback=0), scheduled(AdamW, name)
    exact = [p.detach().double() for p in theirs[0]]
    seen = []
    both = zip(stepping(*ours, range(30)), stepping(*theirs, range(30)), strict=True)
    for t, (rates, expected) in enumerate(both, 1):
        assert rates == expected
        seen.append(rates)
        for p, q, average in zip(ours[0], theirs[0], exact, strict=True):
            average.lerp_(q.detach().double(), (1 + t) ** -0.7)
            # Some ten units of float32 at 1: the arithmetic goes in another order.
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
            found = ours[1].state[p]["average"].double()
            torch.testing.assert_close(found, average, rtol=1e-6, atol=1e-6)
    for group in zip(*seen, strict=True):
        rates, betas = map(set, zip(*group, strict=True))
        assert len(rates) > 1
        assert (len(betas) > 1) == (name in ("CyclicLR", "OneCycleLR"))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_run_under_each_scheduler_resumes_bit_for_bit(name):
    run = scheduled(PACE, name, pullback=0.3)
    list(stepping(*run, range(15)))
    file = io.BytesIO()
    torch.save([run[0].state_dict(), run[1].state_dict()], file)
    of_schedule = copy.deepcopy(run[2].state_dict())
    expected = list(stepping(*run, range(15, 30)))
    file.seek(0)
    fresh = scheduled(PACE, name, pullback=9.0)
    for one, saved in zip(fresh, [*torch.load(file, weights_only=True), of_schedule], strict=True):
        one.load_state_dict(saved)
    assert list(stepping(*fresh, range(15, 30))) == expected
    assert_same(snapshot(*fresh[:2]), snapshot(*run[:2]))


def test_step_hooks_see_and_change_the_arguments():
    p = Parameter(torch.ones(3))
    opt = PACE([p], lr=0.1, pullback=0.1)
    calls = []

    def closure():
        p.grad = torch.ones(3)
        return 7.0

    def give_closure(*args):
        calls.append(("before", *args, p in opt.state))
        return (*args[1], closure), args[2]

    opt.register_step_post_hook(lambda *args: calls.append(("after", *args, p in opt.state)))
    handle = opt.register_step_pre_hook(give_closure)
    assert opt.step() == 7.0
    assert calls == [("before", opt, (opt,), {}, False), ("after", opt, (opt, closure), {}, True)]
    handle.remove()
    assert opt.step() is None
    assert len(calls) == 3


def test_state_dict_hooks_are_called_in_their_order_and_may_replace_it():
    model, generator = problem()
    opt = PACE(model.parameters(), lr=LR, pullback=0.3)
    advance(model, opt, generator, 2)
    before, calls = snapshot(model, opt), []

    def hook(when, result=lambda *_: None):
        """A hook that notes its call, and one put before it."""
        register = getattr(opt, f"register_{when}_hook")
        register(lambda *args: calls.append((when, args[0])) or result(*args))
        register(lambda *_: calls.append(f"first {when}"), prepend=True)
        return [f"first {when}", (when, opt)]

    saving = hook("state_dict_pre") + hook("state_dict_post", lambda _, x: {**x, "note": 1})
    saved = opt.state_dict()
    assert saved["note"] == 1
    assert calls == saving
    loading = hook("load_state_dict_pre") + hook("load_state_dict_post")
    calls.clear()
    with pytest.raises(ValueError, match="parameter groups"):
        opt.load_state_dict({**saved, "param_groups": []})
    assert calls == loading[:2]
    assert len(opt._optimizer_load_state_dict_pre_hooks) == 2  # ours are gone
    opt.load_state_dict(saved)
    assert calls[2:] == loading
    assert_same(snapshot(model, opt), before)


def losses(model, generator, steps):
    """The loss on the step's batch, or on a part of it."""
    for _ in range(steps):
        x = torch.randn(16, 6, generator=generator).to(next(model.parameters()).dtype)
        model.zero_grad()
        yield lambda part=slice(None), x=x: (model(x[part]) - x[part, :2]).square().sum()


def test_accumulated_and_clipped_gradients_make_one_step():
    model, generator = problem(torch.float64)
    run = Beside(model.parameters())
    for loss in losses(model, generator, 8):
        whole = torch.autograd.grad(loss(), run.opt.param_groups[0]["params"])
        norm = torch.cat([g.flatten() for g in whole]).norm()
        assert norm > 1  # or nothing would be clipped
        for half in (slice(8), slice(8, 16)):
            loss(half).backward()
            run.compare()  # nothing moves before the step
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        run.step(grads=[g / (norm + 1e-6) for g in whole])  # as clip_grad_norm_ documents it


def test_autocast_leaves_the_state_in_float32():
    model, generator = problem()
    # Rounding of float32 in 20 steps, √20·6e-8 of a weight of about 1, with a wide margin.
    run = Beside(model.parameters(), tolerance=1e-5)
    for loss in losses(model, generator, 20):
        with torch.autocast(device_type="cpu", dtype=torch.bfloat16):
            assert model(torch.ones(1, 6)).dtype == torch.bfloat16
            loss().backward()
            run.step()  # inside, too, where some loops have it
    kept = {x.dtype for state in run.opt.state.values() for x in state.values() if x.ndim}
    assert kept == {torch.float32}


def test_a_step_that_the_grad_scaler_skips_does_not_count():
    model, generator = problem(torch.float64)
    run = Beside(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for t, loss in enumerate(losses(model, generator, 6)):
        scaler.scale(loss()).backward()
        if bad := t in (0, 3):
            model[0].bias.grad[0] = torch.inf
            scaler.step(run.opt)
            run.compare()  # without state, or as it was
        else:
            scaler.unscale_(run.opt)
            run.step(lambda: scaler.step(run.opt))
        scale = scaler.get_scale()
        scaler.update()
        assert scaler.get_scale() == (scale / 2 if bad else scale)
    assert run.opt.state[model[0].bias]["step"] == 4
    assert run.opt.stats()["skipped_steps"] == 0
