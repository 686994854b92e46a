"""The command, and what a folder holds, for the tests of merging."""

from paceline.cli import main


def average(*arguments, status=0):
    assert main(["average", *map(str, arguments)]) == status


def tree(folder):
    """All that is there, and what is in it."""
    return {p: p.is_file() and p.read_bytes() for p in folder.rglob("*")}
