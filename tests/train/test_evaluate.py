"""`paceline eval`: what lm-eval finds is what plain torch computes; and what is refused."""

import datetime
import functools
import io
import json
import logging
import math
import shutil
import statistics
import sys

import pytest
import torch
import yaml

pytest.importorskip("lm_eval")

import lm_eval.tasks
import tyro
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from paceline.sums import write_sums
from paceline.train import InputError
from paceline.train.data import make_tokenizer
from paceline.train.evaluate import Evaluation, _paired_stderr, day_of, evaluate, of_examples
from paceline.train.model import make_gpt2

WORDS = [
    "red",
    "green",
    "blue",
    "round",
    "square",
    "heavy",
    "light",
    "old",
    "new",
    "warm",
    "cold",
    "quiet",
]


def sentence(n):
    """Different for every n, and of different lengths."""
    return " ".join(WORDS[(n * k + k * k) % len(WORDS)] for k in range(1, 4 + n % 5))


DOCUMENTS = [
    {
        "question": f"{sentence(n)} is",
        "choices": [WORDS[n % 12], WORDS[(n + 5) % 12], sentence(n + 3)],
        "answer": n * n % 3,
        "text": f"{sentence(n)}.\n{sentence(2 * n + 1)}, {n}.",
    }
    for n in range(30)
]
TRAIN, TEST = DOCUMENTS[:6], DOCUMENTS[6:]

CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_target": "answer",
    "doc_to_choice": "{{choices}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
