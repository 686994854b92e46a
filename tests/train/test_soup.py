"""`paceline soup`: models of one start, averaged into one."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from io import StringIO
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch
import torch.nn.functional as F
import yaml

pytest.importorskip("transformers")
pytest.importorskip("trl")

from merged import average, tree
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from safetensors.torch import load_file, save_file
from scipy.stats import t as student
from training import conversations, go, read, same, weights, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from paceline.cli import main
from paceline.sums import find_damage
from paceline.train import soup as module
from paceline.train.build import build_trainer
from paceline.train.held_out import Half, HeldOut, held_out_of
from paceline.train.recipe import Recipe
from paceline.train.weighted import read_headers

pytestmark = pytest.mark.usefixtures("surroundings")
SEQUENCES = 24


@pytest.fixture(scope="module")
def tuned(values, tmp_path_factory):
    """The recipe of fine-tunings of one run's model."""
    place = tmp_path_factory.mktemp("held out")
    rows = write_jsonl(place / "eval.jsonl", conversations(SEQUENCES, 1))
    base = place / "base"
    assert go(base, values, evaluations=1)
    start = {"model": str(base / "model"), "config": None, "tokenizer": None}
    return {**values, **start, "eval_data": (str(rows),), "evaluations": 1}


@pytest.fixture(scope="module")
def kitchen(tuned, tmp_path_factory):
    """A folder with two fine-tunings, one and two, and the folder of a bad model, far."""
    place = tmp_path_factory.mktemp("kitchen")
    for name, seed in (("one", 1), ("two", 2)):
        assert go(place / name, tuned, seed=seed)
    spoilt(place / "two" / "model", place / "far", lambda x: x + 0.2 * torch.randn_like(x))
    return place


def spoilt(source, target, change):
    """A copy of a model's folder with other weights and no check sums."""
    torch.manual_seed(0)
    shutil.copytree(source, target)
    (target / "checksums.json").unlink()
    state = {name: change(x) for name, x in load_file(target / "model.safetensors").items()}
    save_file(state, target / "model.safetensors", {"format": "pt"})


@pytest.fixture
def place(kitchen, tmp_path):
    """A copy of the kitchen, to be spoilt."""
    return shutil.copytree(kitchen, tmp_path / "kitchen")


def soup(*arguments, status=0):
    assert main(["soup", *map(str, arguments)]) == status


def mean(states):
    return {name: sum(x[name].double() for x in states) / len(states) for name in states[0]}


def by_hand(folders, recipe, scratch):
    """Each sequence's loss and tokens under the mean of some folders' weights."""
    model = AutoModelForCausalLM.from_pretrained(folders[0]).eval()
    model.load_state_dict(mean([weights(x) for x in folders]), strict=False)
    trainer = build_trainer(Recipe(**recipe), scratch, only_data=True)
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


# ---- the soups -----------------------------------------------------------------------------------


def test_the_greedy_soup_by_hand(kitchen, tuned, tmp_path, capsys):
    """Two runs whose mean is better than either, and a third model that is left out."""
    given = [kitchen / "far", kitchen / "one", kitchen / "two"]
    out = tmp_path / "soup"
    soup(*given, "--out", out)
    said = " ".join(capsys.readouterr().out.split())
    models = {"far": given[0], "one": given[1] / "model", "two": given[2] / "model"}
    losses = {
        names: by_hand([models[x] for x in names.split()], tuned, tmp_path / "scratch")
        for names in ("far", "one", "two", "one two", "far one two")
    }
    half = SEQUENCES // 2
    first = {names: a_token(found[:half]) for names, found in losses.items()}
    assert first["one two"] < min(first["one"], first["two"]) < first["far one two"]
    best = min("one", "two", key=first.__getitem__)

    about = read(out / "paceline.json")
    assert [(Path(x["ingredient"]).name, x["weight"]) for x in about["ingredients"]] == [
        *(("far", 0), ("one", 0.5), ("two", 0.5)),
    ]
    for x in about["ingredients"]:
        assert x["score"] == pytest.approx(first[Path(x["ingredient"]).name], abs=1e-5)
    names = {"best": best, "greedy": "one two", "uniform": "far one two"}
    for kind, row in about["reported"].items():
        assert [Path(x).name for x in row["ingredients"]] == names[kind].split()
        assert row["score"] == pytest.approx(first[names[kind]], abs=1e-5)
        assert row["other_half"] == pytest.approx(a_token(losses[names[kind]][half:]), abs=1e-5)
    counts = [n for _, n in losses[best][half:]]
    pairs = zip(losses["one two"][half:], losses[best][half:], strict=True)
    gaps = [a - b for (a, _), (b, _) in pairs]
    gap = sum(gaps) / sum(counts)
    errors = [d - gap * n for d, n in zip(gaps, counts, strict=True)]
    spread = student.ppf(0.975, half - 1) * stdev(errors) / math.sqrt(half) / fmean(counts)
    row = about["reported"]["greedy"]
    found = [row["difference"], row["low"], row["high"]]
    assert found == pytest.approx([gap, gap - spread, gap + spread], abs=1e-5)

    wanted = mean([weights(models["one"]), weights(models["two"])])
    for name, x in AutoModelForCausalLM.from_pretrained(out).state_dict().items():
        torch.testing.assert_close(x.double(), wanted.get(name, x.double()), rtol=0, atol=1e-7)
    AutoTokenizer.from_pretrained(out)
    assert (out / "checksums.json").is_file()
    assert find_damage(out) is None
    assert about["start"].startswith("random weights of seed 0 (")
    assert f"greedy soup of 2 ← | {row['score']:.4f} | {row['other_half']:.4f}" in said
    assert about["said"] in said
    card = (out / "README.md").read_text()
    assert f"| {given[0]} | {first['far']:.4f} | left out |" in card
    assert re.search(rf"\| {re.escape(str(given[1]))} \| \d\.\d{{4}} \| 0.5 \|", card)
    assert card.endswith(f"\n\n{about['said']}\n")
    assert yaml.safe_load(card.split("---")[1])["tags"] == ["paceline"]


