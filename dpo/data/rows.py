"""One row of a file -> a `Judgement`: which forms of rows there are, and what their columns mean.

A form is known by its columns (`FORMS`). Columns go by several names (`ALIASES`); `columns` in the configuration maps
any other. What a row says beyond its form is not dropped in silence: `Fields` remembers which columns were read.
"""

import decimal
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dpo.data.files import Row, TextRow

Message = dict[str, Any]
"""At least `role` and `content` (text); the rest goes to the chat template as it is."""
Text = str | list[Message]
Pairs = list[tuple[int, int]]

FORMS = """  chosen, rejected                  two dialogues: text as in HH, or lists of messages
  prompt, chosen, rejected
  prompt, responses, scores         every pair of unequal scores
  prompt, completions               UltraFeedback's: a list of {response, overall_score}
  prompt, completion                demonstrations, for loss=sft; with `label` only those that are true
  messages                          demonstrations, for loss=sft
prompt, chosen, rejected, completion and each response may be text or lists of messages: {role, content}, {from, value}.
`system` (text) and `tools` (a list) belong to the prompt. Other names of columns: columns.prompt=<name>."""

COLUMNS = (
    *("prompt", "chosen", "rejected", "responses", "scores", "completions", "completion", "messages"),
    *("system", "tools", "label", "score_chosen", "score_rejected"),
)
# The names under which a column is found where it does not have its own.
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
# What a message says; other keys (an id, a time) make it no other.
SAID = ("role", "content", "tool_calls", "reasoning_content", "reasoning", "thinking")
# Columns that say where a row comes from, and nothing to a model.
ORIGIN = re.compile(
    r"(.*_)?(id|ids|idx|index|uuid|hash|source|sources|origin|dataset|subset|split|config|url|link|date|time|timestamp|"
    r"created|created_at|author|license|lang|language|category|categories|topic|domain|models?|model_name|generator)",
    re.IGNORECASE,
)


class BadRow(Exception):
    """A row that cannot be used. `reason` is counted in the funnel, `detail` is for the person who mends the row."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


@dataclass
class Judgement:
    """What one row says: text or, still to be rendered, lists of messages."""

    prompt: Text
    responses: Sequence[Text]
    pairs: Pairs
    scores: Sequence[float] | None = None  # of the responses: every pair of unequal ones is a pair
    target: int = 0  # the response that SFT learns
    score: float | None = None  # the target's; among rows of one prompt the highest wins, without scores the last row
    ties: int = 0  # pairs of equal score
    keep_end: bool = False  # truncation keeps the prompt's end, not its start: it ends in what asks for the response
    demonstration: bool = False  # states no preference, and is not merged with other rows of its prompt
    undesired: bool = False  # a demonstration of what not to say (label false)
    tools: list[Any] | None = None  # for the chat template
    notes: list[str] = field(default_factory=list)  # what a person should know of rows like this one, to be counted


def get(row: Row, name: str, *types: type) -> Any:
    """The field `name` of `row`, which must be of one of `types` (str unless told). Raises BadRow."""
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


def _from_text(value: str) -> Any:
    """What a field of a CSV file means where text is not wanted: JSON, or itself if it is none."""
    try:
        return json.loads(value.lower() if value.lower() in ("true", "false") else value)
    except (ValueError, RecursionError):
        return value


def messages(row: Row, name: str) -> list[Message]:
    """The field `name` as a non-empty list of messages, each with a `role` and text in `content`. Raises BadRow."""
    value = get(row, name, list, Mapping)
    value = [value] if isinstance(value, Mapping) else value
    if not value:
        raise BadRow("empty conversation", f"'{name}'")
    return [_message(message, f"message {number} of '{name}'") for number, message in enumerate(value, 1)]


def _message(given: Any, where: str) -> Message:
    """A message with the keys that it has, under the names that chat templates read. Raises BadRow."""
    if not isinstance(given, Mapping):
        raise BadRow("wrong type", f"{where} is {type(given).__name__}, not {{role, content}}")
    message = {key: value for key, value in given.items() if value is not None}
    for own, other in (("role", "from"), ("content", "value")):
        if own not in message and other in message:
            message[own] = message.pop(other)
    called = message.get("role") == "function_call"
    message["role"] = ROLES.get(get(message, "role"), message["role"])
    if message["role"] not in KNOWN_ROLES:
        raise BadRow("wrong role", f"{message['role']!r} of {where} is not one of {', '.join(KNOWN_ROLES)}")
    if called:
        message["tool_calls"] = [{"type": "function", "function": _from_text(str(message.pop("content", "")))}]
    if "tool_calls" in message:
        message["tool_calls"] = [_tool_call(call, where) for call in get(message, "tool_calls", list)]
        message.setdefault("content", "")
        if not message["tool_calls"]:
            del message["tool_calls"]
    message["content"] = _content(message, where)
    return message


def _content(message: Message, where: str) -> str:
    """The text of a message, whose content may come in parts. Raises BadRow for parts that are no text."""
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
    """A tool call whose arguments are an object, as most chat templates expect. Raises BadRow."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadRow("wrong type", f"a tool call of {where} is no {{function: {{name, arguments}}}}")
    function, arguments = dict(function), function.get("arguments", {})
    function["arguments"] = _from_text(arguments) if isinstance(arguments, str) else arguments
    return {**call, "function": function} if "function" in call else {"type": "function", "function": function}


