"""The gain λ of each parameter at the end of a run of `paceline train`.

paceline train tiny-smollm2 --out runs/tiny-smollm2
paceline train tiny-sft --method pace:pullback=0.03:kappa=0.7 --lr 1e-3 --out runs/gains
python benchmarks/gains.py runs/gains

Parameter 0 is the embedding. A rate of 3e-3 works the same way.
"""

import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from paceline.state import averages_of
from paceline.update import scalars


def gains(group, state):
    """λ of each coordinate at a parameter's last step."""
    s = scalars(int(state["step"]), group, averages_of(group))
    root = state["exp_avg_sq"].float().sqrt() / s.root_bias2 + s.eps
    gain = torch.full_like(root, s.gain) if s.uniform_gain else s.gain / root
    return gain.clamp(max=1.0) if s.clip else gain


def main(run):
    checkpoint = max(run.glob("**/optimizer.pt"), key=lambda path: path.stat().st_mtime)
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    table = Table(title=f"{checkpoint}: gain λ at the last step")
    for column in ("parameter", "elements", "mean", "median", "clipped"):
        table.add_column(column, justify="left" if column == "parameter" else "right")
    found = {}
    for group in saved["param_groups"]:
        for key in group["params"]:
            state = saved["state"][key]
            found[f"{key}: {' × '.join(map(str, state['exp_avg'].shape))}"] = gains(group, state)
    found = {name: x.flatten() for name, x in found.items()}
    whole = torch.cat(list(found.values()))
    largest = max(found, key=lambda name: found[name].mean())
    rest = torch.cat([x for name, x in found.items() if name != largest])
    for name, x in {**found, f"all but {largest}": rest, "all": whole}.items():
        numbers = (x.mean(), x.median(), (x >= 1).float().mean())
        table.add_row(name, f"{x.numel():,}", *(f"{float(number):.4f}" for number in numbers))
    Console().print(table)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
