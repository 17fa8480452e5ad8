"""One row of a file -> a `ParsedRow`: the forms that rows come in, and what their columns mean.

A row's columns decide its form (`FORMS`). Columns have aliases (`ALIASES`); `columns` in the configuration maps any
other name. `Fields` remembers which columns were read, so that a column with content that nobody read is reported.
"""

import decimal
import itertools
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dpo.data.files import Row, TextRow

Message = dict[str, Any]
"""At least `role` and `content` (text). The chat template gets the other keys as they are."""
Text = str | list[Message]
Pairs = list[tuple[int, int]]

FORMS = """  chosen, rejected                  two dialogues: text as in HH, or lists of messages
  prompt, chosen, rejected
  prompt, responses, scores         every pair of unequal scores; loss=listwise: the whole ranking
  prompt, responses, ranking        the same; `ranking` holds each response's place, 1 for the best
  prompt, completions               UltraFeedback's: a list of {response, overall_score}
  prompt, completion                demonstrations, for loss=sft; with `label` only those that are true
  prompt, completion, label         for loss=kto: label (true or false) says whether the completion is wanted
  messages                          demonstrations, for loss=sft
prompt, chosen, rejected, completion and each response may be text or lists of messages: {role, content}, {from, value}.
`system` (text) and `tools` (a list) belong to the prompt. Other names of columns: columns.prompt=<name>."""

COLUMNS = (
    *("prompt", "chosen", "rejected", "responses", "scores", "ranking", "completions", "completion", "messages"),
    *("system", "tools", "label", "score_chosen", "score_rejected"),
)
ALIASES = {
    "prompt": ("question", "instruction", "query", "input"),
    "chosen": ("chosen_response", "response_chosen"),
    "rejected": ("rejected_response", "response_rejected"),
    "responses": ("generations",),
    "scores": ("ratings", "rating"),
    "completion": ("response", "output"),
    "messages": ("conversations", "conversation"),
    "system": ("system_prompt",),
    "label": ("labels",),
}
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
ROLES |= {"observation": "tool", "function_response": "tool", "function_call": "assistant"}
KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "environment")
THINKING = ("reasoning_content", "reasoning", "thinking")
# Keys that decide whether two messages are the same. Others, such as an id or a time, do not.
CONTENT_KEYS = ("role", "content", "tool_calls", *THINKING)
# Columns that tell where a row comes from and carry nothing for a model.
ORIGIN = re.compile(
    r"(.*_)?(id|ids|idx|index|uuid|hash|source|sources|origin|dataset|subset|split|config|url|link|date|time|timestamp|"
    r"created|created_at|author|license|lang|language|category|categories|topic|domain|models?|model_name|generator)",
    re.IGNORECASE,
)
EMPTY: tuple[Any, ...] = (None, "", [], {})


