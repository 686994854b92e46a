"""`python -m paceline` whose accelerate takes processes on the CPU for ones that FSDP is for."""

import sys
from unittest import mock

from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from paceline.cli import main
from paceline.train import build


def as_accelerators(made, *args, _init=AcceleratorState.__init__, **kwargs):
    # It has FSDP for every kind of several processes but those on CPUs.
    if not AcceleratorState._shared_state:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    _init(made, *args, **kwargs)


if __name__ == "__main__":
    with (
        mock.patch.object(build, "check_fsdp"),
        mock.patch.object(AcceleratorState, "__init__", as_accelerators),
    ):
        sys.exit(main())
