"""Every style of chat template: what the row says stands in the rendering, and only the assistant's part counts; or the
row is refused."""

import re
import time
from typing import Any

import pytest
from chat_templates import STYLES, tokenizer_of
from conftest import make_tokenizer

from dpo.data.rendering import ChatFormat, Rendering
from dpo.data.rows import BadRow, messages
from dpo.utils import UserError

DATE = "2024-07-26"
TOOLS = [{"type": "function", "function": {"name": "get_price", "parameters": {"type": "object", "properties": {}}}}]


def say(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


CALL = say(
    "assistant", "", tool_calls=[{"type": "function", "function": {"name": "get_price", "arguments": {"item": "pear"}}}]
)
ASK = [say("user", "What is two plus two?")]
SCENES: dict[str, tuple[list, list, list | None]] = {
    "single": (ASK, [say("assistant", "It is four.")], None),
    "system": ([say("system", "Be brief, please."), *ASK], [say("assistant", "It is four.")], None),
    "multi-turn": (
        [*ASK, say("assistant", "It is four."), say("user", "Are you sure?")],
        [say("assistant", "Yes, I am.")],
        None,
    ),
    "turns in the response": (
        ASK,
        [say("assistant", "It is four."), say("user", "Are you sure?"), say("assistant", "Yes, I am.")],
        None,
    ),
    "tool call": (ASK, [CALL], TOOLS),
    "tool result": ([*ASK, CALL, say("tool", "2 euros")], [say("assistant", "Two euros.")], TOOLS),
    "prefill": ([*ASK, say("assistant", "It is")], [say("assistant", " four.")], None),
    "thinking": (ASK, [say("assistant", "<think>two and two</think>It is four.")], None),
    "reasoning": (ASK, [say("assistant", "It is four.", reasoning_content="two and two")], None),
}
# What each style refuses, and why; all else must hold.
NO_TOOLS = {"tool call": "drops text: 'get_price'", "tool result": "'get_price'|alternate", "reasoning": "drops text"}
ON_LAST_USER = "its generation prompt is not how an answer begins"  # written only if the user's turn is the last
REFUSED: dict[str, dict[str, str]] = {
    "chatml": NO_TOOLS,
    "smollm2": NO_TOOLS,
    "llama3": {"reasoning": "drops text"},
    "gemma": {**NO_TOOLS, "system": "System role not supported"},
    "mistral": {
        "reasoning": "drops text",
        "system": ON_LAST_USER,
        "tool call": ON_LAST_USER,
        "tool result": "ignores tools",
    },
    "qwen3": {},
    "olmo2": NO_TOOLS,
    "phi": NO_TOOLS,
    "deepseek_r1": dict.fromkeys(SCENES.keys() - {"prefill", "thinking", "reasoning"}, f"get_price|{ON_LAST_USER}"),
    "zephyr": NO_TOOLS,
}


def squeezed(text: str) -> str:
    return "".join(text.split())


def check_holds(tokenizer: Any, found: Rendering, prompt: list, response: list, tools: list | None) -> None:
    """Compare with the template's own rendering of the whole conversation, and with what its messages say."""
    conversation = [*prompt, *response]
    if prompt[-1]["role"] == "assistant":
        conversation = [*prompt[:-1], say("assistant", prompt[-1]["content"] + response[0]["content"])]
    template = re.sub(r"strftime_now\('%d %b %Y'\)", "'26 Jul 2024'", tokenizer.chat_template)
    whole = tokenizer.apply_chat_template(conversation, tools=tools, tokenize=False, chat_template=template)
    text = found.prompt + "".join(found.responses[0])
    assert text == whole or text == whole.rstrip().removesuffix(tokenizer.eos_token)
    counted, between = squeezed("".join(found.responses[0][::2])), squeezed("".join(found.responses[0][1::2]))
    for message in response:
        said = squeezed(message["content"].replace("<think>", "").replace("</think>", ""))
        if message["role"] == "assistant":
            assert squeezed(message["content"].rpartition("</think>")[2]) in counted and "Areyousure" not in counted
            assert squeezed(message.get("reasoning_content", "")) in counted
            assert not message.get("tool_calls") or ("get_price" in counted and "pear" in counted)
        else:
            assert said in between
    assert all(squeezed(message["content"]) in squeezed(found.prompt) for message in prompt)


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("style", STYLES)
def test_a_rendering_holds_or_is_refused(style: str, scene: str) -> None:
    tokenizer, (prompt, response, tools) = tokenizer_of(style), SCENES[scene]
    chat = ChatFormat(tokenizer, "template", DATE)
    if reason := REFUSED[style].get(scene):
        with pytest.raises(BadRow, match=reason):
            chat(prompt, [response], tools)
        return
    found = chat(prompt, [response], tools)
    if style == "deepseek_r1" and scene != "prefill":  # whose template leaves thinking out, as it does in a next turn
        assert found.prompt.endswith("<|Assistant|><think>\n")
        assert [squeezed(part) for part in found.responses[0]] == ["twoandtwo</think>Itisfour."]
    else:
        check_holds(tokenizer, found, prompt, response, tools)


def test_parts_between_answers_do_not_count() -> None:
    prompt, response, _ = SCENES["turns in the response"]
    found = ChatFormat(tokenizer_of("chatml"), "auto", DATE)(prompt, [response])
    middle = "\n<|im_start|>user\nAre you sure?<|im_end|>\n<|im_start|>assistant\n"
    assert found.responses[0] == ["It is four.<|im_end|>", middle, "Yes, I am."]
    hh = ChatFormat(make_tokenizer(), "hh", DATE)(prompt, [response])
    assert hh.responses[0] == [" It is four.", "\n\nHuman: Are you sure?\n\nAssistant:", " Yes, I am."]


def test_a_prompt_that_ends_with_the_assistant_goes_on() -> None:
    prompt, response, _ = SCENES["prefill"]
    found = ChatFormat(tokenizer_of("chatml"), "auto", DATE)(prompt, [response])
    assert found.prompt.endswith("<|im_start|>assistant\nIt is") and found.responses[0] == [" four."]
    hh = ChatFormat(make_tokenizer(), "hh", DATE)(prompt, [response])
    assert hh.prompt.endswith("\n\nAssistant: It is") and hh.responses[0] == [" four."]


def test_the_date_is_fixed() -> None:
    prompt, response, _ = SCENES["single"]
    tokenizer = tokenizer_of("llama3")
    assert "26 Jul 2024" in ChatFormat(tokenizer, "auto", DATE)(prompt, [response]).prompt
    other = ChatFormat(tokenizer, "auto", "2025-01-02")
    assert "02 Jan 2025" in other(prompt, [response]).prompt
    assert other.identity != ChatFormat(tokenizer, "auto", DATE).identity


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}[{{ m.role }}]{% endfor %}", "drops text"),
        ("{% for m in messages %}[{{ m.role }}] {{ m.content[:4] }}{% endfor %}", "drops text"),
        ("{% for m in messages if m.role != 'system' %}{{ m.content }}|{% endfor %}", "drops text: .*Be brief.*system"),
        ("{% for m in messages %}{{ m.content }}{{ m.content if loop.index > 2 }}|{% endfor %}", "repeats text"),
        ("{% for m in messages %}{{ m.content * 100000 }}{% endfor %}", "unfit chat template: it makes"),
        ("{% for m in messages %}{{ m.nothing.at_all }}{% endfor %}", "refused by the chat template"),
    ],
)
def test_templates_that_are_not_true_to_the_row(template: str, reason: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    prompt, response = [say("system", "Be brief, please."), *ASK], [say("assistant", "It is four, without any doubt.")]
    with pytest.raises(BadRow, match=reason):
        ChatFormat(tokenizer, "auto", DATE)(prompt, [response])


def test_an_endless_template_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo.data.rendering.RENDER_SECONDS", 0.5)
    tokenizer = make_tokenizer()
    loops = "".join(f"{{% for {c} in range(90000) %}}" for c in "abc") + "{% endfor %}" * 3
    tokenizer.chat_template = loops + "{{ messages[0].content }}"
    start = time.monotonic()
    with pytest.raises(UserError, match=r"takes more than 0\.5 s"):
        ChatFormat(tokenizer, "auto", DATE)(ASK, [[say("assistant", "4")]])
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"from": "human", "value": "Q"}, say("user", "Q")),
        ({"from": "gpt", "value": "A"}, say("assistant", "A")),
        ({"role": "developer", "content": "D"}, say("developer", "D")),
        ({"from": "observation", "value": "R"}, say("tool", "R")),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            say("user", "ab"),
        ),
        ({"role": "user", "content": "Q", "name": None, "tool_calls": None}, say("user", "Q")),
        (
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            say("assistant", "", tool_calls=[{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]),
        ),
        (
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}],
            },
            say("assistant", "", tool_calls=[{"function": {"name": "f", "arguments": {"x": 1}}}]),
        ),
    ],
)
def test_messages_of_other_forms(given: dict, expected: dict) -> None:
    assert messages({"m": [given]}, "m") == [expected]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"role": "user", "content": [{"type": "image", "url": "x"}]}, "not text: .* 'image'"),
        ({"role": "assistant", "content": "", "tool_calls": [{"nothing": 1}]}, "a tool call of"),
        ({"role": 3, "content": "x"}, "'role' is int"),
        ({"content": "x"}, "missing field: 'role'"),
    ],
)
def test_messages_that_are_none(given: dict, reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        messages({"m": [given]}, "m")
