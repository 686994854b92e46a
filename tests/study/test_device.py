"""`paceline check-device`: the CPU stands for the device, right or made wrong."""

import json
from unittest.mock import patch

import pytest
import torch

from paceline import PACE, kernels, swap
from paceline.cli import main
from paceline.kernels import cpu
from paceline.study import device

CPU = torch.device("cpu")


def outcomes(only):
    """Those checks whose names begin so."""
    every = device._checks()
    wanted = {name: check for name, check in every.items() if name.startswith(only)}
    assert wanted
    with patch.object(device, "_checks", lambda: wanted):
        return list(device.checked(CPU))


def faults(only):
    return [x.fault for x in outcomes(only) if not x.skipped]


def test_what_is_right_passes(kernel):
    found = outcomes("")
    assert len(found) == 5 * 4 * 2 + 9
    assert [x.name for x in found if x.skipped] == ["CUDA graph"]
    assert not [x for x in found if x.fault and not x.skipped]


WRONG = {"the rate": (5, 1.1), "the gain": (7, 1.5), "β": (9, 1.5), "of an average": (12, 2.0)}


@pytest.mark.parametrize(
    ("form", "what"),
    [
        *(("float32, pull", what) for what in WRONG),
        *(("float64, pull", what) for what in WRONG),
        ("bfloat16, stochastic, pull", "the rate"),  # less would be lost in the rounding
    ],
)
def test_a_wrong_step_is_found(form, what, kernel, monkeypatch):
    where, factor = WRONG[what]
    numbers = cpu.numbers

    def off(s):
        found = list(numbers(s))
        found[where] *= factor
        return found

    monkeypatch.setattr(cpu, "numbers", off)
    named = f"step, {form}, "
    by_kernel, by_operations = faults(named)
    assert "are off by" in by_kernel
    assert by_operations is None


def test_a_wrong_pull_around_another_optimizer_is_found(kernel, monkeypatch):
    follow = cpu.follow
    monkeypatch.setattr(
        cpu, "follow", lambda slots, pull: follow(slots, pull._replace(weight=0.05))
    )
    assert all("are off by" in x for x in faults("Pullback"))
    assert kernels.WORTH_BUILDING == 2**18


def lose_a_bit(param, average):
    live = param.clone()
    param.copy_(average)
    average.copy_(live).mul_(1 + 2**-20)


def test_each_other_fault_is_found_by_its_check(kernel, monkeypatch):
    step, load = cpu.Kernel.step, PACE.load_state_dict
    with monkeypatch.context() as change:
        change.setattr(swap, "_pair_in", lose_a_bit)
        assert ["other bits back" in x for x in faults("swap")] == [True]
    with monkeypatch.context() as change:
        run = cpu.Swap.run

        def off(self, *, back):
            run(self, back=back)
            self.pairs[0][0][0, 0].add_(-1.0 if back else 1.0)

        change.setattr(cpu.Swap, "run", off)
        (fault,) = faults("swap")
        assert "puts other weights in" in fault or "other bits back" in fault
    with monkeypatch.context() as change:
        change.setattr(
            cpu.Kernel,
            "step",
            lambda self, g, k, s, **x: step(self, g, k, s._replace(skip_nonfinite=False), **x),
        )
        assert ["whose gradient is NaN has moved" in x for x in faults("guard")] == [True]
    with monkeypatch.context() as change:

        def lossy(self, saved):
            load(self, saved)
            for state in self.state.values():
                state["exp_avg"].mul_(0.5)

        change.setattr(PACE, "load_state_dict", lossy)
        assert ["other bits" in x for x in faults("resume")] == [True]
    with monkeypatch.context() as change:
        always = lambda self, opt, *_, **__: opt.step()  # noqa: E731
        change.setattr(torch.amp.GradScaler, "_maybe_opt_step", always)
        assert ["differ from those of a run" in x for x in faults("GradScaler")] == [True]
    with monkeypatch.context() as change:
        change.setattr(torch, "compile", lambda model, **_: lambda x: 2 * model(x))
        assert ["not compiled" in x for x in faults("compiled")] == [True]


