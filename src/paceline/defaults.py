"""The defaults of PACE, recipes and commands, in one place. docs/pace.md has the reasons.

| said of the pull | pullback | gain | pulled toward | returned |
|---|---|---|---|---|
| nothing, or just that | 1 | scalar | κ = 0.3 | κ = 0.7 |
| pullback="auto" | auto | one for all | κ = 0.3 | κ = 0.6 |
| pullback=c, the paper's rule | c | adam | κ = 0.5 | the same average |
| pullback=0, or the method `ema` | 0 | | nothing | κ = 0.7 |

Where an average is given, it is pulled toward and returned.
"""

from typing import Any, NamedTuple

LR = 1e-3
BETAS = (0.9, 0.999)
WEIGHT_DECAY = 0.01
WARMUP = 0.05  # of the steps
MAX_GRAD_NORM = 1.0

PULLBACK, GAIN = 1.0, "scalar"  # the saturated pull, which has no unit
KAPPA, RETURN_KAPPA = 0.3, 0.7  # of the average that is pulled toward, and of the returned one
PAPER_KAPPA = 0.5  # of the only average, where a strength is given
AUTO, AUTO_RETURN_KAPPA = "auto", 0.6
TWIN_GAIN = 1.0


class Kappas(NamedTuple):
    """κ of the average that a pull goes toward, and of another that is returned, or None."""

    own: float
    returned: float | None


def kappas(pullback: Any, gain: str | None = None) -> Kappas:
    """The averages where none is given, by what is given as `pullback` and `gain`, or None."""
    strength = pullback if isinstance(pullback, int | float) else None  # no traced number
    if strength == 0:
        return Kappas(RETURN_KAPPA, None)
    if pullback is None or (gain == GAIN and strength == PULLBACK):
        return Kappas(KAPPA, RETURN_KAPPA)
    if isinstance(pullback, str) and pullback == AUTO:
        return Kappas(KAPPA, AUTO_RETURN_KAPPA)
    return Kappas(PAPER_KAPPA, None)


def pull(options: dict[str, Any]) -> dict[str, Any]:
    """`pullback` and `gain` where they are left out or None.

    Raises:
        ValueError: only a gain is given that needs a strength.
    """
    c, gain = options.get("pullback"), options.get("gain")
    if c is not None:
        return {"pullback": c, "gain": gain or "adam"}
    if gain == "adam":
        raise ValueError(
            f"pullback must be given with gain={gain!r}: its best value moves with the scale of "
            "the gradients"
        )
    return {"pullback": PULLBACK, "gain": gain or GAIN}
