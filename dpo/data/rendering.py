"""Messages -> text: by the tokenizer's chat template, or in the style of HH. Each rendering is checked against its row:
what the assistant says stands in it, and which parts of a response are the assistant's is known."""

import contextlib
import hashlib
import json
import re
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from types import FrameType
from typing import Any

from dpo.data.rows import ASSISTANT, BadRow, Message, dialogue_parts
from dpo.utils import UserError

RENDER_SECONDS = 10.0  # for one row
RENDER_FACTOR = 64  # characters of a rendering for each of its messages'
HH_MARKERS = {"user": "\n\nHuman: ", "assistant": f"{ASSISTANT} ", "system": "", "developer": ""}
THINKING = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class Rendering:
    """A prompt up to where the assistant speaks, and a response without its closing EOS: what the assistant says and,
    in turn, what stands between (`parts[1]`, `parts[3]`, ...)."""

    prompt: str
    parts: list[str]
    notes: list[str] = field(default_factory=list)


class ChatFormat:
    """Renders messages. `style`: "template" (the tokenizer's chat template), "hh", or "auto": the first if it exists.

    `date` is today for templates that write the date.
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
            special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}  # written by name
            self.identity = [template, special, self.wraps_text]
            self.name = f"template:{hashlib.sha256(template.encode()).hexdigest()[:8]}"

    def _with_date(self, template: str) -> str:
        """The template with `date` for the day on which it is rendered: a prompt must not change overnight."""
        call = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
        return call.sub(lambda found: json.dumps(self.date.strftime(found[2])), template)

    def __call__(self, prompt: list[Message], response: list[Message], tools: list[Any] | None = None) -> Rendering:
        """Raises BadRow if the rendering is not what the row says."""
        if self.tokenizer is None:
            return self._hh(prompt, response, tools)
        asked, before, whole = self.prompt(prompt, tools), len(prompt), [*prompt, *response]
        if prompt[-1]["role"] == "assistant":  # the response goes on where the prompt ends
            before -= 1
            whole[before : before + 2] = [_joined(prompt[-1], response[0])]
        text = self._render(whole, tools)
        if not text.startswith(asked):
            if thought := _after_think(asked, response, text, self.tokenizer.eos_token):
                return Rendering(asked, [thought], self._notes(whole, text, tools))
            raise BadRow("unfit chat template", "its generation prompt is not how an answer begins; use chat_format=hh")
        parts = [text[a:b] for a, b in self._bounds(whole, before, len(asked), text, tools)]
        for message, part in zip(response, self._answers(whole[before:], parts)):
            _must_stand(message, part)
        _prompt_must_stand(prompt, asked)
        return Rendering(asked, self._without_eos(parts), self._notes(whole, text, tools))

    def prompt(self, prompt: list[Message], tools: list[Any] | None = None) -> str:
        """The prompt alone, up to where the assistant speaks, or goes on. Raises BadRow."""
        goes_on = prompt[-1]["role"] == "assistant"
        if self.tokenizer is None:
            asked = "".join(HH_MARKERS.get(message["role"], "") + message["content"] for message in prompt)
            return asked if goes_on else asked + ASSISTANT
        options = {"continue_final_message": True} if goes_on else {"add_generation_prompt": True}
        return self._render(prompt, tools, **options)

    def _render(self, messages: list[Message], tools: list[Any] | None, **options: Any) -> str:
        size = RENDER_FACTOR * (len(str(messages)) + len(str(tools)) + 2**14)
        assert self.tokenizer is not None
        try:
            with _time_limit(RENDER_SECONDS):
                template = self._with_date(self.tokenizer.get_chat_template(None, tools))
                if "strftime_now(" in template:
                    raise ValueError("it writes the date in a way that cannot be fixed")
                text = self.tokenizer.apply_chat_template(
                    messages, tools=tools, chat_template=template, tokenize=False, **options
                )
        except TimeoutError:
            raise UserError(
                f"the chat template takes more than {RENDER_SECONDS:g} s; mend it or use chat_format=hh"
            ) from None
        except Exception as error:  # templates raise what they like
            raise BadRow("refused by the chat template", f"{error}; chat_format=hh needs no template") from error
        if len(text) > size:
            raise BadRow(
                "unfit chat template", f"it makes {len(text)} characters of the row; mend it or use chat_format=hh"
            )
        return text

    def _bounds(
        self, whole: list[Message], before: int, start: int, text: str, tools: list[Any] | None
    ) -> Iterator[tuple[int, int]]:
        """Where in `text` each answer of the messages after `before` is and, in turn, what lies between two."""
        answers = [i for i in range(before, len(whole)) if whole[i]["role"] == "assistant"]
        end = start
        for i in answers:
            if i > before:
                begin = self._render(whole[:i], tools, add_generation_prompt=True)
                if not text.startswith(begin) or len(begin) < end:
                    raise BadRow(
                        "unfit chat template", "it renders a turn in other ways once others follow; use chat_format=hh"
                    )
                yield end, len(begin)
                start = len(begin)
            end = len(text) if i == len(whole) - 1 else self._end_of_answer(whole, i, start, text, tools)
            yield start, end
        if answers[-1] < len(whole) - 1:
            raise BadRow("wrong role", f"a response must end with the assistant, not with {whole[-1]['role']!r}")

    def _end_of_answer(self, whole: list[Message], i: int, start: int, text: str, tools: list[Any] | None) -> int:
        """Where the answer whole[i], which begins at `start`, ends: with its EOS if it has one."""
        assert self.tokenizer is not None
        alone, eos = self._render(whole[: i + 1], tools), self.tokenizer.eos_token
        for end in (alone, alone.rstrip().removesuffix(eos)):  # some end a conversation with an EOS of its own
            if text.startswith(end) and len(end) > start:
                rest = end.rstrip()
                return len(rest) if rest.endswith(eos) and len(rest) > start else len(end)
        said = whole[i]["content"].strip()
        found = re.match(rf"\s*{re.escape(said)}\s*{re.escape(eos)}", text[start:])
        if not said or found is None:
            raise BadRow(
                "unfit chat template", "it renders an answer in other ways once others follow; use chat_format=hh"
            )
        return start + found.end()

    @staticmethod
    def _answers(messages: Sequence[Message], parts: list[str]) -> Iterator[str]:
        """The part of each of `messages` that is an answer; none ("") for others."""
        answers = iter(parts[::2])
        return (next(answers) if message["role"] == "assistant" else "" for message in messages)

    def _without_eos(self, parts: list[str]) -> list[str]:
        assert self.tokenizer is not None
        last, eos = parts[-1].rstrip(), self.tokenizer.eos_token
        return [*parts[:-1], last.removesuffix(eos) if last.endswith(eos) else parts[-1]]

    def _notes(self, whole: list[Message], text: str, tools: list[Any] | None) -> list[str]:
        """What the template leaves out of the row."""
        notes = []
        if tools and self._render(whole, None) == text:
            raise BadRow(
                "the chat template ignores tools", "take a tokenizer whose template writes them, or remove them"
            )
        for key in sorted({key for message in whole for key in message} - {"role", "content", "tool_calls", *THINKING}):
            if self._render([{k: v for k, v in m.items() if k != key} for m in whole], tools) == text:
                notes.append(f"key {key!r} of messages is not used by the chat template")
        return notes

    def _hh(self, prompt: list[Message], response: list[Message], tools: list[Any] | None) -> Rendering:
        notes = []
        for message in (*prompt, *response):
            if message["role"] not in HH_MARKERS:
                raise BadRow("wrong role", f"{message['role']!r} is not one of {', '.join(HH_MARKERS)}")
            if tools or "tool_calls" in message:
                raise BadRow("tools without a chat template", "take a tokenizer whose template writes tool calls")
            if message in response and set(THINKING) & message.keys():
                raise BadRow("thinking without a chat template", "take a tokenizer whose template writes it")
            if message in response and message["role"] in ("system", "developer"):
                raise BadRow("wrong role", f"{message['role']!r} inside a response has no marker in the style of HH")
            more = sorted(message.keys() - {"role", "content"})
            notes += [f"key {key!r} of messages is not used by chat_format=hh" for key in more]
        if response[-1]["role"] != "assistant":
            raise BadRow("wrong role", f"a response must end with the assistant, not with {response[-1]['role']!r}")
        said = "".join(HH_MARKERS[message["role"]] + message["content"] for message in response)
        marker = f"{ASSISTANT} " if prompt[-1]["role"] == "assistant" else ASSISTANT
        return Rendering(self.prompt(prompt), dialogue_parts(said.removeprefix(marker)), notes)


def _joined(start: Message, end: Message) -> Message:
    """One message of the assistant that `start` begins and `end` goes on with."""
    return {**start, **end, "content": start["content"] + end["content"]}


def _after_think(asked: str, response: list[Message], text: str, eos: str) -> str | None:
    """A response that thinks, word for word, after a prompt that has it begin with <think>. (Templates that write such
    prompts leave the thinking out of a conversation that is over.)"""
    message, begins = response[0], asked.rstrip().endswith("<think>")
    if len(response) > 1 or "tool_calls" in message or not begins or not text.rstrip().endswith(eos):
        return None
    thinking = next((message[key] for key in THINKING if isinstance(message.get(key), str)), None)
    if thinking is not None:
        return f"{thinking.strip()}\n</think>\n\n{message['content']}"
    said = message["content"].lstrip()
    return said.removeprefix("<think>").lstrip() if "</think>" in said else None


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _stands(text: str, rendered: str) -> bool:
    """Whether a text stands in a (squeezed) rendering, but for white space, as it is or as JSON writes it."""
    forms = (text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1])
    return any(_squeezed(form) in rendered for form in forms)


def leaves(value: Any) -> Iterator[str]:
    """The keys and texts inside a tool call's arguments."""
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
    """Raise BadRow unless all that a message of a response says stands in its part of the rendering."""
    if message["role"] != "assistant":
        return
    rendered = _squeezed(part)
    said = [message["content"], *(message[key] for key in THINKING if isinstance(message.get(key), str))]
    for call in message.get("tool_calls", ()):
        said += [call["function"]["name"], *leaves(call["function"].get("arguments"))]
    thinking = re.split(r"(</?think>)", message["content"])  # which templates set apart, in tags of their own
    thinking = [piece for piece in thinking if piece not in ("<think>", "</think>")]
    said[:1] = thinking
    for text in said:
        if text.strip() and not _stands(text, rendered):
            advice = "" if "tool_calls" in message else ", or chat_format=hh"
            raise BadRow(
                "the chat template drops text",
                f"{text.strip()[:60]!r} of a response is not in its rendering {part.strip()[:80]!r}; take a tokenizer "
                f"whose template keeps it{advice}",
            )
    thought = sum(text.count(message["content"]) for text in said[len(thinking) :])  # may hold the answer, too
    if len(message["content"]) > 20 and part.count(message["content"]) > 1 + thought:
        raise BadRow("the chat template repeats text", f"{message['content'][:60]!r} stands twice in its rendering")


def _prompt_must_stand(prompt: Sequence[Message], asked: str) -> None:
    """Raise BadRow unless what others than the assistant say in a prompt stands in its rendering. (Of the assistant's
    earlier turns some templates leave thinking out, as they do when the model is used.)"""
    rendered = _squeezed(asked)
    for message in prompt:
        if message["role"] == "assistant":
            missing = [call["function"]["name"] for call in message.get("tool_calls", ())]
        else:
            missing = [message["content"]]
        if text := next((text for text in missing if text.strip() and not _stands(text, rendered)), None):
            raise BadRow(
                "the chat template drops text",
                f"{text.strip()[:60]!r} ({message['role']}) of the prompt is not in its rendering; take a template "
                "that keeps it, or chat_format=hh",
            )


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError inside if it takes longer. Only in a process's main thread, as everything here runs."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
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
