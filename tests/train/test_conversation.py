"""What a row says besides role and content: reaches the template, is obeyed, or is refused."""

import json
import re

import pytest

pytest.importorskip("transformers")

from conversing import assistant, system, talk, user

from paceline.train import InputError
from paceline.train.conversation import conversation_of, text_of

CALL = [{"id": "a", "type": "function", "function": {"name": "look", "arguments": "{}"}}]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


def converted(row):
    found = conversation_of(row, "x.jsonl, row 7")
    conversation = json.loads(found.text)
    assert conversation.pop("at") == "x.jsonl, row 7"
    return conversation, found.ignored


def marked(**mark):
    return {"messages": [user("Q"), {**assistant("WRONG"), **mark}, user("Q"), assistant("Right")]}


# ---- what reaches the template ---------------------------------------------------------------


def test_calls_of_tools_reach_it():
    call = {"role": "assistant", "content": None, "tool_calls": CALL, "refusal": None}
    result = {"role": "tool", "content": "7", "tool_call_id": "a", "name": "look"}
    messages = [user("Seven?"), call, result, assistant("Yes.")]
    given = {**assistant(""), "tool_calls": CALL}
    found, _ = converted({"messages": messages, "tools": json.dumps([TOOL])})
    assert found == {"messages": [messages[0], given, *messages[2:]], "tools": [TOOL]}
    found, _ = converted({"messages": messages[:2], "tools": [json.dumps(TOOL)]})
    assert found == {"messages": [messages[0], given], "tools": [TOOL]}


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_reaches_it(name):
    turn = {**assistant("Yes."), name: "Well ..."}
    assert converted({"messages": [user("Q"), turn]})[0]["messages"] == [user("Q"), turn]


def test_what_is_beside_the_turns_reaches_it():
    extras = {"documents": [{"title": "a", "text": "b"}], "chat_template_kwargs": {"think": True}}
    assert converted({"messages": talk(1), **extras})[0] == {"messages": talk(1), **extras}
    for form in (
        {"messages": talk(1)},
        {"prompt": talk(1)[0]["content"], "completion": talk(1)[1]["content"]},
        {
            "conversations": [
                {"from": "human", "value": "question 1"},
                {"from": "gpt", "value": "answer 1"},
            ]
        },
    ):
        expected = {"messages": [system("Be brief."), *talk(1)]}
        for name in ("system", "system_prompt", "system_message"):
            assert converted({**form, name: "Be brief."})[0] == expected
    assert converted({**expected, "system": "Be brief."})[0] == expected  # said twice


def test_instruction_input_and_output_are_a_prompt_and_a_completion():
    row = {"instruction": "Add.", "input": "1 and 2", "output": "3", "text": "all of it"}
    found, ignored = converted(row)
    assert found == {"messages": [user("Add.\n\n1 and 2"), assistant("3")]}
    assert ignored == ["text"]
    for nothing in ({}, {"input": ""}, {"input": None}):
        found, _ = converted({"instruction": "Hi.", "output": "Hello.", **nothing})
        assert found == {"messages": [user("Hi."), assistant("Hello.")]}
    told, _ = converted({**row, "system": "Be brief."})
    assert told["messages"][0] == system("Be brief.")
    empty = conversation_of({"instruction": "Hi.", "output": None}, "")
    assert empty.left_out == "output is empty"
    # Where a row has turns, these columns say something that is not known.
    with pytest.raises(InputError, match="'instruction' cannot be obeyed"):
        converted({"prompt": "a", "completion": "b", "instruction": "c", "output": "d"})


def test_content_may_be_parts_of_text():
    parts = [{"type": "text", "text": "1 +"}, {"type": "text", "text": " 1", "image_url": None}]
    found, _ = converted({"messages": [user(parts), assistant([{"type": "text", "text": "2"}])]})
    assert found == {"messages": [user("1 + 1"), assistant("2")]}


@pytest.mark.parametrize("name", ["tool_calls", "reasoning_content", "reasoning", "thinking"])
def test_content_may_be_null_beside_what_is_said_otherwise(name):
    said = CALL if name == "tool_calls" else "Well ..."
    for turn in ({"role": "assistant", "content": None}, {"role": "assistant"}):
        found, _ = converted({"messages": [user("Q"), {**turn, name: said}]})
        assert found["messages"][1] == {"role": "assistant", "content": "", name: said}


# ---- what is obeyed --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mark",
    [
        *({name: 0} for name in ("weight", "loss", "loss_mask")),
        *({name: False} for name in ("train", "training", "trainable", "learn", "train_on_turn")),
        {"weight": 0.0},
        {"loss": False},
        {"masked": True},
    ],
    ids=str,
)
def test_marks_of_turns_are_obeyed(mark):
    assert converted(marked(**mark))[0] == {**marked(), "skip": [1]}
    ((name, value),) = mark.items()
    assert converted(marked(**{name: not value}))[0] == marked()
    assert converted(marked(**{name: None}))[0] == marked()
    with pytest.raises(InputError, match=f"^data: x.jsonl, row 7: {name} must be 0 or 1.* got 0.5"):
        converted(marked(**{name: 0.5}))
    of_row = conversation_of({**marked(), **mark}, "")
    assert of_row.left_out == "it is marked as not to be learned"


def test_of_a_prompt_nothing_is_learned():
    turns = [*talk(1), *talk(2)]
    row = {"prompt": turns[:3], "completion": turns[3:]}
    assert converted(row)[0] == {"messages": turns, "skip": [1]}
    assert converted({**row, "completion": "answer 2"})[0] == {"messages": turns, "skip": [1]}
    told = {"messages": [system("Be brief."), *turns], "skip": [2]}
    assert converted({**row, "system": "Be brief."})[0] == told
    only = conversation_of({"prompt": turns, "completion": turns[:1]}, "")
    assert only.left_out == "the assistant says nothing that is to be learned"