class BadRow(Exception):
    """A row that cannot be used. The funnel counts `reason`; `detail` helps the person who mends the row."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


class SkippedRow(BadRow):
    """A row that its data set leaves out on purpose: counted, never an error."""


@dataclass
class ParsedRow:
    """What one row holds: text or, not rendered yet, lists of messages."""

    prompt: Text
    responses: Sequence[Text]
    pairs: Pairs  # (preferred, dispreferred), indices of `responses`
    scores: Sequence[float] | None = None  # of the responses; replaces `pairs` by every pair of unequal scores
    target: int = 0  # the response that SFT learns
    score: float | None = None  # the target's: the best target of a prompt's rows wins, without scores the last
    ties: int = 0  # pairs of equal score
    keep_end: bool = False  # truncation keeps the prompt's end, which asks for the response, not its start
    demonstration: bool = False  # states no preference, and is not merged with other rows of its prompt
    label: bool | None = None  # of a demonstration: whether it is wanted; None if the row does not say
    tools: list[Any] | None = None  # for the chat template
    notes: list[str] = field(default_factory=list)  # warnings, counted over rows


# --- Fields of a row ---


def get(row: Row, name: str, *types: type) -> Any:
    """Return the field `name` of `row`, which must be of one of `types` (default: str). Raises BadRow."""
    types = types or (str,)
    if name not in row:
        raise BadRow("missing field", f"'{name}'; the row has {', '.join(map(repr, row)) or 'no fields'}")
    value = row[name]
    if value is None:
        raise BadRow("null field", f"'{name}'")
    if isinstance(value, decimal.Decimal):
        value = int(value) if value == value.to_integral_value() else float(value)
    elif isinstance(value, str) and isinstance(row, TextRow) and str not in types:
        value = _from_text(value)
    # bool is an int to Python, but true is no score
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        wanted = " or ".join(t.__name__ for t in types)
        raise BadRow("wrong type", f"'{name}' is {type(value).__name__} ({str(value)[:40]!r}), not {wanted}")
    return value


ASKED_BY = {"margin": "loss.margin", "weight": "loss.weighting"}  # numeric column: the key that asks for it


def number(row: Row, name: str) -> float:
    """Return the field `name` of `row`, which must be a number within the range of a float. Raises BadRow."""
    try:
        value = get(row, name, int, float)
    except BadRow as bad:
        if name not in ASKED_BY or row.get(name) is not None:
            raise
        advice = f"{ASKED_BY[name]}=none of losses of pairs does without it"
        raise BadRow(bad.reason, f"{str(bad).removeprefix(f'{bad.reason}: ')}. {advice}") from bad
    if not -sys.float_info.max <= value <= sys.float_info.max:
        raise BadRow("number not finite", f"'{name}' is {str(value)[:40]}")
    return value


def _from_text(value: str) -> Any:
    """Decode a field of a CSV file as JSON; return it unchanged if it is none."""
    try:
        return json.loads(value.lower() if value.lower() in ("true", "false") else value)
    except (ValueError, RecursionError):
        return value


def messages(row: Row, name: str) -> list[Message]:
    """Return the field `name` as a non-empty list of messages, each with a `role` and text in `content`.

    Raises BadRow.
    """
    value = get(row, name, list, Mapping)
    value = [value] if isinstance(value, Mapping) else value
    if not value:
        raise BadRow("empty conversation", f"'{name}'")
    return [_message(message, f"message {place} of '{name}'") for place, message in enumerate(value, 1)]


def _message(given: Any, where: str) -> Message:
    """Return a message under the keys that chat templates read. Raises BadRow."""
    if not isinstance(given, Mapping):
        raise BadRow("wrong type", f"{where} is {type(given).__name__}, not {{role, content}}")
    message = {key: value for key, value in given.items() if value is not None}
    for key, alias in (("role", "from"), ("content", "value")):
        if key not in message and alias in message:
            message[key] = message.pop(alias)
    is_call = message.get("role") == "function_call"
    message["role"] = ROLES.get(get(message, "role"), message["role"])
    if message["role"] not in KNOWN_ROLES:
        raise BadRow("wrong role", f"{message['role']!r} of {where} is not one of {', '.join(KNOWN_ROLES)}")
    if is_call:
        message["tool_calls"] = [{"type": "function", "function": _from_text(str(message.pop("content", "")))}]
    if "tool_calls" in message:
        message["tool_calls"] = [_tool_call(call, where) for call in get(message, "tool_calls", list)]
        message.setdefault("content", "")
        if not message["tool_calls"]:
            del message["tool_calls"]
    message["content"] = _content(message, where)
    return message


def _content(message: Message, where: str) -> str:
    """Return a message's text, joined if it comes in parts. Raises BadRow for a part that is not text."""
    content = get(message, "content", str, list)
    if isinstance(content, str):
        return content
    texts = []
    for part in content:
        if isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            kind = part.get("type", "?") if isinstance(part, Mapping) else type(part).__name__
            raise BadRow("not text", f"{where} has a part of type {kind!r}; only text can be trained on")
    return "".join(texts)


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    """Return a tool call whose arguments are an object, as most chat templates expect. Raises BadRow."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadRow("wrong type", f"a tool call of {where} is no {{function: {{name, arguments}}}}")
    function, arguments = dict(function), function.get("arguments", {})
    function["arguments"] = _from_text(arguments) if isinstance(arguments, str) else arguments
    return {**call, "function": function} if "function" in call else {"type": "function", "function": function}


def text_or_messages(row: Row, name: str) -> Text:
    """Return the field `name` as text or, if it is a list, as messages. Raises BadRow."""
    value = get(row, name, str, list, Mapping)
    if isinstance(value, str) and isinstance(row, TextRow) and value.startswith("[{"):
        parsed = _from_text(value)
        if isinstance(parsed, list) and all(isinstance(m, Mapping) and {"role", "from"} & m.keys() for m in parsed):
            return messages({name: parsed}, name)
    return value if isinstance(value, str) else messages(row, name)


class Fields:
    """A row's fields by this program's column names. A null field is absent. Remembers which fields were read."""

    def __init__(self, row: Row, columns: Mapping[str, str | None]):
        self.row, self.columns = row, columns
        self.read: set[str] = set()

    def name(self, column: str) -> str:
        """Return the row's name of `column`: as `columns` maps it, else its own, else the first alias present."""
        if mapped := self.columns.get(column):
            return mapped
        names = (column, *ALIASES.get(column, ()))
        return next((name for name in names if self.row.get(name) is not None), column)

    def has(self, column: str) -> bool:
        """Return whether `column` is present and not null."""
        return self.row.get(self.name(column)) is not None

    def _use(self, column: str) -> str:
        name = self.name(column)
        self.read.add(name)
        return name

    def get(self, column: str, *types: type) -> Any:
        """Return a field as `get` does. Raises BadRow, with the row's own name of the column."""
        return get(self.row, self._use(column), *types)

    def text(self, column: str) -> Text:
        """Return a field as `text_or_messages` does."""
        return text_or_messages(self.row, self._use(column))

    def messages(self, column: str) -> list[Message]:
        """Return a field as `messages` does."""
        return messages(self.row, self._use(column))

    def prompt(self) -> Text:
        """Return the prompt: an instruction includes its `input`."""
        prompt, given = self.text("prompt"), self.row.get("input")
        if self.name("prompt") != "instruction" or not isinstance(prompt, str) or not isinstance(given, str):
            return prompt
        self.read.add("input")
        return f"{prompt}\n\n{given}" if given.strip() else prompt

    def unused(self) -> list[str]:
        """Return the columns with content that were not read, except those that tell a row's origin."""
        left = (name for name, value in self.row.items() if name not in self.read and value not in EMPTY)
        return [name for name in left if not ORIGIN.fullmatch(str(name))]