def text_or_messages(row: Row, name: str) -> Text:
    value = get(row, name, str, list, Mapping)
    if isinstance(value, str) and isinstance(row, TextRow) and value.startswith("[{"):
        parsed = _from_text(value)
        if isinstance(parsed, list) and all(isinstance(m, Mapping) and {"role", "from"} & m.keys() for m in parsed):
            return messages({name: parsed}, name)
    return value if isinstance(value, str) else messages(row, name)


class Fields(Mapping[str, Any]):
    """A row under the columns' own names. Those that are null are absent. Remembers which of the row's were read."""

    def __init__(self, row: Row, columns: Mapping[str, str | None]):
        self.row, self.columns = row, columns
        self.read: set[str] = set()

    def name(self, column: str) -> str:
        """What the row calls `column`: as `columns` says, else by its own name, else by the first alias it has."""
        if given := self.columns.get(column):
            return given
        known = (column, *ALIASES.get(column, ()))
        return next((name for name in known if self.row.get(name) is not None), column)

    def has(self, column: str) -> bool:
        """Whether the row says anything in `column`."""
        return self.row.get(self.name(column)) is not None

    def __getitem__(self, column: str) -> Any:
        self.read.add(self.name(column))
        return self.row[self.name(column)]

    def __contains__(self, column: object) -> bool:
        return isinstance(column, str) and self.name(column) in self.row

    def __iter__(self) -> Any:
        return iter(self.row)

    def __len__(self) -> int:
        return len(self.row)

    def get_as(self, column: str, *types: type) -> Any:
        """As `get`; a message names the column as the row does."""
        self.read.add(self.name(column))
        return get(self.row, self.name(column), *types)

    def text(self, column: str) -> Text:
        """As `text_or_messages`."""
        self.read.add(self.name(column))
        return text_or_messages(self.row, self.name(column))

    def messages(self, column: str) -> list[Message]:
        """As `messages`."""
        self.read.add(self.name(column))
        return messages(self.row, self.name(column))

    def prompt(self) -> Text:
        """The prompt; an instruction with the input that it is about, if there is one."""
        prompt, about = self.text("prompt"), self.row.get("input")
        if self.name("prompt") != "instruction" or not isinstance(prompt, str) or not isinstance(about, str):
            return prompt
        self.read.add("input")
        return f"{prompt}\n\n{about}" if about.strip() else prompt

    def unused(self) -> list[str]:
        """The columns that say something and were not read, but for those of a row's origin."""
        left = (name for name, value in self.row.items() if name not in self.read and value not in (None, "", [], {}))
        return [name for name in left if not ORIGIN.fullmatch(str(name))]


# --- Where prompt and responses part ---

TURN = re.compile(r"\n\n(Human|Assistant):")
ASSISTANT = "\n\nAssistant:"


