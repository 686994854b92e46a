"""PACE for JAX: an optax transformation, and the returned model read out of its state."""

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ..averaging import Averaging, PowerEMA, as_rule
from ..options import parse_returns, returns_text
from ..update import TINY

Tree = Any  # a pytree of arrays
Rule = Averaging | str


class PaceState(NamedTuple):
    """State of `pace`: arrays shaped like the parameters, in float32, or float64 for float64."""

    step: jax.Array  # t, int32: steps done
    exp_avg: Tree  # m
    exp_avg_sq: Tree  # v
    average: Tree  # ema_t, which the pull goes toward
    returns: OrderedDict[str, Tree]  # averages that nothing pulls toward, by name


def pace(
    learning_rate: optax.ScalarOrSchedule,
    pullback: float,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    mask: Tree | Callable[[Tree], Tree] | None = None,
    gain: str = "adam",
    kappa: float | None = None,
    averaging: Rule | None = None,
    return_kappa: float | None = None,
    returns: Rule | Mapping[str, Rule] | None = None,
    clip: bool = True,
) -> optax.GradientTransformation:
    r"""AdamW whose weights are pulled toward the average that you return.

        β_t     = max((1 + γ·max(0, t - ρ))^-κ, 1e-4)
        λ_t     = min(1, η·c·β_t / (sqrt(v̂_t) + ε))
        θ_{t+1} = (1 - η·wd)·θ_t - η·m̂_t / (sqrt(v̂_t) + ε) + λ_t·(ema_{t-1} - θ_t)
        ema_t   = (1 - β_t)·ema_{t-1} + β_t·θ_{t+1},     ema_0 = θ_1

    The rule, and what the options mean, are those of `paceline.PACE`.

        optimizer = optax.chain(optax.clip_by_global_norm(1.0), pace(1e-3, pullback=0.1))
        state = optimizer.init(params)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        returned = pace_params(state, params)  # the model to evaluate and to save

    It must be the last of a chain: the average takes in the parameters plus these updates, and
    would not see what another transformation makes of them. `optax.MultiSteps`, `optax.partition`,
    `optax.masked` and `optax.inject_hyperparams` may be around it; `optax.apply_if_finite`, too, if
    the gradients are in float32.

    Args:
        learning_rate: η, a number or a schedule of the steps done, from 0.
        pullback: c >= 0, in the unit of a gradient. There is no "auto" here.
        b1: decay of the first moment, in [0, 1).
        b2: decay of the second moment, in [0, 1).
        eps: ε >= 0; 0 counts as 1.2e-38.
        weight_decay: decoupled weight decay wd >= 0.
        mask: whether each weight decays: a tree of booleans, or a function of the parameters that
            gives one. Default: all do.
        gain: "adam" as above; or "scalar", λ_t = min(1, c), which has no unit.
        kappa: κ of the average, in [0, 1]. Default: 0.5.
        averaging: another rule than a power EMA, or its text. LAWA and BEMA are refused: they need
            more than the average.
        return_kappa: κ of a second average, which is returned.
        returns: averages that are returned: one, or several by name; the first is the default.
        clip: hold the gain to at most 1.

    Returns:
        A transformation whose `update` needs the parameters.

    Raises:
        ValueError: an argument is out of its range; or two of them say the same.

    Source: Au & Block, arXiv:2606.25086 (2026).
    """
    _check("pullback", pullback, 0, math.inf)
    _check("b1", b1, 0, 1)
    _check("b2", b2, 0, 1)
    _check("eps", eps, 0, math.inf)
    _check("weight_decay", weight_decay, 0, math.inf)
    if gain not in ("adam", "scalar"):
        raise ValueError(f"gain must be 'adam' or 'scalar', got {gain!r}")
    if kappa is not None and averaging is not None:
        raise ValueError(f"give either kappa or averaging, got {kappa!r} and {averaging!r}")
    if return_kappa is not None and returns is not None:
        raise ValueError(
            f"give either return_kappa or returns, got {return_kappa!r} and {returns!r}"
        )
    own = PowerEMA(0.5 if kappa is None else kappa) if averaging is None else as_rule(averaging)
    rules = parse_returns(returns_text(returns if return_kappa is None else PowerEMA(return_kappa)))
    for rule in (own, *rules.values()):
        if rule.keeps:
            raise ValueError(f"{rule} needs more than the average, which pace does not keep")

    def init(params: Tree) -> PaceState:
        for p in jax.tree.leaves(params):
            if jnp.iscomplexobj(p):
                raise ValueError("pace is for real parameters, got complex ones")

        def wide(p: Any) -> jax.Array:
            return jnp.array(p, dtype=_wide(p), copy=True)  # the parameters may be donated

        def zeros(p: Any) -> jax.Array:
            return jnp.zeros(jnp.shape(p), _wide(p))

        return PaceState(
            step=jnp.zeros((), jnp.int32),
            exp_avg=jax.tree.map(zeros, params),
            exp_avg_sq=jax.tree.map(zeros, params),
            average=jax.tree.map(wide, params),
            returns=OrderedDict((name, jax.tree.map(wide, params)) for name in rules),
        )

    def update(grads: Tree, state: PaceState, params: Tree | None = None) -> tuple[Tree, PaceState]:
        if params is None:
            raise ValueError("pace needs the parameters: update(grads, state, params)")
        t: Any = state.step + 1
        lr = learning_rate(state.step) if callable(learning_rate) else learning_rate
        decays = mask(params) if callable(mask) else mask
        decays = jax.tree.map(lambda _: True, params) if decays is None else decays
        falloff: Any = own.falloff(t)

        def moment(decay: Any, old: jax.Array, new: Any) -> jax.Array:
            return decay * old + (1 - decay) * new

        def step(p: Any, m: jax.Array, v: jax.Array, average: jax.Array, decay: Any) -> jax.Array:
            wide = jnp.asarray(p, m.dtype)
            root = jnp.sqrt(v / _one_minus_power(b2, t)) + jnp.maximum(eps, TINY)
            strength = pullback if gain == "scalar" else lr * pullback * falloff / root
            if clip:
                strength = jnp.minimum(1, strength)
            moved = lr * (m / _one_minus_power(b1, t) / root + weight_decay * decay * wide)
            return strength * (average - wide) - moved

        def taken_in(rule: Averaging, average: Tree) -> Tree:
            weight: Any = rule.weight(t)

            def one(a: jax.Array, p: Any, u: jax.Array) -> jax.Array:
                after = jnp.asarray(p + u).astype(jnp.result_type(p))  # as it is stored
                return jnp.asarray(a + weight * (after - a), a.dtype)

            return jax.tree.map(one, average, params, updates)

        grads = jax.tree.map(lambda g, m: jnp.asarray(g, m.dtype), grads, state.exp_avg)
        exp_avg = jax.tree.map(lambda m, g: moment(b1, m, g), state.exp_avg, grads)
        exp_avg_sq = jax.tree.map(lambda v, g: moment(b2, v, g * g), state.exp_avg_sq, grads)
        updates = jax.tree.map(step, params, exp_avg, exp_avg_sq, state.average, decays)
        return updates, PaceState(
            step=t,
            exp_avg=exp_avg,
            exp_avg_sq=exp_avg_sq,
            average=taken_in(own, state.average),
            returns=OrderedDict(
                (name, taken_in(rule, state.returns[name])) for name, rule in rules.items()
            ),
        )

    return optax.GradientTransformation(init, update)


