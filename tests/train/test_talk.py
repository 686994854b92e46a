"""`paceline chat`, and the samples of a run: each token is the one that scores highest."""

import io
import json
import shutil
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers")

import torch
from rich.console import Console
from training import go, lines, read, same, timeless, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from paceline.cli import main
from paceline.train import InputError, run, talk
from paceline.train.options import Chat
from paceline.train.talk import ANSWER, PROMPT, generate


def opened(folder):
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def greedy(model, tokenizer, ids, most):
    """Token by token over the whole sequence: no cache, no `generate`."""
    found = []
    for _ in range(most):
        token = int(model.eval()(torch.tensor([ids + found])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        found.append(token)
    return found


def asked(tokenizer, *turns):
    """The prompt of ChatML, written out; turns are the user's and the assistant's."""
    roles = ["user", "assistant"] * len(turns)
    text = "".join(f"<|im_start|>{a}\n{b}<|im_end|>\n" for a, b in zip(roles, turns, strict=False))
    return tokenizer(text + "<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]


def said(folder, *turns, most=8):
    model, tokenizer = opened(folder)
    found = greedy(model, tokenizer, asked(tokenizer, *turns), most)
    return tokenizer.decode(found, skip_special_tokens=True).strip("\n")


@pytest.fixture(scope="module")
def talker(finished, tmp_path_factory):
    """A run whose two models have large random weights, so that they have much to say."""
    run = shutil.copytree(finished, tmp_path_factory.mktemp("talker") / "run")
    for seed, name in enumerate(("model", "live")):
        model, _ = opened(run / name)
        rng = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for x in model.parameters():
                x.normal_(0, 0.5, generator=rng)
        model.save_pretrained(run / name)
        (run / name / "checksums.json").unlink()
    return run


@pytest.fixture(scope="module")
def early(surroundings, values, talker, tmp_path_factory):
    """A run from there, of two steps, after which its models still have much to say."""
    folder = tmp_path_factory.mktemp("early") / "run"
    start = {"model": str(talker / "model"), "config": None, "tokenizer": None}
    assert go(folder, values | start, steps=2, warmup=0, evaluations=1, lr=0.03)
    return folder


def shown(*answers):
    """Answers as they are printed: a line each, without what would steer a terminal."""
    text = "".join(f"{answer}\n" for answer in answers)
    return "".join(x if x == "\n" or x.isprintable() else "\ufffd" for x in text)


@pytest.fixture
def chat(monkeypatch, capsys):
    """The lines that come for lines through a pipe."""

    def call(text, *arguments, status=0):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        assert main(["chat", *map(str, arguments), "--device", "cpu"]) == status
        return capsys.readouterr().out

    return call


# ---- text from a model ------------------------------------------------------------------------


def test_it_says_the_most_probable_token_each_time_and_leaves_all_as_it_was(talker):
    model, tokenizer = opened(talker / "model")
    ids = asked(tokenizer, "why cat")
    wanted = greedy(model, tokenizer, ids, 12)
    model.generation_config.temperature = 7.0  # nothing of the model's own settings counts
    model.generation_config.do_sample = True
    own, before = model.generation_config, {k: x.clone() for k, x in model.state_dict().items()}
    model.train()
    state = torch.get_rng_state()
    assert generate(model, tokenizer, ids, 12) == wanted
    assert model.training
    assert model.generation_config is own
    assert same(model.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_end_of_text_ends_it_and_is_left_out(talker):
    model, tokenizer = opened(talker / "model")
    ids = asked(tokenizer, "why cat")
    first, *_ = greedy(model, tokenizer, ids, 1)
    model.generation_config.eos_token_id = [first]
    assert generate(model, tokenizer, ids, 12) == []


def test_the_last_position_is_the_last_token(talker):
    model, tokenizer = opened(talker / "model")
    model.config.max_position_embeddings = 20
    tokenizer.eos_token = None
    model.generation_config.eos_token_id = None
    assert len(generate(model, tokenizer, [5] * 17, 12)) == 3
    with pytest.raises(InputError, match="20 tokens fill the model's 20 positions; an empty line"):
        generate(model, tokenizer, [5] * 20, 12)


def test_a_temperature_draws_by_the_seed(chat, talker):
    hot = [chat("why\n", talker, "--temperature", 9, "--seed", seed) for seed in (0, 0, 1)]
    assert hot[0] == hot[1] != hot[2]


# ---- paceline chat ----------------------------------------------------------------------------


def test_each_line_is_a_turn_and_an_empty_one_begins_anew(chat, talker):
    first = said(talker / "model", "why cat")
    second = said(talker / "model", "why cat", first, "and dog")
    apart = said(talker / "model", "and dog")
    assert second != apart
    found = chat("why cat\nand dog\n\nand dog\n", talker, "--tokens", 8)
    assert found == shown(first, second, apart)


def test_a_full_context_is_one_line_and_an_empty_one_begins_anew(chat, talker):
    answer = said(talker / "model", "why cat")
    full = "why " * 5000
    found = chat(f"{full}\n\nwhy cat\n", talker, "--tokens", 8)
    assert found == shown(answer)


def test_live_answers_beside_returned_and_each_remembers_its_own(chat, talker):
    found = chat("why cat\nand dog\n", talker, "--live", "--tokens", 8)
    wanted = []
    for folder in ("model", "live"):
        first = said(talker / folder, "why cat")
        wanted.append([first, said(talker / folder, "why cat", first, "and dog")])
    pairs = zip(*wanted, strict=True)
    assert found == shown(*(x for a, b in pairs for x in (f"returned: {a}", f"live:     {b}")))


def test_without_a_template_it_continues_the_text(chat, talker, tmp_path):
    copied = shutil.copytree(talker, tmp_path / "run")
    for path in (copied / "model").glob("chat_template*"):
        path.unlink()
    model, tokenizer = opened(copied / "model")
    assert tokenizer.chat_template is None
    wanted = greedy(model, tokenizer, tokenizer("the cat")["input_ids"], 8)
    text = tokenizer.decode(wanted, skip_special_tokens=True).strip("\n")
    assert chat("the cat\nthe cat\n", copied, "--tokens", 8) == shown(text, text)


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (
            lambda run: shutil.rmtree(run / "model"),
            {},
            "not finished; .*--resume .* or take .*/checkpoint-12$",
        ),
        (lambda run: shutil.rmtree(run), {}, "neither the folder of a run nor that of a model"),
        (lambda run: (run / "recipe.yaml").unlink(), {}, "neither the folder"),
        (
            lambda run: (run / "live" / "model.safetensors").write_bytes(b"x"),
            {"live": True},
            "model.safetensors",
        ),
    ],
    ids=["unfinished", "none", "no recipe", "damaged"],
)
def test_what_cannot_be_talked_to_is_one_line(spoil, options, message, copied):
    spoil(copied)
    with pytest.raises(InputError, match=message):
        talk.talk(Chat(run=copied, **options), Console(quiet=True))


def test_a_model_alone_has_no_live_weights(chat, talker):
    assert chat("why cat\n", talker / "model", "--tokens", 8) == shown(
        said(talker / "model", "why cat")
    )
    with pytest.raises(InputError, match="live: .* is no run"):
        talk.talk(Chat(run=talker / "model", live=True), Console(quiet=True))


# ---- samples of a run -------------------------------------------------------------------------


def test_the_samples_are_what_the_saved_models_say_to_held_out_prompts(early):
    found = read(early / "samples.json")["greedy"]
    assert len(found) == 3
    _, tokenizer = opened(early / "model")
    models = {name: opened(early / x)[0] for name, x in (("returned", "model"), ("live", "live"))}
    page = (early / "report.html").read_text()
    for sample in found:
        assert sample["prompt"].startswith("user\n")
        assert sample["prompt"].endswith("assistant")
        question = sample["prompt"].removeprefix("user\n").removesuffix("\nassistant").strip()
        ids = asked(tokenizer, question)
        assert len(ids) <= PROMPT
        for name, model in models.items():
            wanted = tokenizer.decode(
                greedy(model, tokenizer, ids, ANSWER), skip_special_tokens=True
            )
            assert sample[name] == wanted.strip("\n")
            assert sample[name] in page
        assert 0 < len(tokenizer(sample["data"])["input_ids"]) <= ANSWER
        assert sample["returned"]
    assert any(sample["live"] != sample["returned"] for sample in found)
    assert f"paceline chat {early}" in page
    assert "AutoModelForCausalLM.from_pretrained" in page


def test_samples_change_nothing_of_a_run(surroundings, finished, values, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "samples", lambda *_: [])
    assert go(tmp_path / "without", values)
    assert read(tmp_path / "without" / "samples.json") == {"greedy": []}
    assert timeless(lines(tmp_path / "without")) == timeless(lines(finished))
    for name in ("model", "live"):
        assert same(weights(tmp_path / "without" / name), weights(finished / name))
    assert "What it says" not in (tmp_path / "without" / "report.html").read_text()


def test_a_model_that_cannot_generate_costs_no_run(monkeypatch, capfd):
    def fails(*_):
        raise RuntimeError("no\nroom")

    monkeypatch.setattr(talk, "_prompts", fails)
    trainer = SimpleNamespace(processing_class=None, model=None)
    assert talk.samples(trainer, SimpleNamespace(fsdp=False)) == []
    said = capfd.readouterr().err
    assert said == "paceline: the report has no samples: RuntimeError: no room\n"


def test_what_a_model_says_is_no_markup(copied, monkeypatch):
    from paceline.train import page
    from paceline.train.recipe import Recipe, read_recipe

    evil = dict.fromkeys(("prompt", "data", "live", "returned"), "<script>alert(1)</script>")
    (copied / "samples.json").write_text(json.dumps({"greedy": [evil]}))
    monkeypatch.setattr(page, "svg", lambda figure: "")
    recipe = Recipe(**read_recipe(str(copied / "recipe.yaml")))
    rows = lines(copied)
    page.write_page(recipe, rows, {"verdict": "higher"}, read(copied / "manifest.json"), copied)
    text = (copied / "report.html").read_text()
    assert "<script>alert" not in text
    assert text.count("&lt;script&gt;") == 4
