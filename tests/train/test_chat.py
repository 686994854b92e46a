"""Which tokens of a conversation are learned."""

import datetime
import functools
import io
import json
import re

import pytest

pytest.importorskip("transformers")

from conversing import (
    CONVERSATIONS,
    EXPECTED,
    MARKED,
    QWEN3,
    TEMPLATES,
    UNMARKED,
    assistant,
    chatml,
    in_brackets,
    system,
    talk,
    user,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from paceline.train import InputError
from paceline.train.chat import CHATML, END, START, conversation_encoder, show_example, use_chatml
from paceline.train.data import make_tokenizer

pytestmark = pytest.mark.usefixtures("folder", "quiet")

# It marks the last turn, and so no turn is written the same when others follow.
LAST = """\
{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\\n' + m.content + ('!' if loop.last else '') -}}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

GEMMA3 = (TEMPLATES / "gemma3.jinja").read_text(encoding="utf-8")


@functools.cache
def encoder_of(template):
    """A tokenizer with this template, and what encodes with it."""
    tokenizer = tokenizer_of(template)
    return tokenizer, conversation_encoder(tokenizer)


def tokenizer_of(template):
    """A byte-level tokenizer with a few merges, and none across a line."""
    tokenizer = make_tokenizer(["hello there, hello user", "a b c d", "question answer"] * 9, 300)
    if template == CHATML:
        use_chatml(tokenizer)
    else:
        special = [START, END, "<start_of_turn>", "<end_of_turn>"]
        tokenizer.add_special_tokens({"additional_special_tokens": special})
        tokenizer.chat_template = template
    return tokenizer


IDS = ["chatml", "unmarked", "marked", "qwen3"]


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("template", EXPECTED, ids=IDS)
def test_what_the_assistant_says_is_learned_and_nothing_else(template, name):
    messages = CONVERSATIONS[name]
    tokenizer, encode = encoder_of(template)
    assert in_brackets(tokenizer, encode(messages)) == EXPECTED[template](messages)


def test_masks_of_one_conversation_in_full():
    tokenizer = tokenizer_of(CHATML)
    encoded = conversation_encoder(tokenizer)([user("a"), assistant("b c")])
    named = [tokenizer.convert_ids_to_tokens(i) for i in encoded["input_ids"]]
    learned = [name for name, m in zip(named, encoded["assistant_masks"], strict=True) if m]
    assert learned == ["b", "Ġc", "<|im_end|>"]
    assert named[-4:] == ["b", "Ġc", "<|im_end|>", "Ċ"]


def test_gemma_as_trl_knows_it():
    tokenizer = tokenizer_of(GEMMA3)
    encode = conversation_encoder(tokenizer)
    assert in_brackets(tokenizer, encode([system("Be brief."), *talk(1)])) == (
        "<|endoftext|><start_of_turn>user\nBe brief.\n\nquestion 1<end_of_turn>\n"
        "<start_of_turn>model\n⟦answer 1<end_of_turn>\n⟧"
    )
    with pytest.raises(InputError, match="^chat_template: Conversation roles must alternate"):
        encode([*talk(1), *talk(2)[1:]])


ROLES = st.sampled_from(["system", "user", "assistant"])

MESSAGE = st.fixed_dictionaries({"role": ROLES, "content": st.text(max_size=12)})


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=st.lists(MESSAGE, min_size=1, max_size=6))
def test_any_conversation(messages):
    for template in (CHATML, UNMARKED):
        tokenizer, encode = encoder_of(template)
        assert in_brackets(tokenizer, encode(messages)) == EXPECTED[template](messages)


def test_a_token_across_the_border_is_learned():
    """Where no special token is between header and text, as in `assistant: hello`."""
    template = UNMARKED.replace("<|im_start|>", "").replace("\\n' + m", ": ' + m")
    template = template.replace("assistant\\n", "assistant: ")
    tokenizer = tokenizer_of(template)
    encoded = conversation_encoder(tokenizer)([user("hello"), assistant("hello there")])
    assert in_brackets(tokenizer, encoded).endswith("assistant:⟦ hello there<|im_end|>⟧\n")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (LAST, "the tokenizer's template writes a turn differently when others follow"),
        (LAST.replace("if loop.last", "if loop.last and m.role == 'assistant'"), "the tokenizer's"),
        (UNMARKED.replace("<|im_start|>assistant", "<|im_start|>bot"), "the tokenizer's template"),
        ("{% for %}", "Expected an expression"),
        (
            "{% for m in mesages %}{{ m.content }}{% endfor %}",
            "it leaves out or does not mark the assistant's turns",
        ),
        ("hello", "it leaves out or does not mark the assistant's turns"),
        ("", "it leaves out or does not mark the assistant's turns"),
        (
            MARKED.replace("== 'assistant'", "== 'bot'"),
            "it leaves out or does not mark the assistant's turns",
        ),
        ("{{ raise_exception('not\nme') }}", "not me"),
        ("{{ messages[9].content + 'x' }}", ""),
    ],
)
def test_templates_that_cannot_be_used(template, message):
    with pytest.raises(InputError, match=f"^chat_template: {message}") as error:
        conversation_encoder(tokenizer_of(template))
    assert "\n" not in str(error.value)


def test_how_to_do_without_such_a_template():
    with pytest.raises(
        InputError,
        match=r"--chat-template FILE with {% generation %} marks, or --chat-template chatml$",
    ):
        conversation_encoder(tokenizer_of(LAST))
    tokenizer = tokenizer_of(LAST)
    use_chatml(tokenizer)
    encoded = conversation_encoder(tokenizer)(talk(1))
    assert in_brackets(tokenizer, encoded) == chatml(talk(1))


def test_chatml_ends_turns_and_texts_with_the_same_token():
    plain = make_tokenizer(["hello"], 300)
    plain.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    size = len(plain)
    use_chatml(plain)
    assert plain.eos_token == END
    assert len(plain) == size + 2
    use_chatml(plain)  # once is enough
    assert len(plain) == size + 2
    assert plain.bos_token == "<|endoftext|>"
    assert {"<|tool|>", START, END} <= set(plain.all_special_tokens)
    asked = plain.apply_chat_template([user("q")], tokenize=False, add_generation_prompt=True)
    assert asked == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("color", [None, "standard"])
def test_shown_is_what_is_learned(color):
    tokenizer = tokenizer_of(CHATML)
    messages = [user("🦊 [bold]?[/bold]"), assistant("[red]🦊"), user("b"), assistant("")]
    encoded = conversation_encoder(tokenizer)(messages)
    ids = encoded["input_ids"]
    labels = [i if m else -100 for i, m in zip(ids, encoded["assistant_masks"], strict=True)]
    output = io.StringIO()
    console = Console(file=output, width=500, color_system=color, force_terminal=color is not None)
    show_example(tokenizer, ids, labels, console)
    said = output.getvalue()
    if color:
        said = re.sub("\x1b\\[2m(.*?)\x1b\\[0m", r"\1", said, flags=re.DOTALL)
        said = re.sub("\x1b\\[1;32m(.*?)\x1b\\[0m", r"⟦\1⟧", said, flags=re.DOTALL)
    assert said == chatml(messages) + "\n"


# ---- more than text ----------------------------------------------------------------------------

CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}
TOOL = {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {}}}
CALLING = [
    user("Blue?"),
    {**assistant(""), "tool_calls": [CALL]},
    {"role": "tool", "content": "blue", "tool_call_id": "a", "name": "look"},
    assistant("Yes."),
]


def test_calls_and_tools_are_written_and_calls_are_learned():
    tokenizer, encode = encoder_of(QWEN3)
    said = in_brackets(tokenizer, encode(CALLING, tools=[TOOL]))
    call = '<tool_call>\n{"name": "look", "arguments": {"at": "sky"}}\n</tool_call><|im_end|>'
    assert call in said.partition("⟦")[2].partition("⟧")[0]
    assert json.dumps(TOOL) in said.partition("⟦")[0]
    assert "<tool_response>\nblue\n</tool_response>" in said
    assert said.endswith("Yes.<|im_end|>\n⟧")


def trl_encoder(name):
    return encoder_of((TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["qwen2_5", "llama3_1", "gptoss", "lfm2_v2", "deepseekv3"])
def test_arguments_of_calls_may_be_text_or_objects(name):
    """OpenAI's data have them as JSON in a text, which many templates would quote again."""
    tokenizer, encode = trl_encoder(name)
    said = []
    for arguments in ({"at": "sky"}, '{"at": "sky"}'):
        call = {**CALL, "function": {"name": "look", "arguments": arguments}}
        turns = [user("Blue?"), {**assistant(""), "tool_calls": [call]}, *CALLING[2:]]
        said.append(in_brackets(tokenizer, encode(turns)))
    assert said[0] == said[1]
    assert "sky" in said[0].partition("⟦")[2]
    assert '\\"at' not in said[0]
    assert "'at'" not in said[0]


def test_arguments_that_are_not_json_are_refused():
    call = {**CALL, "function": {"name": "look", "arguments": "{at: sky"}}
    with pytest.raises(InputError, match=r"^the arguments of a call are not JSON: .* \(x, row 3\)"):
        trl_encoder("qwen2_5")[1](
            [user("Q"), {**assistant(""), "tool_calls": [call]}], at="x, row 3"
        )


LATE = [*talk(1), system("Late."), *talk(2)]
TWO = {**CALLING[1], "tool_calls": [CALL, {**CALL, "function": {"name": "b", "arguments": {}}}]}


@pytest.mark.parametrize(
    ("name", "messages", "lost"),
    [
        ("llama3_1", [user("Q"), {**CALLING[1], "content": "I look."}, *CALLING[2:]], "content"),
        ("gptoss", LATE, "content of turn 2 (system)"),
        ("gptoss", [user("Q"), TWO], "last of the tool_calls of turn 1 (assistant)"),
    ],
)
def test_what_is_left_out_of_one_conversation_is_refused(name, messages, lost):
    with pytest.raises(InputError) as error:
        trl_encoder(name)[1](messages, at="x.jsonl, row 3")
    assert f"data: x.jsonl, row 3: the chat template does not write the {lost}" in str(error.value)


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_written_and_learned(name):
    tokenizer, encode = encoder_of(QWEN3)
    said = in_brackets(tokenizer, encode([user("Q"), {**assistant("A"), name: "Well"}]))
    assert said.endswith("⟦<think>\nWell\n</think>\n\nA<|im_end|>\n⟧")


KNOWS_NO_SYSTEM = UNMARKED.replace("in messages -%}", "in messages if m.role != 'system' -%}")


@pytest.mark.parametrize(
    ("template", "messages", "extras", "lost"),
    [
        (CHATML, CALLING, {}, "tool_calls"),
        (CHATML, talk(1), {"tools": [TOOL]}, "tools"),
        (MARKED, CALLING[:2], {"tools": [TOOL]}, "tool_calls, tools"),
        (CHATML, [user("Q"), {**assistant("A"), "thinking": "Well"}], {}, "thinking"),
        (QWEN3, [{**user("Q"), "name": "Ann"}, assistant("A")], {}, "name"),
        (QWEN3, talk(1), {"documents": [{"text": "x"}]}, "documents"),
        (QWEN3, talk(1), {"chat_template_kwargs": {"thinks": 1}}, "thinks"),
        (KNOWS_NO_SYSTEM, [system("x"), *talk(1)], {}, "the turn of system"),
        (
            CHATML.replace("in messages", "in messages if message.role != 'tool'"),
            [*CALLING[2:]],
            {},
            "the turn of tool",
        ),
    ],
)
def test_what_a_template_does_not_write_is_refused_by_name(template, messages, extras, lost):
    _, encode = encoder_of(template)
    with pytest.raises(InputError) as error:
        encode(messages, at="x.jsonl, row 3", **extras)
    assert str(error.value).startswith(
        f"data: x.jsonl, row 3: the chat template does not write {lost}; give --chat-template FILE"
    )


@pytest.mark.parametrize("template", EXPECTED, ids=IDS)
def test_turns_to_skip_are_not_learned(template):
    tokenizer, encode = encoder_of(template)
    messages = [
        user("a"),
        assistant("WRONG"),
        user("b"),
        assistant("right"),
        user("c"),
        assistant("no"),
    ]
    said = in_brackets(tokenizer, encode(messages, skip=[1, 5]))
    whole = in_brackets(tokenizer, encode(messages))
    assert said.replace("⟦", "").replace("⟧", "") == whole.replace("⟦", "").replace("⟧", "")
    (learned,) = re.findall("⟦(.*?)⟧", said, flags=re.DOTALL)
    assert learned in whole
    assert "right" in learned


def test_settings_of_the_template_reach_it():
    template = CHATML + "{{ 'loud' if loud }}"
    tokenizer, encode = encoder_of(template)
    said = in_brackets(tokenizer, encode(talk(1), chat_template_kwargs={"loud": True}))
    assert said == chatml(talk(1)) + "loud"


def test_named_templates():
    tokenizer = tokenizer_of(CHATML)
    tokenizer.chat_template = {"default": CHATML, "tool_use": QWEN3}
    encode = conversation_encoder(tokenizer)
    assert in_brackets(tokenizer, encode(talk(1))) == chatml(talk(1))
    assert json.dumps(TOOL) in tokenizer.decode(encode(CALLING, tools=[TOOL])["input_ids"])
    tokenizer.chat_template = {"rag": CHATML}
    with pytest.raises(InputError, match="^chat_template: none of rag is the default"):
        conversation_encoder(tokenizer)


def test_the_day_is_given():
    template = "{{ strftime_now('%d %b') }}" + CHATML
    tokenizer = tokenizer_of(CHATML)
    tokenizer.chat_template = template
    encode = conversation_encoder(tokenizer, datetime.date(2024, 2, 29))
    assert in_brackets(tokenizer, encode(talk(1))) == "29 Feb" + chatml(talk(1))


@pytest.mark.parametrize(
    "template",
    [
        *("{{ 1 / 0 }}", "{{ messages + 1 }}", "{{ messages[0]|tojson(indent='x', wrong=1) }}"),
        *("{{ {}[[]] }}", "{{ '%d' % 'x' }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
        *(
            "{{ 'x'|no_such_filter }}",
            "{% include 'x' %}",
            "{{ ''.__class__.__mro__ }}",
            "{{ (" * 500,
        ),
    ],
)
def test_any_failure_of_a_template_is_one_line(template):
    with pytest.raises(InputError, match="^chat_template: .") as error:
        conversation_encoder(tokenizer_of(template))
    assert "\n" not in str(error.value)


def test_a_conversation_that_grows_without_measure_is_refused(monkeypatch):
    monkeypatch.setattr("paceline.train.chat.MOST", 1000)
    template = CHATML + "{% if messages|length == 2 %}{{ 'x' * 10000 }}{% endif %}"
    encode = encoder_of(template)[1]
    with pytest.raises(
        InputError, match=r"^chat_template: it writes 1\d+ characters for a .*row 3\)$"
    ):
        encode(talk(1), at="row 3")
