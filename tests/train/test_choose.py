"""`paceline choose`, `paceline train --choose`: the average to return, chosen after a training."""

import json
import math
import re
import shutil
from contextlib import contextmanager
from statistics import fmean, stdev

import pytest
import torch
import torch.nn.functional as F
import yaml

pytest.importorskip("transformers")
pytest.importorskip("trl")

from merged import tree
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy.stats import t as student
from training import (
    Recorder,
    conversations,
    go,
    go_on,
    lines,
    read,
    same,
    weights,
    write_jsonl,
)
from transformers import AutoModelForCausalLM

from paceline.averaging import PowerEMA, parse
from paceline.cli import main
from paceline.snapshots import SNAPSHOT
from paceline.sums import find_damage
from paceline.train import InputError, weighted
from paceline.train import choose as module
from paceline.train.build import build_trainer, keep_slow
from paceline.train.held_out import Half, HeldOut, difference
from paceline.train.recipe import Recipe

pytestmark = pytest.mark.usefixtures("surroundings")
STEPS, SEQUENCES = 60, 60


@pytest.fixture(scope="module")
def more(values, tmp_path_factory):
    """The recipe of a run whose default, a slow average at a high rate, is not the best."""
    place = tmp_path_factory.mktemp("held out")
    rows = write_jsonl(place / "eval.jsonl", conversations(SEQUENCES, 1))
    changed = {"eval_data": (str(rows),), "steps": STEPS, "evaluations": 2, "lr": 0.05}
    return {**values, **changed, "method": "ema:kappa=0.95", "keep_checkpoints": 9}


@pytest.fixture(scope="module")
def done(surroundings, more, tmp_path_factory):
    """A finished run with snapshots, and its live weights at each step."""
    recorder = Recorder()
    run = tmp_path_factory.mktemp("done") / "run"
    assert go(run, more, recorder, snapshots=12)
    return run, recorder.weights


@pytest.fixture(scope="module")
def made(done, tmp_path_factory):
    """A run in which a choice was made, and what was printed."""
    run = shutil.copytree(done[0], tmp_path_factory.mktemp("made") / "run")
    assert main(["choose", str(run)]) == 0
    return run


@pytest.fixture
def run(done, tmp_path):
    """A copy of the finished run."""
    return shutil.copytree(done[0], tmp_path / "run")


def by_hand(run, iterates, rule, more):
    """Each sequence's loss and tokens under an average of the iterates, by its coefficients."""
    shares = parse(rule).coefficients(len(iterates) - 1)
    model = AutoModelForCausalLM.from_pretrained(run / "live").eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.einsum("t,t...->...", shares, torch.stack([x[name] for x in iterates])))
    trainer = build_trainer(Recipe(**more), run / "scratch", only_data=True)
    found = []
    for row in trainer.eval_dataset:
        batch = trainer.data_collator([row])
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"]).logits[0, :-1]
        labels = batch["labels"][0, 1:]
        learned = labels != -100
        loss = F.cross_entropy(logits[learned], labels[learned], reduction="sum")
        found.append((loss.item(), int(learned.sum())))
    return found


def a_token(found):
    return sum(x for x, _ in found) / sum(n for _, n in found)


# ---- the choice --------------------------------------------------------------------------------