@pytest.mark.parametrize("label", [False, "False"])
def test_undesirable_completions_are_left_out(label):
    row = {"prompt": "a", "completion": "b"}
    assert conversation_of({**row, "label": label}, "").text is None
    assert converted({**row, "label": True}) == converted({**row, "label": 1})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": None}, "messages is empty"),
        ({"prompt": "a", "completion": None}, "completion is empty"),
        ({"prompt": None, "completion": "b"}, "prompt is empty"),
        ({"prompt": "", "completion": "b"}, "prompt is empty"),
        ({"messages": talk(1)[:1]}, "the assistant says nothing that is to be learned"),
        ({"messages": [user("Q"), {**assistant("A"), "weight": 0}]}, "the assistant says nothing"),
        ({"text": "a", "id": 3}, "it has none of the columns messages, .*, only text, id"),
    ],
)
def test_reasons_to_leave_out(row, reason):
    found = conversation_of(row, "")
    assert found.text is None
    assert re.match(reason, found.left_out)


def test_what_is_about_a_row_or_a_message_is_ignored_aloud():
    rows = [{**m, "id": 3, "timestamp": "now", "audio": None} for m in talk(1)]
    found, ignored = converted({"messages": rows, "source": "x", "chosen": ["y"], "rejected": []})
    assert found == {"messages": talk(1)}
    assert ignored == ["chosen", "messages.id", "messages.timestamp", "source"]


# ---- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"messages": [user("Q"), {**assistant("A"), "function_call": {"name": "f"}}]},
            "unknown key 'function_call' in a m",
        ),
        ({"messages": [user("Q"), {**assistant("A"), "refusal": "No."}]}, "unknown key 'refusal'"),
        ({"messages": [user("Q"), {**assistant("A"), "mask": 1}]}, "unknown key 'mask'"),
        ({"messages": [user("Q"), {**assistant("A"), "prefix": True}]}, "unknown key 'prefix'"),
        ({"messages": talk(1), "images": ["a.png"]}, "'images' cannot be obeyed"),
        ({"messages": talk(1), "functions": [{"name": "f"}]}, "'functions' cannot be obeyed"),
        ({"messages": talk(1), "weight": 0.3}, "weight must be 0 or 1"),
        (
            {"messages": [system("a"), *talk(1)], "system": "b"},
            "it has 'system' and another system turn",
        ),
        ({"messages": talk(1), "system": ["b"]}, "system must be text"),
        (
            {"messages": talk(1), "system": "b", "system_prompt": "c"},
            "it has 'system_prompt' and another",
        ),
        ({"messages": talk(1), "tools": "look at this"}, "tools is not JSON"),
        ({"messages": talk(1), "tools": {"look": 1}}, "tools must be a list"),
        ({"messages": talk(1), "tools": [["look"]]}, "tools must hold objects"),
        (
            {"messages": [user("Q"), {**assistant("A"), "tool_calls": "x"}]},
            "tool_calls is not JSON",
        ),
        ({"messages": [user("Q"), {**assistant("A"), "thinking": ["x"]}]}, "thinking must be text"),
        (
            {"messages": [user("Q"), {**assistant("A"), "role": ["assistant"]}]},
            "a message needs a role",
        ),
        ({"messages": [user("Q"), {**assistant("A"), "weight": [0]}]}, "weight must be 0 or 1"),
        ({"messages": [user("Q"), assistant("\ud800")]}, "it is nested too deeply, or its text"),
        ({"prompt": "a", "completion": "b", "context": "c"}, "'context' cannot be obeyed"),
        (
            {"instruction": "a", "output": "b", "history": [["c", "d"]]},
            "'history' cannot be obeyed",
        ),
        ({"instruction": "a", "output": "b", "prompt": "c"}, "'prompt' beside instruction and out"),
        ({"instruction": "a", "output": ["b"]}, "output must be text, got"),
        (
            {"messages": [user([{"type": "image_url", "image_url": "a"}]), assistant("b")]},
            "content must be text, got the part {'type': 'image_url'",
        ),
        ({"messages": [user(["a"]), assistant("b")]}, "content must be text, got the part 'a'"),
        ({"messages": [user("a"), assistant(None)]}, "content must be text, got None"),
        (
            {"messages": [{"role": "user", "from": "gpt", "content": "a"}]},
            "a message has a key in two",
        ),
        (["messages"], "expected an object of columns, got"),
    ],
)
def test_anything_else_is_refused_by_name_and_row(row, message):
    with pytest.raises(InputError, match=f"^data: x.jsonl, row 7: {message}"):
        converted(row)


def test_json_in_a_text_is_read_as_json_is():
    for text, reason in (('[{"name": 1, "name": 2}]', "a key is given twice"), ("[NaN]", "NaN is")):
        with pytest.raises(InputError, match=f"^data: row 7: tools is not JSON: {reason}"):
            conversation_of({"messages": talk(1), "tools": text}, "row 7")


def test_deep_values_are_one_line():
    deep = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(InputError, match="row 7: it is nested too deeply"):
        converted({"messages": talk(1), "documents": [{"text": deep}]})


def test_texts():
    assert text_of({"text": "None", "id": 1}, "", "text") == ("None", None, ["id"])
    assert text_of({"text": None}, "", "text").left_out == "text is empty"
    assert text_of({"body": "a"}, "", "text").left_out.startswith("it has no column 'text', only b")
    with pytest.raises(InputError, match="^data: row 1: its text is broken"):
        text_of({"text": "\udc00"}, "row 1", "text")
