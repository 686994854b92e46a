"""From a row of data to a conversation; the tables say what its keys mean."""

import json
from typing import Any, NamedTuple

from . import InputError, reporting
from .rows import parse_json

# ---- what is known -------------------------------------------------------------------------------

# Where a row has its turns; of several the first that it fills counts.
FORMS = (("messages",), ("conversations",), ("prompt", "completion"), ("instruction", "output"))
ALPACA = ("instruction", "input", "output")  # the first two are the prompt
SPEAKER = {"prompt": "user", "completion": "assistant"}  # of columns with plain text
SYSTEM = ("system", "system_prompt", "system_message")  # beside the turns: becomes the first turn
EXTRAS = ("tools", "documents", "chat_template_kwargs")  # beside the turns: for the template
RENAMED = {"from": "role", "value": "content"}  # ShareGPT's keys
ROLES = {
    **{role: role for role in ("system", "user", "assistant", "tool")},
    **{"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"},
}
REASONING = ("reasoning_content", "reasoning", "thinking")
# Of a message, for the template. What a template must write, it may not leave out; see chat.py.
MUST_BE_WRITTEN = ("tool_calls", "name", *REASONING)
MAY_BE_WRITTEN = ("tool_call_id",)
# 0 or false: do not learn this turn, or beside the turns, leave out this row. Formats of OpenAI,
# Mistral, axolotl, ms-swift, XTuner and Tinker; then torchtune's, of the opposite sense.
LEARNED = (
    "weight",
    "train",
    "training",
    "trainable",
    "train_on_turn",
    "loss",
    "loss_mask",
    "learn",
)
NOT_LEARNED = ("masked",)
# About a message, and no part of it. Any other key of a message is refused.
ABOUT = {
    *("id", "message_id", "parent_id", "turn_id", "index", "turn_identifier", "user_id"),
    *("timestamp", "created", "created_at", "date", "time", "source", "model", "author"),
    *("language", "lang", "country", "state", "header", "hashed_ip", "toxic", "redacted"),
    *("tokens", "token_count", "num_tokens"),
}
# Beside the turns: they change what should be learned, and cannot be obeyed. Any other column is
# about the row, and is ignored aloud.
REFUSED = {
    *("functions", "function_call", "images", "image", "audio", "audios", "video", "videos"),
    *("weights", "sample_weight", "loss_weight", "mask", "completion_mask", "assistant_masks"),
}
MARKS = {"0": 0, "1": 1, "false": 0, "true": 1}  # as CSV has them
# Beside a prompt: they are probably a part of it.
OF_PROMPT = {"context", "history", "input", "instruction", "suffix"}
NOTHING_SAID = "the assistant says nothing that is to be learned"


class Converted(NamedTuple):
    """A row, converted: a text, or None and the reason; and the keys that were not used."""

    text: str | None
    left_out: str | None
    ignored: list[str]


# ---- conversations -------------------------------------------------------------------------------


def conversation_of(row: Any, where: str) -> Converted:
    """The conversation of a row as JSON, for `chat.conversation_encoder`.

    It has `messages`; `skip`, the indices of turns that are not to be learned; `at`, which is
    `where`; and what of EXTRAS the row has.

    Raises:
        InputError: something in the row is not known or cannot be used; it names `where`.
    """
    with reporting(f"data: {where}: it is nested too deeply, or its text is broken", *BROKEN):
        return _converted(_filled(row, where), row, where)


BROKEN = (RecursionError, UnicodeEncodeError)  # the latter: half of a surrogate pair


def _filled(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise InputError(f"data: {where}: expected an object of columns, got {row!r:.80}")
    return {key: value for key, value in row.items() if not _is_empty(value)}


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | dict) and not value)