def test_the_uniform_soup_is_the_uniform_average(kitchen, tmp_path):
    given = [kitchen / "one", kitchen / "two", kitchen / "far"]
    soup(*given, "--kind", "uniform", "--examples", 8, "--out", tmp_path / "soup")
    models = [kitchen / "one" / "model", kitchen / "two" / "model", kitchen / "far"]
    wanted = mean([weights(x) for x in models])
    found = weights(tmp_path / "soup")
    for name, x in wanted.items():
        torch.testing.assert_close(found[name].double(), x, rtol=0, atol=1e-7)
    about = read(tmp_path / "soup" / "paceline.json")
    assert about["rule"] == "uniform soup"
    assert about["examples"]["choosing"] == about["examples"]["reporting"] == 4
    average(models[0], models[1], tmp_path / "soup", "--out", tmp_path / "again")  # of averages


def test_where_no_mean_is_better_the_soup_is_the_best_alone(kitchen, tmp_path, capsys):
    out = tmp_path / "soup"
    soup(kitchen / "far", kitchen / "one", "--out", out)
    assert same(weights(out), weights(kitchen / "one" / "model"))
    assert "has a better score: the soup is the best alone." in capsys.readouterr().out
    row = read(out / "paceline.json")["reported"]["greedy"]
    assert (row["difference"], row["low"]) == (0, None)


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """Makes folders of models whose weights are all one number."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 8}
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=1, **sizes))
    place = tmp_path_factory.mktemp("numbers")

    def make(*numbers):
        for number in numbers:
            with torch.no_grad():
                for p in model.parameters():
                    p.fill_(number)
            model.save_pretrained(place / f"{number:g}")
        return [read_headers(place / f"{number:g}") for number in numbers]

    return make


def held_out_by(cost):
    """Two equal halves, with a cost that is a function of the number that a model is."""
    half = Half(
        [1, 1], lambda model: [cost(float(next(model.parameters()).detach().flatten()[0]))] * 2
    )
    return HeldOut(half, half, ("numbers",))


@pytest.mark.parametrize(
    ("given", "greedy"),
    [
        ((4, -1, 10), (1,)),  # means 1.5 and 4.5 of the best, -1, and another
        ((4, -2, -1), (2,)),  # and -1.5
        ((3, -1, 100), (1,)),  # a mean of 1 is as good as -1, which is not enough
        ((2.5, -1, -2), (0, 1)),  # -1.5 is worse, then 0.75 is better
        ((30, 2, -1), (1, 2)),  # what has no score comes last
    ],
)
def test_an_ingredient_is_added_where_the_score_improves(given, greedy, numbers):
    """In the order of their scores; equal is no improvement."""
    held_out = held_out_by(lambda x: math.nan if x == 30 else abs(x))
    found = module.score_soups(numbers(*given), held_out, Console(file=StringIO()))
    assert found.greedy == greedy
    assert found.uniform == (0, 1, 2)
    assert found.reporting.keys() == {found.best, found.greedy, found.uniform}


def test_without_any_score_there_is_no_soup(numbers):
    held_out = held_out_by(lambda _: math.nan)
    with pytest.raises(module.InputError, match="none of them has a finite score"):
        module.score_soups(numbers(1, 2), held_out, Console(file=StringIO()))


def test_a_model_with_other_names_than_its_file_is_refused(numbers):
    """Unused tensors of a file are left out; a parameter without one would keep its first value."""
    [checkpoint] = numbers(1)
    model = LlamaForCausalLM.from_pretrained(checkpoint.path)
    more = checkpoint.tensors | {"unused": checkpoint.tensors["model.norm.weight"]}
    assert module._tensors(model, checkpoint._replace(tensors=more)).keys() == more.keys() - {
        "unused"
    }
    del more["model.norm.weight"]
    with pytest.raises(module.InputError, match="has the tensor 'unused', which the model has by"):
        module._tensors(model, checkpoint._replace(tensors=more))


PEAK = """
import sys
from pathlib import Path
from rich.console import Console
from paceline.train import model, soup
from paceline.train.held_out import Half, HeldOut
from paceline.train.weighted import read_headers

