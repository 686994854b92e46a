"""What Pullback costs beside AdamW, in CPU time on one thread: for machines that are shared.

python benchmarks/follow.py
"""

import argparse
import time
from collections.abc import Callable
from statistics import quantiles

import torch
from torch.nn import Parameter

from paceline import Pullback

SHAPES = [(2048, 2048)] * 4 + [(2048,)] * 8


def cpu_time(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    params = [Parameter(0.02 * torch.randn(shape)) for shape in SHAPES]
    for p in params:
        p.grad = torch.randn_like(p)
    adamw = torch.optim.AdamW(params, fused=True)
    others = {
        f"Pullback, c = {c:g}": Pullback(torch.optim.AdamW(params, fused=True), pullback=c)
        for c in (0.0, 0.1)
    }
    for opt in (adamw, *others.values()):
        for _ in range(2):
            opt.step()
    for name, opt in others.items():
        ratios = []
        for _ in range(rounds):
            beside = cpu_time(adamw.step)
            ratios.append(cpu_time(opt.step) / beside)
        low, middle, high = quantiles(ratios, n=4)
        print(f"{name}: {middle:.2f} ({low:.2f}-{high:.2f}) x AdamW(fused=True)")


if __name__ == "__main__":
    main()
