"""`paceline doctor`: what it says of this machine, and that it needs no extra."""

import subprocess
import sys
from importlib.metadata import version

import torch

from paceline import doctor
from paceline.cli import main


def facts(said):
    lines = [line for line in said.splitlines() if line.startswith("- ")]
    return dict(line.removeprefix("- ").split(": ", 1) for line in lines)


def test_it_is_a_bug_report_with_what_is_here(capsys, monkeypatch, tmp_path):
    (tmp_path / "cache").mkdir(mode=0o700)
    (tmp_path / "cache" / "x").write_bytes(b"x" * 2_500_000)
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(doctor, "_cpu_kernel", lambda: "works")
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    titles = [line for line in said.splitlines() if line.startswith("#")]
    assert titles[:3] == ["### What I ran", "### What came", "### What I expected"]
    found = facts(said)
    assert found["torch"] == version("torch") == torch.__version__
    assert str(sys.version_info.minor) in found["Python"]
    assert found["cache"] == f"{(tmp_path / 'cache').resolve()}, 2.5 MB"
    assert ("no accelerator" in found["devices"]) is not torch.accelerator.is_available()


def test_a_cache_that_others_may_write_to_is_named(monkeypatch, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))
    assert doctor._cache().endswith(", to which others may write")
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "file"))
    (tmp_path / "file").write_text("")
    assert doctor._cache().startswith("cannot be used: ")


def test_the_kernel_is_tried(monkeypatch, kernel):
    assert doctor._cpu_kernel() == "works"
    from paceline.kernels import cpu

    def fails():
        raise cpu.BuildError("no compiler")

    monkeypatch.setattr(cpu, "build", fails)
    assert doctor._cpu_kernel() == "cannot be built: no compiler"


def test_extras_are_whole_or_say_what_is_missing(monkeypatch):
    there = {"torch": "2.6", "rich": "14.0", "tyro": "1.0"}
    monkeypatch.setattr(doctor, "_version", lambda name: there.get(name, doctor.MISSING))
    needed = [
        "torch>=2.6",
        "rich>=14.0; extra == 'a'",
        'tyro>=1.0; extra == "a"',
        "rich; extra == 'b'",
        "psycopg[binary]>=3.2; extra == 'b'",
        "paceline[a]; extra == 'b'",
        "jax; extra == 'c'",
        "triton<4,>=3.7; (sys_platform == 'plan9') and extra == 'a'",
    ]
    monkeypatch.setattr(doctor, "requires", lambda name: needed)
    assert doctor.extras() == {
        "a": "rich 14.0, tyro 1.0",
        "b": "rich 14.0; missing: psycopg",
        "c": "none of it",
    }


def test_it_needs_no_extra():
    """In a process in which what the commands need cannot be imported."""
    code = "import sys; sys.modules |= dict.fromkeys(['pydantic', 'tyro', 'rich', 'numpy'])\n"
    code += "from paceline import cli, doctor; doctor._cpu_kernel = lambda: 'not tried'\n"
    code += "sys.exit(cli.main(['doctor']))"
    command = [sys.executable, "-W", "ignore", "-c", code]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert facts(found.stdout)["torch"] == version("torch")
