"""Messages -> text, by the tokenizer's chat template or in the style of HH.

Every rendering is checked against its row: each of the assistant's texts stands in it, and it is known which parts of a
response are the assistant's.
"""

import contextlib
import hashlib
import json
import re
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from types import FrameType
from typing import Any

from dpo.data.rows import ASSISTANT, HUMAN, THINKING, BadRow, Message, dialogue_parts
from dpo.utils import UserError

RENDER_SECONDS = 10.0  # for one row
RENDER_FACTOR = 64  # most characters of a rendering for each character of its messages
HH_MARKERS = {"user": f"{HUMAN} ", "assistant": f"{ASSISTANT} ", "system": "", "developer": ""}


@dataclass(frozen=True)
class Rendering:
    """A prompt up to where the assistant speaks, and its responses without their closing EOS.

    A response is a list of parts. The assistant's parts and those between them (1, 3, ...) alternate.
    """

    prompt: str
    responses: list[list[str]]
    notes: list[str]


class ChatFormat:
    """Renders messages. `style`: "template" (the tokenizer's chat template), "hh", or "auto": the first if it exists.

    `date` replaces today's date in templates that write it.
    """

    def __init__(self, tokenizer: Any, style: str, date: str):
        has_template = getattr(tokenizer, "chat_template", None) is not None
        if style == "template" and not has_template:
            raise UserError("chat_format=template, but the tokenizer has no chat template; use chat_format=hh or auto")
        self.tokenizer = tokenizer if has_template and style != "hh" else None
        self.wraps_text = style == "template"
        self.date = datetime.fromisoformat(date)
        self.identity: Any = "hh"
        self.name = "hh"
        if self.tokenizer is not None:
            template = self._with_date(str(tokenizer.chat_template))
            special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}  # templates write them
            self.identity = [template, special, self.wraps_text]
            self.name = f"template:{hashlib.sha256(template.encode()).hexdigest()[:8]}"

    def _with_date(self, template: str) -> str:
        """Write `date` into the template: a prompt must not change overnight."""
        call = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
        return call.sub(lambda found: json.dumps(self.date.strftime(found[2])), template)

    def __call__(
        self, prompt: list[Message], responses: Sequence[list[Message]], tools: list[Any] | None = None
    ) -> Rendering:
        """Render one prompt and its responses. Raises BadRow if the rendering is not what the row says."""
        if self.tokenizer is None:
            return _hh(self.prompt(prompt), prompt, responses, tools)
        start = self.prompt(prompt, tools)
        notes: dict[str, None] = {}
        parts = [self._response(prompt, start, response, tools, notes) for response in responses]
        _prompt_must_stand(prompt, start)
        if tools and self.prompt(prompt) == start:
            advice = "take a tokenizer whose template writes them, or remove them"
            raise BadRow("the chat template ignores tools", advice)
        return Rendering(start, parts, list(notes))

    def prompt(self, prompt: list[Message], tools: list[Any] | None = None) -> str:
        """Render a prompt up to where the assistant speaks or, after its own message, continues. Raises BadRow."""
        continues = prompt[-1]["role"] == "assistant"
        if self.tokenizer is None:
            text = "".join(HH_MARKERS.get(message["role"], "") + message["content"] for message in prompt)
            return text if continues else text + ASSISTANT
        options = {"continue_final_message": True} if continues else {"add_generation_prompt": True}
        return self._render(prompt, tools, **options)

    def _response(
        self,
        prompt: list[Message],
        start: str,
        response: list[Message],
        tools: list[Any] | None,
        notes: dict[str, None],
    ) -> list[str]:
        """Render a response to the prompt that was rendered as `start`; add warnings to `notes`. Raises BadRow."""
        assert self.tokenizer is not None
        first, messages, eos = len(prompt), [*prompt, *response], self.tokenizer.eos_token
        if prompt[-1]["role"] == "assistant":  # the response continues the prompt's last message
            first -= 1
            joined = {**prompt[-1], **response[0], "content": prompt[-1]["content"] + response[0]["content"]}
            messages[first : first + 2] = [joined]
        text = self._render(messages, tools)
        if text.startswith(start):
            parts = [text[a:b] for a, b in self._bounds(messages, first, len(start), text, tools)]
            answers = iter(parts[::2])
            for message in response:
                if message["role"] == "assistant":
                    _must_stand(message, next(answers))
            last = parts[-1].rstrip()
            parts[-1] = last.removesuffix(eos) if last.endswith(eos) else parts[-1]
        elif thought := _after_think(start, response, text, eos):
            parts = [thought]
        else:
            raise _unfit("its generation prompt is not how an answer begins")
        notes |= dict.fromkeys(self._unused_keys(messages, text, tools))
        return parts

    def _render(self, messages: list[Message], tools: list[Any] | None, **options: Any) -> str:
        """Apply the chat template. Raises BadRow, and UserError if it takes too long."""
        most = RENDER_FACTOR * (len(str(messages)) + len(str(tools)) + 2**14)
        assert self.tokenizer is not None
        try:
            with _time_limit(RENDER_SECONDS):
                template = self._with_date(self.tokenizer.get_chat_template(None, tools))
                if "strftime_now(" in template:
                    raise ValueError("it writes the date in a way that cannot be fixed")
                options |= {"tools": tools, "chat_template": template, "tokenize": False}
                text = self.tokenizer.apply_chat_template(messages, **options)
        except TimeoutError:
            advice = "mend it or use chat_format=hh"
            raise UserError(f"the chat template takes more than {RENDER_SECONDS:g} s; {advice}") from None
        except Exception as error:  # a template may raise anything
            raise BadRow("refused by the chat template", f"{error}; chat_format=hh needs no template") from error
        if len(text) > most:
            raise _unfit(f"it makes {len(text)} characters of the row")
        return text

    def _bounds(
        self, messages: list[Message], first: int, start: int, text: str, tools: list[Any] | None
    ) -> Iterator[tuple[int, int]]:
        """Yield where each answer from messages[first] on stands in `text` and, in turn, what lies between two."""
        answers = [i for i in range(first, len(messages)) if messages[i]["role"] == "assistant"]
        end = start
        for i in answers:
            if i > first:
                before = self._render(messages[:i], tools, add_generation_prompt=True)
                if not text.startswith(before) or len(before) < end:
                    raise _unfit("it renders a turn in other ways once others follow")
                yield end, len(before)
                start = len(before)
            end = len(text) if i == len(messages) - 1 else self._end_of_answer(messages, i, start, text, tools)
            yield start, end
        if answers[-1] < len(messages) - 1:
            raise _must_end_with_assistant(messages)

    def _end_of_answer(self, messages: list[Message], i: int, start: int, text: str, tools: list[Any] | None) -> int:
        """Return where the answer messages[i], which begins at `start`, ends, its EOS included."""
        assert self.tokenizer is not None
        alone, eos = self._render(messages[: i + 1], tools), self.tokenizer.eos_token
        for candidate in (alone, alone.rstrip().removesuffix(eos)):  # some templates close a conversation with an EOS
            if text.startswith(candidate) and len(candidate) > start:
                end = candidate.rstrip()
                return len(end) if end.endswith(eos) and len(end) > start else len(candidate)
        content = messages[i]["content"].strip()
        found = re.match(rf"\s*{re.escape(content)}\s*{re.escape(eos)}", text[start:])
        if not content or found is None:
            raise _unfit("it renders an answer in other ways once others follow")
        return start + found.end()

    def _unused_keys(self, messages: list[Message], text: str, tools: list[Any] | None) -> list[str]:
        """Return a warning for each key of the messages that the template leaves out."""
        keys = sorted({key for message in messages for key in message} - {"role", "content", "tool_calls", *THINKING})
        without = ([{k: v for k, v in m.items() if k != key} for m in messages] for key in keys)
        return [
            f"key {key!r} of messages is not used by the chat template"
            for key, rest in zip(keys, without)
            if self._render(rest, tools) == text
        ]


