"""Fixtures of several files of this room."""

import os

import pytest
import torch
import torch.distributed as dist
from tritons import compiled, interpreted  # noqa: F401 - fixtures


# Of a file each: groups and meshes that tests make keep threads, which poll until the process ends.
def some_ranks(count, tmp_path_factory):
    if not dist.is_available():
        pytest.skip("torch without distributed")
    from ranks import Ranks

    made = Ranks(count, tmp_path_factory.mktemp("ranks"))
    yield made
    made.close()


def two_ranks(tmp_path_factory):
    yield from some_ranks(2, tmp_path_factory)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Three processes of one process group."""
    yield from some_ranks(3, tmp_path_factory)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """Four processes of one process group."""
    yield from some_ranks(4, tmp_path_factory)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A process with a process group of its own."""
    yield from some_ranks(1, tmp_path_factory)


# Two processes of one process group; others for the files that import DeepSpeed.
ranks = pytest.fixture(two_ranks, scope="module", name="ranks")
ranks_of_deepspeed = pytest.fixture(two_ranks, scope="module", name="ranks_of_deepspeed")


@pytest.fixture(scope="module")
def quick():
    """What takes longer than training a model this small, and decides nothing here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield
    torch.set_num_threads(threads)
