"""Conversations as tokens, with a mask of the assistant's turns, which count in the loss."""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import copy
from datetime import date
from typing import Any, NamedTuple

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from . import InputError, reporting
from .conversation import REASONING
from .sandbox import clock

START, END = "<|im_start|>", "<|im_end|>"
# ChatML. The generation marks enclose the assistant's text and its end of turn.
CHATML = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- message['content'] + '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
TURNS = {"Q1": "user", "A1": "assistant", "Q2": "user", "A2": "assistant"}
PROBE: list[dict[str, Any]] = [{"role": role, "content": text} for text, role in TURNS.items()]
FUNCTION = {"name": "look", "description": "Looks.", "parameters": {"type": "object"}}
CALL: dict[str, Any] = {
    "type": "function",
    "id": "c12345678",
    "function": {"name": "look", "arguments": {}},
}
# Characters of a conversation's text: so many, and so many times as many as it has itself.
MOST, MOST_TIMES = 10**7, 10

Encoded = dict[str, list[int]]
Message = dict[str, Any]


def use_chatml(tokenizer: PreTrainedTokenizerBase) -> None:
    """Set a tokenizer's chat template to ChatML, and its end of text to ChatML's end of turn."""
    known = tokenizer.get_vocab()
    if missing := [token for token in (START, END) if token not in known]:
        tokenizer.add_special_tokens(
            {"additional_special_tokens": missing}, replace_extra_special_tokens=False
        )
    tokenizer.chat_template = CHATML
    tokenizer.eos_token = END


