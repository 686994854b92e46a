"""PACE for JAX, against the float64 reference, inside of optax's own transformations, under jit."""

import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("optax")

import jax
import jax.numpy as jnp
import optax
from jax import enable_x64
from reference import Reference

from paceline.averaging import parse
from paceline.integrations.optax import PaceState, pace, pace_params
from paceline.testing.hosts import Driven, check_host

RULES = {  # options of pace, and the reference's
    "power": ({"pullback": 0.3}, {"ema_power": 0.5}),
    "strong": ({"pullback": 50.0, "kappa": 0.3}, {"ema_power": 0.3}),
    "clip off": ({"pullback": 2.0, "clip": False}, {"ema_power": 0.5, "clip": False}),
    "constant weight": ({"pullback": 0.3, "averaging": "ema:beta=0.05"}, {"ema_beta": 0.05}),
    "late and seldom": (
        {"pullback": 0.5, "averaging": "ema:kappa=0.7:rate=0.3:start=5:every=3"},
        {"ema_power": 0.7, "ema_rate": 0.3, "ema_start": 5, "ema_every": 3},
    ),
    "scalar": ({"pullback": 0.3, "gain": "scalar"}, {"gain": "scalar"}),
    "whole": ({"pullback": 1.0, "gain": "scalar", "kappa": 0.5}, {"gain": "scalar"}),
    "watching": (
        {"pullback": 0.0, "kappa": 0.5, "b1": 0.0, "eps": 0.0},
        {"betas": (0.0, 0.999), "eps": 0.0},
    ),
}
SHAPES = {"a": (4, 3), "b": {"c": (7,), "d": ()}}
STEPS = 40


def tree(seed, dtype=None):
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(random.normal(size=shape), dtype),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def rate(step):
    return 0.03 * (1 - 0.0125 * step)


def trained(transformation, params, steps=STEPS, jit=True):
    """The parameters after each step, and the state at the end."""
    update = jax.jit(transformation.update) if jit else transformation.update
    state, path = transformation.init(params), [params]
    dtype = params["a"].dtype
    for t in range(steps):
        updates, state = update(jax.tree.map(jnp.cos, tree(t, dtype)), state, params)
        params = optax.apply_updates(params, updates)
        path.append(params)
    return path, state


@pytest.mark.parametrize(
    ("rule", "dtype", "close"),
    [*((rule, "float64", 1e-12) for rule in RULES), ("strong", "float32", 2e-6)],
)
def test_every_step_is_the_references(rule, dtype, close):
    options, of_reference = RULES[rule]
    with enable_x64(dtype == "float64"):
        params = tree(100, jnp.dtype(dtype))
        transformation = pace(rate, weight_decay=0.1, **options)
        state, update = transformation.init(params), jax.jit(transformation.update)
        refs = [
            Reference(p, weight_decay=0.1, pullback=options["pullback"], **of_reference)
            for p in jax.tree.leaves(params)
        ]
        for t in range(STEPS):
            grads = jax.tree.map(jnp.cos, tree(t, jnp.dtype(dtype)))
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
            for ref, g in zip(refs, jax.tree.leaves(grads), strict=True):
                ref.step(g, float(rate(t)))
            for found, name in (
                (params, "theta"),
                (state.average, "ema"),
                (state.exp_avg, "m"),
                (state.exp_avg_sq, "v"),
            ):
                for x, ref in zip(jax.tree.leaves(found), refs, strict=True):
                    assert x.dtype == dtype
                    np.testing.assert_allclose(x, getattr(ref, name), rtol=close, atol=close)
        assert state.step == STEPS