# --- Dialogues and conversations ---

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
TURN = re.compile(r"\n\n(Human|Assistant):")


def _shared_length(a: str, b: str) -> int:
    """Return the length of the common start of `a` and `b`."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def split_dialogues(chosen: str, rejected: str) -> ParsedRow:
    """Split two HH dialogues after the last assistant marker that they share.

    The last marker of `chosen` is not enough: a few HH rows differ from an earlier turn on, and the split would cut
    their rejected text in the wrong place.
    """
    end = chosen.rfind(ASSISTANT, 0, _shared_length(chosen, rejected))
    if end < 0:
        advice = "dialogues look as in HH, other texts need a column 'prompt'"
        raise BadRow("no shared assistant turn", f"chosen and rejected have no common {ASSISTANT!r}; {advice}")
    end += len(ASSISTANT)
    return ParsedRow(chosen[:end], [chosen[end:], rejected[end:]], [(0, 1)], keep_end=True)


def _dialogue_messages(text: str) -> list[Message]:
    """Return an HH dialogue, which begins with a marker, as messages."""
    _, *turns = TURN.split(text)
    roles = ("user" if speaker == "Human" else "assistant" for speaker in turns[::2])
    return [{"role": role, "content": content.strip()} for role, content in zip(roles, turns[1::2])]


def to_messages(parsed: ParsedRow) -> ParsedRow:
    """Turn text into messages, in place: an HH dialogue turn by turn, other text as one turn."""
    if not isinstance(parsed.prompt, str):
        return parsed
    prompt, sides = parsed.prompt, [str(side) for side in parsed.responses]
    if prompt.startswith(HUMAN) and prompt.rstrip().endswith(ASSISTANT):
        parsed.prompt = _dialogue_messages(prompt.rstrip().removesuffix(ASSISTANT))
        parsed.responses = [_dialogue_messages(ASSISTANT + side) for side in sides]
    else:
        parsed.prompt = turn("user", prompt.strip())
        parsed.responses = [turn("assistant", side.strip()) for side in sides]
    parsed.keep_end = True
    return parsed


def dialogue_parts(text: str) -> list[str]:
    """Cut an HH response into the assistant's parts and, in turn, those between: markers and the human's text."""
    parts, start = [], 0
    for human in re.finditer(HUMAN, text):
        if human.start() < start:
            continue
        answer = text.find(ASSISTANT, human.end())
        if answer < 0:
            break
        parts += [text[start : human.start()], text[human.start() : answer + len(ASSISTANT)]]
        start = answer + len(ASSISTANT)
    return [*parts, text[start:]]


def split_conversations(chosen: list[Message], rejected: list[Message]) -> ParsedRow:
    """Split two conversations at the last point up to which they agree and from which both have the assistant speak."""
    contents = [[{key: m.get(key) for key in CONTENT_KEYS} for m in side] for side in (chosen, rejected)]
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*contents)))
    shared = min(shared, len(chosen) - 1, len(rejected) - 1)
    while shared > 0 and not chosen[shared]["role"] == rejected[shared]["role"] == "assistant":
        shared -= 1
    if shared <= 0:
        raise BadRow("no shared prompt", "chosen and rejected share no messages before one of the assistant")
    return ParsedRow(chosen[:shared], [chosen[shared:], rejected[shared:]], [(0, 1)], keep_end=True)


def turn(role: str, text: Text) -> list[Message]:
    """Return text as one message; messages unchanged."""
    return [{"role": role, "content": text}] if isinstance(text, str) else text


def _with_prompt(prompt: Text, sides: Sequence[Text], **facts: Any) -> ParsedRow:
    """Combine a prompt and its responses. If any of them is a list of messages, all become messages."""
    if isinstance(prompt, str) and all(isinstance(side, str) for side in sides):
        return _without_repeated_prompt(ParsedRow(prompt, sides, **facts))
    responses = [turn("assistant", side) for side in sides]
    if any(response[0]["role"] != "assistant" for response in responses):
        raise BadRow("wrong role", "a response must begin with a message of the assistant")
    return ParsedRow(turn("user", prompt), responses, keep_end=True, **facts)


def _without_repeated_prompt(parsed: ParsedRow) -> ParsedRow:
    """Remove the prompt from the responses if each of them begins with it."""
    prompt, texts = str(parsed.prompt), [str(side) for side in parsed.responses]
    start = prompt.strip()
    if not start or not any(text.lstrip().startswith(start) for text in texts):
        return parsed
    ends = [text.lstrip()[len(start) :] for text in texts]
    at_word_end = not start[-1].isalnum() or not any(end[:1].isalnum() for end in ends)  # "12" does not repeat "1"
    if at_word_end and all(text.lstrip().startswith(start) and end.strip() for text, end in zip(texts, ends)):
        parsed.responses = [end.removeprefix(prompt[len(prompt.rstrip()) :]) for end in ends]
        parsed.notes.append("every response began with the prompt, which is taken once")
    elif len(start) > 20:
        parsed.notes.append("a response begins with the text of its prompt, and another does not")
    return parsed


# --- The forms ---


def generic(row: Row, columns: Mapping[str, str | None] | None = None) -> ParsedRow:
    """Parse a row by its columns (`FORMS`). Raises BadRow if they fit no form."""
    fields = Fields(row, columns or {})
    for column, name in fields.columns.items():
        if name not in row:
            raise BadRow("missing field", f"'{name}' (columns.{column}); the row has {', '.join(map(repr, row))}")
    parsed = _with_tools(_with_system(_by_form(fields), fields), fields)
    if parsed.demonstration and fields.has("label"):
        label = fields.get("label", bool, int)
        if label not in (0, 1):
            name = fields.name("label")
            raise BadRow("wrong value", f"{name!r} is {label}, not true or false (is the completion good?)")
        parsed.label = bool(label)
    if parsed.pairs and fields.has("score_chosen") and fields.has("score_rejected"):
        parsed.notes += score_notes(*(fields.get(name, int, float) for name in ("score_chosen", "score_rejected")))
    parsed.notes += [unused_column(name) for name in fields.unused()]
    return parsed


def unused_column(name: str) -> str:
    """Return the warning about a column with content that nothing reads."""
    return f"column {name!r} is not used"


def score_notes(chosen: float, rejected: float) -> list[str]:
    """Return warnings about the scores of a pair."""
    if math.isnan(chosen) or math.isnan(rejected):
        return ["score_chosen or score_rejected is not a number; the pair is kept"]
    return ["score_chosen is below score_rejected; the pair is kept as it is named"] if chosen < rejected else []


def _by_form(fields: Fields) -> ParsedRow:
    for column, form in FORM_OF.items():
        if column in fields.columns and fields.has(column):  # a column that the configuration names comes first
            return form(fields)
    if fields.row.get("responses") is not None and (fields.row.get("scores") or fields.row.get("ranking")) is not None:
        return scored(fields)
    for column in (*FORM_OF, "scores", "ranking"):
        if fields.has(column):
            return FORM_OF.get(column, scored)(fields)
    raise BadRow("columns fit no known form", f"{', '.join(map(repr, fields.row)) or 'none'}; accepted are\n{FORMS}")


def completed(fields: Fields) -> ParsedRow:
    """Parse a prompt and one completion."""
    return _with_prompt(fields.prompt(), [fields.text("completion")], pairs=[], demonstration=True)


def compared(fields: Fields) -> ParsedRow:
    """Parse chosen and rejected, with or without a separate prompt."""
    chosen, rejected = fields.text("chosen"), fields.text("rejected")
    whole = not isinstance(chosen, str) and chosen[0]["role"] != "assistant"
    if isinstance(chosen, str) != isinstance(rejected, str) and (whole or not fields.has("prompt")):
        raise BadRow("wrong type", "one of 'chosen' and 'rejected' is text, the other a list of messages")
    if fields.has("messages"):
        if not whole and not fields.has("prompt"):
            return _with_prompt(fields.messages("messages"), [chosen, rejected], pairs=[(0, 1)])
        if fields.row[fields.name("messages")] == fields.row[fields.name("chosen")]:  # UltraFeedback repeats it
            fields.read.add(fields.name("messages"))
    if fields.has("prompt") and not whole:
        return _with_prompt(fields.prompt(), [chosen, rejected], pairs=[(0, 1)])
    if isinstance(chosen, str) or isinstance(rejected, str):
        return split_dialogues(str(chosen), str(rejected))
    parsed = split_conversations(chosen, rejected)
    if fields.has("prompt"):
        contents = {message["content"].strip() for message in parsed.prompt if isinstance(message, dict)}
        if any(message["content"].strip() not in contents for message in turn("user", fields.prompt())):
            parsed.notes.append("column 'prompt' says other things than the conversations do, and is not used")
    return parsed


def scored(fields: Fields) -> ParsedRow:
    """Parse a prompt, its responses, and their scores or places."""
    prompt, responses = fields.prompt(), fields.get("responses", list)
    if fields.has("scores") or not fields.has("ranking"):
        return _rated(prompt, responses, fields.get("scores", list), "responses", "scores")
    parsed = _rated(prompt, responses, fields.get("ranking", list), "responses", "ranking")
    return replace(parsed, **rank([-place for place in parsed.scores or []]))


def rated_completions(fields: Fields) -> ParsedRow:
    """Parse UltraFeedback's own form: each completion has a response and its scores."""
    completions = fields.get("completions", list)
    for place, completion in enumerate(completions):
        if not isinstance(completion, Mapping) or "response" not in completion:
            raise BadRow("wrong type", f"completions[{place}] is no {{response, overall_score}}")
    scores = [completion.get("overall_score", completion.get("score")) for completion in completions]
    parsed = _rated(fields.prompt(), [c["response"] for c in completions], scores, "completions", "score")
    keys = {key for completion in completions for key, value in completion.items() if value not in EMPTY}
    unused = sorted(key for key in keys - {"response", "overall_score", "score"} if not ORIGIN.fullmatch(str(key)))
    parsed.notes += [f"key {key!r} of completions is not used" for key in unused]
    return parsed