class _Writer(NamedTuple):
    """A chat template, and what is known of it."""

    tokenizer: Any
    template: str
    marked: bool  # it has generation marks
    day: date | None  # on its clock, if it has one
    unknown: tuple[str, ...] = ()  # parts of a conversation that it does not write, sorted
    as_text: bool = False  # it takes the arguments of calls as JSON in a text, not as objects

    def render(
        self, messages: Sequence[Message], *, prompt: bool = False, **extras: Any
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, with starts and ends of what is between generation marks.

        Raises:
            InputError: the template cannot write it.
        """
        render: Any = chat_template_utils.render_jinja_template
        given = {**self.tokenizer.special_tokens_map, **extras.pop("chat_template_kwargs", {})}
        try:
            with clock(self.day):
                texts, spans = render(
                    [list(messages)],
                    chat_template=self.template,
                    return_assistant_tokens_mask=self.marked,
                    add_generation_prompt=prompt,
                    **extras,
                    **given,
                )
        except Exception as error:  # a template can fail in any way
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"chat_template: {reason}") from error
        text = texts[0]
        own = len(str(messages)) + len(str(extras))
        if len(text) > MOST + MOST_TIMES * own:
            raise InputError(
                f"chat_template: it writes {len(text)} characters for a conversation of {own}"
            )
        return text, [] if not spans else spans[0]


def conversation_encoder(
    tokenizer: PreTrainedTokenizerBase, day: date | None = None
) -> Callable[..., Encoded]:
    """A function from messages to `input_ids` and `assistant_masks`, by the chat template.

    Its arguments are the keys of a conversation: `messages`, and what `conversation_of` may add.
    The mask is 1 for each token of the assistant's turns that are learned, with the end of turn.
    They are found

    - by the template's own generation marks, or
    - by the marks of a training template that TRL has for it, or
    - by rendering the conversation turn by turn, if the template writes a turn in the same way
      whatever follows. Then an assistant's turn at the very start is not masked in.

    Args:
        tokenizer: a fast one.
        day: on the clock of the template; None is today.

    Raises:
        InputError: none of the three is possible. The function raises it, too, if the template
            refuses a conversation or leaves a part of it out.
    """
    plain, tools = (_writer(tokenizer, with_tools, day) for with_tools in (False, True))

    def encode(messages: list[Message], **given: Any) -> Encoded:
        return _encode(tools if given.get("tools") else plain, messages, **given)

    if not any(encode(PROBE)["assistant_masks"]):
        raise InputError(
            "chat_template: it leaves out or does not mark the assistant's turns; give another one"
        )
    return encode


def _writer(tokenizer: Any, with_tools: bool, day: date | None) -> _Writer:
    given = tokenizer.chat_template
    named = given if isinstance(given, dict) else {"default": given}
    if "default" not in named:
        raise InputError(f"chat_template: none of {', '.join(named)} is the default; give one")
    name = "tool_use" if with_tools and "tool_use" in named else "default"
    template, marked = named[name], has_generation_markers(named[name])
    writer = _Writer(tokenizer, template, marked, None)
    writer.render(PROBE)  # it can be used at all
    if not marked:
        one = copy(tokenizer)
        one.chat_template = template
        with suppress(Exception):  # TRL has no such template, or its trials of this one fail
            template, marked = get_training_chat_template(one) or template, True
    if "strftime_now" in template:
        writer = writer._replace(day=day or date.today())
    writer = writer._replace(template=template, marked=marked)
    return writer._replace(unknown=_unknown(writer), as_text=_takes_text(writer))


def _takes_text(writer: _Writer) -> bool:
    """Whether a template can write the arguments of calls only where they are a text."""
    function = {**CALL["function"], "arguments": {"at": "sky"}}
    answer = {**PROBE[1], "content": "", "tool_calls": [{**CALL, "function": function}]}
    try:
        return "{'at'" in writer.render([PROBE[0], answer])[0]
    except InputError:
        function["arguments"] = json.dumps(function["arguments"])
        with suppress(InputError):
            writer.render([PROBE[0], answer])
            return True
    return False


def _prepared(message: Message, writer: _Writer) -> Message:
    """A message with the arguments of its calls as the template takes them; data have both."""
    calls = []
    for call in message.get("tool_calls", ()):
        part = call.get("function", call)
        given = part.get("arguments") if isinstance(part, dict) else None
        if isinstance(given, str) and not writer.as_text:
            with reporting("the arguments of a call are not JSON", ValueError):
                given = json.loads(given or "{}")
        elif isinstance(given, dict) and writer.as_text:
            given = json.dumps(given, ensure_ascii=False)
        if given is not None:
            part = {**part, "arguments": given}
            call = {**call, "function": part} if "function" in call else part
        calls.append(call)
    return {**message, "tool_calls": calls} if calls else message


def _left_out(
    writer: _Writer, messages: list[Message], text: str, extras: dict[str, Any]
) -> set[str]:
    """Turns of whose content, or of whose last calls, nothing is in the text.

    A part that the text does not have as it is must change it when it changes.
    """
    lost = set()
    for i, message in enumerate(messages):
        said, calls = message["content"].strip(), message.get("tool_calls", [])
        changes: dict[str, Message] = {}
        if said and said not in text:
            changes["content"] = {"content": said + "0"}
        if len(calls) > 1:
            changes["last of the tool_calls"] = {"tool_calls": calls[:-1]}
        for part, change in changes.items():
            with suppress(InputError):  # it knows what it refuses
                changed = [*messages[:i], {**message, **change}, *messages[i + 1 :]]
                if writer.render(changed, **extras)[0] == text:
                    lost.add(f"the {part} of turn {i} ({message['role']})")
    return lost


def _unknown(writer: _Writer) -> tuple[str, ...]:
    """The parts of conversations that a template does not write.

    A template that fails at a part knows it; it will say itself what is wrong.
    """
    asked, (question, answer) = PROBE[:2], PROBE[2:]
    calls = [*PROBE[:1], {**answer, "tool_calls": [CALL]}]
    result = {"role": "tool", "tool_call_id": CALL["id"], "name": "look"}

    def said(messages: list[Message], **extras: Any) -> str | None:
        try:
            return writer.render(messages, **extras)[0]
        except InputError:
            return None

    def last(**extra: Any) -> str | None:
        return said([*asked, question, {**answer, **extra}])

    without = said(PROBE)
    parts = {
        "the turn of system": said([{"role": "system", "content": "S1"}, *PROBE]),
        "tools": said(PROBE, tools=[{"type": "function", "function": FUNCTION}]),
        "documents": said(PROBE, documents=[{"title": "D1", "text": "D2"}]),
        "tool_calls": last(tool_calls=[CALL]),
        "name": said([*asked, {**question, "name": "N1"}, answer]),
        **{name: last(**{name: "R1"}) for name in REASONING},
    }
    unknown = {name for name, text in parts.items() if text is not None and text == without}
    results = [said([*calls, {**result, "content": text}]) for text in ("T1", "T2")]
    if results[0] is not None and results[0] == results[1]:
        unknown.add("the turn of tool")
    return tuple(sorted(unknown))


def _parts_of(messages: list[Message], extras: dict[str, Any]) -> set[str]:
    """The parts of a conversation that its template must write."""
    roles = {f"the turn of {message['role']}" for message in messages}
    # The name of a tool is in its call, too.
    keys = {key for x in messages for key in x if not (key == "name" and x["role"] == "tool")}
    return roles | keys | extras.keys()


def _encode(
    writer: _Writer,
    messages: list[Message],
    *,
    skip: Sequence[int] = (),
    at: str | None = None,
    **extras: Any,
) -> Encoded:
    where = f"data: {at}: " if at else ""
    settings = extras.get("chat_template_kwargs", {})
    lost = _parts_of(messages, extras).intersection(writer.unknown)
    lost |= {name for name in settings if name not in writer.template}
    try:
        messages = [_prepared(message, writer) for message in messages]
        text, spans = _spans(writer, messages, skip, extras) if not lost else ("", [])
        lost = lost or (_left_out(writer, messages, text, extras) if at else set())
    except InputError as error:
        raise InputError(f"{error} ({at})" if at else str(error)) from error
    if lost:
        raise InputError(
            f"{where}the chat template does not write {', '.join(sorted(lost))}; give "
            "--chat-template FILE that does, or leave it out of the data"
        )
    encoded: Any = writer.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    marks = bytearray(len(text) + 1)
    for start, end in spans:
        marks[start:end] = b"\1" * (end - start)
    # Also tokens across the border; and those of no character, which some tokenizers have.
    masks = [int(1 in marks[a : max(b, a + 1)]) for a, b in encoded["offset_mapping"]]
    return {"input_ids": encoded["input_ids"], "assistant_masks": masks}


def _spans(
    writer: _Writer, messages: list[Message], skip: Sequence[int], extras: dict[str, Any]
) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation, with starts and ends of what is learned."""
    text, spans = writer.render(messages, **extras)
    if writer.marked and not skip:
        return text, spans
    for i in skip if writer.marked else range(len(messages)):
        if messages[i]["role"] != "assistant" or (not i and not writer.marked):
            continue  # without marks, the turns before it cannot be empty
        before = writer.render(messages[:i], prompt=not writer.marked, **extras)[0] if i else ""
        before = before.rstrip() if writer.marked else before
        until = writer.render(messages[: i + 1], **extras)[0].rstrip()
        if not text.startswith(before) or not text.startswith(until):
            raise InputError(
                "chat_template: the tokenizer's template writes a turn differently when others "
                "follow, so the assistant's turns cannot be found; give --chat-template FILE "
                "with {% generation %} marks, or --chat-template chatml"
            )
        start, end = len(before), len(until)
        if writer.marked:
            spans = [span for span in spans if not start <= span[0] < end]
        elif i not in skip:
            spans.append((start, end))
    return text, spans


def show_example(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], labels: list[int], console: Console
) -> None:
    """Print an example as text, with the learned tokens in green, or in ⟦ ⟧ without colours."""
    learned = [label != -100 for label in labels]
    text = Text()
    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or learned[end] != learned[start]:
            part = str(tokenizer.decode(ids[start:end]))
            if learned[start] and not console.color_system:
                part = f"⟦{part}⟧"
            text.append(part, style="bold green" if learned[start] else "dim")
            start = end
    console.print(text)