def _unfit(problem: str) -> BadRow:
    return BadRow("unfit chat template", f"{problem}; mend it or use chat_format=hh")


def _must_end_with_assistant(messages: Sequence[Message]) -> BadRow:
    return BadRow("wrong role", f"a response must end with the assistant, not with {messages[-1]['role']!r}")


def _hh(start: str, prompt: list[Message], responses: Sequence[list[Message]], tools: list[Any] | None) -> Rendering:
    """Render responses in the style of HH, after the prompt's rendering `start`. Raises BadRow."""
    notes: dict[str, None] = {}
    for message in (*prompt, *(message for response in responses for message in response)):
        if message["role"] not in HH_MARKERS:
            raise BadRow("wrong role", f"{message['role']!r} is not one of {', '.join(HH_MARKERS)}")
        if tools or "tool_calls" in message:
            raise BadRow("tools without a chat template", "take a tokenizer whose template writes tool calls")
        for key in sorted(message.keys() - {"role", "content"}):
            notes[f"key {key!r} of messages is not used by chat_format=hh"] = None
    marker = f"{ASSISTANT} " if prompt[-1]["role"] == "assistant" else ASSISTANT
    rendered = []
    for response in responses:
        for message in response:
            if set(THINKING) & message.keys():
                raise BadRow("thinking without a chat template", "take a tokenizer whose template writes it")
            if message["role"] in ("system", "developer"):
                raise BadRow("wrong role", f"{message['role']!r} inside a response has no marker in the style of HH")
        if response[-1]["role"] != "assistant":
            raise _must_end_with_assistant(response)
        text = "".join(HH_MARKERS[message["role"]] + message["content"] for message in response)
        rendered.append(dialogue_parts(text.removeprefix(marker)))
    return Rendering(start, rendered, list(notes))