def test_the_best_becomes_the_model_and_the_former_is_kept(done, made, more):
    before, iterates = done
    choice = read(made / "choice.json")
    rows = {x["average"]: x for x in choice["averages"]}
    assert set(rows) >= {"live", *(f"ema:kappa={k}" for k in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95))}
    assert choice["default"] == "ema:kappa=0.95"
    assert not choice["flat"]
    assert choice["chosen"] == min(rows, key=lambda name: rows[name]["score"])
    assert choice["examples"] | {"data": 0} == {"choosing": 30, "reporting": 30, "data": 0}
    # what was scored
    losses = {
        name: by_hand(made, iterates, name if name != "live" else "ema:beta=1", more)
        for name in ("live", "ema:kappa=0.95", "ema:kappa=0.8", choice["chosen"])
    }
    for name, found in losses.items():
        assert rows[name]["score"] == pytest.approx(a_token(found[:30]), abs=2e-3)
    assert rows["live"]["score"] == pytest.approx(a_token(losses["live"][:30]), abs=1e-5)
    evaluated = [x["eval_loss"] for x in lines(made) if "eval_loss" in x]
    assert a_token(losses["ema:kappa=0.95"]) == pytest.approx(evaluated[-1], abs=1e-5)
    # what is reported, of the other half
    reported, default = choice["reported"], losses["ema:kappa=0.95"][30:]
    assert reported["default_score"] == pytest.approx(a_token(default), abs=1e-5)
    assert reported["score"] == pytest.approx(a_token(losses[choice["chosen"]][30:]), abs=2e-3)
    assert reported["difference"] == pytest.approx(reported["score"] - reported["default_score"])
    # the model is that average, within the expected error
    shares = parse(choice["chosen"]).coefficients(STEPS)
    found, missed, far = weights(made / "model"), 0.0, 0.0
    for name in iterates[0]:
        stack = torch.stack([x[name] for x in iterates])
        wanted = torch.einsum("t,t...->...", shares, stack)
        missed += float((found[name].double() - wanted).square().sum())
        far += float((iterates[-1][name] - wanted).square().sum())
    assert (missed / far) ** 0.5 < 2 * max(rows[choice["chosen"]]["expected_error"], 1e-3)
    assert tree(made / "model-before-choice").keys() == {
        made / "model-before-choice" / x.name for x in (before / "model").iterdir()
    }
    assert same(weights(made / "model-before-choice"), weights(before / "model"))
    AutoModelForCausalLM.from_pretrained(made / "model")
    assert find_damage(made / "model") is None


def test_the_model_says_that_it_was_chosen(done, made):
    choice, about = read(made / "choice.json"), read(made / "model" / "paceline.json")
    assert about["rule"] == choice["chosen"]
    assert about["choice"]["reported"] == choice["reported"]
    rule = parse(choice["chosen"])
    assert about["kappa"] == rule.kappa
    assert about["weight_of_newest"] == rule.weight(STEPS)
    card = (made / "model" / "README.md").read_text()
    assert f"| rule of the average | {choice['chosen']} |" in card
    assert card.endswith(f"## Chosen after the training\n\n{choice['said']}\n")
    assert (made / "choice.svg").read_text().count("rebuilt") == 1
    assert (made / "choice.png").read_bytes().startswith(b"\x89PNG")
    of_run = read(made / "paceline.json")["weights"]
    assert of_run["model"].endswith(f"on held-out data: {choice['chosen']}")
    assert of_run["model-before-choice"] == read(done[0] / "paceline.json")["weights"]["model"]
    # what the run itself wrote is as it was
    assert read(made / "manifest.json") == read(done[0] / "manifest.json")


def test_the_report_shows_the_choice(done, made):
    before, page = ((run / "report.html").read_text() for run in (done[0], made))
    said = read(made / "choice.json")["said"]
    assert f"<h2>Chosen after the training</h2>\n<p>{said} " in page.replace("&#39;", "'")
    assert "Chosen after" not in before
    assert "<code>model/</code>" in before  # what the default is in
    assert "<code>model-before-choice/</code>" in page
    for part in ("The average", "Recipe"):  # else it is as it was
        wanted = before.partition(f"<h2>{part}")[2].partition("<h2>")[0].partition("<details>")[0]
        assert wanted
        assert wanted in page


