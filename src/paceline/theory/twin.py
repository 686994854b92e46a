r"""What a pull amounts to: an EMA at another learning rate, its twin.

Write what the average makes of noise as a transfer function, with z = 1 - u and b = c(1-β), and
leave out a shift by one step that is in both:

    β / G_pull(u) = u²      - (a + β + b)·u + aβ
    β / G_twin(u) = u² / r  - (a + β + b)·u + aβ,        r = β / (β + b)

where the twin is the EMA with the same β of SGD at the learning rate r·η, without a pull. The two
differ in the u² term alone: motions that are slow against both of its modes are the same in both.
Read as a mass on a spring, the pull is friction, and its twin has the same friction and the same
spring but 1/r of the mass; and the variance of a mass that white noise shakes does not depend on
the mass.

With matrices, a = η·H and B = (1-β)·diag(c), the same holds with R = β(β + B)⁻¹ in place of r, on
the left of a: the twin then has a learning rate for each coordinate. With a filter F on the
gradients, such as Adam's momentum, u² and (β+b)u are divided by F(u) on both sides, and the two
still differ in the u² term alone.

Source: ours; the method is that of Au & Block, arXiv:2606.25086 (2026).
"""

import math

import numpy as np
from numpy.typing import ArrayLike

from .quadratic import Array, limiting_error, require, spectral_radius


def twin_rate(beta: ArrayLike, c: ArrayLike, *, simple: bool = False) -> Array:
    """The twin's learning rate over that of the pull: r = β / (β + c(1-β)).

    At c = 1 it is β: the identity of the pull that goes all the way to the average.

    Args:
        beta: averaging weight, in (0, 1]; any shape.
        c: gain, >= 0; broadcasts.
        simple: β / (β + c) instead, which is the same for small β, and is not exact at c = 1.

    Raises:
        ValueError: an argument is out of its range.
    """
    beta, c = require("beta", beta, 0, 1, open_="low"), require("c", c, 0, math.inf)
    return np.asarray(beta / (beta + c * (1.0 if simple else 1 - beta)))


def twin_ratio(a: ArrayLike, beta: ArrayLike, c: ArrayLike, *, simple: bool = False) -> Array:
    """Limiting error of the pull over that of its twin, exactly.

        2 - a·r·β / (1 + (1-a·r)(1-β))                            a + β + c(1-β) - aβ + x
        ------------------------------  ·  (1  or, if simple,  ----------------------- ), x = cβ
           2 - a·β / (1 + w - b)                                  a + β + c(1-β) - aβ

    with w = (1-a)(1-β), b = c(1-β). Without drift it is above 1 for every c > 0 and β < 1 in the
    stable range: by aβ/2·(1/(1+w-b) - r/2) to leading order, and if simple, by βc/(a+β+c) more.

    Args:
        a: learning rate times curvature, in (0, 2); any shape.
        beta: averaging weight, in (0, 1]; broadcasts.
        c: gain, >= 0 and below `largest_gain(a, beta)`; broadcasts.
        simple: with the twin's simple rate.

    Raises:
        ValueError: an argument is out of its range, or the recursion is not stable.
    """
    limiting_error(a, beta, c)  # raises
    a, beta, c = (np.asarray(x, dtype=np.float64) for x in (a, beta, c))
    r, w, b = twin_rate(beta, c, simple=simple), (1 - a) * (1 - beta), c * (1 - beta)
    ratio = (2 - a * r * beta / (1 + (1 - a * r) * (1 - beta))) / (2 - a * beta / (1 + w - b))
    friction = a + beta - a * beta + b
    return np.asarray(ratio * ((friction + c * beta) / friction if simple else 1.0))


def twin_modes(a: ArrayLike, beta: ArrayLike, c: ArrayLike) -> tuple[Array, Array]:
    """What is left of the start after each step in the long run: spectral radii of pull and twin.

    With u = 1 - z, the pull's two modes have u1 + u2 = a + β + b and u1·u2 = aβ; the twin's are
    ra and β. So Σ 1/u is the same, (a + β + b)/(aβ), and with it the sum over all steps of the
    start's share in the average. But the pull's slow mode has more of it: where no mode is past
    1, it is slower, by up to 2 (at ra = β), and by 1 + a/(β+b) or so where the twin's average is
    the faster one.

    Args:
        a: learning rate times curvature, in (0, 2); any shape.
        beta: averaging weight, in (0, 1]; broadcasts.
        c: gain, >= 0 and below `largest_gain(a, beta)`; broadcasts.

    Raises:
        ValueError: an argument is out of its range, or the recursion is not stable.
    """
    limiting_error(a, beta, c)  # raises
    return spectral_radius(a, beta, c), spectral_radius(np.asarray(a) * twin_rate(beta, c), beta, 0)


def twin_epsilon(lr: ArrayLike, c: ArrayLike, beta: ArrayLike, eps: float = 1e-8) -> Array:
    """The ε with which AdamW is the twin of PACE, where nothing is clipped or decays.

    With the weight β_t of a power EMA the gain is η·c·β_t/(√v̂+ε), so that the twin's step is

        η·r·m̂/(√v̂+ε) = η·m̂ / (√v̂ + ε + (1-β)·η·c)

    η is the scheduled one. With a constant weight the gain lacks the factor β, and c counts 1/β
    times as much. A weight decay would be multiplied by r, too, in each coordinate, which no ε
    does.

    Args:
        lr: learning rate η > 0.
        c: PACE's strength >= 0, in the unit of a gradient.
        beta: averaging weight in (0, 1].
        eps: PACE's own ε, >= 0.

    Raises:
        ValueError: an argument is out of its range.
    """
    lr, c = require("lr", lr, 0, math.inf, open_="low"), require("c", c, 0, math.inf)
    require("eps", eps, 0, math.inf)
    return np.asarray(eps + (1 - require("beta", beta, 0, 1, open_="low")) * lr * c)