def _converted(row: dict[str, Any], columns: dict[str, Any], where: str) -> Converted:
    form = next((names for names in FORMS if all(name in row for name in names)), ())
    if form == FORMS[-1]:
        row, form = _from_alpaca(row, where), FORMS[-2]
    known = (*form, *SYSTEM, *EXTRAS, *LEARNED, *NOT_LEARNED)
    ignored = [str(name) for name in row if name not in known]
    if not form:
        empty = [name for names in FORMS for name in names if name in {*columns} - {*row}]
        return Converted(None, f"{empty[0]} is empty" if empty else _no_form(columns), ignored)
    for name in row:
        if name in REFUSED or (name in OF_PROMPT and "prompt" in form):
            raise InputError(f"data: {where}: {name!r} cannot be obeyed; leave the column out")
    if not _is_learned(row, where):
        return Converted(None, "it is marked as not to be learned", ignored)
    turns = _turns(row, form, where)
    messages = []
    for turn in turns:
        messages.append(_message(turn, where))
        ignored += [f"{form[-1]}.{name}" for name in turn if name in ABOUT]
    learned = [_is_learned(turn, where) for turn in turns]
    completion = row[form[-1]] if form[-1] == "completion" else turns
    given = len(turns) - (len(completion) if isinstance(completion, list) else 1)
    skip = [
        i
        for i, message in enumerate(messages)
        if not learned[i] or (i < given and message["role"] == "assistant")  # of a prompt
    ]
    says = ("content", "tool_calls", *REASONING)
    if not any(
        message["role"] == "assistant" and i not in skip and any(_says(message, x) for x in says)
        for i, message in enumerate(messages)
    ):
        return Converted(None, NOTHING_SAID, ignored)
    conversation: dict[str, Any] = {"messages": messages, "at": where}
    if skip:
        conversation["skip"] = skip
    for name in EXTRAS:
        if name in row:
            conversation[name] = _extra(row[name], name, where)
    text = json.dumps(conversation, ensure_ascii=False)
    text.encode()
    return Converted(text, None, sorted(set(ignored)))


def _from_alpaca(row: dict[str, Any], where: str) -> dict[str, Any]:
    """A row of instruction, input and output with a prompt and a completion in their place."""
    texts = {name: row.get(name, "") for name in ALPACA}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise InputError(f"data: {where}: {name} must be text, got {text!r:.80}")
    for name in FORMS[-2]:
        if name in row:
            raise InputError(
                f"data: {where}: {name!r} beside instruction and output cannot be obeyed; leave "
                "the column out"
            )
    rest = {name: x for name, x in row.items() if name not in ALPACA}
    prompt = "\n\n".join(filter(None, (texts["instruction"], texts["input"])))
    return rest | {"prompt": prompt, "completion": texts["output"]}


def _no_form(columns: dict[str, Any]) -> str:
    return (
        "it has none of the columns messages, conversations, prompt and completion, or instruction "
        "and output, only " + ", ".join(map(str, columns))
    )


def _says(message: dict[str, Any], name: str) -> bool:
    value = message.get(name)
    return bool(value.strip()) if isinstance(value, str) else bool(value)


def _turns(row: dict[str, Any], form: tuple[str, ...], where: str) -> list[dict[str, Any]]:
    turns: list[Any] = []
    for name in form:
        part = row[name]
        if isinstance(part, str) and name in SPEAKER:
            part = [{"role": SPEAKER[name], "content": part}]
        if not isinstance(part, list):
            raise InputError(f"data: {where}: {name} must be messages or text, got {part!r:.80}")
        turns += part
    for turn in turns:
        if not isinstance(turn, dict):
            raise InputError(f"data: {where}: a message needs a role and content, got {turn!r:.80}")
        if any({old, new} <= turn.keys() for old, new in RENAMED.items()):
            raise InputError(f"data: {where}: a message has a key in two ways, got {turn!r:.80}")
    turns = [{RENAMED.get(name, name): x for name, x in turn.items()} for turn in turns]
    for name in (name for name in SYSTEM if name in row):
        if not isinstance(row[name], str):
            raise InputError(f"data: {where}: {name} must be text, got {row[name]!r:.80}")
        first = {"role": "system", "content": row[name]}
        if any(turn.get("role") == "system" and turn != first for turn in turns):
            raise InputError(
                f"data: {where}: it has {name!r} and another system turn; leave one of them out"
            )
        turns = turns if first in turns else [first, *turns]
    return turns


