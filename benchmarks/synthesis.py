"""How well averages are rebuilt from others: expected errors, two norms, and rounding.

    python benchmarks/synthesis.py

Prints three tables as Markdown: errors that `paceline.synthesize` expects; errors measured on small
networks, seed 0, for its norm and for least squares on profiles; and what float32 and bfloat16
snapshots cost. A minute on one core.
"""

import math

import torch
from torch import Tensor, nn

from paceline import PACE, Snapshot, snapshot_steps, synthesize
from paceline.averaging import parse

KAPPAS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.95)
SETTINGS = [
    *[((0.5, 0.9), 600, 10), ((0.5, 0.9), 3000, 10), ((0.5, 0.9), 3000, 20)],
    *[((0.3, 0.9), 600, 10), ((0.3, 0.9), 3000, 10), ((0.3, 0.9), 30_000, 12)],
    *[((0.9,), 3000, 12), ((0.5,), 3000, 12)],
]
STEPS = 1500


def evenly(steps: int, count: int) -> list[int]:
    return [steps * i // count for i in range(1, count + 1)]


def snapshots(kappas, steps: list[int]) -> list[Snapshot]:
    return [Snapshot(f"ema:kappa={kappa}", step) for kappa in kappas for step in steps]


def expected():
    print("| kept | steps | snapshots | when | " + " | ".join(f"κ {k}" for k in KAPPAS) + " |")
    print("|---|---:|---:|---|" + "---:|" * len(KAPPAS))
    for kappas, steps, count in SETTINGS:
        for when, at in (("evenly", evenly), ("advised", snapshot_steps)):
            kept = snapshots(kappas, at(steps, count))
            found = [synthesize(kept, f"ema:kappa={k}", limit=math.inf).error for k in KAPPAS]
            errors = " | ".join(f"{error:.1%}" if error else "kept" for error in found)
            names = ", ".join(map(str, kappas))
            print(f"| κ {names} | {steps:,} | {count} | {when} | {errors} |", flush=True)


def trajectory(kind: str) -> Tensor:
    """The weights of a small network after each step, in float64."""
    torch.manual_seed(0)
    x = torch.randn(2048, 16)
    y = (x @ torch.randn(16, 8)).relu() @ torch.randn(8, 4) + 0.5 * torch.randn(2048, 4)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
    params = list(model.parameters())
    opt = {
        "AdamW": lambda: torch.optim.AdamW(params, lr=3e-3),
        "AdamW, cosine": lambda: torch.optim.AdamW(params, lr=1e-2),
        "SGD": lambda: torch.optim.SGD(params, lr=0.05, momentum=0.9),
        "PACE": lambda: PACE(params, lr=1e-2, pullback=0.1, fused=False),
    }[kind]()
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(opt, STEPS) if "cosine" in kind else None
    path = [torch.cat([p.detach().flatten().double() for p in params])]
    for _ in range(STEPS):
        rows = torch.randint(0, len(x), (16,))
        opt.zero_grad()
        (model(x[rows]) - y[rows]).square().mean().backward()
        opt.step()
        if cosine:
            cosine.step()
        path.append(torch.cat([p.detach().flatten().double() for p in params]))
    return torch.stack(path)


def profile(snapshot: Snapshot) -> Tensor:
    """The share of each iterate."""
    shares = torch.zeros(STEPS + 1, dtype=torch.float64)
    shares[0] = 1.0
    for step in range(1, snapshot.step + 1):
        weight = snapshot.rule.weight(step)
        shares *= 1.0 - weight
        shares[step] += weight
    return shares


def on_profiles(kept: Tensor, wanted: Tensor) -> Tensor:
    """The weights, with the sum 1, of least squares on profiles."""
    last = kept[-1]
    free = torch.linalg.lstsq((kept[:-1] - last).T, (wanted - last)[:, None], driver="gelsd")
    return torch.cat([free.solution[:, 0], 1.0 - free.solution.sum(0)])


def norms():
    kinds = ("AdamW", "AdamW, cosine", "SGD", "PACE")
    paths = {kind: trajectory(kind) for kind in kinds}
    print("\n| kept | rebuilt | expected | norm | " + " | ".join(kinds) + " |")
    print("|---|---|---:|---|" + "---:|" * len(kinds))
    for kappas in ((0.5, 0.9), (0.3, 0.9)):
        kept = snapshots(kappas, evenly(STEPS, 10))
        profiles = torch.stack([profile(x) for x in kept])
        for target in ("ema:kappa=0.6", "ema:kappa=0.7", "ema:kappa=0.8", "ema:half_life=200"):
            wanted = profile(Snapshot(target, STEPS))
            found = synthesize(kept, target, limit=math.inf)
            ways = {"ours": torch.tensor(found.weights).double(), "profiles": None}
            ways["profiles"] = on_profiles(profiles, wanted)
            for name, weights in ways.items():
                errors = []
                for path in paths.values():
                    missed, far = (weights @ profiles - wanted) @ path, wanted @ path - path[-1]
                    errors.append(f"{missed.norm() / far.norm():.1%}")
                start = f"| κ {kappas[0]}, {kappas[1]} | {target} | {found.error:.1%} | {name} | "
                print(start + " | ".join(errors) + " |", flush=True)


def rounding():
    print("\n| snapshots | rate | noise | expected | measured | without noise= |")
    print("|---|---:|---:|---:|---:|---:|")
    returns = {"a": "ema:kappa=0.5", "b": "ema:kappa=0.9", "c": "ema:kappa=0.7"}
    steps = snapshot_steps(400, 10)
    kept = [Snapshot(returns[name], step) for name in "ab" for step in steps]
    for rate in (1e-2, 1e-3, 1e-4):
        torch.manual_seed(0)
        param = nn.Parameter(0.05 * torch.randn(3000))
        opt = PACE([param], lr=rate, pullback=0.1, fused=False, returns=returns)
        held = {}
        for step in range(1, steps[-1] + 1):
            noise = 0.1 * torch.randn(3000)
            param.grad = torch.logspace(-2, 0, 3000) * param.detach() + noise
            opt.step()
            held |= {(name, step): opt.state[param][f"return_{name}"].clone() for name in "ab"}
        average = opt.state[param]["return_c"].double()
        # by how much a step moves them, if they walk
        apart = [profile(Snapshot(parse(returns[name]), steps[-1])).cumsum(0) for name in "ab"]
        moved = (held["a", steps[-1]] - held["b", steps[-1]]).norm() / (apart[0] - apart[1]).norm()
        for dtype in (torch.float32, torch.bfloat16):
            tensors = [held[name, step].to(dtype).double() for name in "ab" for step in steps]
            unit = 2.0**-9.2 if dtype == torch.bfloat16 else 2.0**-25.2
            noise = float(unit * tensors[0].norm() / moved)
            both = [synthesize(kept, returns["c"], noise=x, limit=math.inf) for x in (noise, 1e-4)]
            measured = []
            for found in both:
                rebuilt = sum(a * x for a, x in zip(found.weights, tensors, strict=True))
                measured.append(
                    float((rebuilt - average).norm() / (average - param.detach()).norm())
                )
            start = f"| {str(dtype).removeprefix('torch.')} | {rate:g} | {noise:.2g} | "
            print(start + f"{both[0].error:.1%} | {measured[0]:.1%} | {measured[1]:.1%} |")


if __name__ == "__main__":
    expected()
    norms()
    rounding()