@pytest.mark.parametrize(
    "rule", ["uniform:start=7", "swa:start=5:every=4", "ema:half_life=9:every=2"]
)
def test_what_is_returned_is_the_average_of_the_stored_weights(rule):
    """Of bfloat16 weights, by the coefficients of the rule."""
    path, state = trained(pace(0.02, 0.3, returns={"it": rule}), tree(100, jnp.bfloat16))
    weights = np.asarray(parse(rule).coefficients(STEPS))
    flat = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(p)]) for p in path]
    exact = np.einsum("t,tn->n", weights, np.asarray(flat, np.float64))
    kept = np.concatenate([np.ravel(x) for x in jax.tree.leaves(state.returns["it"])])
    assert kept.dtype == np.float32
    np.testing.assert_allclose(kept, exact, rtol=1e-5, atol=1e-6)
    returned = pace_params(state, path[-1])
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(returned))
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(path[-1]))


@pytest.mark.parametrize("mask", [None, {"a": True, "b": {"c": False, "d": True}}])
def test_without_a_pull_it_is_adamw(mask):
    given = {"weight_decay": 0.1, "mask": mask}
    with enable_x64():
        ours, _ = trained(pace(rate, 0.0, **given), tree(100))
        theirs, _ = trained(optax.adamw(rate, **given), tree(100))
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-7, atol=1e-8)  # optax has 1 - b1^t in float32


def by_name(path, leaf):
    return "other" if path[0].key == "a" else "pace"


ALL = {"a": True, "b": True}  # a prefix of the parameters' tree
AROUND = {
    "chain": lambda: optax.chain(optax.identity(), pace(rate, 0.3, return_kappa=0.7)),
    "hyperparameters": lambda: optax.inject_hyperparams(
        pace, static_args=("kappa", "return_kappa", "mask")
    )(learning_rate=rate, pullback=0.3, kappa=0.5, return_kappa=0.7),
    "masked": lambda: optax.masked(pace(rate, 0.3, return_kappa=0.7, mask=ALL), ALL),
    "finite": lambda: optax.apply_if_finite(pace(rate, 0.3, return_kappa=0.7), 3),
}


@pytest.fixture(scope="module")
def alone():
    with enable_x64():
        return trained(pace(rate, 0.3, return_kappa=0.7), tree(100))


@pytest.mark.parametrize("around", AROUND)
def test_inside_of_other_transformations(around, alone):
    with enable_x64():
        path, other = trained(AROUND[around](), tree(100))
        expected = pace_params(alone[1], alone[0][-1])
        for a, b in ((alone[0][-1], path[-1]), (expected, pace_params(other, path[-1]))):
            for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
                np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-8)  # rates may be float32


def test_without_jit_it_is_the_same(alone):
    with enable_x64():
        path, _ = trained(pace(rate, 0.3, return_kappa=0.7), tree(100), steps=4, jit=False)
        for x, y in zip(jax.tree.leaves(path), jax.tree.leaves(alone[0][:5]), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-12)


def test_of_a_part_of_the_parameters():
    """What no `pace` steps is returned as it is."""
    labels = jax.tree_util.tree_map_with_path(by_name, tree(0))
    both = optax.partition({"other": optax.sgd(0.1), "pace": pace(rate, 0.3, mask=ALL)}, labels)
    path, state = trained(both, tree(100))
    whole, own = trained(pace(rate, 0.3), tree(100))
    returned, expected = pace_params(state, path[-1]), pace_params(own, whole[-1])
    assert jnp.array_equal(returned["a"], path[-1]["a"])
    assert not jnp.array_equal(returned["a"], expected["a"])
    for name in "cd":
        np.testing.assert_allclose(returned["b"][name], expected["b"][name], rtol=1e-6)


def test_gradients_added_up_and_one_that_is_not_finite():
    def run(transformation, grads):
        params = {"w": jnp.ones(3)}
        state = transformation.init(params)
        for g in grads:
            updates, state = transformation.update({"w": jnp.asarray(g)}, state, params)
            params = optax.apply_updates(params, updates)
        return params["w"], pace_params(state, params)["w"]

    grads = [jnp.full(3, x) for x in (0.5, -0.25, 2.0)]
    once = run(pace(rate, 0.3), grads)
    twice = run(optax.MultiSteps(pace(rate, 0.3), 2), [g for g in grads for _ in range(2)])
    spoilt = [grads[0], jnp.full(3, jnp.nan), *grads[1:]]
    finite = run(optax.apply_if_finite(pace(rate, 0.3), 3), spoilt)
    for other in (twice, finite):
        for x, y in zip(once, other, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-6)