def _message(turn: dict[str, Any], where: str) -> dict[str, Any]:
    """What a template gets of a turn."""
    role, content = turn.get("role"), turn.get("content")
    if not isinstance(role, str):
        raise InputError(f"data: {where}: a message needs a role and content, got {turn!r:.80}")
    if role not in ROLES:
        known = ", ".join(sorted(set(ROLES.values())))
        raise InputError(f"data: {where}: unknown role {role!r}; known: {known}")
    if content is None and any(turn.get(name) for name in ("tool_calls", *REASONING)):
        content = ""  # OpenAI's way
    if isinstance(content, list):
        content = _joined(content, where)
    if not isinstance(content, str):
        raise InputError(f"data: {where}: content must be text, got {content!r:.80}")
    message: dict[str, Any] = {"role": ROLES[role], "content": content}
    for name, value in turn.items():
        if name in message or _is_empty(value) or name in (*LEARNED, *NOT_LEARNED, *ABOUT):
            continue
        if name == "tool_calls":
            value = _extra(value, name, where)
        elif name not in (*MUST_BE_WRITTEN, *MAY_BE_WRITTEN):
            raise InputError(f"data: {where}: unknown key {name!r} in a message; leave it out")
        elif not isinstance(value, str):
            raise InputError(f"data: {where}: {name} must be text, got {value!r:.80}")
        message[name] = value
    return message


def _joined(parts: list[Any], where: str) -> str:
    """The text of a content in parts, `{"type": "text", "text": ...}` each."""
    texts = []
    for part in parts:
        filled = {k: x for k, x in part.items() if x is not None} if isinstance(part, dict) else {}
        text = filled.get("text")
        if filled != {"type": "text", "text": text} or not isinstance(text, str):
            raise InputError(f"data: {where}: content must be text, got the part {part!r:.80}")
        texts.append(text)
    return "".join(texts)


def _is_learned(marked: dict[str, Any], where: str) -> bool:
    """Whether no mark of a turn, or of a row, says that it is not to be learned."""
    learned = True
    for name in (*LEARNED, *NOT_LEARNED):
        value = marked.get(name)
        value = MARKS.get(value.lower(), value) if isinstance(value, str) else value
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise InputError(
                f"data: {where}: {name} must be 0 or 1, false or true, got {value!r:.80}"
            )
        learned = learned and bool(value) == (name in LEARNED)
    # The mark of KTO's data; other data have their own kinds of labels.
    return learned and str(marked.get("label")).lower() != "false"


def _extra(value: Any, name: str, where: str) -> Any:
    """A list of objects, or an object; data often have them as JSON in a text."""
    if isinstance(value, str):
        with reporting(f"data: {where}", ValueError):
            value = parse_json(value, name)
    if name == "chat_template_kwargs":
        if not isinstance(value, dict):
            raise InputError(f"data: {where}: {name} must be an object, got {value!r:.80}")
        return value
    if not isinstance(value, list):
        raise InputError(f"data: {where}: {name} must be a list, got {value!r:.80}")
    value = [_extra(x, "chat_template_kwargs", where) if isinstance(x, str) else x for x in value]
    if not all(isinstance(x, dict) for x in value):
        raise InputError(f"data: {where}: {name} must hold objects, got {value!r:.80}")
    return value


# ---- texts ---------------------------------------------------------------------------------------


def text_of(row: Any, where: str, column: str) -> Converted:
    """The text of a row.

    Raises:
        InputError: it is no text.
    """
    filled = _filled(row, where)
    ignored = [str(name) for name in filled if name != column]
    if column not in row:
        columns = ", ".join(map(str, row))
        reason = f"it has no column {column!r}, only {columns}; name the text's by --text-column"
        return Converted(None, reason, ignored)
    if column not in filled:
        return Converted(None, f"{column} is empty", ignored)
    text = filled[column]
    if not isinstance(text, str):
        raise InputError(f"data: {where}: expected text, got {text!r:.80}")
    with reporting(f"data: {where}: its text is broken", UnicodeEncodeError):
        text.encode()
    return Converted(text, None, ignored)
