"""Conversations, and how they are loaded."""

import csv
import json
import re
from pathlib import Path

import trl

from paceline.train.chat import CHATML
from paceline.train.recipe import Recipe
from paceline.train.sources import load_sources

TEMPLATES = Path(trl.__file__).parent / "chat_templates"


def user(text):
    return {"role": "user", "content": text}


def system(text):
    return {"role": "system", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def talk(n, word="a"):
    """A conversation of its own for every n."""
    return [user(f"question {n}"), assistant(f"{word}nswer {n}")]


def load(*names, **changes):
    return load_sources(Recipe(model="any", data=names, steps=1, **changes))


def messages_of(row):
    return json.loads(row["conversation"])["messages"]


def numbers(rows):
    """Which of the conversations or texts these are, in order."""
    texts = [row["text"] if "text" in row else messages_of(row)[-1]["content"] for row in rows]
    return [int(re.search(r"\d+", text)[0]) for text in texts]


def write_lines(path, rows):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_csv(path, rows):
    with Path(path).open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


MESSAGES = [{"messages": talk(n)} for n in range(20)]


def files_of(folder):
    return {p: p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def text(content):
    return lambda path: Path(path).write_bytes(content)


def write_texts(folder, count):
    Path(folder).mkdir()
    for n in range(count):
        Path(folder, f"{n}.txt").write_text(f"text {n}\n")
    return folder


MARKED = """\
{%- for m in messages -%}
{{- '[' + m.role + ']\\n' -}}
{%- if m.role == 'assistant' -%}
{%- generation -%}{{- m.content + eos_token -}}{%- endgeneration -%}
{%- else -%}{{- m.content -}}{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
"""
# Like SmolLM2's: it puts a system prompt in front, and has no marks.
UNMARKED = """\
{%- for m in messages -%}
{%- if loop.first and m.role != 'system' -%}
{{- '<|im_start|>system\\nBe kind.<|im_end|>\\n' -}}
{%- endif -%}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

QWEN3 = (TEMPLATES / "qwen3.jinja").read_text(encoding="utf-8")


def in_brackets(tokenizer, encoded):
    """All that was encoded, with ⟦ ⟧ around each piece that is learned."""
    ids, mask = encoded["input_ids"], encoded["assistant_masks"]
    assert len(ids) == len(mask)
    assert set(mask) <= {0, 1}
    parts, start = [], 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or mask[end] != mask[start]:
            part = tokenizer.decode(ids[start:end])
            parts.append(f"⟦{part}⟧" if mask[start] else part)
            start = end
    return "".join(parts)


# What each template should write, by hand.
def chatml(messages):
    return "".join(
        f"<|im_start|>assistant\n⟦{m['content']}<|im_end|>⟧\n"
        if m["role"] == "assistant"
        else f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n"
        for m in messages
    )


def unmarked(messages):
    given = messages[0]["role"] == "system"
    said = ("" if given else "<|im_start|>system\nBe kind.<|im_end|>\n") + chatml(messages)
    if messages[0]["role"] == "assistant":  # which is not learned there
        said = re.sub("⟦(.*?)⟧", r"\1", said, count=1, flags=re.DOTALL)
    return said


def marked(messages):
    return "".join(
        f"[assistant]\n⟦{m['content']}<|endoftext|>⟧\n"
        if m["role"] == "assistant"
        else f"[{m['role']}]\n{m['content']}\n"
        for m in messages
    )


def qwen3(messages):
    """In TRL's training template the line break after the turn is the assistant's, too."""
    return "".join(
        f"<|im_start|>assistant\n⟦<think>\n\n</think>\n\n{m['content']}<|im_end|>\n⟧"
        if m["role"] == "assistant"
        else f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n"
        for m in messages
    )


EXPECTED = {CHATML: chatml, UNMARKED: unmarked, MARKED: marked, QWEN3: qwen3}

CONVERSATIONS = {
    "one turn": talk(1),
    "many turns": [*talk(1), *talk(2), user("hello"), assistant("hello there")],
    "system": [system("Be brief."), *talk(1)],
    "unicode": [user("🦊?"), assistant("ünï 🦊👨‍👩‍👧 中文"), user("é"), assistant("🦊")],
    "empty": [*talk(1), user(""), assistant(""), *talk(2)],
    "unanswered": [*talk(1), user("hello?")],
    "twice": [user("q"), assistant("hello"), assistant("there")],
    "first": [assistant("hello there"), *talk(1)],
    "spaces": [user(" a "), assistant(" b c "), user("d"), assistant("a\n\nb")],
}
