"""Runs of `python -m paceline.train.verify`: each a fork of this process, which has imported it.

So they start in milliseconds. A line of input is a run's arguments and its log, in JSON; the answer
is its exit status, negative for a signal.
"""

import json
import os
import sys
import traceback

from paceline.train import verify


def run(arguments: list[str], log: str) -> None:
    """Be a run, and end with it."""
    said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.argv[1:] = arguments
    status = 99
    try:
        status = verify._main()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    for line in sys.stdin:
        if child := os.fork():
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        else:
            run(*json.loads(line))