def test_an_exception_is_one_line_and_the_others_go_on(kernel, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(cpu.Kernel, "step", fails)
    found = outcomes("step, float32, ")
    assert {x.fault for x in found if "kernel" in x.name} == {"RuntimeError: no kernel image"}
    assert {x.fault for x in found if "operations" in x.name} == {None}


def test_what_no_longer_fits_is_named(tmp_path, monkeypatch, capsys):
    """Time passes in the checks alone, ten seconds in each."""
    now, measured = [0.0], []

    def check(_):
        now[0] += 10.0

    def bench(options, console):
        measured.append((options.models, options.only))
        now[0] += 10.0

    monkeypatch.setattr(device.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(device, "accelerator", lambda: CPU)
    monkeypatch.setattr(device, "_checks", lambda: dict.fromkeys(("one", "two", "three"), check))
    monkeypatch.setattr(device, "bench", bench)
    out = tmp_path / "device.md"
    every = (*device.COMPARED, *device.OURS)
    assert main(["check-device", "--out", str(out), "--seconds", "20"]) == 0
    text = out.read_text()
    assert ": 2 right, 0 wrong, 1 left out\n" in text
    assert "| two | right |\n| three | not run: no time was left |" in text
    assert "not run  three: no time was left" in capsys.readouterr().out
    assert not measured
    for model in ("gpt2", "small"):
        assert f"{model}, {', '.join(every)}: not measured, for no time was left." in text
    for name in device.OURS:
        assert f"large, {name}: not measured, for no time was left." in text
    now[0] = 0.0
    assert main(["check-device", "--out", str(out), "--seconds", "35"]) == 0
    assert measured == [(("gpt2",), every)]
    assert "left out" not in out.read_text()
    assert "small, AdamW for-loop, " in out.read_text()
    assert device.CheckDevice().seconds < 300


def test_without_an_accelerator_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert main(["check-device"]) == 2
    error = capsys.readouterr().err
    assert error == "paceline: check-device: torch finds no accelerator on this machine\n"


@pytest.mark.parametrize("wrong", [False, True])
def test_the_file_says_what_was_found(wrong, tmp_path, capsys, monkeypatch):
    def check(_):
        if wrong:
            raise device.Failed("weights | are off")

    checks = {"step": check, "CUDA graph": device._graph}
    monkeypatch.setattr(device, "accelerator", lambda: CPU)
    monkeypatch.setattr(device, "_checks", lambda: checks)
    measured = []

    def bench(options, console):
        measured.append((options.models, options.only))
        console.print(json.dumps(options.models))

    monkeypatch.setattr(device, "bench", bench)
    out = tmp_path / "device.md"
    assert main(["check-device", "--out", str(out)]) == int(wrong)
    text = out.read_text()
    assert text.startswith("# paceline check-device, ")
    assert f": {0 if wrong else 1} right, {int(wrong)} wrong\n" in text
    assert "| step | **wrong**: weights \\| are off |" in text or not wrong
    assert "| CUDA graph | not run: NotImplementedError: CUDA alone has them |" in text
    assert torch.__version__ in text
    assert text.count('["large"]') == len(device.OURS)
    together = (*device.COMPARED, *device.OURS)
    assert measured[:2] == [(("gpt2",), together), (("small",), together)]
    assert main(["check-device", "--out", str(tmp_path / "nowhere" / "x.md")]) == 2
    assert "name a file in a folder" in capsys.readouterr().err
    assert sum(torch.Size(x).numel() for x in device.shapes("large")) == 1_711_376_384


@pytest.mark.parametrize(
    ("choice", "check"),
    [("swaps", device._swap), ("follow", lambda place: device._around(place, 0.3))],
)
def test_a_kernel_that_falls_back_to_torch_operations_fails_its_check(choice, check, monkeypatch):
    """Torch operations would be compared with themselves, and be right."""
    by_kernel = getattr(kernels, choice)

    def falls_back(*args, **options):
        kernels._warn("another result on a small tensor", "it works")
        return by_kernel(*args, **options)

    check(torch.device("cpu"))
    monkeypatch.setattr(kernels, choice, falls_back)
    for _ in range(2):  # also where the warning was seen before
        with pytest.raises(device.Failed, match="without its one-pass kernel, slower: another"):
            check(torch.device("cpu"))