def _shared(a: str, b: str) -> int:
    """How many characters `a` and `b` begin with in common."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def split_dialogues(chosen: str, rejected: str) -> Judgement:
    """The prompt is the shared text up to and with its last assistant marker.

    Chosen's own last marker will not do: a few HH rows part at an earlier turn, and their rejected text would be cut
    in the wrong place.
    """
    end = chosen.rfind(ASSISTANT, 0, _shared(chosen, rejected))
    if end < 0:
        advice = "dialogues look as in HH, other texts need a column 'prompt'"
        raise BadRow("no shared assistant turn", f"chosen and rejected have no common {ASSISTANT!r}; {advice}")
    end += len(ASSISTANT)
    return Judgement(chosen[:end], [chosen[end:], rejected[end:]], [(0, 1)], keep_end=True)


def dialogue_messages(text: str) -> list[Message]:
    """A text in the style of HH, which begins with a marker, as messages."""
    _, *turns = TURN.split(text)
    roles = ("user" if who == "Human" else "assistant" for who in turns[::2])
    return [{"role": role, "content": said.strip()} for role, said in zip(roles, turns[1::2])]


def to_messages(judged: Judgement) -> Judgement:
    """The judgement with text as messages: a dialogue in the style of HH turn by turn, other text as one turn."""
    if not isinstance(judged.prompt, str):
        return judged
    prompt, sides = judged.prompt, [str(side) for side in judged.responses]
    if prompt.startswith("\n\nHuman:") and prompt.rstrip().endswith(ASSISTANT):
        judged.prompt = dialogue_messages(prompt.rstrip().removesuffix(ASSISTANT))
        judged.responses = [dialogue_messages(ASSISTANT + side) for side in sides]
    else:
        judged.prompt = turn("user", prompt.strip())
        judged.responses = [turn("assistant", side.strip()) for side in sides]
    judged.keep_end = True
    return judged


def dialogue_parts(text: str) -> list[str]:
    """A response in the style of HH, cut into what the assistant says and, in turn, what stands between: markers, and
    what the human says."""
    parts, start = [], 0
    for human in re.finditer(r"\n\nHuman:", text):
        if human.start() < start:
            continue
        answer = text.find(ASSISTANT, human.end())
        if answer < 0:
            break
        parts += [text[start : human.start()], text[human.start() : answer + len(ASSISTANT)]]
        start = answer + len(ASSISTANT)
    return [*parts, text[start:]]


def split_conversations(chosen: list[Message], rejected: list[Message]) -> Judgement:
    """The prompt is the messages that both sides share, up to the last point where both go on with the assistant."""
    said = [[{key: m.get(key) for key in SAID} for m in side] for side in (chosen, rejected)]
    shared = sum(1 for _ in itertools.takewhile(lambda ab: ab[0] == ab[1], zip(*said)))
    shared = min(shared, len(chosen) - 1, len(rejected) - 1)
    while shared > 0 and not chosen[shared]["role"] == rejected[shared]["role"] == "assistant":
        shared -= 1
    if shared <= 0:
        raise BadRow("no shared prompt", "chosen and rejected share no messages before one of the assistant")
    return Judgement(chosen[:shared], [chosen[shared:], rejected[shared:]], [(0, 1)], keep_end=True)


def turn(role: str, text: Text) -> list[Message]:
    return [{"role": role, "content": text}] if isinstance(text, str) else text


def answers(prompt: Text, sides: Sequence[Text], **facts: Any) -> Judgement:
    """Prompt and responses given apart. If any is a list of messages, text among them becomes a message."""
    if isinstance(prompt, str) and all(isinstance(side, str) for side in sides):
        return _without_repetition(Judgement(prompt, sides, **facts))
    said = [turn("assistant", side) for side in sides]
    if any(side[0]["role"] != "assistant" for side in said):
        raise BadRow("wrong role", "a response must begin with a message of the assistant")
    return Judgement(turn("user", prompt), said, keep_end=True, **facts)


def _without_repetition(judged: Judgement) -> Judgement:
    """Take the prompt out of responses that all begin with it: they are whole texts."""
    prompt, texts = str(judged.prompt), [str(side) for side in judged.responses]
    asked = prompt.strip()
    if not asked or not any(text.lstrip().startswith(asked) for text in texts):
        return judged
    ends = [text.lstrip()[len(asked) :] for text in texts]
    parted = not asked[-1].isalnum() or not any(end[:1].isalnum() for end in ends)  # "1" does not stand in "12"
    if parted and all(text.lstrip().startswith(asked) and end.strip() for text, end in zip(texts, ends)):
        judged.responses = [end.removeprefix(prompt[len(prompt.rstrip()) :]) for end in ends]
        judged.notes.append("every response began with the prompt, which is taken once")
    elif len(asked) > 20:
        judged.notes.append("a response begins with the text of its prompt, and another does not")
    return judged


# --- The forms ---


def generic(row: Row, columns: Mapping[str, str | None] | None = None) -> Judgement:
    """A row whose columns say what it is (`FORMS`)."""
    fields = Fields(row, columns or {})
    for column, name in fields.columns.items():
        if name not in row:
            raise BadRow("missing field", f"'{name}' (columns.{column}); the row has {', '.join(map(repr, row))}")
    judged = _with_tools(_with_system(_form(fields), fields), fields)
    if judged.demonstration and fields.has("label"):
        judged.undesired = not _label(fields)
    if judged.pairs and fields.has("score_chosen") and fields.has("score_rejected"):
        scores = [fields.get_as(name, int, float) for name in ("score_chosen", "score_rejected")]
        judged.notes += score_notes(*scores)
    judged.notes += [f"column {name!r} is not used" for name in fields.unused()]
    return judged


def score_notes(chosen: float, rejected: float) -> list[str]:
    """What is odd about the scores of a pair."""
    if math.isnan(chosen) or math.isnan(rejected):
        return ["score_chosen or score_rejected is not a number; the pair is kept"]
    return ["score_chosen is below score_rejected; the pair is kept as it is named"] if chosen < rejected else []


def _form(fields: Fields) -> Judgement:
    for column, form in FORM_OF.items():
        if column in fields.columns and fields.has(column):  # what the configuration names comes first
            return form(fields)
    if fields.row.get("responses") is not None and fields.row.get("scores") is not None:
        return scored(fields)
    if fields.has("chosen") or fields.has("rejected"):
        return compared(fields)
    if fields.has("completions"):
        return rated_completions(fields)
    if fields.has("completion"):
        return completed(fields)
    if fields.has("messages"):
        return conversation(fields)
    if fields.has("responses") or fields.has("scores"):
        return scored(fields)
    raise BadRow("columns fit no known form", f"{', '.join(map(repr, fields)) or 'none'}; accepted are\n{FORMS}")


def completed(fields: Fields) -> Judgement:
    """A prompt and one completion."""
    return answers(fields.prompt(), [fields.text("completion")], pairs=[], demonstration=True)


def _label(fields: Fields) -> bool:
    value = fields.get_as("label", bool, int)
    if value not in (0, 1):
        raise BadRow("wrong value", f"{fields.name('label')!r} is {value}, not true or false (is the completion good?)")
    return bool(value)


def compared(fields: Fields) -> Judgement:
    """Chosen and rejected, with or without a prompt apart."""
    chosen, rejected = fields.text("chosen"), fields.text("rejected")
    whole = not isinstance(chosen, str) and chosen[0]["role"] != "assistant"
    if isinstance(chosen, str) != isinstance(rejected, str) and (whole or not fields.has("prompt")):
        raise BadRow("wrong type", "one of 'chosen' and 'rejected' is text, the other a list of messages")
    if fields.has("messages"):
        if not whole and not fields.has("prompt"):
            return answers(fields.messages("messages"), [chosen, rejected], pairs=[(0, 1)])
        if fields.row[fields.name("messages")] == fields["chosen"]:  # as UltraFeedback repeats it
            fields.read.add(fields.name("messages"))
    if fields.has("prompt") and not whole:
        return answers(fields.prompt(), [chosen, rejected], pairs=[(0, 1)])
    if isinstance(chosen, str) and isinstance(rejected, str):
        return split_dialogues(chosen, rejected)
    assert not isinstance(chosen, str) and not isinstance(rejected, str)
    judged = split_conversations(chosen, rejected)
    if fields.has("prompt") and not _stands_in(fields.prompt(), judged):
        judged.notes.append("column 'prompt' says other things than the conversations do, and is not used")
    return judged


def _stands_in(prompt: Text, judged: Judgement) -> bool:
    """Whether the prompt that stands apart is a part of the conversations, too."""
    shown = {message["content"].strip() for message in judged.prompt if isinstance(message, dict)}
    return all(message["content"].strip() in shown for message in turn("user", prompt))


def scored(fields: Fields) -> Judgement:
    prompt, responses, scores = fields.prompt(), *(fields.get_as(n, list) for n in ("responses", "scores"))
    return _rated(prompt, responses, scores, "responses", "scores")


def rated_completions(fields: Fields) -> Judgement:
    """UltraFeedback's own form: each completion has a response and its scores."""
    completions = fields.get_as("completions", list)
    for number, one in enumerate(completions):
        if not isinstance(one, Mapping) or "response" not in one:
            raise BadRow("wrong type", f"completions[{number}] is no {{response, overall_score}}")
    scores = [one.get("overall_score", one.get("score")) for one in completions]
    judged = _rated(fields.prompt(), [one["response"] for one in completions], scores, "completions", "score")
    keys = {key for one in completions for key, value in one.items() if value not in (None, "", [], {})}
    more = sorted(key for key in keys - {"response", "overall_score", "score"} if not ORIGIN.fullmatch(str(key)))
    judged.notes += [f"key {key!r} of completions is not used" for key in more]
    return judged


