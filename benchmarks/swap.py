"""What putting the average in and out costs: the one-pass kernel beside torch operations.

python benchmarks/swap.py
"""

import argparse
import time
from collections.abc import Callable
from statistics import median, quantiles

import torch
from torch.nn import Parameter

from paceline import PACE

SHAPES = [(2048, 2048)] * 4 + [(2048,)] * 8
FORMS = {
    "float32": (torch.float32, None),
    "float32, bfloat16 state": (torch.float32, torch.bfloat16),
    "bfloat16": (torch.bfloat16, None),
    "bfloat16, bfloat16 state": (torch.bfloat16, torch.bfloat16),
    "float64": (torch.float64, None),
}


def cpu_time(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    for name, (dtype, state_dtype) in FORMS.items():
        torch.manual_seed(0)
        params = [Parameter((0.02 * torch.randn(shape)).to(dtype)) for shape in SHAPES]
        for p in params:
            p.grad = torch.randn_like(p)
        opt = PACE(params, pullback=0.1, state_dtype=state_dtype, fused=True)
        opt.step()

        def there_and_back(opt: PACE = opt) -> None:
            opt.eval()
            opt.train()

        times: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(1 + rounds):
            for fused in times:
                opt.param_groups[0]["fused"] = fused
                times[fused].append(cpu_time(there_and_back))
        pairs = zip(times[False][1:], times[True][1:], strict=True)
        low, middle, high = quantiles([one / other for one, other in pairs], n=4)
        print(
            f"{name}: torch operations take {middle:.2f} ({low:.2f}-{high:.2f}) times the kernel's "
            f"{1e3 * median(times[True][1:]):.1f} ms"
        )


if __name__ == "__main__":
    main()
