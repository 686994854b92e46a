"""Fixtures of several files of this room."""

import gc
import os

import pytest
import torch
import torch.distributed as dist
from tritons import compiled, interpreted  # noqa: F401 - fixtures


def two_ranks(tmp_path_factory):
    if not dist.is_available():
        pytest.skip("torch without distributed")
    from ranks import Ranks

    made = Ranks(2, tmp_path_factory.mktemp("ranks"))
    yield made
    made.close()


# Two processes of one process group, for all files or for one.
ranks = pytest.fixture(two_ranks, scope="session", name="ranks")
ranks_of_this_file = pytest.fixture(two_ranks, scope="module", name="ranks_of_this_file")


@pytest.fixture(scope="module")
def quick():
    """What takes longer than training a model this small, and decides nothing here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()  # the Trainer collects garbage at each start, over all that is imported
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield
    gc.unfreeze()
    torch.set_num_threads(threads)
