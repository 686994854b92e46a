"""Conversations as tokens, with a mask of the assistant's turns, which count in the loss."""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from jinja2 import TemplateError
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from . import InputError, reporting

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
PROBE = [{"role": role, "content": text} for text, role in TURNS.items()]

Encoded = dict[str, list[int]]


def use_chatml(tokenizer: PreTrainedTokenizerBase) -> None:
    """Set a tokenizer's chat template to ChatML, and its end of text to ChatML's end of turn."""
    known = tokenizer.get_vocab()
    if missing := [token for token in (START, END) if token not in known]:
        tokenizer.add_special_tokens(
            {"additional_special_tokens": missing}, replace_extra_special_tokens=False
        )
    tokenizer.chat_template = CHATML
    tokenizer.eos_token = END


def conversation_encoder(
    tokenizer: PreTrainedTokenizerBase,
) -> Callable[[list[dict[str, str]]], Encoded]:
    """A function from messages to `input_ids` and `assistant_masks`, by the chat template.

    The mask is 1 for each token of the assistant's turns, with the end of turn. They are found

    - by the template's own generation marks, or
    - by the marks of a training template that TRL has for it, or
    - by rendering the conversation turn by turn, if the template writes a turn in the same way
      whatever follows. Then an assistant's turn at the very start is not masked in.

    Raises:
        InputError: none of the three is possible. The function raises it, too, if the template
            refuses a conversation.
    """
    template: Any = tokenizer.chat_template
    marked = has_generation_markers(template)
    if not marked:
        # A ValueError: TRL has no such template.
        with reporting("chat_template", TemplateError), suppress(ValueError):
            template, marked = get_training_chat_template(tokenizer), True

    def encode(messages: list[dict[str, str]]) -> Encoded:
        with reporting("chat_template", TemplateError):
            if not marked:
                return _by_turns(tokenizer, messages)
            encoded: Any = tokenizer.apply_chat_template(
                messages,
                chat_template=template,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
        return {name: encoded[name] for name in ("input_ids", "assistant_masks")}

    if not any(encode(PROBE)["assistant_masks"]):
        raise InputError(
            "chat_template: it leaves out or does not mark the assistant's turns; give another one"
        )
    return encode


def _by_turns(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> Encoded:
    render: Any = partial(tokenizer.apply_chat_template, tokenize=False)
    text, spans = render(messages), []  # start and end of each assistant's turn in the text
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and i:  # the turns before it cannot be empty
            before = render(messages[:i], add_generation_prompt=True)
            until = render(messages[: i + 1]).rstrip()
            if not text.startswith(before) or not text.startswith(until):
                raise InputError(
                    "chat_template: the tokenizer's template writes a turn differently when others "
                    "follow, so the assistant's turns cannot be found; give --chat-template FILE "
                    "with {% generation %} marks, or --chat-template chatml"
                )
            spans.append((len(before), len(until)))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    masks = [
        int(any(start < b and a < end for start, end in spans))  # also tokens across the border
        for a, b in encoded["offset_mapping"]
    ]
    return {"input_ids": encoded["input_ids"], "assistant_masks": masks}


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
