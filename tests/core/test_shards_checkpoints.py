"""Checkpoints and exports of models that two ranks share."""

import threading

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from problems import RETURNS
from sharding import advance, assert_close, assert_equal, held, net, pullback, wrapped
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from paceline import PACE, load_checkpoint, save_checkpoint

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


# ---- torch.distributed.checkpoint ------------------------------------------------------------


def second(opt):
    """The average to swap in: of several not what eval() would put in without a name."""
    return opt.returns[:2][-1]


FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def with_checkpoints_asked_for(engine, moment, asked, flat=False):
    model = wrapped(net(), engine)
    opt = PACE(model.parameters(), lr=0.05, pullback=2.0)
    if "before" not in moment:
        advance(model, opt, engine, 2)
    if "swapped" in moment:
        opt.eval()
    options = FLAT if flat else None
    if "get" in asked:
        states = get_state_dict(model, opt, options=options)
    if "set" in asked:
        set_state_dict(
            model, opt, model_state_dict=states[0], optim_state_dict=states[1], options=options
        )
    opt.train()
    if "before" in moment:
        # Other weights come in before the first step: the average begins with them.
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.5)
    advance(model, opt, engine, 3, first=2)
    return held(model, opt)


@pytest.mark.parametrize(
    ("engine", "asked", "flat"),
    [
        ("ddp", "get, set", False),
        ("fsdp", "get", False),
        ("fsdp", "get, set", False),
        ("fsdp", "get, set", True),
    ],
)
@pytest.mark.parametrize("moment", ["before", "before, swapped", "after", "swapped"])
def test_asking_for_a_checkpoint_disturbs_nothing(engine, moment, asked, flat, ranks):
    plain = ranks(with_checkpoints_asked_for, engine, moment, "")
    those = ranks(with_checkpoints_asked_for, engine, moment, asked, flat)
    for a, b in zip(plain, those, strict=True):
        assert_equal(a, b)


def made(model, kind, options):
    """PACE with these options, or a Pullback around another by the name of its options."""
    if kind == "PACE":
        return PACE(model.parameters(), lr=0.05, pullback=2.0, **options)
    return pullback(model, kind, options)


def states(model, opt):
    return dict(zip(("model", "optimizer"), get_state_dict(model, opt), strict=True))


def run_and_save(engine, folder, swapped, kind, options, dtype=torch.float32):
    """Trains, saves, trains on; what is held when it is saved, and at the end."""
    model = wrapped(net(dtype), engine)
    opt = made(model, kind, options)
    advance(model, opt, engine, 3)
    live = held(model, opt)
    if swapped:
        opt.eval(second(opt))
    dcp.save(states(model, opt), checkpoint_id=folder, no_dist=engine is None)
    opt.train()
    assert_equal(held(model, opt), live)
    advance(model, opt, engine, 2, first=3)
    return live, held(model, opt)