def test_a_table_and_a_curve_are_printed(made, tmp_path, capsys):
    """And a second choice is the first one, with the same former model."""
    run = shutil.copytree(made, tmp_path / "run")
    assert main(["choose", str(run)]) == 0
    said = capsys.readouterr().out
    first, again = read(made / "choice.json"), read(run / "choice.json")
    assert again["averages"] == first["averages"]
    assert again["reported"] == first["reported"]
    for name in ("model", "model-before-choice"):
        assert same(weights(run / name), weights(made / name))
        assert (run / name / "README.md").read_text() == (made / name / "README.md").read_text()
    curve = re.findall(r"^  ([\d.]+) +([\d.]+)  ·*●$", said, re.MULTILINE)
    assert [(float(k), float(x)) for k, x in curve] == sorted(
        (x["kappa"], pytest.approx(x["score"], abs=5e-5)) for x in first["averages"]
    )
    assert f"{first['chosen']}, rebuilt ←" in said
    assert first["said"] in said
    assert len(first["left_out"]) == 1
    assert "Left out, because the snapshots cannot give them: 1 (ema:kappa=0.3)." in said


def test_a_flat_curve_keeps_the_default(done, made, run, tmp_path, capsys, monkeypatch):
    """An interval with 0 in it says nothing; and a default that was replaced comes back."""
    monkeypatch.setattr("paceline.train.held_out.interval", lambda _: (-1.0, 1.0))
    before = tree(run / "model")
    assert main(["choose", str(run)]) == 0
    choice = read(run / "choice.json")
    assert choice["flat"]
    assert choice["chosen"] == choice["default"] == "ema:kappa=0.95"
    best = next(x for x in choice["averages"] if x["average"] == choice["best"])
    assert best["low"] < 0 < best["high"]
    assert choice["said"].endswith("(loss, nats a token), which may be chance.")
    assert "The curve is flat: " in capsys.readouterr().out
    assert tree(run / "model") == before
    assert not (run / "model-before-choice").exists()

    again = shutil.copytree(made, tmp_path / "again")
    assert main(["choose", str(again)]) == 0
    assert same(weights(again / "model"), weights(done[0] / "model"))
    assert "choice" not in read(again / "model" / "paceline.json")
    assert not (again / "model-before-choice").exists()
    assert read(again / "paceline.json") == read(done[0] / "paceline.json")


def test_of_few_examples_the_best_is_chance_and_the_default_stays(done, made, tmp_path, capsys):
    again = shutil.copytree(made, tmp_path / "again")
    assert main(["choose", str(again), "--examples", "59"]) == 0
    choice = read(again / "choice.json")
    assert choice["chosen"] == choice["default"] == "ema:kappa=0.95"
    best = next(x for x in choice["averages"] if x["average"] == choice["best"])
    assert best["high"] < 0  # it would be chosen
    assert choice["said"] in capsys.readouterr().out
    assert choice["said"].startswith(
        "Too few to choose by: 29 and 30 examples in the halves, and 30 are needed in each. The "
        f"best may be chance: {best['average']}, {best['difference']:+.4f} ["
    )
    assert choice["said"].endswith("Give more by --examples or --data.")
    assert same(weights(again / "model"), weights(done[0] / "model"))


def test_other_rules_and_other_data(run, more, tmp_path, capsys):
    rows = write_jsonl(tmp_path / "other.jsonl", conversations(40, 7))
    rules = "uniform:start=20,ema:kappa=0.75,bema,ema:kappa=0.1"
    assert main(["choose", str(run), "--rules", rules, "--data", str(rows)]) == 0
    choice = read(run / "choice.json")
    names = [x["average"] for x in choice["averages"]]
    assert names == ["live", "ema:kappa=0.95", "uniform:start=20", "ema:kappa=0.75"]
    assert choice["left_out"] == ["bema:kappa=0.5", "ema:kappa=0.1"]
    assert choice["examples"] == {"choosing": 20, "reporting": 20, "data": [str(rows)]}
    assert (run / "choice.svg").read_text().count(">uniform:start=20<") == 1