TASKS = {
    "choice": CHOICE | {"metadata": {"version": 3.0}},
    "bare": CHOICE | {"num_fewshot": 0},
    "cloze": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}}",
        "doc_to_target": " {{choices[0]}}",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}
        ],
    },
    "prose": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [
            {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}
        ],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of task files."""
    folder = tmp_path_factory.mktemp("tasks")
    data = {}
    for split, documents in (("train", TRAIN), ("test", TEST)):
        path = folder / f"{split}.jsonl"
        path.write_text("".join(json.dumps(document) + "\n" for document in documents))
        data[split] = str(path)
    for name, task in TASKS.items():
        common = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": data, "cache_dir": str(folder / "cache")},
            "training_split": "train",
            "test_split": "test",
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(common | task))
    for name, members in (("both", ["choice", "bare"]), ("mixed", ["choice", "arc_easy"])):
        acc = {"metric": "acc", "weight_by_size": True}
        group = {"group": name, "task": members, "aggregate_metric_list": [acc]}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(group))
    return folder


def tokenizer():
    return make_tokenizer([document["text"] for document in DOCUMENTS], 300)


def save(folder, seed, kind="gpt2", dtype=torch.float32):
    if kind == "gpt2":
        model = make_gpt2(tokenizer(), width=16, layers=2, heads=2, positions=128, seed=seed)
    else:
        torch.manual_seed(seed)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 128}
        heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer()), **sizes, **heads))
    with torch.no_grad():
        for p in model.parameters():  # or all would be equally likely
            p.mul_(10 if p.dim() > 1 else 1)
    model.to(dtype).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    save(folder / "live", seed=0)
    save(folder / "model", seed=1)
    return folder


# Of all tasks that lm-eval has, too: made once, for that takes 9 seconds.
task_manager = functools.cache(lm_eval.tasks.TaskManager)


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    """In one process and thread: the models are tiny."""
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    monkeypatch.setattr("lm_eval.tasks.TaskManager", task_manager)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def ask(model, *tasks, **options):
    """The results, and what was said."""
    said = io.StringIO()
    options = Evaluation(model=str(model), tasks=tasks, **options)
    return evaluate(options, Console(file=said, width=120)), said.getvalue()


# ---- by hand ------------------------------------------------------------------------------------


class ByHand:
    """The same figures, a sequence at a time."""

    def __init__(self, folder):
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def log_likelihood(self, before, text):
        """Of the text, in nats, after what is before it."""
        first = self.tokenizer(before).input_ids or [self.tokenizer.bos_token_id]
        ids = self.tokenizer(before + text).input_ids
        ids = ids if before else first + ids
        scores = self.model(torch.tensor([ids[:-1]])).logits[0].float().log_softmax(-1)
        return sum(scores[i - 1, ids[i]].item() for i in range(len(first), len(ids)))

    def right(self, before=""):
        """Of each example, whether the likeliest choice is the answer."""
        found = []
        for document in TEST:
            question, choices = before + document["question"], document["choices"]
            scores = [self.log_likelihood(question, " " + choice) for choice in choices]
            found.append(float(scores.index(max(scores)) == document["answer"]))
        return found

    def perplexity(self):
        pairs = [(document["question"], " " + document["choices"][0]) for document in TEST]
        return math.exp(-statistics.fmean(self.log_likelihood(*pair) for pair in pairs))

    def bits_per_byte(self):
        texts = [document["text"] for document in TEST]
        nats = -sum(self.log_likelihood("", text) for text in texts)
        return nats / math.log(2) / sum(len(text.encode()) for text in texts)


def standard_error(scores):
    return statistics.stdev(scores) / math.sqrt(len(scores))


# ---- what is found ------------------------------------------------------------------------------


def test_live_and_returned_of_a_run(run, tasks, capfd, caplog):
    (run / "live" / "tokenizer.json").unlink()  # that of the returned model is used
    found, said = ask(run, "choice", "prose", "cloze", "choice", include=tasks, device="cpu")
    assert capfd.readouterr() == ("", "")  # the libraries are quiet
    assert not caplog.records
    assert logging.root.manager.disable == logging.NOTSET
    returned = ByHand(run / "model")
    shutil.copy(run / "model" / "tokenizer.json", run / "live")
    live = ByHand(run / "live")
    assert json.loads((run / "eval.json").read_text()) == found
    assert list(found["results"]) == ["choice", "prose", "cloze"]

    cells = found["results"]["choice"].pop("acc")
    before, after = live.right(), returned.right()
    assert len(set(before)) == len(set(after)) == 2
    assert before != after
    difference = [b - a for a, b in zip(before, after, strict=True)]
    for name, scores in (("live", before), ("returned", after), ("difference", difference)):
        assert cells[name]["value"] == pytest.approx(statistics.fmean(scores), abs=1e-12)
        assert cells[name]["stderr"] == pytest.approx(standard_error(scores), rel=1e-9)
        sign = "+" if name == "difference" else ""
        assert f"{cells[name]['value']:{sign}.4f} ±{cells[name]['stderr']:.4f}" in said
    assert not found["results"]["choice"]

    for task, metric in (("prose", "bits_per_byte"), ("cloze", "perplexity")):
        cells = found["results"][task][metric]
        a, b = (getattr(model, metric)() for model in (live, returned))
        assert cells["live"]["value"] == pytest.approx(a, rel=1e-5)
        assert cells["returned"]["value"] == pytest.approx(b, rel=1e-5)
        assert cells["difference"]["value"] == pytest.approx(b - a, rel=1e-4)
        assert cells["difference"]["stderr"] is None  # these are no means over the examples
        assert f"{cells['difference']['value']:+.4f} |" in said
    assert found["results"]["prose"]["bits_per_byte"]["live"]["stderr"] is None
    assert found["results"]["cloze"]["perplexity"]["live"]["stderr"] > 0
    for text in ("acc ↑", "bits_per_byte ↓", "| task ", "Written: ", "eval.json"):
        assert text in said
    assert "shot" not in said

    assert found["models"] == {"live": str(run / "live"), "returned": str(run / "model")}
    given = {"device": "cpu", "limit": None, "few_shot": None, "batch": 8, "seed": 1234}
    assert found.items() >= given.items()
    assert found["versions"].keys() >= {"lm_eval", "datasets", "torch", "transformers"}
    choice = found["tasks"]["choice"]
    assert choice["version"] == 3.0
    assert choice["few_shot"] == 0
    assert choice["examples"] == {"original": 24, "effective": 24}
    assert choice["config"]["doc_to_text"] == "{{question}}"


@pytest.mark.parametrize(("kind", "dtype"), [("llama", torch.float32), ("gpt2", torch.bfloat16)])
def test_a_model_alone(kind, dtype, tasks, tmp_path):
    """In its own dtype; but the scores are in float32."""
    model = save(tmp_path / "model-1", seed=2, kind=kind, dtype=dtype)
    files = set(model.iterdir())
    found, said = ask(model, "prose", include=tasks, batch=1)  # batches round bfloat16 otherwise
    cells = found["results"]["prose"]["bits_per_byte"]
    assert ByHand(model).model.dtype == dtype
    assert cells.keys() == {"model"}
    assert cells["model"]["value"] == pytest.approx(ByHand(model).bits_per_byte(), rel=1e-6)
    assert "difference" not in said
    assert "Written" not in said
    assert set(model.iterdir()) == files


@pytest.mark.slow
def test_few_shots_limit_and_groups(run, tasks, tmp_path):
    out = tmp_path / "new.json"
    out.write_text("old")
    found, said = ask(run, "both", include=tasks, few_shot=6, limit=9, out=out)
    assert json.loads(out.read_text()) == found
    assert not (run / "eval.json").exists()
    assert found["results"].keys() == {"both", "choice", "bare"}
    assert (found["tasks"]["choice"]["few_shot"], found["tasks"]["bare"]["few_shot"]) == (6, 0)
    assert found["tasks"]["choice"]["examples"] == {"original": 24, "effective": 9}
    assert "choice, 6-shot" in said
    for name, folder in (("live", "live"), ("returned", "model")):
        bare = statistics.fmean(ByHand(run / folder).right()[:9])
        assert found["results"]["bare"]["acc"][name]["value"] == pytest.approx(bare)
        both = [found["results"][task]["acc"][name]["value"] for task in ("choice", "bare")]
        group = found["results"]["both"]["acc"]
        assert group[name]["value"] == pytest.approx(statistics.fmean(both))
        assert group[name]["stderr"] > 0
    assert group["difference"]["stderr"] is None  # tasks' examples are not all alike


def test_a_solved_example_comes_before(run, tasks):
    """Of one that there is, for what it says is then known."""
    one = tasks / "one"
    one.mkdir()
    (one / "train.jsonl").write_text(json.dumps(TRAIN[0]))
    task = yaml.safe_load((tasks / "choice.yaml").read_text()) | {"task": "one"}
    task["dataset_kwargs"]["data_files"]["train"] = str(one / "train.jsonl")
    (one / "one.yaml").write_text(yaml.safe_dump(task))
    found, _ = ask(run / "model", "one", include=one, few_shot=1)
    first = f"{TRAIN[0]['question']} {TRAIN[0]['choices'][TRAIN[0]['answer']]}\n\n"
    right = ByHand(run / "model").right(first)
    assert right != ByHand(run / "model").right()
    assert found["results"]["one"]["acc"]["model"] == {
        "value": pytest.approx(statistics.fmean(right)),
        "stderr": pytest.approx(standard_error(right)),
    }


def test_pairs_are_of_one_filter():
    """lm-eval scores an answer by each of a task's filters."""

    def found(**scores):
        return {
            "samples": {
                "t": [{"filter": name, "m": x} for name in scores for x in scores[name]],
            },
            "results": {"t": {f"m,{name}": statistics.fmean(scores[name]) for name in scores}},
        }

    scored = [
        found(loose=(1, 1, 0, 1), strict=(0, 1, 0, 0)),
        found(loose=(1, 1, 1, 1), strict=(1, 0, 1, 0)),
    ]
    assert _paired_stderr(scored, "t", "m,loose") == standard_error([0, 0, 1, 0])
    assert _paired_stderr(scored, "t", "m,strict") == standard_error([1, -1, 1, 0])