def _rated(prompt: Text, responses: list[Any], scores: list[Any], of: str, by: str) -> ParsedRow:
    """Combine a prompt with scored responses. `of` and `by` name the two columns in errors."""
    if not responses or len(responses) != len(scores):
        raise BadRow("scores do not match responses", f"{len(responses)} {of}, {len(scores)} {by}")
    scores = [number({f"{by}[{i}]": score}, f"{by}[{i}]") for i, score in enumerate(scores)]
    sides = [text_or_messages({f"{of}[{i}]": side}, f"{of}[{i}]") for i, side in enumerate(responses)]
    return _with_prompt(prompt, sides, pairs=[], **rank(scores))


def rank(scores: Sequence[float]) -> dict[str, Any]:
    """Return the fields of a ParsedRow that follow from scores: SFT learns the first of the best responses."""
    best = max(scores)
    return {"scores": scores, "target": list(scores).index(best), "score": float(best)}


def conversation(fields: Fields) -> ParsedRow:
    """Parse a whole conversation. Its last answer is the response."""
    turns = fields.messages("messages")
    end = next((i for i in reversed(range(len(turns))) if turns[i]["role"] == "assistant"), None)
    if not end:
        raise BadRow("no answer", "'messages' has no message of the assistant after another's")
    parsed = ParsedRow(turns[:end], [turns[end : end + 1]], [], keep_end=True, demonstration=True)
    if end + 1 < len(turns):
        parsed.notes.append("messages after the last of the assistant are not used")
    return parsed


