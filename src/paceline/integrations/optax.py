"""PACE for JAX: an optax transformation, and the returned model read out of its state."""

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ..averaging import Averaging, as_rule
from ..defaults import BETAS, WEIGHT_DECAY
from ..options import (
    check_scalar,
    expand_short,
    fill_in,
    number,
    parse_returns,
    require,
    returns_text,
)
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
    pullback: float | None = None,
    *,
    b1: float = BETAS[0],
    b2: float = BETAS[1],
    eps: float = 1e-8,
    weight_decay: float = WEIGHT_DECAY,
    mask: Tree | Callable[[Tree], Tree] | None = None,
    gain: str | None = None,
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

    The rule, and what the options mean, are those of `paceline.PACE`, except that nothing guards
    against gradients that are not finite: one spoils its weight and average, as in `optax.adamw`.

        optimizer = optax.chain(optax.clip_by_global_norm(1.0), pace(4e-3))
        state = optimizer.init(params)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        returned = pace_params(state, params)  # the model to evaluate and to save

    It must be the last of a chain: the average takes in the parameters plus these updates, and
    would not see what another transformation makes of them. `optax.MultiSteps`, `optax.partition`,
    `optax.masked` and `optax.apply_if_finite` may be around it, the last for gradients in float32.
    So may `optax.inject_hyperparams`, with static_args=("kappa", "return_kappa", "mask"), and with
    hyperparam_dtype=jnp.float32 for gradients in bfloat16.

    Args:
        learning_rate: η, a number or a schedule of the steps done, from 0.
        pullback: c >= 0, in the unit of a gradient. Default: 1, with the gain "scalar". There is no
            "auto" here.
        b1: decay of the first moment, in [0, 1).
        b2: decay of the second moment, in [0, 1).
        eps: ε >= 0; 0 counts as 1.2e-38.
        weight_decay: decoupled weight decay wd >= 0.
        mask: whether each weight decays: a tree of booleans, or a function of the parameters that
            gives one. Default: all do.
        gain: "adam" as above, the default where pullback is given; or "scalar", λ_t = c in [0, 1],
            which has no unit.
        kappa: κ of the average, in [0, 1]. Default: that of `paceline.PACE`.
        averaging: another rule than a power EMA, or its text. LAWA and BEMA are refused: they need
            more than the average. A rule of your own gets the step as a traced array.
        return_kappa: κ of a second average, which is returned. Default: 0.7 where neither pullback
            nor an average is given.
        returns: averages that are returned: one, or several by name; the first is the default.
        clip: hold the gain to at most 1.

    Returns:
        A transformation whose `update` needs the parameters.

    Raises:
        ValueError: an argument is out of its range, or two are given for one thing.

    Source: Au & Block, arXiv:2606.25086 (2026).
    """
    options: dict[str, Any] = {
        **{"learning_rate": learning_rate, "pullback": pullback, "b1": b1, "b2": b2, "eps": eps},
        **{"weight_decay": weight_decay, "gain": gain, "clip": clip, "kappa": kappa},
        **{"averaging": averaging, "return_kappa": return_kappa, "returns": returns},
    }
    expand_short(options)
    fill_in(options)
    pullback, gain = options["pullback"], options["gain"]
    for name in ("learning_rate", "pullback", "b1", "b2", "eps", "weight_decay"):
        value = options[name]
        if not (callable(value) or isinstance(value, jax.core.Tracer)):
            value = float(value) if isinstance(value, jax.Array) else number(value)
            high = 1 if name in ("b1", "b2") else math.inf
            range_ = "in [0, 1)" if high == 1 else "a finite number >= 0"
            require(options, name, 0 <= value < high, range_)
    require(options, "gain", gain in ("adam", "scalar"), "'adam' or 'scalar'")
    require(options, "clip", isinstance(clip, bool), "True or False")
    if isinstance(pullback, float | int):
        check_scalar(options, clip)
    if not clip and isinstance(eps, float | int) and not eps:
        raise ValueError("clip=False needs eps > 0, got eps=0.0: a gain would have no bound")
    own = as_rule(options["averaging"])
    rules = parse_returns(returns_text(options["returns"]))
    for rule in (own, *rules.values()):
        if rule.keeps:
            raise ValueError(f"{rule} needs more than the average, which pace does not keep")

    def init(params: Tree) -> PaceState:
        for p in jax.tree.leaves(params):
            if not jnp.issubdtype(jnp.result_type(p), jnp.floating):
                raise ValueError(
                    f"pace is for floating-point parameters, got {jnp.result_type(p)}; leave such "
                    "out by optax.masked"
                )

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
        decays = mask(params) if callable(mask) else True if mask is None else mask
        decays = jax.tree.map(lambda d, p: jax.tree.map(lambda _: d, p), decays, params)
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
    """The returned model: an average in the parameters' dtypes, in memory of its own.

    Args:
        state: of `pace`, or of a chain, a partition or another transformation around it.
        params: the parameters. Those that no `pace` steps are copied.
        name: of the average: one of `returns`, or "average" for the one that the pull goes toward.
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
        x = p if isinstance(average, optax.MaskedNode) else average
        return jnp.array(x, jnp.result_type(p), copy=True)  # the state may be donated

    for one in found:
        known = {**one.returns, "average": one.average}
        if name is not None and name not in known:
            raise ValueError(f"name must be one of {', '.join(known)}, got {name!r}")
        average = known[next(iter(known)) if name is None else name]
        masked = {"is_leaf": lambda x: isinstance(x, optax.MaskedNode)}
        params = jax.tree.map(put_in, average, params, **masked)
    return params


def _wide(p: Any) -> Any:
    return jnp.promote_types(jnp.result_type(p), jnp.float32)


def _one_minus_power(decay: Any, t: jax.Array) -> jax.Array:
    """1 - decay^t without the cancellation that float32 would have."""
    log = math.log(decay) if isinstance(decay, float) and decay else jnp.log(decay)
    return -jnp.expm1(t * log)