def test_without_snapshots_the_averages_in_checkpoints_are_taken(run, made):
    shutil.rmtree(run / "averages")
    before = {x.name for x in run.iterdir()}
    assert main(["choose", str(run), "--rules", "ema:kappa=0.9,ema:kappa=0.3"]) == 0
    choice, whole = read(run / "choice.json"), read(made / "choice.json")
    of = {x["average"]: x["score"] for x in whole["averages"]}
    found = {x["average"]: x["score"] for x in choice["averages"]}
    assert found.keys() >= {"live", "ema:kappa=0.95"}
    assert all(found[name] == of[name] for name in ("live", "ema:kappa=0.95"))
    assert choice["snapshots"] == 2
    assert {x.name for x in run.iterdir()} - before <= {
        *("choice.json", "choice.svg", "choice.png", "model-before-choice"),
    }


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with a task of ten examples, one with two metrics, and one with no mean."""
    pytest.importorskip("lm_eval")
    place = tmp_path_factory.mktemp("tasks")
    asked = [turns[0]["content"] for turns in conversations(10, 9)]
    data = place / "rows.jsonl"
    rows = [json.dumps({"q": text, "a": n % 2}) for n, text in enumerate(asked)]
    data.write_text("\n".join(rows))
    acc = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
    perplexity = {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}
    of = {"dataset_path": "json", "test_split": "test", "doc_to_text": "{{q}}"}
    of["dataset_kwargs"] = {"data_files": {"test": str(data)}, "cache_dir": str(place / "cache")}
    choice = {"output_type": "multiple_choice", "doc_to_choice": [" yes", " no"]} | of
    choice["doc_to_target"] = "a"
    kinds = {
        "guess": choice | {"metric_list": [acc]},
        "two": choice | {"metric_list": [acc, acc | {"metric": "acc_norm"}]},
        "cloze": of
        | {"output_type": "loglikelihood", "doc_to_target": " yes", "metric_list": [perplexity]},
    }
    for name, task in kinds.items():
        (place / f"{name}.yaml").write_text(yaml.safe_dump({"task": name} | task))
    return place


def test_a_task_in_place_of_the_loss(run, tasks):
    """Its halves are those that paceline eval scores together."""
    said = f"choose {run} --task guess --include {tasks} --rules ema:kappa=0.8 --device cpu"
    assert main(said.split()) == 0
    choice = read(run / "choice.json")
    assert choice["measure"] == "acc"
    assert choice["examples"] == {"choosing": 5, "reporting": 5, "data": ["guess"]}
    default = run / ("model" if choice["flat"] else "model-before-choice")
    assert main(f"eval {default} --tasks guess --include {tasks} --out {run}/x.json".split()) == 0
    whole = read(run / "x.json")["results"]["guess"]["acc"]["model"]["value"]
    first = next(x["score"] for x in choice["averages"] if x["kind"] == "default")
    assert (first + choice["reported"]["default_score"]) / 2 == pytest.approx(whole)


def test_of_a_task_higher_is_better():
    """A gain of accuracy has a positive difference, and the best has the highest score."""
    default, other = module.Candidate("a", "default"), module.Candidate("b", "kept")
    scores = {default: [-0.0, -1.0, -0.0, -0.0], other: [-1.0, -1.0, -0.0, -1.0]}
    half = Half([1] * 4, list)
    held_out = HeldOut(half, half, ("guess",), "acc", True)
    assert module._best(scores, default) is other
    found = module._result(scores, other, default, held_out)
    first, second = found["averages"]
    assert (first["score"], second["score"], second["difference"]) == (0.25, 0.75, 0.5)
    spread = student.ppf(0.975, 3) * stdev([1, 0, 0, 1]) / 2
    assert (second["low"], second["high"]) == pytest.approx((0.5 - spread, 0.5 + spread))
    said = module._reported(other, default, found, scores, held_out)
    assert said["reported"] | {"low": 0, "high": 0} == {
        **{"score": 0.75, "default_score": 0.25, "difference": 0.5, "low": 0, "high": 0}
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--task two", r"^metric: two has acc, acc_norm; name one by --metric"),
        ("--task two --metric f1", r"^metric: two has acc, acc_norm; got 'f1'"),
        (
            "--task two --metric acc,strict",
            r"^metric: two has no 'acc,strict'; it has acc,none and",
        ),
        ("--task cloze", r"^metric: perplexity of cloze is no mean over examples; name another"),
        ("--task guess --examples 3", r"^task: guess has 3 examples to score on, and at least 4"),
        ("--task guess --data x.jsonl", r"^data: a task has its own data; give --data or --task"),
        ("--metric acc", r"^metric: it is of a task; name that by --task"),
    ],
)
def test_tasks_that_cannot_be_chosen_by(arguments, message, run, tasks, capsys):
    before = tree(run)
    include = f" --include {tasks}" if "--task" in arguments else ""
    assert main(["choose", str(run), *f"{arguments}{include}".split()]) == 2
    said = capsys.readouterr()
    assert re.search(message, said.err.removeprefix("paceline: ")), said.err
    assert tree(run) == before


def test_the_interval_is_students_of_the_ratio():
    """Of differences a token: residuals from the mean, each sequence by its tokens."""
    losses, others, counts = [3.0, 5.0, 4.5, 9.0], [2.0, 5.5, 4.0, 8.0], [2, 4, 3, 7]
    gaps = [a - b for a, b in zip(losses, others, strict=True)]
    mean = sum(gaps) / sum(counts)
    found = difference(losses, others, counts)
    assert found.difference == pytest.approx(mean)
    residuals = [d - mean * n for d, n in zip(gaps, counts, strict=True)]
    half = student.ppf(0.975, 3) * stdev(residuals) / math.sqrt(4) / fmean(counts)
    assert found.high - mean == pytest.approx(half)
    assert mean - found.low == pytest.approx(half)


def test_alike_differences_have_no_interval():
    """Two examples that both changed say nothing; a default of equal score stays."""
    found = difference([0.0, 0.0], [1.0, 1.0], [1, 1])
    assert (found.difference, found.excludes_0) == (-1, False)
    assert str(found) == "-1.0000 (no interval)"
    default, other = module.Candidate("a", "default"), module.Candidate("b", "kept")
    half = Half([1, 1], list)
    scores = {default: [1.0, 1.0], other: [0.0, 0.0]}
    result = module._result(scores, other, default, HeldOut(half, half, ("guess",)))
    assert result["flat"]
    assert result["chosen"] == "a"


def test_of_equal_scores_the_live_weights_come_last():
    live, kept = module.Candidate("live", "live"), module.Candidate("b", "kept")
    default = module.Candidate("a", "default")
    assert module._best({live: [1.0], default: [1.0], kept: [1.0]}, default) is default
    assert module._best({live: [1.0], default: [2.0], kept: [1.0]}, default) is kept
    assert module._best({live: [math.nan], default: [2.0], kept: [2.5]}, default) is default


# ---- interrupted -------------------------------------------------------------------------------


def fails_at(monkeypatch, moment):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    if moment == "scoring":

        def stopped(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(module, "_put", stopped)
    elif moment == "writing":
        monkeypatch.setattr("paceline.train.weighted.write_safetensors", full)
    elif moment == "renaming":
        whole = weighted.whole

        @contextmanager
        def half(path):
            with whole(path) as partial:
                yield partial
                full()

        monkeypatch.setattr(weighted, "whole", half)
    elif moment == "keeping the former":
        monkeypatch.setattr("paceline.train.choose.shutil.copytree", full)


@pytest.mark.parametrize("moment", ["scoring", "writing", "keeping the former", "renaming"])
def test_interrupted_it_leaves_the_run_as_it_was(moment, run, monkeypatch, capsys):
    before = tree(run)
    fails_at(monkeypatch, moment)
    assert main(["choose", str(run)]) == (130 if moment == "scoring" else 2)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "No space left" in said or moment == "scoring"
    assert tree(run) == before


def test_killed_before_it_is_written_it_ends_the_same(done, made, run):
    """The former is beside a model that is still the former; then the choice is made."""
    shutil.copytree(run / "model", run / "model-before-choice")
    assert main(["choose", str(run)]) == 0
    assert same(weights(run / "model"), weights(made / "model"))
    assert same(weights(run / "model-before-choice"), weights(done[0] / "model"))


# ---- at the end of a training ------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(surroundings, more, tmp_path_factory):
    run = tmp_path_factory.mktemp("trained") / "run"
    assert go(run, more, choose=True)
    return run


def test_at_the_end_of_a_training_it_is_the_command_after_it(trained, made):
    assert len(list((trained / "averages").iterdir())) == 11  # of 12 steps two are one
    first, other = read(trained / "choice.json"), read(made / "choice.json")
    for name in ("averages", "reported", "chosen", "said"):
        assert first[name] == other[name]
    for name in ("live", "model", "model-before-choice"):
        assert same(weights(trained / name), weights(made / name))


@pytest.mark.parametrize("moment", ["training", "before the choice", "in the choice"])
def test_killed_it_goes_on_to_the_same_end(moment, trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    (run / "choice.json").unlink()
    if moment != "in the choice":
        shutil.rmtree(run / "model")
        (run / "model-before-choice").rename(run / "model")
    if moment == "training":
        for name in ("model", "live", f"checkpoints/checkpoint-{STEPS}"):
            shutil.rmtree(run / name)
    assert go_on(run) == 0
    for name in ("live", "model", "model-before-choice"):
        assert same(weights(run / name), weights(trained / name))
    mine, theirs = read(run / "choice.json"), read(trained / "choice.json")
    assert mine["averages"] == theirs["averages"]
    assert go_on(run) == 0
    assert read(run / "choice.json") == mine


def test_too_little_to_choose_by_is_said_before_the_training(more, tmp_path):
    with pytest.raises(InputError, match=r"^data: .* has 3 sequences to score on, and at least 4"):
        go(tmp_path / "run", more, choose=True, eval_examples=3)
    assert not (tmp_path / "run" / "recipe.yaml").exists()


@pytest.mark.parametrize("method", ["adamw", "schedule-free", "bema"])
def test_methods_without_averages_are_refused(method, more):
    with pytest.raises(InputError, match=r"^choose: .* keeps no average that others can be"):
        Recipe(**{**more, "method": method, "choose": True})


@pytest.mark.parametrize(
    ("own", "returns", "expected"),
    [
        ("ema:kappa=0.3", None, "returned=ema:kappa=0.3,slow=ema:kappa=0.9"),
        ("ema:kappa=0.3", "x=ema:kappa=0.6", "x=ema:kappa=0.6,slow=ema:kappa=0.9"),
        ("ema:kappa=0.3", "x=ema:kappa=0.85", "x=ema:kappa=0.85"),
        ("ema:kappa=0.95", None, None),
        ("uniform:start=9", None, "returned=uniform:start=9,slow=ema:kappa=0.9"),
    ],
)
def test_a_slow_average_is_kept_for_it(own, returns, expected):
    group = {"averaging": own, "returns": returns}
    keep_slow(group)
    assert group == {"averaging": own, "returns": expected}


# ---- refusals ----------------------------------------------------------------------------------


def change(file, tensors=None, **facts):
    """Another file in place of a snapshot; None leaves a fact out."""
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    said = json.loads(metadata[SNAPSHOT]) | facts
    metadata[SNAPSHOT] = json.dumps({k: x for k, x in said.items() if x is not None})
    found = load_file(file)
    save_file(tensors(found) if tensors else found, file, metadata)
    (file.parent / "checksums.json").unlink(missing_ok=True)


def spoil(run, how):
    last = run / "averages" / f"step-{STEPS}" / "average.safetensors"
    if how == "another run":
        change(last, lambda x: {name: 2 * value for name, value in x.items()})
    elif how == "two runs":
        change(last, run="other")
    elif how == "another model":
        for file in (run / "averages").glob("*/*.safetensors"):
            change(file, lambda x: {"other.weight": torch.zeros(2)})
    elif how == "no metadata":
        for file in (run / "averages").glob("*/*.safetensors"):
            save_file(load_file(file), file)
            (file.parent / "checksums.json").unlink()
    elif how == "no beginning":
        change(last, begun=None)
    elif how == "twice":
        shutil.copytree(last.parent, last.parent.with_name("step-7"))
    elif how == "a bit":
        data = last.read_bytes()
        last.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif how == "unfinished":
        shutil.rmtree(run / "model")
    elif how == "no run":
        (run / "recipe.yaml").unlink()
    elif how == "no averages":
        shutil.rmtree(run / "averages")
        shutil.rmtree(run / "checkpoints")
    elif how == "the former":
        facts = read(run / "model" / "paceline.json") | {"choice": {}}
        (run / "model" / "paceline.json").write_text(json.dumps(facts))
    elif how == "one example":
        write_jsonl(run / "one.jsonl", conversations(1, 3))


@pytest.mark.parametrize(
    ("how", "arguments", "message"),
    [
        ("another run", "", r"^run: .*average.safetensors is not what the run returned: the sna"),
        ("two runs", "", r"is of the run \w+ and .* of other; give snapshots of one run"),
        ("another model", "", r"tensor 'other.weight' of the snapshots, of shape \(2,\), is miss"),
        ("no metadata", "", r"^run: the files in .*averages do not say which averages they are"),
        ("no beginning", "", r"does not say which average it is: KeyError: 'begun'"),
        ("twice", "", r"are both ema:kappa=0.95 at step 60; leave one out"),
        ("a bit", "", r"^run: .*average.safetensors is damaged"),
        ("unfinished", "", r"^run: .* is not finished; paceline train --resume .* goes on with it"),
        ("no run", "", r"^run: .* is no folder of a run: it has no recipe.yaml"),
        (
            "no averages",
            "",
            r"^run: .* has no snapshots of averages, and it has no checkpoints; tr",
        ),
        ("the former", "", r"^run: .*model was chosen, and .*before-choice is gone; delete model/"),
        ("one example", "--data {run}/one.jsonl", r"^data: .* has 1 sequence to score on, and at"),
        (None, "--examples 3", r"^data: .* has 3 sequences to score on, and at least 4 are needed"),
        (None, "--rules ema:kappa=2", r"^rules: .*kappa of ema must be in \[0, 1\], got 2"),
        (None, "--rules mean", r"^rules: unknown average 'mean'"),
        (None, "--data {run}/nothing.jsonl", r"^data: no such file or folder: "),
        (None, "--device warp", r"^device: 'warp' cannot be used"),
    ],
    ids=lambda x: x if isinstance(x, str) and len(x) < 20 else None,
)
def test_bad_input_is_one_line_and_nothing_is_written(how, arguments, message, run, capsys):
    spoil(run, how)
    before = tree(run)
    assert main(["choose", str(run), *arguments.format(run=run).split()]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert re.search(message, said.err.removeprefix("paceline: ")), said.err
    assert tree(run) == before


def test_data_that_have_changed_are_refused(more, run, capsys):
    recipe = (run / "recipe.yaml").read_text()
    rows = write_jsonl(run / "rows.jsonl", conversations(SEQUENCES, 2))
    (run / "recipe.yaml").write_text(recipe.replace(more["eval_data"][0], str(rows)))
    assert main(["choose", str(run)]) == 2
    assert "data: those that the run evaluated on have changed" in capsys.readouterr().err


def test_the_eight_are_plain_power_emas():
    assert [PowerEMA(k) for k in module.KAPPAS] == sorted(map(PowerEMA, module.KAPPAS), key=str)


def test_the_help_explains_it(capsys):
    assert main(["choose", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for words in ("paceline choose RUN", "--data", "--rules", "--device", "the default stays"):
        assert words in said


def test_a_run_of_elastic_workers_is_refused(tmp_path):
    recipe = Recipe(config={"model_type": "llama"}, tokenizer="bpe", method="adamw", elastic=8)
    with pytest.raises(InputError, match=r"^choose: .* is of elastic workers, which keep no avera"):
        module.choose(tmp_path, recipe, HeldOut(None, None, ()), Console(quiet=True))