def _after_think(start: str, response: list[Message], text: str, eos: str) -> str | None:
    """Return a response with its thinking, word for word, if the rendered prompt ends with <think>; else None.

    Templates that write such prompts leave the thinking out of a finished conversation.
    """
    message = response[0]
    opens = start.rstrip().endswith("<think>")
    if len(response) > 1 or "tool_calls" in message or not opens or not text.rstrip().endswith(eos):
        return None
    thinking = next((message[key] for key in THINKING if isinstance(message.get(key), str)), None)
    if thinking is not None:
        return f"{thinking.strip()}\n</think>\n\n{message['content']}"
    content = message["content"].lstrip()
    return content.removeprefix("<think>").lstrip() if "</think>" in content else None


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _stands(text: str, rendered: str) -> bool:
    """Return whether a text stands in a squeezed rendering, as it is or as JSON writes it, but for white space."""
    forms = (text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1])
    return any(_squeezed(form) in rendered for form in forms)


def leaves(value: Any) -> Iterator[str]:
    """Yield the keys and texts inside a tool call's arguments."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from leaves(inner)
    elif isinstance(value, str):
        yield value


def _must_stand(message: Message, part: str) -> None:
    """Raise BadRow unless every text of an answer stands in its part of the rendering, and its content once."""
    rendered = _squeezed(part)
    # Templates set thinking apart, in tags of their own.
    contents = [piece for piece in re.split(r"(</?think>)", message["content"]) if piece not in ("<think>", "</think>")]
    others = [message[key] for key in THINKING if isinstance(message.get(key), str)]
    for call in message.get("tool_calls", ()):
        others += [call["function"]["name"], *leaves(call["function"].get("arguments"))]
    for text in (*contents, *others):
        if text.strip() and not _stands(text, rendered):
            advice = "" if "tool_calls" in message else ", or chat_format=hh"
            raise BadRow(
                "the chat template drops text",
                f"{text.strip()[:60]!r} of a response is not in its rendering {part.strip()[:80]!r}; take a tokenizer "
                f"whose template keeps it{advice}",
            )
    repeated = sum(text.count(message["content"]) for text in others)  # thinking may hold the answer, too
    if len(message["content"]) > 20 and part.count(message["content"]) > 1 + repeated:
        raise BadRow("the chat template repeats text", f"{message['content'][:60]!r} stands twice in its rendering")


def _prompt_must_stand(prompt: Sequence[Message], rendered: str) -> None:
    """Raise BadRow unless what others than the assistant say in a prompt stands in its rendering.

    Some templates leave the thinking out of the assistant's earlier turns, in training as in use.
    """
    squeezed = _squeezed(rendered)
    for message in prompt:
        if message["role"] == "assistant":
            texts = [call["function"]["name"] for call in message.get("tool_calls", ())]
        else:
            texts = [message["content"]]
        if missing := next((text for text in texts if text.strip() and not _stands(text, squeezed)), None):
            raise BadRow(
                "the chat template drops text",
                f"{missing.strip()[:60]!r} ({message['role']}) of the prompt is not in its rendering; take a template "
                "that keeps it, or chat_format=hh",
            )


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError inside after `seconds`. Signals need the main thread; others have no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
