"""A training loop in JAX, returning the average: the lines marked <- are all that is new.

    pip install '.[jax]'
    python examples/jax_loop.py

Runs offline in seconds: a small network learns a sine from noisy samples.
"""

import jax
import jax.numpy as jnp
import optax

from paceline.integrations.optax import pace, pace_params  # <- 1


def network(params, x):
    return jnp.tanh(x @ params["in"] + params["bias"]) @ params["out"]


def loss(params, x, y):
    return jnp.mean((network(params, x) - y) ** 2)


@jax.jit
def step(params, state, key):
    x = jax.random.uniform(key, (32, 1), minval=-3, maxval=3)
    y = jnp.sin(x) + 0.3 * jax.random.normal(jax.random.fold_in(key, 1), x.shape)
    grads = jax.grad(loss)(params, x, y)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state


keys = jax.random.split(jax.random.key(0), 803)
params = {
    "in": jax.random.normal(keys[0], (1, 32)),
    "bias": jax.random.normal(keys[1], (32,)),
    "out": 0.1 * jax.random.normal(keys[2], (32, 1)),
}
optimizer = optax.chain(
    optax.clip_by_global_norm(1.0),
    pace(3e-2),  # <- 2, the last one
)
state = optimizer.init(params)
for key in keys[3:]:
    params, state = step(params, state, key)

x = jnp.linspace(-3, 3, 200)[:, None]
live = loss(params, x, jnp.sin(x))
returned = loss(pace_params(state, params), x, jnp.sin(x))  # <- 3
print(f"squared error: live weights {live:.5f}, returned {returned:.5f}")
