"""Every average at its best setting of a grid, on the task of `paceline compare`.

    python benchmarks/averages.py [--out FOLDER]

Settings are chosen by their returned loss with seed 5, and compared over seeds 0 to 4, paired, with
95 % intervals of Student's t; * marks differences that hold after Holm's correction for the table.
A setting at the edge of its grid is named: there no best was found.

The table is printed as Markdown. FOLDER gets both comparisons; a comparison that is already there
is read and not run. Default: runs/averages.
"""

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path
from statistics import fmean

from rich.console import Console

from paceline.study.compare import Comparison, compare
from paceline.study.statistics import edges, holds, holm, interval, p_value

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
KAPPAS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9)
STRENGTHS = (1, 10)
GRID = {
    "AdamW": ["adamw"],
    "AdamW, cosine": ["adamw:cosine"],
    "AdamW, WSD": ["adamw:wsd"],
    "EMA, power": [f"ema:kappa={k}" for k in KAPPAS],
    "EMA, half-life": [f"ema:half_life={h}" for h in (20, 50, 100, 200, 400)],
    "uniform": [f"uniform:start={s}" for s in (0, 0.25, 0.5, 0.75, 0.9)],
    "SWA": [f"swa:start={s}:every={k}" for s in (0.5, 0.75, 0.9) for k in (10, 50)],
    "LAWA": [f"lawa:window={w}:every={k}" for w in (5, 10, 20) for k in (10, 40)],
    "BEMA": [f"bema:kappa={k}:bias_power={e}" for k in (0.5, 0.7, 0.9) for e in (0.2, 0.4, 0.8)],
    "EMA under the twin schedule": [f"ema:twin:twin_gain={g}:kappa=0.3" for g in (0.5, 1)],
    "Lookahead": [f"lookahead:every={k}:alpha={a}" for k, a in ((5, 0.5), (5, 0.8), (10, 0.5))],
    "Schedule-Free": ["schedule-free"],
    "PACE": [f"pace:pullback={c}:kappa={k}" for c in STRENGTHS for k in (0.3, 0.5)],
    "pull with a scalar gain": [
        f"pullback:adamw:gain=scalar:pullback={c}:kappa={k}" for c in (0.1, 0.5) for k in (0.3, 0.5)
    ],
    "Muon": [f"pullback:muon:pullback=0:kappa={k}" for k in (0.5, 0.7)],
    "Muon, pulled": [f"pullback:muon:pullback={c}:kappa=0.3" for c in STRENGTHS],
}


def losses(folder: Path, methods: list[str], seeds: tuple[int, ...], rates: tuple[float, ...]):
    """Returned losses at the end: (label, rate) -> seed -> loss; NaN after divergence."""
    own = {"methods": methods, "lr": rates, "seeds": seeds}
    options = Comparison(**own, warmup=20, evaluations=1, out=folder)
    if not (folder / "report.html").exists():
        compare(options, Console())
    found = defaultdict(dict)
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        loss = row["returned_loss"]
        found[row["label"], row["lr"]][row["seed"]] = math.nan if loss is None else loss
    texts = {(m.label, m.lr): text for text in methods for m in labelled(text, rates)}
    return {texts[key] if len(rates) == 1 else (texts[key], key[1]): x for key, x in found.items()}


def mean_of(values: list[float]) -> str:
    ends = interval(values)
    return f"{fmean(values):.4f} ±{(ends[1] - ends[0]) / 2:.4f}" if ends else "diverged"


def labelled(text: str, rates: tuple[float, ...]):
    return Comparison(methods=(text,), lr=rates).compared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/averages"))
    out = parser.parse_args().out
    every = [text for settings in GRID.values() for text in settings]
    tuned = losses(out / "tuning", every, (5,), RATES)

    def score(key) -> float:
        loss = fmean(tuned[key].values())
        return loss if math.isfinite(loss) else math.inf

    best, edge = {}, {}
    for family, settings in GRID.items():
        text, rate = min(((s, lr) for s in settings for lr in RATES), key=score)
        best[family] = f"{text}:lr={rate:g}"
        (chosen,) = labelled(text, (rate,))
        edge[family] = edges(chosen.row, [x.row for s in settings for x in labelled(s, RATES)])
    final = losses(out / "final", list(best.values()), (0, 1, 2, 3, 4), (1.0,))
    reference = final[best["EMA, power"]]
    against = {f: [final[best[f]][s] - reference[s] for s in reference] for f in best}
    corrected = dict(zip(against, holm(map(p_value, against.values())), strict=True))
    print("| method | best of | setting | edge | returned loss | against the power EMA |")
    print("|---|---:|---|---|---:|---:|")
    for family in sorted(best, key=lambda f: fmean(final[best[f]].values())):
        own = list(final[best[family]].values())
        shown = mean_of(against[family]) + "*" * holds(corrected[family])
        shown = "" if family == "EMA, power" else shown
        print(
            f"| {family} | {len(GRID[family]) * len(RATES)} | `{best[family]}` | {edge[family]} "
            f"| {mean_of(own)} | {shown} |"
        )


if __name__ == "__main__":
    main()