def _rated(prompt: Text, responses: list[Any], scores: list[Any], of: str, by: str) -> Judgement:
    if not responses or len(responses) != len(scores):
        raise BadRow("scores do not match responses", f"{len(responses)} responses, {len(scores)} scores")
    for i, score in enumerate(scores):
        found = get({f"{by}[{i}]": score}, f"{by}[{i}]", int, float)
        if isinstance(found, float) and not math.isfinite(found):
            raise BadRow("score not finite", f"{by}[{i}] is {score}")
    sides = [text_or_messages({f"{of}[{i}]": side}, f"{of}[{i}]") for i, side in enumerate(responses)]
    return answers(prompt, sides, pairs=[], **rank(scores))


def rank(scores: Sequence[float]) -> dict[str, Any]:
    """A Judgement's facts: the first of the highest scored is the SFT target."""
    best = max(scores)
    try:
        score = float(best)
    except OverflowError:
        raise BadRow("score not finite", f"{str(best)[:20]}... is beyond what a 64-bit number holds") from None
    return {"scores": scores, "target": list(scores).index(best), "score": score}


def conversation(fields: Fields) -> Judgement:
    """A whole conversation, of which the last answer is the response."""
    turns = fields.messages("messages")
    end = next((i for i in reversed(range(len(turns))) if turns[i]["role"] == "assistant"), None)
    if not end:
        raise BadRow("no answer", "'messages' has no message of the assistant after another's")
    judged = Judgement(turns[:end], [turns[end : end + 1]], [], keep_end=True, demonstration=True)
    if end + 1 < len(turns):
        judged.notes.append("messages after the last of the assistant are not used")
    return judged