FORM_OF = {"chosen": compared, "rejected": compared, "completions": rated_completions, "completion": completed}
FORM_OF |= {"messages": conversation, "responses": scored}


def all_answers(parsed: ParsedRow) -> ParsedRow:
    """Return a demonstration whose response is all from the first answer on; `parsed` itself if it has one answer."""
    target: Any = parsed.responses[parsed.target]
    if isinstance(parsed.prompt, str):
        end = parsed.prompt.find(ASSISTANT) + len(ASSISTANT)
        if not parsed.prompt.startswith(HUMAN) or end == len(parsed.prompt):
            return parsed
        whole: Text = parsed.prompt[end:] + str(target)
    else:
        end = next((i for i, m in enumerate(parsed.prompt) if m["role"] == "assistant" and i), 0)
        if not end:
            return parsed
        whole = [*parsed.prompt[end:], *target]
    parsed = replace(parsed, prompt=parsed.prompt[:end], responses=[whole], pairs=[], scores=None)
    return replace(parsed, target=0, score=None, ties=0, demonstration=True)


def _with_system(parsed: ParsedRow, fields: Fields) -> ParsedRow:
    """Add the column `system` as the first turn of the prompt."""
    system = fields.get("system") if fields.has("system") else ""
    if not system.strip():
        return parsed
    parsed = to_messages(parsed)
    turns: Any = parsed.prompt
    if turns[0]["role"] == "system":
        if turns[0]["content"].strip() not in ("", system.strip()):
            raise BadRow("two system turns", "the column 'system' differs from the conversation's own system turn")
        turns = turns[1:]
    parsed.prompt = [{"role": "system", "content": system}, *turns]
    return parsed


def _with_tools(parsed: ParsedRow, fields: Fields) -> ParsedRow:
    """Add the column `tools`, which may hold JSON as text. Tools need a chat template."""
    if not fields.has("tools"):
        return parsed
    value = fields.get("tools", object)
    tools = _from_text(value) if isinstance(value, str) else value
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadRow("wrong type", f"'tools' is {type(tools).__name__}, not a list of {{type, function}}")
    parsed.tools = tools or None
    return to_messages(parsed) if tools else parsed
