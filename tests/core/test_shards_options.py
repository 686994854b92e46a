"""Options that must be the same on all ranks: what differs is named before ranks wait."""

import warnings

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks, join
from torch.nn import Parameter

from paceline import PACE, Pullback

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


def steps(kind, *options):
    """What is said in three steps with this rank's options, if anything."""
    dist.barrier()
    p = Parameter(torch.ones(3))
    own = options[dist.get_rank()]
    opt = PACE([p], **own) if kind == "PACE" else Pullback(torch.optim.SGD([p], lr=0.1), **own)
    said = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            p.grad = torch.ones(3)
            if said is None:
                try:
                    opt.step()
                except RuntimeError as error:
                    said = f"{error}, {p.tolist() == [1.0] * 3}"
            dist.barrier()
    return said or "".join(str(x.message) for x in caught)


GUARD, IGNORE = {"pullback": 0.1}, {"pullback": 0.1, "nonfinite": "ignore"}


@pytest.mark.parametrize(
    ("kind", "one", "other", "rank_0_has"),
    [
        ("PACE", {"pullback": 0.1, "nonfinite": "skip"}, GUARD, "nonfinite='skip'"),
        ("PACE", GUARD, {"pullback": 0.1, "nonfinite": "raise"}, "nonfinite='guard'"),
        ("PACE", {"pullback": "auto"}, GUARD, "pullback='auto'"),
        ("Pullback", {}, {"nonfinite": "ignore"}, "nonfinite='skip'"),
    ],
)
def test_ranks_that_would_wait_for_each_other_are_told(kind, one, other, rank_0_has, ranks):
    for rank, said in enumerate(ranks(steps, kind, one, other)):
        assert f"rank {1 - rank} has " in said
        assert "they would wait for each other. Nothing was changed, " in said
        waits = (one, other)[rank].get("nonfinite", kind) in ("skip", "raise", "Pullback")
        assert "True" in said or not waits  # the other may have taken a step
        assert rank_0_has in said


def test_another_pull_is_told(ranks):
    for rank, said in enumerate(ranks(steps, "PACE", GUARD, {"pullback": 0.2})):
        mine, theirs = ("0.1", "0.2")[:: 1 - 2 * rank]
        assert f"rank {1 - rank} has nonfinite='guard', pullback={theirs}" in said
        assert f"this rank nonfinite='guard', pullback={mine}" in said


@pytest.mark.parametrize("options", [GUARD, IGNORE, {"pullback": 0.1, "nonfinite": "skip"}])
def test_where_all_have_the_same_nothing_is_said(options, ranks):
    assert ranks(steps, "PACE", options, options) == ["", ""]


def steps_in_two_groups(folder, *options):
    """In a process group of all, after two of them were in one of their own."""
    rank = dist.get_rank()
    dist.destroy_process_group()
    if rank < 2:
        join(rank, 2, f"{folder}/two")
        assert steps("PACE", GUARD, GUARD) == ""
        dist.destroy_process_group()
    join(rank, 3, f"{folder}/three")
    return steps("PACE", *options)


def test_ranks_that_were_in_another_process_group_before_are_compared(tmp_path):
    ranks = Ranks(3, tmp_path)
    found = ranks(steps_in_two_groups, str(tmp_path), GUARD, GUARD, {"pullback": 0.2})
    ranks.close()
    # Each rank reads rank 0's and the next one's.
    assert ["pullback=0.2" in said for said in found] == [False, True, True]