FORM_OF = {"responses": scored, "chosen": compared, "rejected": compared, "completions": rated_completions}
FORM_OF |= {"completion": completed, "messages": conversation}


def all_answers(judged: Judgement) -> Judgement:
    """A demonstration of the whole conversation: the response is all from the first answer on. Itself if there is one
    answer only."""
    target = judged.responses[judged.target]
    facts: dict[str, Any] = {"keep_end": judged.keep_end, "demonstration": True, "tools": judged.tools}
    facts |= {"undesired": judged.undesired, "notes": judged.notes}
    if isinstance(judged.prompt, str):
        end = judged.prompt.find(ASSISTANT) + len(ASSISTANT)
        if not judged.prompt.startswith("\n\nHuman:") or end == len(judged.prompt):
            return judged
        return Judgement(judged.prompt[:end], [judged.prompt[end:] + str(target)], [], **facts)
    assert not isinstance(target, str)
    end = next((i for i, m in enumerate(judged.prompt) if m["role"] == "assistant" and i), 0)
    return Judgement(judged.prompt[:end], [[*judged.prompt[end:], *target]], [], **facts) if end else judged


def _with_system(judged: Judgement, fields: Fields) -> Judgement:
    """The judgement with the column `system` as the first turn of its prompt."""
    system = fields.get_as("system") if fields.has("system") else ""
    if not system.strip():
        return judged
    judged = to_messages(judged)
    asked: Any = judged.prompt
    if asked[0]["role"] == "system":
        if asked[0]["content"].strip() not in ("", system.strip()):
            raise BadRow("two system turns", "the column 'system' differs from the conversation's own system turn")
        asked = asked[1:]
    judged.prompt = [{"role": "system", "content": system}, *asked]
    return judged


def _with_tools(judged: Judgement, fields: Fields) -> Judgement:
    """The judgement with the column `tools`, which may hold JSON as text. Tools need a chat template."""
    if not fields.has("tools"):
        return judged
    value = fields["tools"]
    tools = _from_text(value) if isinstance(value, str) else value
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadRow("wrong type", f"'tools' is {type(tools).__name__}, not a list of {{type, function}}")
    judged.tools = tools or None
    return to_messages(judged) if tools else judged
