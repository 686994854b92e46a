"""`paceline doctor`: a bug report's facts: versions, devices, kernels, cache. Needs torch alone."""

import os
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, requires, version

from .cache import cache_folder, is_ours

# In the metadata: a package, its range, and the extra that asks for it.
NEED = re.compile(r"([A-Za-z0-9._-]+)(?:\[[^\]]*\])?[^;]*;.*extra == ['\"](\w+)['\"]")


def report() -> str:
    """Markdown: versions, devices, kernels, cache and extras; then what to fill in.

    Building the CPU's kernel is part of it, which takes some seconds on a machine that has none.
    """
    facts = {
        "paceline": _version("paceline"),
        "Python": f"{platform.python_version()}, {sys.executable}",
        "system": f"{platform.platform()}, {os.cpu_count()} cores",
        "torch": _version("torch"),
        "devices": _devices(),
        "kernel of the CPU": _cpu_kernel(),
        "kernel of GPUs": f"triton {_version('triton')}, not tried",
        "cache": _cache(),
        **{f"extra [{name}]": text for name, text in extras().items()},
    }
    lines = [f"- {name}: {text}" for name, text in facts.items()]
    asked = "### What I ran\n\n### What came\n\n### What I expected\n"
    return "\n".join([asked, "### `paceline doctor`", "", *lines])


def extras() -> dict[str, str]:
    """Of each extra, whether all its packages are installed, or which are missing."""
    needs: dict[str, list[str]] = {}
    try:
        lines = requires("paceline") or []
    except PackageNotFoundError:  # it is run from a folder
        return {}
    for line in lines:
        found = NEED.match(line)
        if found and found[1] != "paceline" and _is_for_this_system(line):
            needs.setdefault(found[2], []).append(found[1])
    states = {}
    for extra, names in needs.items():
        there = {name: _version(name) for name in names}
        missing = [name for name, number in there.items() if number == MISSING]
        both = [f"{name} {number}" for name, number in there.items() if number != MISSING]
        states[extra] = ", ".join(both) or "none of it"
        states[extra] += f"; missing: {', '.join(missing)}" if both and missing else ""
    return states


MISSING = "not installed"


def _is_for_this_system(line: str) -> bool:
    found = re.search(r"sys_platform == ['\"](\w+)['\"]", line)
    return found is None or found[1] == sys.platform


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return MISSING


def _devices() -> str:
    try:
        import torch
    except (ImportError, OSError) as error:  # a library that is missing
        return f"unknown: {error}"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    kinds = [("MPS", torch.backends.mps.is_available()), ("XPU", torch.xpu.is_available())]
    names += [kind for kind, there in kinds if there]
    built = f"torch built for CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    return f"{', '.join(names) or 'no accelerator'} ({built})"


def _cpu_kernel() -> str:
    try:
        from .kernels import cpu
    except (ImportError, OSError) as error:
        return f"unknown: {error}"
    try:
        cpu.build()
    except cpu.BuildError as error:
        return f"cannot be built: {error}"
    return "works"


def _cache() -> str:
    try:
        folder = cache_folder().resolve()
        others = "" if is_ours(folder) else ", to which others may write"
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    except OSError as error:
        return f"cannot be used: {error}"
    return f"{folder}, {size / 1e6:.1f} MB{others}"
