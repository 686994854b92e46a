r"""A pull's twin: the EMA at another learning rate that returns nearly the same model.

Write the path from noise to average as a transfer function, with z = 1 - u and b = λ(1-β), and
leave out a shift by one step that is in both:

    β / G_pull(u) = u²      - (a + β + b)·u + aβ
    β / G_twin(u) = u² / r  - (a + β + b)·u + aβ,        r = β / (β + b)

The twin is the EMA with the same β of SGD at the learning rate r·η, without a pull. The two
differ in the u² term alone, so that motions slower than both modes are the same in both. Read as a
mass on a spring, the pull is friction. The twin has the same friction, the same spring, and 1/r of
the mass. White noise shakes a mass with a variance that does not depend on the mass.

With matrices, a = η·H and B = (1-β)·diag(λ), the same holds with R = β(β + B)⁻¹ for r, to the left
of a: the twin then has a learning rate for each coordinate. A filter F on the gradients, such as
Adam's momentum, divides u² and (β+b)u by F(u) on both sides. The two still differ in the u² term
alone.

This module needs NumPy, not SciPy.

Source: derived here; the method is that of Au & Block, arXiv:2606.25086 (2026).
"""

import numpy as np
from numpy.typing import ArrayLike

from .quadratic import Array, in_range, limiting_error, spectral_radius


def twin_rate(beta: ArrayLike, gain: ArrayLike, *, simple: bool = False) -> Array:
    """The twin's learning rate divided by the pull's: r = β / (β + λ(1-β)).

    At λ = 1, a pull all the way to the average, it is β. If the optimizer takes the same step d
    every time, live weights and average come to move by r·d.

    Args:
        beta: averaging weight, in (0, 1]; any shape.
        gain: λ >= 0; broadcasts.
        simple: use β / (β + λ) instead, nearly the same for small β, and not exact at λ = 1.

    Raises:
        ValueError: an argument is out of its range.
    """
    beta, gain = in_range("beta", beta, "(0, 1]"), in_range("gain", gain, "[0, inf)")
    return np.asarray(beta / (beta + gain * (1.0 if simple else 1 - beta)))


def twin_ratio(a: ArrayLike, beta: ArrayLike, gain: ArrayLike, *, simple: bool = False) -> Array:
    """Limiting error of the pull divided by its twin's, exactly.

        2 - a·r·β / (1 + (1-a·r)(1-β))                            a + β + λ(1-β) - aβ + x
        ------------------------------  ·  (1  or, if simple,  ----------------------- ), x = λβ
           2 - a·β / (1 + w - b)                                  a + β + λ(1-β) - aβ

    with w = (1-a)(1-β), b = λ(1-β). Without drift it is above 1 for every λ > 0 and β < 1 in the
    stable range. To leading order the excess is aβ/2·(1/(1+w-b) - r/2), plus βλ/(a+β+λ) if simple.

    `simple` is that of `twin_rate`; other arguments and errors are those of `limiting_error`.
    """
    limiting_error(a, beta, gain)  # raises
    a, beta, gain = (np.asarray(x, dtype=np.float64) for x in (a, beta, gain))
    r, w, b = twin_rate(beta, gain, simple=simple), (1 - a) * (1 - beta), gain * (1 - beta)
    ratio = (2 - a * r * beta / (1 + (1 - a * r) * (1 - beta))) / (2 - a * beta / (1 + w - b))
    friction = a + beta - a * beta + b
    return np.asarray(ratio * ((friction + gain * beta) / friction if simple else 1.0))


def twin_modes(a: ArrayLike, beta: ArrayLike, gain: ArrayLike) -> tuple[Array, Array]:
    """Spectral radii of the pull and of its twin: a step's factor on the start, in the long run.

    With u = 1 - z, the pull's two modes have u1 + u2 = a + β + b and u1·u2 = aβ; the twin's are
    ra and β. So Σ 1/u = (a + β + b)/(aβ) is the same, and with it the sum over all steps of the
    start's share in the average. The pull's slow mode has more of that sum: if no mode is past 1,
    it is slower than the twin's, by a factor of up to 2 (at ra = β). The factor is about
    1 + a/(β+b) if the twin's average is its faster mode.

    Arguments and errors are those of `limiting_error`.
    """
    limiting_error(a, beta, gain)  # raises
    twin_a = np.asarray(a) * twin_rate(beta, gain)
    return spectral_radius(a, beta, gain), spectral_radius(twin_a, beta, 0)


def twin_epsilon(lr: ArrayLike, pullback: ArrayLike, beta: ArrayLike, eps: float = 1e-8) -> Array:
    """The ε with which AdamW is the twin of PACE, without clipped gains and weight decay.

    With the weight β_t of a power EMA the gain is η·c·β_t/(√v̂+ε), so that the twin's step is

        η·r·m̂/(√v̂+ε) = η·m̂ / (√v̂ + ε + (1-β)·η·c)

    With a constant averaging weight the gain lacks the factor β: give c/β for c. Weight decay has
    no such ε, because the twin scales it by r in each coordinate.

    Args:
        lr: scheduled learning rate η > 0.
        pullback: PACE's c >= 0, in the unit of a gradient.
        beta: averaging weight, in (0, 1].
        eps: PACE's own ε, >= 0.

    Raises:
        ValueError: an argument is out of its range.
    """
    lr, beta = in_range("lr", lr, "(0, inf)"), in_range("beta", beta, "(0, 1]")
    pullback = in_range("pullback", pullback, "[0, inf)")
    return np.asarray(in_range("eps", eps, "[0, inf)") + (1 - beta) * lr * pullback)