def test_a_model_that_diverged_has_scores():
    """Their mean is NaN as lm-eval says; a metric that is no mean has none."""
    samples = [{"acc": math.nan, "f1": 0.5, "filter": "none"}] * 3
    found = {"samples": {"x": samples}, "results": {"x": {"acc,none": math.nan, "f1,none": 0.7}}}
    assert all(map(math.isnan, of_examples(found, "x", "acc,none")))
    assert of_examples(found, "x", "f1,none") == []
    assert _paired_stderr([found, found], "x", "acc,none") is None


def test_both_models_are_asked_the_same(run, tasks):
    """The few-shot examples, which are drawn, too; and a second call asks it again."""
    shutil.copy(run / "live" / "model.safetensors", run / "model")
    cells = [
        ask(run, "cloze", include=tasks, few_shot=2)[0]["results"]["cloze"]["perplexity"]
        for _ in range(2)
    ]
    assert cells[0]["live"] == cells[0]["returned"] == cells[1]["live"]
    assert cells[0]["difference"]["value"] == 0
    assert torch.initial_seed() == 1234  # for those tasks that sample


def test_a_run_without_live_weights(run, tasks):
    shutil.rmtree(run / "live")
    found, said = ask(run, "choice", include=tasks, limit=3)
    assert found["results"]["choice"]["acc"].keys() == {"returned"}
    assert "eval.json" in said


