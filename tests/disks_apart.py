"""`python -m paceline` whose process 1 has a disk of its own, without its worker's file."""

import os
import shutil
import sys
from tempfile import TemporaryDirectory

from paceline.cli import main

if __name__ == "__main__":
    with TemporaryDirectory() as disk:
        if os.environ["RANK"] == "1":
            left = shutil.ignore_patterns("optimizer-1.pt")
            shutil.copytree(sys.argv[-1], f"{disk}/{sys.argv[-1]}", ignore=left)
            os.chdir(disk)
        sys.exit(main())