def pace_params(state: Tree, params: Tree, name: str | None = None) -> Tree:
    """The returned model: an average in the parameters' dtypes.

    Args:
        state: of `pace`, or of what it is in: a chain, a partition, `optax.MultiSteps`.
        params: the parameters. Those that no `pace` steps are returned as they are.
        name: of the average: one of `returns`, or "average" for that which the pull goes toward.
            Default: the first of `returns`, or "average" where there are none.

    Raises:
        ValueError: the state has no such average.
    """
    found = [
        x
        for x in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, PaceState))
        if isinstance(x, PaceState)
    ]
    if not found:
        raise ValueError("pace_params needs the state of pace, and there is none in this state")

    def put_in(average: Any, p: Any) -> Any:
        if isinstance(average, optax.MaskedNode):
            return p
        return average.astype(jnp.result_type(p))

    for one in found:
        known = {**one.returns, "average": one.average}
        if name is not None and name not in known:
            raise ValueError(f"name must be one of {', '.join(known)}, got {name!r}")
        average = known[next(iter(known)) if name is None else name]
        masked = {"is_leaf": lambda x: isinstance(x, optax.MaskedNode)}
        params = jax.tree.map(put_in, average, params, **masked)
    return params


def _check(name: str, value: Any, low: float, high: float) -> None:
    """Values that are traced, as by `optax.inject_hyperparams`, are not known yet."""
    if isinstance(value, str) or (
        isinstance(value, int | float) and not (low <= value < high and math.isfinite(value))
    ):
        range_ = f"in [{low}, {high})" if high < math.inf else f"a finite number >= {low}"
        raise ValueError(f"{name} must be {range_}, got {value!r}")


def _wide(p: Any) -> Any:
    return jnp.promote_types(jnp.result_type(p), jnp.float32)


def _one_minus_power(decay: Any, t: jax.Array) -> jax.Array:
    """1 - decay^t without the cancellation that float32 would have."""
    log = math.log(decay) if isinstance(decay, float) and decay else jnp.log(decay)
    return -jnp.expm1(t * log)