def test_the_command_line():
    parse = functools.partial(tyro.cli, Evaluation, config=(tyro.conf.OmitArgPrefixes,))
    options = parse(args=["runs/a", "--tasks", "x,y", "--few-shot", "0", "--limit", "7"])
    assert options == Evaluation(model="runs/a", tasks=("x", "y"), few_shot=0, limit=7)


# ---- what is refused ----------------------------------------------------------------------------


def refused(message, *arguments, **options):
    with pytest.raises(InputError, match=message) as error:
        ask(*arguments, **options)
    assert "\n" not in str(error.value)


def test_what_cannot_be_evaluated(run, tasks, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tasks / "both.yaml"):
        refused("is neither the folder of a run .* nor that of a model", path, "choice")
    (tmp_path / "empty" / "recipe.yaml").touch()
    refused("^model: .*empty is not finished; .*--resume", tmp_path / "empty", "choice")
    weights = run / "model" / "model.safetensors"
    state = {name: x.clone() for name, x in load_file(weights).items()}
    write_sums(run / "model")
    weights.write_bytes(weights.read_bytes()[:1000])
    refused("^model: .*model.safetensors is damaged: ", run, "choice", include=tasks)
    (run / "model" / "checksums.json").unlink()
    refused("model cannot be loaded: ", run, "choice", include=tasks)
    state.pop("transformer.ln_f.weight")
    save_file(state, weights, {"format": "pt"})  # transformers would make up what is missing
    refused("model has no tensor 'transformer.ln_f.weight'", run, "choice", include=tasks)
    weights.unlink()
    refused("model cannot be loaded: .*model.safetensors", run / "model", "choice", include=tasks)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("nobody/nothing", "nofolder"):
        refused(f"^model: there is no .*'{name}' here", name, "choice", include=tasks)
    refused("^model: no such folder: ./nofolder", "./nofolder", "choice")


def test_options_that_cannot_be_used(run, tasks, tmp_path, monkeypatch):
    refused("include: no such folder: nowhere", run, "choice", include="nowhere")
    refused("device: 'xyz' cannot be used: ", run, "choice", include=tasks, device="xyz")
    for out in (tmp_path, tmp_path / "no" / "x.json"):
        refused("is a folder, or its folder does not exist", run, "choice", include=tasks, out=out)
    for name, value in (("limit", 0), ("few_shot", -1), ("batch", 0)):
        refused(f"{name}: .*, got {value}", run, "choice", **{name: value})
    refused("tasks: .*; --few-shot 7 may be more", run, "choice", include=tasks, few_shot=7)
    assert not (run / "eval.json").exists()
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    refused(r"lm-eval is not installed: pip install 'paceline\[eval\]'", run, "choice")


def test_tasks_that_cannot_be_made(run, tasks, tmp_path):
    task = yaml.safe_load((tasks / "choice.yaml").read_text())
    for message, change in (
        ("tasks: .*elsewhere.jsonl", {"dataset_kwargs": {"data_files": "elsewhere.jsonl"}}),
        ("tasks: .*undefined", {"doc_to_text": "{{a.b.c}}"}),
        ("tasks: .*invalid output_type", {"output_type": "telepathy"}),
    ):
        (tmp_path / "own.yaml").write_text(yaml.safe_dump(task | change))
        refused(message, run, "choice", include=tmp_path)


@pytest.mark.slow
def test_tasks_of_lm_eval(run, tasks, monkeypatch):
    """That are not known, or whose data cannot be had."""
    for name in ("datasets.config", "huggingface_hub.constants"):
        monkeypatch.setattr(f"{name}.HF_HUB_OFFLINE", True)
    for message, *names in (
        ("unknown task 'arc_eazy'; did you mean arc_easy", "choice", "arc_eazy"),
        ("unknown task 'chioce'; did you mean choice", "chioce"),
        ("unknown task '§'; lm-eval ls tasks lists them", "arc_easy", "§"),
        ("Couldn't reach 'allenai/ai2_arc' on the Hub.*; --include takes", "mixed"),
    ):
        refused(message, run, *names, include=tasks)


def test_a_chat_has_the_day_of_its_run(tmp_path):
    assert day_of(tmp_path) is None
    (tmp_path / "recipe.yaml").write_text("model: x\ndate: 2024-02-29\n")
    for path in (tmp_path, tmp_path / "model"):
        assert day_of(path) == datetime.date(2024, 2, 29)