def resident(kind):  # kB
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(kind)))

def load(path, *_):
    global before
    found = loads(path)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is forgotten
    before = resident("VmRSS:")
    return found

loads, soup.load_to_score = soup.load_to_score, load
half = Half([1, 1], lambda m: [float(m.lm_head.weight[0, 0])] * 2)
held_out = HeldOut(half, half, ("x",))
checkpoints = [read_headers(Path(name)) for name in sys.argv[1:]]
for _ in range(2):  # the first loads what is loaded once
    soup.score_soups(checkpoints, held_out, Console(file=sys.stderr))
print(resident("VmHWM:") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_memory_is_that_of_one_model_and_two_tensors(tmp_path):
    """Of all that is resident while four models and their soups are scored."""
    sizes = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 6, "vocab_size": 8}
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=1, **sizes))
    for name in "abcd":
        model.save_pretrained(tmp_path / name)
    # glibc: what is freed is no longer resident, at whatever size
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", PEAK, *"abcd"]
    run = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    largest = max(p.nbytes for p in model.parameters())
    assert largest == 2**20  # a model has 42 of them
    assert int(run.stdout) * 1024 < 2 * largest + 2**20  # 1 MiB for all that is else


# ---- other ingredients, other scores -------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters(kitchen, tuned, tmp_path, capsys):
    base, folders, states = tuned["model"], [], []
    for n in range(2):
        torch.manual_seed(n)
        lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
        lora.init_lora_weights = False  # both factors random
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
        folders.append(tmp_path / f"lora-{n}")
        model.save_pretrained(folders[-1])
        states.append(load_file(folders[-1] / "adapter_model.safetensors"))
    out, data = tmp_path / "soup", tuned["eval_data"][0]
    soup(*folders, "--data", data, "--kind", "uniform", "--out", out)
    assert "factor of the adapters is averaged" in capsys.readouterr().out
    found = load_file(out / "adapter_model.safetensors")
    assert found.keys() == states[0].keys()
    for name, x in mean(states).items():
        torch.testing.assert_close(found[name].double(), x, rtol=0, atol=1e-7)
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out)
    merged.merge_and_unload().save_pretrained(tmp_path / "merged")
    losses = by_hand([tmp_path / "merged"], {**tuned, "context": 64}, tmp_path / "scratch")[
        : SEQUENCES // 2
    ]
    about = read(out / "paceline.json")["reported"]["uniform"]
    assert about["score"] == pytest.approx(a_token(losses), abs=1e-5)

    config = read(folders[1] / "adapter_config.json") | {"base_model_name_or_path": "other/model"}
    (folders[1] / "adapter_config.json").write_text(json.dumps(config))
    soup(*folders, "--data", data, "--out", tmp_path / "x", status=2)
    assert f"lora-1 differ in their base model: {base} and other/model" in capsys.readouterr().err


