"""A shipped recipe, and what a folder holds, for the tests of recipes and commands."""

from paceline.train.recipe import Recipe, read_recipe


def contents(folder):
    return {p: p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def shipped_recipe(name):
    return Recipe(**read_recipe(name))
