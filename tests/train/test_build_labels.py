"""The labels of a run, from the masks of its conversations."""

import re
from pathlib import Path

import datasets
import pytest

pytest.importorskip("transformers")


from conversing import (
    CONVERSATIONS,
    EXPECTED,
    MARKED,
    MESSAGES,
    UNMARKED,
    assistant,
    chatml,
    in_brackets,
    talk,
    user,
    write_lines,
    write_texts,
)

from paceline.train import InputError, build
from paceline.train.build import build_trainer
from paceline.train.chat import conversation_encoder
from paceline.train.recipe import Recipe

pytestmark = pytest.mark.usefixtures("folder", "quiet")


TINY = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
}


def built(folder, **changes):
    values = {"config": TINY, "tokenizer": "bpe", "vocabulary": 300, "context": 256, "batch": 2}
    values |= {"steps": 1, "report_to": ("none",), **changes}
    return build_trainer(Recipe(**values), folder / "run")


def labels_of(trainer, rows):
    """Token ids and labels as the model gets them, padding left out."""
    batch = trainer.data_collator(rows)
    for ids, labels, real in zip(
        batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True
    ):
        assert (labels[real == 0] == -100).all()
        yield ids[real == 1].tolist(), labels[real == 1].tolist()


def bracketed(trainer, ids, labels):
    assert all(label in (-100, i) for i, label in zip(ids, labels, strict=True))
    mask = [int(label != -100) for label in labels]
    return in_brackets(trainer.processing_class, {"input_ids": ids, "assistant_masks": mask})


def test_labels_are_the_masks(tmp_path):
    talks = list(CONVERSATIONS.values())
    write_lines("x.jsonl", [{"messages": messages} for messages in talks])
    write_lines("y.jsonl", [{"messages": talk(1)}] * 2)
    trainer = built(tmp_path, data=("x.jsonl",), eval_data=("y.jsonl",), batch=1)
    for rows, expected in ((trainer.train_dataset, talks), (trainer.eval_dataset, [talk(1)] * 2)):
        found = [bracketed(trainer, *row) for row in labels_of(trainer, list(rows))]
        assert found == list(map(chatml, expected))


@pytest.mark.parametrize("context", [24, 30, 33])
def test_labels_are_cut_at_the_context(tmp_path, context):
    messages = [*talk(1), user("b"), assistant("hello there " * 30)]
    write_lines("x.jsonl", [{"messages": messages}] * 4)
    trainer = built(tmp_path, data=("x.jsonl",), context=context)
    encoded = conversation_encoder(trainer.processing_class)(messages)
    ((ids, labels),) = labels_of(trainer, [trainer.train_dataset[0]])
    assert ids == encoded["input_ids"][:context]
    mask = encoded["assistant_masks"][:context]
    assert labels == [i if m else -100 for i, m in zip(ids, mask, strict=True)]


def test_first_tokens_are_not_labels(tmp_path):
    Path("all.jinja").write_text(
        "{% for m in messages %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}"
        "{% endfor %}"
    )
    write_lines("x.jsonl", MESSAGES)
    trainer = built(tmp_path, data=("x.jsonl",), chat_template="all.jinja")
    rows = [trainer.train_dataset[i] for i in range(4)]
    for ids, labels in labels_of(trainer, rows):
        assert labels == [-100, *ids[1:]]


def test_rows_of_which_nothing_is_left_are_left_out(tmp_path, capsys):
    silent = [user("b " * 200), assistant("never")]
    write_lines("x.jsonl", [*MESSAGES, {"messages": silent}, {"messages": silent}])
    write_lines("y.jsonl", [{"messages": silent}, *MESSAGES[:3]])
    trainer = built(tmp_path, data=("x.jsonl",), eval_data=("y.jsonl",), context=64)
    assert len(trainer.train_dataset) == 20
    assert len(trainer.eval_dataset) == 3
    said = capsys.readouterr().err
    longer = "longer than the context, with nothing to learn within it"
    assert said == (
        f"paceline: data: kept 20 of 22 conversations to train on, context 64: 2 {longer}\n"
        f"paceline: data: kept 3 of 4 conversations to evaluate on, context 64: 1 {longer}\n"
    )
    write_lines("x.jsonl", [{"messages": silent}] * 4)
    with pytest.raises(
        InputError, match="^data: no conversation to train on in x.jsonl has any.* 64 tokens;"
    ):
        built(tmp_path, data=("x.jsonl",), context=64)