def test_folders_outside_of_runs(kitchen, tuned, tmp_path, capsys):
    """Their data are read by the recipe that is named, within the context that the model has."""
    models = [shutil.copytree(kitchen / name / "model", tmp_path / name) for name in ("one", "two")]
    out, data = tmp_path / "soup", ["--data", tuned["eval_data"][0]]
    soup(*models, *data, "--recipe", kitchen / "one" / "recipe.yaml", "--out", out)
    inside = tmp_path / "inside"
    soup(kitchen / "one", kitchen / "two", "--out", inside)
    a, b = read(out / "paceline.json"), read(inside / "paceline.json")
    assert a["start"] is None
    assert a["reported"]["uniform"]["score"] == b["reported"]["uniform"]["score"]
    for ingredients in (models, [kitchen / "one", kitchen / "two"]):
        soup(*ingredients, "--recipe", "demo-pretrain", "--out", tmp_path / "no", status=2)
        assert "recipe: it says how --data are read; give --data" in capsys.readouterr().err
    options = module.Soup(ingredients=(), out=out, data=("x",), recipe="demo-pretrain")
    assert module._recipe(options, models[0]).context == 64  # of the model; the recipe's is 128
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the dog runs fast " * 200)
    soup(*models, "--data", text, "--recipe", "demo-pretrain", "--out", tmp_path / "read")
    assert read(tmp_path / "read" / "paceline.json")["examples"]["data"] == [str(text)]


def test_a_task_in_place_of_the_loss(kitchen, tmp_path, capsys):
    """The score of all examples by `paceline eval` is the mean of the halves."""
    pytest.importorskip("lm_eval")
    rows = [{"q": turns[0]["content"], "a": n % 2} for n, turns in enumerate(conversations(10, 9))]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {"task": "guess", "dataset_path": "json", "test_split": "test", "doc_to_text": "{{q}}"}
    files = {"test": str(tmp_path / "rows.jsonl")}
    task["dataset_kwargs"] = {"data_files": files, "cache_dir": str(tmp_path / "cache")}
    task |= {"output_type": "multiple_choice", "doc_to_choice": [" yes", " no"]}
    task |= {"doc_to_target": "a", "metric_list": [{"metric": "acc", "higher_is_better": True}]}
    (tmp_path / "guess.yaml").write_text(yaml.safe_dump(task))
    out, by = tmp_path / "soup", ["--task", "guess", "--include", tmp_path]
    soup(kitchen / "one", kitchen / "two", *by, "--kind", "uniform", "--out", out)
    about = read(out / "paceline.json")
    assert (about["measure"], about["higher_is_better"]) == ("acc", True)
    row = about["reported"]["uniform"]
    assert main(f"eval {out} --tasks guess --include {tmp_path} --out {tmp_path}/x".split()) == 0
    whole = read(tmp_path / "x")["results"]["guess"]["acc"]["model"]["value"]
    assert (row["score"] + row["other_half"]) / 2 == pytest.approx(whole)
    assert "Score: acc, higher is better, on 5 examples" in capsys.readouterr().out


# ---- refusals ------------------------------------------------------------------------------------


def edit(file, **changes):
    (file.parent / "checksums.json").unlink(missing_ok=True)
    file.write_text(json.dumps(read(file) | changes))


