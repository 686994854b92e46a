"""Folders of runs for the tests of `paceline report`."""

import html.parser
import itertools
import json

from paceline.train.methods import parse_method
from paceline.train.recipe import Recipe, read_recipe

STEPS = (0, 50, 100)


def rows_of(text, lr, seed, losses, *, setting=None, selection=None, trained_with=None):
    """A run's rows as sweeps write them; losses: (live, returned) at STEPS, None for diverged."""
    method = parse_method(text, lr=lr, pullback=1.0, kappa=0.3, twin_gain=1.0)
    run = f"{method.label} lr={lr:g} seed={seed} {setting}"
    rows = []
    for step, (live, returned) in zip(STEPS, losses, strict=False):
        row = {"run": run, "label": method.label, **method.row, "seed": seed}
        row |= {"trained_with": trained_with or run, "seconds": 1.0, "train_loss": live}
        row |= {"step": step, "tokens": step * 128, "live_loss": live, "returned_loss": returned}
        if method.name == "pace":
            row |= {"gain_mean": 0.25 + step / 1000, "clipped": 0.5}
        if setting is not None:
            row |= {"setting": setting, "steps": STEPS[-1], "selection_loss": selection}
        rows.append(row)
    return rows


def ending(live, returned):
    return [(4.0, 4.0), (live + 0.5, returned + 0.5), (live, returned)]


def write(folder, rows, **manifest):
    folder.mkdir(parents=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


FACTS = {
    "command": "paceline sweep tiny --seeds 0,1",
    "started": "2026-11-22T10:00:00+00:00",
    "versions": {"paceline": "0.1.0", "torch": "2.13.0"},
    "hardware": {"cpu": "one", "cores": 2},
}


def write_sweep(folder, seeds=(0, 1), extra=()):
    """Two settings; pace over c, κ and rate, with a diverged corner; adamw; an ema of adamw."""
    rows = list(extra)
    for number, setting in enumerate(("tiny-sft on smol", "tiny-pretrain on nano")):
        for lr, seed in itertools.product((0.003, 0.01), seeds):
            base = 2.0 + number + 10 * lr + seed / 100
            adamw = rows_of("adamw", lr, seed, ending(base, base), setting=setting, selection=base)
            rows += adamw
            rows += rows_of(
                "ema",
                lr,
                seed,
                ending(base, base - 0.1),
                setting=setting,
                selection=base - 0.1,
                trained_with=adamw[0]["run"],
            )
            for c, kappa in itertools.product((1, 10), (0.3, 0.7)):
                end = base - 0.05 * c * kappa * (1 + seed)
                losses = ending(base, end)
                if c == 1 and lr == 0.01:
                    losses = [(4.0, 4.0), (None, None), (None, None)] if seed else losses
                text = f"pace:pullback={c}:kappa={kappa}"
                rows += rows_of(text, lr, seed, losses, setting=setting, selection=losses[-1][1])
    configuration = {"seeds": list(seeds), "lr": [0.003, 0.01], "batch": 8}
    return write(folder, rows, **FACTS, configuration=configuration, failed={"x": "<i>no</i>"})


def write_comparison(folder, steps=100, seeds=(0,), batch=4, **losses):
    """By default adamw and ema; `width` and `layers` name the setting."""
    losses = losses or {"adamw": 3.0, "ema": 2.9}
    rows = []
    for seed, (name, loss) in itertools.product(seeds, losses.items()):
        rows += rows_of(name, 0.003, seed, ending(loss, loss))
    configuration = {"width": 64, "layers": 2, "batch": batch, "steps": 2000, "lr": [0.003]}
    facts = {**FACTS, "command": "paceline compare", "text": "books", "steps": steps}
    return write(folder, rows, **facts, configuration=configuration)


def write_run(folder, method="pace", seed=0, steps=20, last=20, **changes):
    """As `paceline train` leaves it: the Trainer's log, the recipe, the manifest."""
    values = {**read_recipe("demo-sft"), "method": method, "seed": seed, "steps": steps, **changes}
    recipe = Recipe(**values)
    lines = [{"eval_live_loss": 7.5, "eval_loss": 7.5, "eval_num_tokens": 0.0, "step": 0}]
    for step in (10, 20):
        if step <= last:
            lines.append({"loss": 6.8, "gain_mean": 0.9, "clipped": 0.5, "step": step})
            loss = {"eval_live_loss": 7 - step / 20, "eval_loss": 6.9 - step / 20}
            lines.append({**loss, "eval_num_tokens": 400.0 * step, "step": step})
    facts = {**FACTS, "command": "paceline train demo-sft", "steps": steps}
    write(folder, lines, **facts, recipe=json.loads(recipe.model_dump_json()))
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    return folder


class Parsed(html.parser.HTMLParser):
    """Tags, links, and the texts of scripts and of table cells."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.scripts, self.cells = [("", {})], [], {}, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.links += [value for name, value in attributes if name == "href"]

    def handle_data(self, text):
        tag, attributes = self.tags[-1]
        if tag == "script":
            self.scripts[attributes.get("id")] = self.scripts.get(attributes.get("id"), "") + text
        if tag == "td":
            self.cells.append(text)