def load_and_go_on(engine, folder, kind, options, dtype=torch.float32):
    """Loads into other weights and options, trains on; what is held before that, and at the end."""
    model = wrapped(net(dtype), engine)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(7.0)
    opt = made(model, kind, options)
    opt.param_groups[0] |= {"lr": 9.0, "pullback": 9.0}
    state = states(model, opt)
    dcp.load(state, checkpoint_id=folder, no_dist=engine is None)
    set_state_dict(model, opt, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    opt.train()
    loaded = held(model, opt)
    advance(model, opt, engine, 2, first=3)
    return loaded, held(model, opt)


# A float32 average is exact over any number of ranks; with bfloat16 state only the gradients'
# own rounding differs, which may flip a stochastic one: a unit in the last place of 8 bits.
FORMS = {
    "float32": ({}, 1e-6),
    "bfloat16 state": ({"state_dtype": torch.bfloat16}, 2**-6),
    "lawa": ({"averaging": "lawa:window=3"}, 1e-6),
    "bema": ({"averaging": "bema"}, 1e-6),
    "returns": ({"returns": RETURNS}, 1e-6),
    "returns, bfloat16 state": ({"returns": RETURNS, "state_dtype": torch.bfloat16}, 2**-6),
}


@pytest.mark.filterwarnings("ignore:.*torch.distributed.*:UserWarning")
@pytest.mark.parametrize(
    ("engine", "swapped", "form"),
    [
        *(("fsdp", True, form) for form in FORMS),
        ("fsdp", False, "float32"),
        ("fsdp", False, "returns, bfloat16 state"),
        ("ddp", False, "float32"),
        ("ddp", True, "returns, bfloat16 state"),
    ],
)
def test_saved_on_two_ranks_and_loaded_on_one_and_the_reverse(
    engine, swapped, form, ranks, tmp_path
):
    form, close = FORMS[form]
    (live, two), *_ = ranks(run_and_save, engine, str(tmp_path / "two"), swapped, "PACE", form)
    _, one = run_and_save(None, str(tmp_path / "one"), swapped, "PACE", form)
    ends = [load_and_go_on(None, str(tmp_path / "two"), "PACE", form)]
    ends += ranks(load_and_go_on, engine, str(tmp_path / "one"), "PACE", form)
    again = ranks(load_and_go_on, engine, str(tmp_path / "two"), "PACE", form)
    for _, end in ends:
        assert_close(end, two, close, close)
        assert_close(end, one, close, close)
    for loaded, end in again:
        assert_equal(loaded, live)
        assert_equal(end, two)


@pytest.mark.filterwarnings("ignore:.*torch.distributed.*:UserWarning")
@pytest.mark.parametrize(
    ("base", "around"),
    [*(("AdamW", x) for x in ("no pull", "adam", "own", "returns")), ("SGD", "own")],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_around_another_optimizer_shards_are_saved_and_loaded(
    swapped, base, around, ranks, tmp_path
):
    folder = str(tmp_path)
    for live, two in ranks(run_and_save, "fsdp", folder, swapped, base, around):
        assert_close(load_and_go_on(None, folder, base, around)[1], two)
        for loaded, end in ranks(load_and_go_on, "fsdp", folder, base, around):
            assert_equal(loaded, live)
            assert_equal(end, two)


@pytest.mark.filterwarnings("ignore:.*(torch.distributed|view tensor).*:UserWarning")
@pytest.mark.parametrize(
    ("engine", "kind", "options", "loaded_by"),
    [
        ("fsdp", "PACE", {"returns": RETURNS}, [("fsdp", 3), ("fsdp", 2)]),
        ("fsdp", "AdamW", "returns", [("fsdp", 3), ("fsdp", 2)]),
        ("fsdp", "SGD", "own", [("fsdp", 3)]),
        ("hsdp", "PACE", {"averaging": "lawa:window=3"}, [("tp", 4)]),
        ("tp", "PACE", {"returns": RETURNS}, [("hsdp", 4), ("fsdp", 3)]),
        ("tp", "AdamW", "own", [("fsdp", 3)]),
    ],
)
def test_saved_on_four_ranks_and_loaded_on_fewer_or_by_another_layout(
    engine, kind, options, loaded_by, ranks, three, four, tmp_path
):
    dtype = torch.float64
    _, alone = run_and_save(None, str(tmp_path / "one"), True, kind, options, dtype)
    folder = str(tmp_path / "four")
    (live, _), *_ = four(run_and_save, engine, folder, True, kind, options, dtype)
    found = [load_and_go_on(None, folder, kind, options, dtype)]
    for other, count in loaded_by:
        some = {2: ranks, 3: three, 4: four}[count]
        found += some(load_and_go_on, other, folder, kind, options, dtype)
    for loaded, end in found:
        assert_equal(loaded, live)
        assert_close(end, alone, 1e-12, 1e-12)


class Waiting(dcp.FileSystemWriter):
    """Writes when it is told to."""

    def __init__(self, folder):
        super().__init__(folder)
        self.told = threading.Event()

    def write_data(self, *args):
        assert self.told.wait(60)
        return super().write_data(*args)


def go_on_while_it_is_saved(engine, folder, swapped, kind, options):
    """As `run_and_save`, but nothing is written before the last step."""
    model = wrapped(net(), engine)
    opt = made(model, kind, options)
    own = dist.new_group(backend="gloo")  # or its messages would come between those of training
    advance(model, opt, engine, 3)
    live = held(model, opt)
    if swapped:
        opt.eval(second(opt))
    writer = Waiting(folder)
    saving = dcp.async_save(states(model, opt), storage_writer=writer, process_group=own)
    opt.train()
    assert_equal(held(model, opt), live)
    advance(model, opt, engine, 2, first=3)
    end = held(model, opt)
    opt.eval()
    assert not saving.done()
    writer.told.set()
    saving.result()
    opt.train()
    assert_equal(held(model, opt), end)
    return live, end


@pytest.mark.filterwarnings("ignore:.*torch.distributed.*:UserWarning")
@pytest.mark.parametrize(
    ("engine", "kind", "options", "swapped"),
    [
        ("fsdp", "PACE", {"returns": RETURNS}, True),
        ("fsdp", "PACE", {"state_dtype": torch.bfloat16}, False),
        ("ddp", "PACE", {}, True),
        ("fsdp", "AdamW", "returns", True),
        ("ddp", "SGD", "own", False),
    ],
)
def test_training_goes_on_while_a_checkpoint_is_written(
    engine, kind, options, swapped, ranks, tmp_path
):
    folder = str(tmp_path)
    saved = ranks(go_on_while_it_is_saved, engine, folder, swapped, kind, options)
    for mine, again in zip(
        saved, ranks(load_and_go_on, engine, folder, kind, options), strict=True
    ):
        for before, after in zip(mine, again, strict=True):
            assert_equal(after, before)


def whole_state_into_shards(state):
    model = wrapped(net(), "fsdp")
    with pytest.raises(ValueError, match="'average' is a whole tensor.*set_optimizer_state_dict"):
        pullback(model, "SGD", "own").load_state_dict(state)


def test_around_another_optimizer_a_whole_average_is_not_loaded_into_a_shard(ranks):
    model = net()
    opt = pullback(model, "SGD", "own")
    advance(model, opt, None, 1)
    ranks(whole_state_into_shards, opt.state_dict())


# ---- exports ---------------------------------------------------------------------------------


def export(engine, swapped, name):
    model = wrapped(net(), engine)
    opt = PACE(model.parameters(), lr=0.05, pullback=2.0, returns=RETURNS)
    advance(model, opt, engine, 3)
    before = held(model, opt)
    if swapped:
        opt.eval(swapped)
    exported = opt.averaged_state_dict(model, name)
    opt.train()
    assert_equal(held(model, opt), before)
    key = "average" if name == "average" else f"return_{name or 'slow'}"
    return exported, [state[key] for state in before[1]]


@pytest.mark.parametrize("name", [None, "mean", "average"])
@pytest.mark.parametrize("swapped", [None, "mean", "average"])
def test_an_export_gathers_whole_averages_on_the_first_rank(swapped, name, ranks):
    (exported, averages), (other, _) = ranks(export, "fsdp", swapped, name)
    assert other == {}
    assert list(exported) == list(net().state_dict())
    for x, average in zip(exported.values(), averages, strict=True):
        assert type(x) is torch.Tensor
        assert torch.equal(x, average)
    net().load_state_dict(exported)


def test_under_ddp_every_rank_can_export(ranks):
    for exported, averages in ranks(export, "ddp", None, "mean"):
        assert list(exported) == [f"module.{name}" for name in net().state_dict()]
        for x, average in zip(exported.values(), averages, strict=True):
            assert torch.equal(x, average)


def load_a_whole_checkpoint(state):
    model = wrapped(net(), "fsdp")
    with pytest.raises(ValueError, match="'average' is a whole tensor.*set_optimizer_state_dict"):
        PACE(model.parameters(), pullback=1.0).load_state_dict(state)


def test_a_whole_tensor_is_not_loaded_into_a_shard(ranks):
    model = net()
    opt = PACE(model.parameters(), pullback=1.0)
    advance(model, opt, None, 1)
    ranks(load_a_whole_checkpoint, opt.state_dict())


# ---- save_checkpoint ---------------------------------------------------------------------------


def saves_on_one_path(path):
    """Save at the same moment, some times: what is there is whole all the while."""
    model = wrapped(net(), "ddp")
    opt = PACE(model.parameters(), lr=0.05, pullback=2.0)
    advance(model, opt, "ddp", 1)
    for step in range(10):
        dist.barrier()
        save_checkpoint(path, model, opt, step=step)
        assert load_checkpoint(path, model, opt)["step"] in (step, step + 1)


def test_ranks_that_save_on_one_path_leave_one_file(ranks, tmp_path):
    ranks(saves_on_one_path, tmp_path / "run.pt")
    assert [file.name for file in tmp_path.iterdir()] == ["run.pt"]