def spoil(place, how):
    two = place / "two"
    if how == "unfinished":
        shutil.rmtree(two / "model")
    elif how == "architecture":
        edit(two / "model" / "config.json", rms_norm_eps=0.5)
    elif how == "tokenizer":
        added = read(two / "model" / "tokenizer.json")["added_tokens"]
        edit(two / "model" / "tokenizer.json", added_tokens=added[:-1])
    elif how in ("start", "seed"):
        recipe = yaml.safe_load((two / "recipe.yaml").read_text())
        recipe["model"] = "other/model" if how == "start" else None
        if how == "seed":
            recipe |= {"config": {"model_type": "llama"}, "tokenizer": "bpe"}
        (two / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    elif how == "bit":
        data = (two / "model" / "model.safetensors").read_bytes()
        (two / "model" / "model.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif how == "shape":
        state = weights(place / "far")
        state["model.norm.weight"] = torch.ones(3)
        save_file(state, place / "far" / "model.safetensors")
    elif how == "adapter":
        (place / "far" / "model.safetensors").rename(place / "far" / "adapter_model.safetensors")
        (place / "far" / "config.json").unlink()


@pytest.mark.parametrize(
    ("how", "arguments", "message"),
    [
        (None, "one", r"^give at least two checkpoints, got 1"),
        (None, "one one/model", r"^checkpoints: give each only once"),
        (None, "one/model/model.safetensors far", r"^ingredients: .* is a file; give the folder"),
        (None, "one three", r"^no such file or folder: .*three"),
        ("unfinished", "one two", r"^ingredients: .*two is not finished; paceline train --resume"),
        ("architecture", "one two", r"differ in their architecture, rms_norm_eps of config.json: "),
        ("tokenizer", "one far two", r"one/model and .*two/model differ in their tokenizer, tok"),
        ("start", "one far two", r"differ in their start: random weights of seed 0 .* and other/m"),
        ("seed", "one two", r"in their start: random weights of seed 0 .* of seed 2 \(model_type"),
        ("bit", "one two", r"model.safetensors is damaged"),
        (
            "shape",
            "one far",
            r"tensor 'model.norm.weight' is F32 of shape \(32,\) in .* and F32 of",
        ),
        ("adapter", "one far", r"one/model is a model folder, and .*far is an adapter folder"),
        (None, "one two --out {place}/far", r"^out: .*far exists; name another"),
        (None, "far two/live --metric acc", r"^metric: it is of a task; name that by --task"),
        (None, "one two --task x --data y", r"^data: a task has its own data; give --data or"),
        (None, "one two --examples 3", r"^data: .* has 3 sequences to score on, and at least 4"),
        (None, "one two --data nothing.jsonl", r"^data: no such file or folder: "),
        (
            None,
            "one two --data x --recipe demo-stf",
            r"^unknown recipe 'demo-stf'; did you mean 'demo-sft'",
        ),
        (None, "one two --kind best", r"^kind: must be 'greedy' or 'uniform', got 'best'"),
    ],
    ids=lambda x: x if isinstance(x, str) and len(x) < 20 else None,
)
def test_bad_input_is_one_line_and_nothing_is_written(how, arguments, message, place, capsys):
    spoil(place, how)
    before = tree(place)
    words = arguments.format(place=place).split()
    given = [str(place / x) if re.match(r"(one|two|far|three)\b", x) else x for x in words]
    out = [] if "--out" in words else ["--out", place / "out"]
    soup(*given, *out, status=2)
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert re.search(message, said.err.removeprefix("paceline: ")), said.err
    assert tree(place) == before


def test_of_folders_outside_of_runs_data_have_to_be_named(kitchen, tmp_path, capsys):
    models = [shutil.copytree(kitchen / name / "model", tmp_path / name) for name in ("one", "two")]
    soup(*models, "--out", tmp_path / "out", status=2)
    assert "data: no ingredient is in the folder of a run; give --data" in capsys.readouterr().err


def test_the_start_itself_and_what_came_of_it_are_of_one_start(kitchen, tuned, tmp_path):
    """A chain of runs goes back to its random weights, from a checkpoint too."""
    base = Path(tuned["model"]).parent
    checkpoint = kitchen / "one" / "checkpoints" / "checkpoint-12"
    assert module.folder.run_of(checkpoint) == kitchen / "one"
    soup(base, checkpoint, "--examples", 4, "--out", tmp_path / "soup")
    assert "random weights of seed 0" in read(tmp_path / "soup" / "paceline.json")["start"]


def test_adapters_of_other_random_factors_are_of_another_start(tmp_path):
    for name, seed in (("one", 0), ("two", 1), ("three", 1)):
        (tmp_path / name / "model").mkdir(parents=True)
        recipe = {"task": "sft", "model": str(tmp_path), "lora_rank": 2, "seed": seed}
        (tmp_path / name / "recipe.yaml").write_text(json.dumps(recipe))
    one, two, three = (tmp_path / name / "model" for name in ("one", "two", "three"))
    assert module._common_start([two, three]).endswith("LoRA's random factors of seed 1")
    with pytest.raises(module.InputError, match="differ in their start: .* seed 0 and .* seed 1;"):
        module._common_start([one, two])


def test_a_recipe_beside_folders_of_models_is_no_run_of_theirs(tmp_path):
    (tmp_path / "models" / "a").mkdir(parents=True)
    (tmp_path / "recipe.yaml").write_text("task: sft\n")
    assert module.folder.run_of(tmp_path / "models" / "a") is None
    assert module.folder.run_of(tmp_path / "models") == tmp_path


def test_runs_of_elastic_workers_are_scored_in_one_process(kitchen, tuned):
    recipe = Recipe(**{**tuned, "elastic": "20:average"})
    found = held_out_of(kitchen / "one" / "model", recipe)
    assert found.examples["reporting"] == SEQUENCES // 2


@pytest.mark.parametrize("moment", ["put_sums", "weighted_sum"])
def test_interrupted_it_leaves_nothing(moment, place, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, moment, stopped)
    before = tree(place)
    soup(place / "one", place / "two", "--out", place / "out", status=130)
    assert tree(place) == before
