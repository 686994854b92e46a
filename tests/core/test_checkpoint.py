"""Checkpoint files: exact, and whole or not there."""

import copy
import enum
import io
import os
import random
import re
import subprocess
import sys
import time
import zipfile
from collections import Counter, OrderedDict, defaultdict, namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from problems import RETURNS, advance, assert_same, problem, same, snapshot

from paceline import PACE, load_checkpoint, save_checkpoint
from paceline.testing import SCHEDULERS

# ---- killed at any moment --------------------------------------------------------------------


@pytest.fixture
def run():
    """run(folder, seconds, fatal): the exit status of tests/killed.py, killed after so long."""
    script = str(Path(__file__).parents[1] / "killed.py")
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, script], stdin=pipe, stdout=pipe, text=True) as server:
        assert server.stdout.readline() == "ready\n"

        def run(folder, seconds=1000.0, fatal=""):
            server.stdin.write(f"{folder} {seconds} {fatal}\n")
            server.stdin.flush()
            return int(server.stdout.readline())

        yield run
        server.stdin.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_killed_at_twenty_moments_a_run_ends_as_if_it_had_not_been(run, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    start = time.monotonic()
    assert run(whole) == 0
    seconds = time.monotonic() - start
    moments = random.Random(0)
    in_a_save = ["writing", "synced", "renaming"] * 2
    kills = [(moments.uniform(0, 0.1) * seconds, "") for _ in range(14)]
    kills += [(1000.0, point) for point in in_a_save]
    moments.shuffle(kills)
    partial, reached = 0, {0}

    def check_the_end():
        assert same(*(torch.load(folder / "end.pt") for folder in (whole, killed)))
        assert not list(killed.glob(".*"))

    while kills:
        if run(killed, *kills[-1]) == 0:  # done before that moment came: once more from the start
            check_the_end()
            (killed / "run.pt").unlink()
            continue
        kills.pop()
        left = list(killed.glob(".run.pt.*.partial/whole"))
        assert len(left) < 2  # each run removes what kills have left
        partial += len(left)
        if (killed / "run.pt").exists():
            reached.add(torch.load(killed / "run.pt", weights_only=True)["values"]["step"])
    assert partial >= len(in_a_save)
    assert len(reached) > 8  # it went on between the kills
    assert run(killed) == 0
    check_the_end()


# ---- save_checkpoint -------------------------------------------------------------------------


@pytest.mark.parametrize("returns", [None, RETURNS])
def test_a_file_holds_live_weights_whatever_the_moment(returns, tmp_path):
    model, generator = problem(torch.bfloat16)
    opt = PACE(model.parameters(), lr=0.05, pullback=0.3, returns=returns)
    advance(model, opt, generator, 5)
    live = snapshot(model, opt)
    save_checkpoint(tmp_path / "live.pt", model, opt, step=5)
    opt.eval(opt.returns[:2][-1])  # which is still in the model after the save
    swapped = snapshot(model, opt)
    save_checkpoint(tmp_path / "averaged.pt", model, opt, step=5)
    assert opt.swapped
    assert_same(snapshot(model, opt), swapped)
    for name in ("live.pt", "averaged.pt"):
        other, _ = problem(torch.bfloat16, seed=2)
        resumed = PACE(other.parameters(), pullback=1.0)
        assert load_checkpoint(tmp_path / name, other, resumed) == {"step": 5}
        assert not resumed.swapped
        assert_same(snapshot(other, resumed), live)


def test_a_save_that_fails_leaves_the_file_before_it_and_the_mode(tmp_path, monkeypatch):
    model, generator = problem()
    opt = PACE(model.parameters(), lr=0.05, pullback=0.3)
    advance(model, opt, generator, 2)
    save_checkpoint(tmp_path / "run.pt", model, opt)
    before = (tmp_path / "run.pt").read_bytes()
    opt.eval()
    swapped = snapshot(model, opt)

    def full(run, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left on device: '.*run.pt'"):
        save_checkpoint(tmp_path / "run.pt", model, opt)
    assert [file.name for file in tmp_path.iterdir()] == ["run.pt"]
    assert (tmp_path / "run.pt").read_bytes() == before
    assert_same(snapshot(model, opt), swapped)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_what_schedulers_and_numpy_leave_is_read_back(name, tmp_path):
    model, generator = problem()
    opt = PACE(model.parameters(), lr=0.05, pullback=0.3)
    schedule = SCHEDULERS[name](opt)
    advance(model, opt, generator, 3)
    schedule.step(*([np.float32(1.0)] if name == "ReduceLROnPlateau" else []))
    opt.param_groups[0]["lr"] = np.float64(0.125)  # as LambdaLR has it from np.cos
    saved = torch.load(io_of(opt.state_dict()), weights_only=True)
    assert type(saved["param_groups"][0]["lr"]) is float
    values = {
        "loss": np.float32(0.5),
        "step": np.int64(3),
        "done": np.bool_(True),
        "seen": (1, [2]),
    }
    save_checkpoint(tmp_path / "run.pt", model, opt, schedule=schedule, **values)
    other, _ = problem(seed=2)
    resumed = PACE(other.parameters(), lr=0.05, pullback=0.3)
    again = SCHEDULERS[name](resumed)
    assert load_checkpoint(tmp_path / "run.pt", other, resumed, schedule=again) == values
    kinds = [{k: type(x) for k, x in each.state_dict().items()} for each in (again, schedule)]
    assert kinds[0] == kinds[1]
    assert resumed.param_groups[0]["lr"] == 0.125


def io_of(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def test_what_could_not_be_read_back_is_not_written(tmp_path):
    model, _ = problem()
    opt = PACE(model.parameters(), pullback=0.3)
    save_checkpoint(tmp_path / "run.pt", model, opt, step=1)
    before = (tmp_path / "run.pt").read_bytes()
    with pytest.raises(ValueError, match="part 'sampler' holds a Random; a checkpoint takes"):
        save_checkpoint(tmp_path / "run.pt", model, opt, sampler=[random.Random(0)])
    assert (tmp_path / "run.pt").read_bytes() == before


@pytest.mark.parametrize("swapped", [False, True])
def test_a_file_of_another_model_changes_nothing(swapped, tmp_path):
    model, generator = problem()
    opt = PACE(model.parameters(), pullback=0.3)
    advance(model, opt, generator, 2)
    renamed = torch.nn.ModuleDict({"inner": model})
    save_checkpoint(tmp_path / "run.pt", renamed, opt)
    other, stream = problem(seed=1)
    theirs = PACE(other.parameters(), lr=0.1, pullback=0.5)
    advance(other, theirs, stream, 3)
    if swapped:
        theirs.eval()
    before = snapshot(other, theirs)
    with pytest.raises(ValueError, match=r"of another model: '0.bias' is not in the file"):
        load_checkpoint(tmp_path / "run.pt", other, theirs)
    assert_same(snapshot(other, theirs), before)
    assert (theirs.swapped, theirs.param_groups[0]["lr"]) == (swapped, 0.1)


def test_parts_are_restored_and_must_be_those_that_were_saved(tmp_path):
    model, generator = problem()
    opt = PACE(model.parameters(), lr=0.05, pullback=0.3)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 2)
    advance(model, opt, generator, 3)
    schedule.step()
    path = tmp_path / "run.pt"
    save_checkpoint(path, model, opt, schedule=schedule, data=generator, seen={"tokens": 12})
    drawn = [torch.rand(1), random.random(), np.random.rand(), torch.rand(1, generator=generator)]
    other, stream = problem(seed=1)
    resumed = PACE(other.parameters(), pullback=0.0)
    after = torch.optim.lr_scheduler.StepLR(resumed, 7)
    with pytest.raises(ValueError, match=r"has the parts \['data', 'schedule'\], got \['data'\]"):
        load_checkpoint(path, other, resumed, data=stream)
    assert not resumed.state
    values = load_checkpoint(path, other, resumed, schedule=after, data=stream)
    assert values == {"seen": {"tokens": 12}}
    assert after.state_dict() == schedule.state_dict()
    again = [torch.rand(1), random.random(), np.random.rand(), torch.rand(1, generator=stream)]
    assert same(again, drawn)


def test_a_file_of_something_else_is_refused(tmp_path):
    model, _ = problem()
    opt = PACE(model.parameters(), pullback=0.0)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model.pt' was not written by save_checkpoint"):
        load_checkpoint(tmp_path / "model.pt", model, opt)
    for content in (b"", b"hello world", b"PK\x03\x04 and no more"):
        (tmp_path / "broken.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"broken.pt' cannot be read: "):
            load_checkpoint(tmp_path / "broken.pt", model, opt)
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "none.pt", model, opt)


# ---- the path ----------------------------------------------------------------------------------


def one_step(tmp_path, **parts):
    """A model and its optimizer after two steps, and their file."""
    model, generator = problem()
    opt = PACE(model.parameters(), lr=0.05, pullback=0.3)
    advance(model, opt, generator, 2)
    save_checkpoint(tmp_path / "run.pt", model, opt, **parts)
    return model, opt, tmp_path / "run.pt"


@pytest.mark.skipif(os.name != "posix", reason="devices of POSIX")
def test_what_is_no_file_is_neither_replaced_nor_read(tmp_path):
    model, opt, path = one_step(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    os.mkfifo(tmp_path / "fifo")
    refused = {
        tmp_path / "folder": "Is a directory: '.*folder'",
        tmp_path / "link": "Is a directory: '.*link'",
        tmp_path / "fifo": "Not a regular file: '.*fifo'",
        tmp_path / "none" / "run.pt": "No such file or directory: '.*none",
        path / "run.pt": "Not a directory: '.*run.pt/run.pt'",
    }
    for wrong, message in refused.items():
        with pytest.raises(OSError, match=message):
            save_checkpoint(wrong, model, opt)
        with pytest.raises(OSError, match=message):
            load_checkpoint(wrong, model, opt)
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to(path)
    path.chmod(0o600)
    save_checkpoint(tmp_path / "link", model, opt, step=3)
    assert (tmp_path / "link").is_symlink()
    assert load_checkpoint(path, model, opt) == {"step": 3}
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_full_disk_is_an_oserror_that_says_so(tmp_path):
    model, opt, path = one_step(tmp_path)
    before = path.read_bytes()
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (10, 1000, len(before) - 100):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(OSError, match="File too large: '.*run.pt'"):
                save_checkpoint(path, model, opt)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert [file.name for file in tmp_path.iterdir()] == ["run.pt"]
        assert path.read_bytes() == before


# ---- what is in the file -----------------------------------------------------------------------


@pytest.mark.parametrize(("place", "bit"), [(24, 0x08), (38, 0x10)], ids=["size", "folder"])
def test_a_bit_in_the_directory_of_the_file_is_found(place, bit, tmp_path):
    """There is no check sum of it, and torch goes by it: it would read what nobody wrote."""
    model, opt, path = one_step(tmp_path)
    before = path.read_bytes()
    entries = [x.start() for x in re.finditer(rb"PK\x01\x02", before)]
    assert len(entries) > 10
    for entry in entries:
        at = entry + place
        path.write_bytes(before[:at] + bytes([before[at] ^ bit]) + before[at + 1 :])
        with pytest.raises(ValueError, match="it is damaged"):
            load_checkpoint(path, model, opt)
    path.write_bytes(before)
    load_checkpoint(path, model, opt)


def test_a_flipped_bit_is_found(tmp_path):
    torch.serialization.set_crc32_options(False)  # as a program may have it for other files
    try:
        model, opt, path = one_step(tmp_path, note="text" * 40)
    finally:
        torch.serialization.set_crc32_options(True)
    before, right = path.read_bytes(), snapshot(model, opt)
    moments, found = random.Random(0), 0
    for _ in range(300):
        at = moments.randrange(len(before))
        path.write_bytes(before[:at] + bytes([before[at] ^ 1 << at % 8]) + before[at + 1 :])
        other, _ = problem(seed=1)
        resumed = PACE(other.parameters(), pullback=0.0)
        try:
            load_checkpoint(path, other, resumed)
        except ValueError as error:
            assert re.match(r"'.*run.pt' .*damaged", str(error))  # noqa: PT017
            assert not resumed.state
            found += 1
        else:  # where nothing is kept
            assert_same(snapshot(other, resumed), right)
    assert found > 100


@pytest.mark.parametrize("kind", ["cut", "compressed", "legacy"])
def test_a_file_in_another_form_is_refused(kind, tmp_path):
    model, opt, path = one_step(tmp_path)
    run = torch.load(path)
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif kind == "legacy":  # of torch before 1.6, without check sums
        torch.save(run, path, _use_new_zipfile_serialization=False)
    else:  # which might be of any length
        with zipfile.ZipFile(path) as old:
            content = {name: old.read(name) for name in old.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
            for name, data in content.items():
                new.writestr(name, data)
    with pytest.raises(ValueError, match=r"run.pt' cannot be read: .* damaged"):
        load_checkpoint(path, model, opt)


class Level(enum.IntEnum):
    HIGH = 3


def extended(base, value):
    return type(f"My{base.__name__}", (base,), {})(value)


UNREADABLE = {
    "an enum": (Level.HIGH, "a Level; .*: sampler"),
    "a key": ({"a": [{Level.HIGH: 1}]}, r"a Level; .*: the key of sampler\['a'\]\[0\]\["),
    "str": ([1, {"x": extended(str, "text")}], r"a Mystr; .*: sampler\[1\]\['x'\]"),
    "float": ((extended(float, 0.5),), r"a Myfloat; .*: sampler\[0\]"),
    "int": (extended(int, 1), "a Myint"),
    "dict": ({1: defaultdict(list)}, r"a defaultdict; .*: sampler\[1\]"),
    "list": (extended(list, [1]), "a Mylist"),
    "tuple": (namedtuple("Pair", "a b")(1, 2), "a Pair"),
    "huge": ({"n": 1 << 3000}, r"a int; .*: sampler\['n'\]"),
    "no bytes": ([b""], r"a bytes; .*: sampler\[0\]"),
    "a function": (len, "a builtin_function_or_method"),
    "a set of such": ({Level.HIGH}, "a set"),
    "attributes": (torch.ones(1), r"a Tensor; .*: sampler"),
    "long double": (np.longdouble(1), "a longdouble"),
    "uint4": ([torch.empty(2, dtype=torch.uint4)], r"a Tensor of torch.uint4; .*: sampler\[0\]$"),
    "a date": (np.datetime64("2020-01-01"), "a date"),
}
UNREADABLE["attributes"][0].of = random.Random(0)


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_could_not_be_read_back_is_named_and_not_written(kind, tmp_path):
    value, message = UNREADABLE[kind]
    model, opt, path = one_step(tmp_path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"part 'sampler' holds {message}"):
        save_checkpoint(path, model, opt, sampler=value)
    assert path.read_bytes() == before


def test_what_is_read_back_is_the_same(tmp_path):
    values = {
        "numbers": [True, -(2**63), 2**63, 2**2000, 0.1, float("inf"), 1j, np.float64(0.5)],
        "texts": ["", "\ud800", b"\x00\xff"],
        "kinds": [torch.float8_e4m3fn, torch.device("cpu"), torch.Size([2]), {1}, (), [], {}, None],
        "dicts": [OrderedDict(b=1, a=2), Counter("aab"), {(1, "x"): 1, None: 2}],
        "tensors": [torch.ones(2, dtype=torch.uint16), torch.eye(2).to_sparse(), torch.ones(0)],
    }
    model, opt, path = one_step(tmp_path, **values)
    read = load_checkpoint(path, model, opt)
    values["tensors"][1] = values["tensors"][1].to_dense()
    read["tensors"][1] = read["tensors"][1].to_dense()
    assert same(read, values)
    assert [list(map(type, x)) for x in read.values()] == [
        [float if type(x) is np.float64 else type(x) for x in values[key]] for key in read
    ]


def test_what_is_shared_is_visited_once_and_stays_shared(tmp_path):
    shared = [1, torch.ones(2)]
    for _ in range(60):  # 2^60 visits one by one
        shared = [shared, {"again": shared}]
    model, opt, path = one_step(tmp_path, shared=shared)
    read = load_checkpoint(path, model, opt)["shared"]
    assert read[0] is read[1]["again"]


def test_a_path_may_be_bytes(tmp_path):
    model, opt, path = one_step(tmp_path)
    save_checkpoint(os.fsencode(path), model, opt, step=5)
    assert load_checkpoint(os.fsencode(path), model, opt) == {"step": 5}


def test_a_part_that_holds_itself_is_refused(tmp_path):
    cyclic, deep = {}, []
    cyclic["self"] = [cyclic]
    for _ in range(5000):
        deep = [deep]
    for part in (cyclic, deep):
        model, opt, path = one_step(tmp_path)
        with pytest.raises(ValueError, match="part 'queue' holds itself, or is nested too deeply"):
            save_checkpoint(path, model, opt, queue=part)
        load_checkpoint(path, model, opt)


class Extra(torch.nn.Linear):
    """A module with an extra state."""

    extra = ()

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        if state == "refused":
            raise KeyError(state)
        self.extra = state


def test_an_extra_state_is_kept_with_the_versions_or_refused(tmp_path):
    model = torch.nn.Sequential(Extra(2, 2), torch.nn.BatchNorm1d(2))
    opt = PACE(model.parameters(), pullback=0.3)
    model[0].extra = {"scale": np.float32(0.5)}
    save_checkpoint(tmp_path / "run.pt", model, opt)
    assert torch.load(tmp_path / "run.pt")["model"]._metadata["1"] == {"version": 2}
    model[0].extra = None
    load_checkpoint(tmp_path / "run.pt", model, opt)
    assert model[0].extra == {"scale": 0.5}
    model[0].extra = {"level": Level.HIGH}
    says = r"part 'model' holds a Level; .*: model\['0._extra_state'\]\['level'\]"
    with pytest.raises(ValueError, match=says):
        save_checkpoint(tmp_path / "run.pt", model, opt)


# ---- contents that are not what they should be -------------------------------------------------


class Refusing:
    """A part that changes before it refuses."""

    def __init__(self):
        self.state = {"position": 1}

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state["position"] = -1
        self.state = {"position": state["position"] + 0}


def wrong(path, *keys, value):
    """Change one thing in a file, by its keys; `del` takes it away."""
    run = torch.load(path)
    place = run
    for key in keys[:-1]:
        place = place[key]
    if value == "del":
        del place[keys[-1]]
    else:
        place[keys[-1]] = value
    torch.save(run, path)


NOTHING = [None, [], "text", 3, torch.ones(2)]
EXTRA = "4._extra_state"
WRONG = {
    **{f"{key}={x!r:.7}": ((key,), x, "was not written by save_checkpoint")
       for key in ("model", "optimizer", "random", "states", "values") for x in NOTHING},
    "no model": (("model",), "del", "was not written by save_checkpoint"),
    "weights of ints": (("model", "0.bias"), torch.ones(5).long(), "'0.bias' is torch.int64"),
    "wider weights": (("model", "0.bias"), torch.ones(5).double(), "'0.bias' is torch.float64"),
    "a shape": (("model", "0.bias"), torch.ones(4), r"'0.bias' is torch.float32 of shape \(4,\)"),
    "a list": (("model", "0.bias"), [1.0] * 5, "'0.bias' is extra state in the file"),
    "no data": (("model", "0.bias"), torch.ones(5, device="meta"), "'0.bias' is .*without data"),
    "sparse": (("model", "0.bias"), torch.ones(5).to_sparse(), "'0.bias' is .*torch.sparse_coo"),
    "a key": (("model", 7), torch.ones(5), "7 is torch.float32"),
    "no weight": (("model", "0.bias"), "del", "'0.bias' is not in the file"),
    "extra state": (("model", EXTRA), "refused", "model cannot be loaded: KeyError: 'refused'"),
    "no state": (("states", "reader"), {}, "part 'reader' cannot be loaded: KeyError: 'position'"),
    "part": (("states", "reader"), [], "part 'reader' cannot be loaded: its state is a list"),
    "part's": (("states", "reader", "position"), "x", "'reader' cannot be loaded: TypeError"),
    "generator": (("states", "order"), torch.ones(3), "part 'order' cannot be loaded: TypeError"),
    "fewer parts": (("states", "order"), "del", r"has the parts \['reader'\]"),
    "more parts": (("states", 3), {}, r"has the parts \['3', 'order', 'reader'\]"),
    "torch's": (("random", "torch"), torch.ones(3), "random states cannot be loaded: TypeError"),
    "Python's": (("random", "python"), (3, (1,), None), "random states cannot be loaded: state"),
    "NumPy's": (("random", "numpy"), ("MT19937", [0] * 624, 10**9, 0, 0.0), "random states"),
    "no state of torch": (("random", "torch"), "del", "random states cannot be loaded: KeyError"),
    "groups": (("optimizer", "param_groups"), None, "optimizer cannot be loaded: 'param_groups'"),
    "a count": (("optimizer", "state", 0, "step"), torch.tensor(-5.0), "'step' must be .* got -5"),
}  # fmt: skip


def holder(seed):
    model, generator = problem(seed=seed)
    model.append(Extra(2, 2))
    opt = PACE(model.parameters(), lr=0.05, pullback=0.3)
    advance(model, opt, generator, 1 + seed)
    return model, opt, {"reader": Refusing(), "order": generator}


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("kind", WRONG)
def test_malformed_contents_change_nothing(kind, swapped, tmp_path):
    keys, value, message = WRONG[kind]
    model, opt, parts = holder(0)
    model[-1].extra = {"scale": 1.0}
    save_checkpoint(tmp_path / "run.pt", model, opt, **parts)
    wrong(tmp_path / "run.pt", *keys, value=value)
    model, opt, parts = holder(1)
    if swapped:
        opt.eval()

    def everything():
        own = parts["reader"].state, parts["order"].get_state(), model[-1].extra
        others = torch.get_rng_state(), random.getstate(), np.random.get_state()[2]
        return copy.deepcopy((snapshot(model, opt), own, others, opt.param_groups[0]["swapped"]))

    before = everything()
    with pytest.raises(ValueError, match=rf"^'.*run.pt'.*{message}") as error:
        load_checkpoint(tmp_path / "run.pt", model, opt, **parts)
    assert len(str(error.value).splitlines()) == 1
    assert same(everything(), before)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_model_that_refuses_its_weights_is_as_before_and_so_is_all_else(moment, tmp_path):
    model, opt, parts = holder(0)
    save_checkpoint(tmp_path / "run.pt", model, opt, **parts)
    model, opt, parts = holder(1)

    def refuse(*_):
        raise RuntimeError("not this one\nof all")

    if moment == "before":
        model.register_load_state_dict_pre_hook(refuse)
    else:
        model[0].register_load_state_dict_post_hook(refuse)
    before = copy.deepcopy((snapshot(model, opt), parts["reader"].state))
    with pytest.raises(ValueError, match=r"model cannot be loaded: RuntimeError: not this one$"):
        load_checkpoint(tmp_path / "run.pt", model, opt, **parts)
    assert same((snapshot(model, opt), parts["reader"].state), before)


def test_an_optimizer_of_torch_that_refuses_is_as_before(tmp_path):
    model, generator = problem()
    opt = torch.optim.AdamW(model.parameters(), lr=0.05)
    advance(model, opt, generator, 2)
    save_checkpoint(tmp_path / "run.pt", model, opt, order=generator)
    wrong(tmp_path / "run.pt", "optimizer", "state", 0, "step", value="del")
    advance(model, opt, generator, 1)
    before, at = snapshot(model, opt), generator.get_state()
    with pytest.raises(ValueError, match="optimizer cannot be loaded: KeyError: 'step'"):
        load_checkpoint(tmp_path / "run.pt", model, opt, order=generator)
    assert_same(snapshot(model, opt), before)
    assert torch.equal(generator.get_state(), at)


def test_a_run_with_an_average_is_not_loaded_into_an_optimizer_without(tmp_path):
    model, generator = problem()
    opt = PACE(model.parameters(), lr=0.05)
    advance(model, opt, generator, 2)
    save_checkpoint(tmp_path / "run.pt", model, opt)
    other = torch.optim.AdamW(model.parameters(), lr=0.05)
    before = snapshot(model, other)
    with pytest.raises(ValueError, match="PACE or Pullback; AdamW would drop the average and the"):
        load_checkpoint(tmp_path / "run.pt", model, other)
    assert_same(snapshot(model, other), before)


# ---- wrappers ----------------------------------------------------------------------------------


def test_live_weights_through_any_wrappers(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)

    def prepared(seed):
        model, generator = problem(seed=seed)
        opt = PACE(model.parameters(), lr=0.05, pullback=0.3)
        model, opt = accelerator.prepare(model, opt)
        return model, accelerate.optimizer.AcceleratedOptimizer(opt), generator

    model, opt, generator = prepared(0)
    advance(model, opt, generator, 3)
    live = snapshot(model, opt)
    opt.eval()
    swapped = snapshot(model, opt)
    save_checkpoint(tmp_path / "run.pt", model, opt)
    assert_same(snapshot(model, opt), swapped)
    other, resumed, _ = prepared(1)
    load_checkpoint(tmp_path / "run.pt", other, resumed)
    assert_same(snapshot(other, resumed), live)
    assert not resumed.optimizer.optimizer.swapped
