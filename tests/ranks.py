"""Processes that hold one process group, and run functions for tests on all ranks at once."""

import faulthandler
import os
import signal
import time
import traceback
from contextlib import suppress
from datetime import timedelta
from multiprocessing import get_all_start_methods, get_context
from multiprocessing.connection import wait
from pathlib import Path

import torch
import torch.distributed as dist

TIMEOUT = 120  # seconds, for a busy machine; a rank that fails alone leaves the other waiting
METHOD = "forkserver" if "forkserver" in get_all_start_methods() else "spawn"
IMPORTED = ["torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict"]


class Ranks:
    """`ranks(function, *args)` is [function(*args) on rank 0, on rank 1, ...].

    The functions must be found by name in a module, and their results be picklable.
    """

    def __init__(self, count: int, folder: Path):
        self.count, self.folder, self.pipes, self.processes = count, folder, [], []

    def start(self):
        store = str(self.folder / f"store{len(list(self.folder.iterdir()))}")
        context = get_context(METHOD)
        if METHOD == "forkserver":
            context.set_forkserver_preload(IMPORTED)
        for rank in range(self.count):
            ours, theirs = context.Pipe()
            args = (rank, self.count, store, theirs)
            self.processes.append(context.Process(target=_serve, args=args, daemon=True))
            self.pipes.append(ours)
            self.processes[-1].start()
            theirs.close()

    def __call__(self, function, *args, last=False, **kwargs):
        """A last call ends every process; the result of one that ends itself is None then.

        Results of a last call hold no tensors, for these are read from the process's memory.
        """
        if not self.processes:
            self.start()
        for pipe in self.pipes:
            pipe.send((function, args, kwargs, last))
        waiting, results = dict(zip(self.pipes, range(self.count), strict=True)), {}
        while waiting:
            ready = wait(waiting, TIMEOUT)
            failures = [] if ready else [f"no answer in {TIMEOUT} s\n{self.stacks()}"]
            for pipe in ready:
                rank, failure = waiting.pop(pipe), None
                try:
                    failure, results[rank] = pipe.recv()
                except EOFError:
                    results[rank] = None
                    failure = None if last else "the process has ended"
                if failure:
                    failures.append(f"on rank {rank}:\n{failure}")
            if failures:
                self.close()  # others may be waiting for these; the next call starts anew
                raise AssertionError("\n".join(failures))
        if last:
            self.close()  # the next call starts anew
        return [results[rank] for rank in range(self.count)]

    def stacks(self):
        """Where each rank is, in all of its threads."""
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGUSR1)
        time.sleep(1)
        paths = [_stack(self.folder, process.pid) for process in self.processes]
        return "\n".join(f"{path.name}:\n{path.read_text()}" for path in paths)

    def close(self):
        for process in self.processes:
            process.kill()
            process.join()
        self.pipes, self.processes = [], []


def _stack(folder, pid):
    return folder / f"stack of process {pid}"


def _serve(rank, count, path, pipe):
    faulthandler.register(
        signal.SIGUSR1, _stack(Path(path).parent, os.getpid()).open("w"), all_threads=True
    )
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    join(rank, count, path)
    while True:
        try:
            function, args, kwargs, last = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((None, function(*args, **kwargs)))
        except BaseException:
            pipe.send((traceback.format_exc(), None))
        if last:
            os._exit(0)  # at once, as a process does that an error ends: its connections close


def join(rank, count, path):
    """Be a rank of the default process group, which meets by a file."""
    store, timeout = dist.FileStore(path, count), timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=timeout)
