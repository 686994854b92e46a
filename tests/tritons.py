"""Triton on the CPU: its interpreter, and its compiler without a device.

The interpreter is chosen as Triton is imported, so it runs in a process of its own.
"""

import os
import re
import subprocess
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}


def _interpret():
    os.environ["TRITON_INTERPRET"] = "1"
    np.seterr(all="ignore")  # of gradients that are not finite
    from triton.runtime.interpreter import InterpreterBuilder

    load = InterpreterBuilder.create_masked_load

    def as_on_a_device(self, pointers, mask, other, *rest):
        """What a mask leaves out is anything; the interpreter makes it zeros."""
        found = load(self, pointers, mask, other, *rest)
        anything = np.full(found.data.nbytes, 0xFF, np.uint8).view(found.data.dtype)
        found.data = np.where(mask.data, found.data, anything.reshape(found.data.shape))
        return found

    InterpreterBuilder.create_masked_load = as_on_a_device


@pytest.fixture(scope="module")
def interpreted():
    """`interpreted(function, ...)` runs a function of this file where Triton interprets."""
    with ProcessPoolExecutor(1, get_context("spawn"), _interpret) as pool:
        yield lambda function, *args: pool.submit(function, *args).result()


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """`compiled(target)` gives the list of what is compiled for it, and nothing is launched."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    run = JITFunction.run

    def start(target):
        made, kind = [], GPUTarget(*TARGETS[target])

        class Driver:
            get_current_device = staticmethod(lambda: f"{tmp_path} {target}")
            get_current_stream = staticmethod(lambda device: 0)
            get_current_target = staticmethod(lambda: kind)

        def compile_only(self, *args, grid, warmup, **options):
            found = run(self, *args, grid=grid, warmup=True, **options)
            if found not in made:
                made.append(found)

        monkeypatch.setattr(driver, "_active", Driver())
        monkeypatch.setattr(torch.version, "hip", "6" if kind.backend == "hip" else None)
        monkeypatch.setattr(JITFunction, "run", compile_only)
        return made

    return start


def resources(kernel, folder):
    """Registers, stack and local memory of what is compiled for NVIDIA."""
    import triton

    binary = folder / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run([tool, "-res-usage", binary], capture_output=True, check=True, text=True)
    return dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout))


def spills(kernel):
    """Whether what is compiled for AMD keeps anything in memory that has no register."""
    names = r"\.(\w+_spill_count|private_segment_fixed_size): +(\d+)"
    used = dict(re.findall(names, kernel.asm["amdgcn"]))
    assert len(used) == 3
    return set(used.values()) != {"0"}


def vector_widths(kernel):
    """Bytes of each vector that what is compiled for NVIDIA loads or stores; no flush to zero."""
    ptx = kernel.asm["ptx"]
    assert not re.search(r"\.(approx|full|ftz)\b", ptx)
    found = re.findall(r"(@%p\d+ )?(ld|st)\.global(?:\.v(\d))?\.b(\d+)", ptx)
    return [int(count) * int(bits) // 8 for _, _, count, bits in found if count]
