"""Fixtures of several files of this room."""

import gc
import os

import pytest
import torch
import torch.distributed as dist
from tritons import compiled, interpreted  # noqa: F401 - fixtures


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Two processes of one process group."""
    if not dist.is_available():
        pytest.skip("torch without distributed")
    from ranks import Ranks

    made = Ranks(2, tmp_path_factory.mktemp("ranks"))
    yield made
    made.close()


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
