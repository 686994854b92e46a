"""Processes that hold one process group, and run functions for tests on all ranks at once."""

import os
import traceback
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.distributed as dist

TIMEOUT = 120  # seconds, for a busy machine; a rank that fails alone leaves the other waiting


class Ranks:
    """`ranks(function, *args)` is [function(*args) on rank 0, on rank 1, ...].

    The functions must be found by name in a module, and their results be picklable.
    """

    def __init__(self, count: int, folder: Path):
        self.count, self.folder, self.pipes, self.processes = count, folder, [], []

    def start(self):
        store = str(self.folder / f"store{len(list(self.folder.iterdir()))}")
        context = get_context("spawn")
        for rank in range(self.count):
            ours, theirs = context.Pipe()
            args = (rank, self.count, store, theirs)
            self.processes.append(context.Process(target=_serve, args=args, daemon=True))
            self.pipes.append(ours)
            self.processes[-1].start()
            theirs.close()

    def __call__(self, function, *args, **kwargs):
        if not self.processes:
            self.start()
        for pipe in self.pipes:
            pipe.send((function, args, kwargs))
        results = []
        for rank, pipe in enumerate(self.pipes):
            failure = f"no answer in {TIMEOUT} s"
            if pipe.poll(TIMEOUT):
                failure, result = pipe.recv()
            if failure:
                self.close()  # the other may be waiting for this one; the next call starts anew
                raise AssertionError(f"on rank {rank}:\n{failure}")
            results.append(result)
        return results

    def close(self):
        for process in self.processes:
            process.kill()
            process.join()
        self.pipes, self.processes = [], []


def _serve(rank, count, path, pipe):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    store = dist.FileStore(path, count)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=count, timeout=timedelta(seconds=TIMEOUT)
    )
    while True:
        try:
            function, args, kwargs = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((None, function(*args, **kwargs)))
        except BaseException:
            pipe.send((traceback.format_exc(), None))
