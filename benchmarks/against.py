"""The time of PACE's step on the CPU, relative to another commit in the same process.

    python benchmarks/against.py COMMIT

prints the median and quartiles over 51 rounds of the ratio of step times to that commit, for the
shapes of GPT-2 124M. The ratio of that commit to itself shows the noise.
"""

import importlib
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from io import BytesIO
from pathlib import Path

import torch

import paceline

BLOCK = [(768, 2304), (768, 768), (768, 3072), (3072, 768), (2304,), (768,), (3072,)]
SHAPES = [(50257, 768), (1024, 768), *BLOCK * 12]
ROUNDS = 51
OPTIONS = {
    "kernel": {},
    "kernel, bfloat16 state": {"state_dtype": torch.bfloat16},
    "torch operations": {"fused": False},
}


def other_pace(commit, folder):
    """The PACE of a commit, under another package name."""
    root = Path(__file__).parent.parent
    archive = subprocess.run(
        ["git", "archive", commit, "src/paceline"], cwd=root, check=True, capture_output=True
    )
    with tarfile.open(fileobj=BytesIO(archive.stdout)) as tar:
        tar.extractall(folder, filter="data")
    Path(folder, "src/paceline").rename(Path(folder, "src/paceline_before"))
    sys.path.insert(0, str(Path(folder, "src")))
    return importlib.import_module("paceline_before").PACE


def made(kind, **options):
    """An optimizer of that class with gradients, after one step."""
    params = [torch.nn.Parameter(torch.randn(shape) * 0.02) for shape in SHAPES]
    optimizer = kind(params, lr=1e-3, pullback=0.1, **options)
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    optimizer.step()
    return optimizer


def main():
    """Time both commits in turn."""
    with tempfile.TemporaryDirectory() as folder:
        before = other_pace(sys.argv[1], folder)
        for what, options in OPTIONS.items():
            kinds = {"before": before, "before again": before, "now": paceline.PACE}
            optimizers = {name: made(kind, **options) for name, kind in kinds.items()}
            times = {name: [] for name in kinds}
            for _ in range(ROUNDS):
                for name, optimizer in optimizers.items():
                    start = time.perf_counter()
                    optimizer.step()
                    times[name].append(time.perf_counter() - start)
            for name in ("before again", "now"):
                ratios = [b / a for a, b in zip(times["before"], times[name], strict=True)]
                low, middle, high = statistics.quantiles(ratios, n=4)
                print(f"{what}: {name} {middle:.3f} ({low:.3f}-{high:.3f})")


if __name__ == "__main__":
    main()