def test_what_a_template_refuses_is_a_bad_row_too(tmp_path, capsys):
    Path("strict.jinja").write_text(
        "{% for m in messages %}{% if 'no' in m.content %}{{ raise_exception('No no.') }}"
        "{% endif %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% endfor %}"
    )
    refused = {"messages": [user("no"), assistant("x")]}
    write_lines("x.jsonl", [*MESSAGES, refused])
    write_lines("y.jsonl", MESSAGES[:3])
    given = {"data": ("x.jsonl",), "eval_data": ("y.jsonl",), "chat_template": "strict.jinja"}
    with pytest.raises(InputError, match=r"No no\. \(x.jsonl, line 21\); --skip-bad-rows leaves"):
        built(tmp_path, **given)
    trainer = built(tmp_path, **given, skip_bad_rows=True)
    assert len(trainer.train_dataset) == 20
    assert capsys.readouterr().err == (
        "paceline: data: x.jsonl: kept 20 of 21 rows: 1 left out because chat_template: No no. "
        "(the first: x.jsonl, line 21)\n"
    )


def test_what_is_cut_off_is_said(tmp_path, capsys):
    long = {"messages": [user("a"), assistant("b " * 200)]}
    write_lines("x.jsonl", [*MESSAGES[1:], long])
    write_lines("y.jsonl", MESSAGES[:3])
    built(tmp_path, data=("x.jsonl",), eval_data=("y.jsonl",), context=64)
    assert capsys.readouterr().err == (
        "paceline: data: kept 20 of 20 conversations to train on, context 64: 1 longer than the "
        "context, and cut off there\n"
    )


def test_turns_that_are_marked_are_not_learned(tmp_path):
    wrong = {**assistant("hello there"), "weight": 0}
    messages = [user("a"), wrong, user("b"), {**assistant("c"), "weight": 1}]
    write_lines("x.jsonl", [{"messages": messages}] * 4)
    trainer = built(tmp_path, data=("x.jsonl",))
    ((ids, labels),) = labels_of(trainer, [trainer.train_dataset[0]])
    said = bracketed(trainer, ids, labels)
    assert said == chatml([user("a"), assistant("hello there"), user("b"), assistant("c")]).replace(
        "⟦hello there<|im_end|>⟧", "hello there<|im_end|>"
    )


@pytest.mark.parametrize("template", ["chatml", MARKED, UNMARKED], ids=["chatml", "marked", "not"])
def test_a_chat_template_of_ones_own(tmp_path, template):
    Path("own.jinja").write_text(template)
    write_lines("x.jsonl", MESSAGES)
    given = "chatml" if template == "chatml" else "own.jinja"
    trainer = built(tmp_path, data=("x.jsonl",), eval_data=("x.jsonl",), chat_template=given)
    ((ids, labels),) = labels_of(trainer, [trainer.train_dataset[0]])
    expected = EXPECTED.get(template, chatml)(talk(0))
    assert bracketed(trainer, ids, labels) == expected


def test_labels_of_text_are_all_but_the_first(tmp_path):
    write_texts("texts", 60)
    trainer = built(tmp_path, task="pretrain", data=("texts",), context=16)
    rows = list(trainer.train_dataset)
    said = []
    for ids, labels in labels_of(trainer, rows):
        assert labels == [-100, *ids[1:]]
        assert len(ids) == 16 or len(said) + len(ids) == sum(len(r["input_ids"]) for r in rows)
        said += ids
    texts = trainer.processing_class.decode(said).split("<|endoftext|>")
    assert len(texts) > 40
    assert all(re.fullmatch(r"text \d+", text) for text in texts[:-1])
    assert len(set(texts)) == len(texts)


def test_a_stream_says_once_that_it_leaves_out_what_is_not_learned(capfd):
    rows = [{"input_ids": [1] * 9, "assistant_masks": [0] * i + [1]} for i in range(9)]
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset()
    assert len(list(build._within(stream, 4, "to train on", "x"))) == 3
    assert capfd.readouterr().err == (
        "paceline: data: conversations to train on are left out that have nothing to learn within "
        "the context of 4 tokens\n"
    )