def test_the_returned_model_outlives_a_state_that_is_donated():
    transformation, params = pace(rate, 0.3), {"w": jnp.ones(3)}
    update = jax.jit(transformation.update, donate_argnums=1)
    state = transformation.init(params)
    returned = pace_params(state, params)
    update({"w": jnp.ones(3)}, state, params)
    assert jnp.array_equal(returned["w"], jnp.ones(3))


def test_a_loop_inside_of_jit_and_donated_parameters():
    transformation = pace(rate, 0.3, return_kappa=0.7)

    def body(carry, grads):
        params, state = carry
        updates, state = transformation.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    def run(params, state, grads):
        return jax.lax.scan(body, (params, state), grads)[0]

    many = jax.tree.map(
        lambda *x: jnp.cos(jnp.stack(x)), *(tree(t, jnp.float32) for t in range(STEPS))
    )
    params = tree(100, jnp.float32)
    state = transformation.init(params)
    params, state = jax.jit(run, donate_argnums=(0, 1))(params, state, many)
    path, other = trained(transformation, tree(100, jnp.float32))
    for x, y in zip(
        jax.tree.leaves((params, state)), jax.tree.leaves((path[-1], other)), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6)


def test_averages_are_asked_for_by_name():
    path, state = trained(
        pace(rate, 0.3, returns={"slow": "ema:kappa=0.7", "mean": "uniform"}), tree(100)
    )
    assert isinstance(state, PaceState)
    for name, found in (
        (None, state.returns["slow"]),
        ("mean", state.returns["mean"]),
        ("average", state.average),
    ):
        asked = pace_params(state, path[-1], name)
        assert all(map(jnp.array_equal, jax.tree.leaves(asked), jax.tree.leaves(found)))
    with pytest.raises(ValueError, match="name must be one of slow, mean, average, got 'fast'"):
        pace_params(state, path[-1], "fast")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pullback": -1.0}, "pullback must be a finite number >= 0, got -1.0"),
        ({"pullback": "auto"}, "pullback must be a finite number >= 0, got 'auto'"),
        ({"b2": 1.0}, r"b2 must be in \[0, 1\), got 1.0"),
        ({"eps": float("nan")}, "eps must be a finite number >= 0, got nan"),
        ({"gain": "own"}, "gain must be 'adam' or 'scalar', got 'own'"),
        ({"kappa": 1.5}, r"^kappa must be in \[0, 1\], got 1.5"),
        ({"return_kappa": 1.5}, r"return_kappa must be in \[0, 1\], got 1.5"),
        ({"kappa": 0.5, "averaging": "uniform"}, "averaging must be left out with kappa, got"),
        ({"return_kappa": 0.5, "returns": "uniform"}, "returns must be left out with return_kappa"),
        ({"learning_rate": -1.0}, "learning_rate must be a finite number >= 0, got -1.0"),
        ({"learning_rate": None}, "learning_rate must be a finite number >= 0, got None"),
        ({"pullback": jnp.asarray(-1.0)}, "pullback must be a finite number >= 0, got"),
        ({"b1": True}, r"b1 must be in \[0, 1\), got True"),
        ({"clip": "no"}, "clip must be True or False, got 'no'"),
        ({"clip": False, "eps": 0.0}, "clip=False needs eps > 0, got eps=0.0"),
        ({"averaging": "lawa:window=3"}, "lawa:window=3 needs more than the average"),
        ({"returns": {"a": "bema"}}, "bema.* needs more than the average"),
        ({"returns": {"live": "uniform"}}, "not 'average' or 'live', got 'live'"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        pace(**{"learning_rate": 0.1, "pullback": 0.3, **options})


def test_without_gradients_and_epsilon_weights_stay():
    transformation, params = pace(0.1, 0.3, eps=0.0, weight_decay=0.0), {"w": jnp.ones(3)}
    updates, _ = transformation.update({"w": jnp.zeros(3)}, transformation.init(params), params)
    assert jnp.array_equal(updates["w"], jnp.zeros(3))


def test_what_it_cannot_do_is_said():
    transformation = pace(0.1, 0.3)
    state = transformation.init({"w": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"needs the parameters: update\(grads, state, params\)"):
        transformation.update({"w": jnp.ones(3)}, state)
    for dtype in (jnp.complex64, jnp.int32):
        with pytest.raises(ValueError, match=f"floating-point parameters, got {dtype.__name__}"):
            transformation.init({"w": jnp.ones(3, dtype)})
    with pytest.raises(ValueError, match="there is none in this state"):
        pace_params(optax.adam(0.1).init({"w": jnp.ones(3)}), {"w": jnp.ones(3)})


def drive(task, folder, stop, resume):
    """A loop of one's own; a checkpoint is a pytree of the weights and the state."""
    model, optimizer = task.model(), pace(0.05, pullback=0.3)
    arrays = {name: x.numpy() for name, x in model.state_dict().items()}
    params = jax.tree.map(jnp.asarray, arrays)
    leaves, form = jax.tree.flatten((params, optimizer.init(params)))
    if resume:
        with np.load(folder / f"{stop - 1}.npz") as file:
            leaves = [jnp.asarray(file[name]) for name in file]
    params, state = jax.tree.unflatten(form, leaves)

    def loss(params, batch):
        x, y = batch
        hidden = jnp.tanh(x @ params["0.weight"].T + params["0.bias"])
        return jnp.mean((hidden @ params["2.weight"].T + params["2.bias"] - y) ** 2)

    def as_tensors(params):
        return [torch.tensor(np.asarray(params[name])) for name in arrays]

    losses, evaluated, live = [], [], []
    held_out = [x.numpy() for x in task.held_out]
    for epoch in range(int(resume), stop):
        for batch in task.batches():
            value, grads = jax.value_and_grad(loss)(params, [x.numpy() for x in batch])
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            losses.append(float(value))
        live.append(float(loss(params, held_out)))
        evaluated.append(float(loss(pace_params(state, params), held_out)))
        np.savez(folder / f"{epoch + 1}.npz", *jax.tree.leaves((params, state)))
    with np.load(folder / f"{stop}.npz") as file:
        saved, _ = jax.tree.unflatten(form, [file[name] for name in file])
    return Driven(losses, evaluated, as_tensors(saved), as_tensors(params), live)


def test_a_loop_passes_the_conformance_kit():
    report = check_host(drive, checkpoint="live", after="live")
    assert report.passed, report


def test_the_example_runs(capsys):
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "jax_loop.py"))
    live, returned = map(float, re.findall(r"0\.\d+", capsys.readouterr().out))
    assert returned < live / 3


def test_the_defaults_are_those_of_the_class():
    params, ends = {"w": jnp.ones(3)}, []
    grads = {"w": jnp.asarray([1.0, -2.0, 0.5])}
    whole = {"pullback": 1.0, "gain": "scalar", "kappa": 0.3, "return_kappa": 0.7}
    for said in ({}, whole, {"pullback": 3.0, "gain": "adam", "kappa": 0.5}):
        optimizer = pace(0.1, **said)
        state, own = optimizer.init(params), params
        for _ in range(3):
            updates, state = optimizer.update(grads, state, own)
            own = optax.apply_updates(own, updates)
        ends.append((own["w"].tolist(), pace_params(state, own)["w"].tolist()))
    assert ends[0] == ends[1] != ends[2]
