"""What comes out of a row: a table of inputs with the records, masks, notes or the message that must come of them."""

import gzip
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_templates import CHATML, STYLES, tokenizer_of
from conftest import make_model, make_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dpo.data.checks import overlap
from dpo.data.parse import ranked_pairs
from dpo.data.records import PreferenceData, Record, parser_identity
from dpo.data.sources import DataSettings
from dpo.utils import UserError
from preference_datasets import load_data

EOS = "<|eos|>"
USER, BOT = "user", "assistant"


def u(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def a(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def im(*turns: tuple[str, str]) -> str:
    """ChatML of these turns, up to where the assistant speaks."""
    shown = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    return f"{shown}<|im_start|>assistant\n"


def hh(*asked: str) -> str:
    """A prompt in the style of HH: questions and answers in turn."""
    markers = ("\n\nHuman: ", "\n\nAssistant: ")
    return "".join(markers[i % 2] + text for i, text in enumerate(asked)) + "\n\nAssistant:"


@dataclass
class Case:
    """Rows (or the bytes of a file), what is set, and what must come out.

    `records`: prompt, responses and pairs, as text; what does not count in a response stands in « ». `error`: a
    pattern of the message instead. `notes`: patterns of what must be noted, and all of it.
    """

    rows: list[Any] | bytes
    records: list[tuple[str, list[str], list[tuple[int, int]]]] = field(default_factory=list)
    error: str = ""
    notes: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    template: str | None = None  # a chat template; ChatML's tokenizer if it is "chatml", or another of STYLES
    file: str = "rows.jsonl"
    funnel: dict[str, int] = field(default_factory=dict)


SFT = {"rows": "targets"}
PAIR = [(0, 1)]
CHAT = {"template": "chatml"}
Q, IM = "2+2?", im(("user", "2+2?"))
TOOLS = [{"type": "function", "function": {"name": "get_price", "parameters": {"type": "object"}}}]


def call(**arguments: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "get_price", "arguments": arguments}}]


TOOL_ROWS = [
    {
        "tools": TOOLS,
        "prompt": [u("price of a pear?")],
        "chosen": [a("Let me look.", tool_calls=call(item="pear"))],
        "rejected": [a("Let me look.", tool_calls=call(item="boat"))],
    },
    {
        "tools": TOOLS,
        "prompt": [u("price of a boat?")],
        "chosen": [a("I look it up.", tool_calls=call(item="boat"))],
        "rejected": [a("I do not know.")],
    },
]
WITH_TOOLS = "".join(
    (
        "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}",
        "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}",
        "<|eos|>\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}",
    )
)
TOOL_JSON = json.dumps(TOOLS)
THINK_ROWS = [
    {"prompt": [u(Q)], "chosen": [a("<think>two and two</think>4")], "rejected": [a("<think>I guess</think>5")]},
]
KTO_ROWS = [
    {"prompt": "Capital of France?", "completion": " Paris.", "label": True},
    {"prompt": "Capital of France?", "completion": " A silly question.", "label": False},
    {"prompt": "Capital of Spain?", "completion": " Who cares?", "label": False},
]
MULTI_ROW = {
    "chosen": [u(Q), a("4"), u("and 2+3?"), a("5")],
    "rejected": [u(Q), a("6"), u("are you sure about that?"), a("7")],
}
MULTI_RECORD = (
    IM,
    [
        "4<|im_end|>«\n<|im_start|>user\nand 2+3?<|im_end|>\n<|im_start|>assistant\n»5<|im_end|>",
        "6<|im_end|>«\n<|im_start|>user\nare you sure about that?<|im_end|>\n<|im_start|>assistant\n»7<|im_end|>",
    ],
    PAIR,
)
SIMPLE = {"prompt": Q, "chosen": " 4", "rejected": " 5"}
SIMPLE_RECORD = (Q, [" 4" + EOS, " 5" + EOS], PAIR)
UNION = {"responses": None, "scores": None, "completion": None}
TALK = [u(Q), a("4"), u("sure?"), a("yes")]

CASES = {
    # Tool calls, tools, thinking
    "tool calls and tools": Case(
        TOOL_ROWS,
        [
            (
                f"{TOOL_JSON}\n<user>price of a pear?{EOS}\n<assistant>",
                [
                    f'Let me look.[get_price {{"item": "pear"}}]{EOS}',
                    f'Let me look.[get_price {{"item": "boat"}}]{EOS}',
                ],
                PAIR,
            ),
            (
                f"{TOOL_JSON}\n<user>price of a boat?{EOS}\n<assistant>",
                [f'I look it up.[get_price {{"item": "boat"}}]{EOS}', f"I do not know.{EOS}"],
                PAIR,
            ),
        ],
        template=WITH_TOOLS,
    ),
    "tools as JSON text": Case(
        [{**TOOL_ROWS[1], "tools": TOOL_JSON}],
        [
            (
                f"{TOOL_JSON}\n<user>price of a boat?{EOS}\n<assistant>",
                [f'I look it up.[get_price {{"item": "boat"}}]{EOS}', f"I do not know.{EOS}"],
                PAIR,
            )
        ],
        template=WITH_TOOLS,
    ),
    "arguments as JSON text": Case(
        [
            {
                **TOOL_ROWS[1],
                "chosen": [
                    a(
                        "I look it up.",
                        tool_calls=[{"function": {"name": "get_price", "arguments": '{"item": "boat"}'}}],
                    )
                ],
            }
        ],
        [
            (
                f"{TOOL_JSON}\n<user>price of a boat?{EOS}\n<assistant>",
                [f'I look it up.[get_price {{"item": "boat"}}]{EOS}', f"I do not know.{EOS}"],
                PAIR,
            )
        ],
        template=WITH_TOOLS,
    ),
    "tool calls that the template drops": Case(TOOL_ROWS, error="rows.jsonl:1: the chat template drops text", **CHAT),
    "tools that the template ignores": Case(
        [{"tools": TOOLS, "prompt": [u(Q)], "chosen": "4", "rejected": "5"}], error="ignores tools", **CHAT
    ),
    "tool calls in the style of HH": Case(TOOL_ROWS, error="tools without a chat template"),
    "tools that are no list": Case([{**TOOL_ROWS[1], "tools": "get_price"}], error="'tools' is str", **CHAT),
    "no tools": Case(
        [{"tools": [], "prompt": [u(Q)], "chosen": "4", "rejected": "5"}],
        [(IM, ["4<|im_end|>", "5<|im_end|>"], PAIR)],
        **CHAT,
    ),
    "thinking that is kept": Case(
        THINK_ROWS,
        [(IM, ["<think>two and two</think>4<|im_end|>", "<think>I guess</think>5<|im_end|>"], PAIR)],
        **CHAT,
    ),
    "thinking by a template that sets it apart": Case(
        THINK_ROWS,
        [(IM, ["<think>\ntwo and two\n</think>\n\n4<|im_end|>", "<think>\nI guess\n</think>\n\n5<|im_end|>"], PAIR)],
        template="qwen3",
    ),
    "thinking that the template drops": Case(
        THINK_ROWS,
        error="rows.jsonl:1: the chat template drops text: 'two and two'",
        template=CHATML.replace("{{ m['content'] }}", "{{ m['content'].split('</think>')[-1] }}").replace(
            "<|im_end|>", EOS
        ),
    ),
    "reasoning that the template drops": Case(
        [{"prompt": [u(Q)], "chosen": [a("4", reasoning_content="hm")], "rejected": [a("4")]}],
        error="drops text: 'hm'",
        **CHAT,
    ),
    "a name that the template drops": Case(
        [{"prompt": [u(Q, name="Eve")], "chosen": [a("4")], "rejected": [a("5")]}],
        [(IM, ["4<|im_end|>", "5<|im_end|>"], PAIR)],
        notes=["key 'name' of messages is not used"],
        **CHAT,
    ),
    # System turns
    "a system column": Case(
        [{"system": s, "question": Q, "chosen": c, "rejected": r} for s, c, r in (("A", "4", "5"), ("B", "5", "4"))],
        [
            (im(("system", "A"), ("user", Q)), ["4<|im_end|>", "5<|im_end|>"], PAIR),
            (im(("system", "B"), ("user", Q)), ["5<|im_end|>", "4<|im_end|>"], PAIR),
        ],
        **CHAT,
    ),
    "a system column in the style of HH": Case(
        [{**SIMPLE, "system": "Be brief."}], [("Be brief." + hh(Q), [" 4" + EOS, " 5" + EOS], PAIR)]
    ),
    "a system column before a conversation": Case(
        [{"system": "S", "chosen": [u(Q), a("4")], "rejected": [u(Q), a("5")]}],
        [(im(("system", "S"), ("user", Q)), ["4<|im_end|>", "5<|im_end|>"], PAIR)],
        **CHAT,
    ),
    "two system turns": Case(
        [{"system": "S", "prompt": [system("T"), u(Q)], "completion": "4"}],
        error="two system turns",
        settings=SFT,
        **CHAT,
    ),
    "an empty system column": Case([{**SIMPLE, "system": ""}], [SIMPLE_RECORD]),
    "an empty system turn": Case(
        [
            {"prompt": [system(""), u(Q)], "chosen": [a("4")], "rejected": [a("5")]},
            {"prompt": [system(""), u("2+3?")], "chosen": [a("5")], "rejected": [a("6")]},
        ],
        [
            (im(("system", ""), ("user", Q)), ["4<|im_end|>", "5<|im_end|>"], PAIR),
            (im(("system", ""), ("user", "2+3?")), ["5<|im_end|>", "6<|im_end|>"], PAIR),
        ],
        **CHAT,
    ),
    "a developer's turn in the style of HH": Case(
        [{"prompt": [{"role": "developer", "content": "D"}, u(Q)], "chosen": [a("4")], "rejected": [a("5")]}],
        [("D" + hh(Q), [" 4" + EOS, " 5" + EOS], PAIR)],
    ),
    # Labels, scores, columns that are not used
    "labels under DPO": Case(
        KTO_ROWS, error="no example left:\n(.*\n)*.*completions with labels", notes=["label is false"]
    ),
    "labels under SFT": Case(
        KTO_ROWS, error=r"rows.jsonl:2: label is false.*Remove such rows \(there are 2\)", settings=SFT
    ),
    "labels under SFT, dropped": Case(
        KTO_ROWS,
        [("Capital of France?", [" Paris." + EOS], [])],
        settings={**SFT, "drop_bad_rows": True},
        notes=["label is false"],
        funnel={"rows dropped: label is false: the completion is not wanted": 2},
    ),
    "labels of messages": Case(
        [{"messages": [u(Q), a("4")], "label": False}], error="rows.jsonl:1: label is false", settings=SFT, **CHAT
    ),
    "a role that is misspelt": Case(
        [{"messages": [{"role": "usr", "content": Q}, a("4")]}], error="wrong role: 'usr'", settings=SFT, **CHAT
    ),
    "rows of two kinds": Case(
        [SIMPLE, {"prompt": "x", "completion": "y"}], [SIMPLE_RECORD], notes=["rows that state no preference"]
    ),
    "a label that is none": Case([{**KTO_ROWS[0], "label": 3}], error="'label' is 3, not true or false", settings=SFT),
    "score_chosen below": Case(
        [{**SIMPLE, "score_chosen": 1, "score_rejected": 2}], [SIMPLE_RECORD], notes=["score_chosen is below"]
    ),
    "score_chosen NaN": Case(
        [{**SIMPLE, "score_chosen": math.nan, "score_rejected": 2}], [SIMPLE_RECORD], notes=["is not a number"]
    ),
    "scores that agree": Case([{**SIMPLE, "score_chosen": 3, "score_rejected": 2}], [SIMPLE_RECORD]),
    "a column that is not used": Case(
        [{**SIMPLE, "images": ["x.png"], "margin": 1.5, "id": 7}],
        [SIMPLE_RECORD],
        notes=["column 'images' is not used", "column 'margin' is not used"],
    ),
    "an extra column of scores": Case(
        [{**SIMPLE, "scores": [0.9, 0.1]}], [SIMPLE_RECORD], notes=["column 'scores' is not used"]
    ),
    "null columns of a union": Case(
        [{**SIMPLE, **UNION}, {"prompt": "2+3?", "chosen": " 5", "rejected": " 6", **UNION}],
        [SIMPLE_RECORD, ("2+3?", [" 5" + EOS, " 6" + EOS], PAIR)],
    ),
    "an image in a message": Case(
        [{"prompt": [u([{"type": "image"}])], "completion": "4"}],  # type: ignore[arg-type]
        error="not text: message 1 of 'prompt' has a part of type 'image'",
        settings=SFT,
    ),
    # Who says what in a response
    "user turns inside a response": Case([MULTI_ROW], [MULTI_RECORD], **CHAT),
    "user turns inside, in the style of HH": Case(
        [MULTI_ROW],
        [
            (
                hh(Q),
                [
                    f" 4«\n\nHuman: and 2+3?\n\nAssistant:» 5{EOS}",
                    f" 6«\n\nHuman: are you sure about that?\n\nAssistant:» 7{EOS}",
                ],
                PAIR,
            )
        ],
    ),
    "user turns inside text of HH": Case(
        [{"chosen": hh(Q) + " 4" + hh("ok?") + " 5", "rejected": hh(Q) + " 6"}],
        [(hh(Q), [f" 4«{hh('ok?')}» 5{EOS}", f" 6{EOS}"], PAIR)],
    ),
    "user turns inside, SFT": Case([MULTI_ROW], [(IM, MULTI_RECORD[1][:1], [])], settings=SFT, **CHAT),
    "a response that ends with the user": Case(
        [{"chosen": [u(Q), a("4"), u("ok")], "rejected": [u(Q), a("5")]}], error="must end with the assistant", **CHAT
    ),
    "messages": Case(
        [{"messages": TALK}],
        [(im(("user", Q), ("assistant", "4"), ("user", "sure?")), ["yes<|im_end|>"], [])],
        settings=SFT,
        **CHAT,
    ),
    "messages, all answers": Case(
        [{"messages": TALK}],
        [(IM, ["4<|im_end|>«\n<|im_start|>user\nsure?<|im_end|>\n<|im_start|>assistant\n»yes<|im_end|>"], [])],
        settings={**SFT, "sft_turns": "all"},
        **CHAT,
    ),
    "HH, all answers": Case(
        [{"chosen": hh(Q, "4", "sure?") + " yes", "rejected": hh(Q, "4", "sure?") + " no"}],
        [(hh(Q), [f" 4«{hh('sure?')}» yes{EOS}"], [])],
        settings={**SFT, "sft_turns": "all"},
    ),
    "messages after the last answer": Case(
        [{"messages": [*TALK[:2], u("thanks")]}],
        [(IM, ["4<|im_end|>"], [])],
        settings=SFT,
        notes=["messages after the last"],
        **CHAT,
    ),
    "messages without an answer": Case([{"messages": [u(Q)]}], error="no answer", settings=SFT, **CHAT),
    "a prompt that ends with the assistant": Case(
        [{"prompt": [u(Q), a("It is")], "chosen": [a(" 4")], "rejected": [a(" 5")]}],
        [(IM + "It is", [" 4<|im_end|>", " 5<|im_end|>"], PAIR)],
        **CHAT,
    ),
    "a response that ends with the user, in the style of HH": Case(
        [{"chosen": [u(Q), a("4"), u("ok")], "rejected": [u(Q), a("5")]}], error="must end with the assistant"
    ),
    "a system turn inside a response": Case(
        [{"chosen": [u(Q), a("4"), system("x"), a("y")], "rejected": [u(Q), a("5")]}],
        error="'system' inside a response",
    ),
    "EOS in the thinking": Case(
        [{"prompt": [u(Q)], "completion": [a("4", reasoning_content="a<|im_end|>b")]}],
        error="holds the EOS string",
        settings=SFT,
        template="qwen3",
    ),
    "EOS in a tool call": Case(
        [{"tools": TOOLS, "prompt": [u(Q)], "completion": [a("", tool_calls=call(item=EOS))]}],
        error="holds the EOS string",
        settings=SFT,
        template=WITH_TOOLS,
    ),
    "an answer that stands in the thinking too": Case(
        [
            {
                "prompt": [u(Q)],
                "completion": [a("The answer is surely 4.", reasoning_content="The answer is surely 4. Yes")],
            }
        ],
        [(IM, ["<think>\nThe answer is surely 4. Yes\n</think>\n\nThe answer is surely 4.<|im_end|>"], [])],
        settings=SFT,
        template="qwen3",
    ),
    "messages with ids of their own": Case(
        [{"chosen": [u(Q, id=1), a("4")], "rejected": [u(Q, id=2), a("5")]}],
        [(IM, ["4<|im_end|>", "5<|im_end|>"], PAIR)],
        notes=["key 'id' of messages is not used"],
        **CHAT,
    ),
    "one side text, the other a conversation": Case(
        [{"prompt": "hi", "chosen": [u("hi"), a("a")], "rejected": "b"}], error="wrong type: one of"
    ),
    "a null prompt beside dialogues": Case(
        [{"prompt": None, "chosen": hh(Q) + " 4", "rejected": hh(Q) + " 5"}], [(hh(Q), [" 4" + EOS, " 5" + EOS], PAIR)]
    ),
    # Text
    "a prompt repeated in both": Case(
        [{"prompt": Q, "chosen": Q + " 4", "rejected": Q + " 5"}], [SIMPLE_RECORD], notes=["began with the prompt"]
    ),
    "a dialogue repeated in both": Case(
        [{"prompt": hh(Q), "chosen": hh(Q) + " 4", "rejected": hh(Q) + " 5"}],
        [(hh(Q), [" 4" + EOS, " 5" + EOS], PAIR)],
        notes=["began with the prompt"],
    ),
    "a prompt that begins a number": Case(
        [{"prompt": "1", "chosen": "12", "rejected": "13"}], [("1", ["12" + EOS, "13" + EOS], PAIR)]
    ),
    "text by the template": Case(
        [SIMPLE, {"chosen": hh("a?", "b", "c?") + " d", "rejected": hh("a?", "b", "c?") + " e"}],
        [
            (IM, ["4<|im_end|>", "5<|im_end|>"], PAIR),
            (im(("user", "a?"), ("assistant", "b"), ("user", "c?")), ["d<|im_end|>", "e<|im_end|>"], PAIR),
        ],
        settings={"chat_format": "template"},
        **CHAT,
    ),
    "text stays text": Case([SIMPLE], [(Q, [" 4<|im_end|>", " 5<|im_end|>"], PAIR)], **CHAT),
    "a prompt that is rendered already": Case(
        [{"prompt": IM, "chosen": "4", "rejected": "5"}], [(IM, ["4<|im_end|>", "5<|im_end|>"], PAIR)], **CHAT
    ),
    # Numbers
    "integers beyond 2^53": Case(
        [
            {"prompt": Q, "responses": [" 4", " 5"], "scores": [9007199254740993, 9007199254740992]},
            {"prompt": "2+3?", "responses": [" 5", " 6"], "scores": [2, 1]},
        ],
        [SIMPLE_RECORD, ("2+3?", [" 5" + EOS, " 6" + EOS], PAIR)],
    ),
    "integers beyond all numbers": Case(
        [{"prompt": Q, "responses": [" 4", " 5"], "scores": [10**400, 1]}], error="rows.jsonl:1: number not finite"
    ),
    # Forms of others
    "UltraFeedback's completions": Case(
        [
            {
                "instruction": Q,
                "models": ["x", "y"],
                "completions": [{"response": " 5", "overall_score": 1.0}, {"response": " 4", "overall_score": 9.0}],
            }
        ],
        [SIMPLE_RECORD],
    ),
    "Orca's question": Case([{"question": Q, "chosen": " 4", "rejected": " 5"}], [SIMPLE_RECORD]),
    "Argilla's names": Case([{"instruction": Q, "chosen_response": " 4", "rejected_response": " 5"}], [SIMPLE_RECORD]),
    "Alpaca's names": Case(
        [{"instruction": "Add.", "input": Q, "output": " 4"}], [("Add.\n\n" + Q, [" 4" + EOS], [])], settings=SFT
    ),
    "ShareGPT's names": Case(
        [
            {
                "conversations": [{"from": "human", "value": Q}],
                "chosen": {"from": "gpt", "value": "4"},
                "rejected": {"from": "gpt", "value": "5"},
            }
        ],
        [(IM, ["4<|im_end|>", "5<|im_end|>"], PAIR)],
        **CHAT,
    ),
    "ShareGPT's conversations": Case(
        [
            {
                "conversations": [
                    {"from": "system", "value": "S"},
                    {"from": "human", "value": Q},
                    {"from": "gpt", "value": "4"},
                ]
            }
        ],
        [(im(("system", "S"), ("user", Q)), ["4<|im_end|>"], [])],
        settings=SFT,
        **CHAT,
    ),
    "names of one's own": Case(
        [{"ask": Q, "good": " 4", "bad": " 5"}],
        [SIMPLE_RECORD],
        settings={"columns": {"prompt": "ask", "chosen": "good", "rejected": "bad"}},
    ),
    "names of one's own beside an alias": Case(
        [{"q": Q, "answers": [" 4", " 5"], "votes": [2, 1], "output": "REF"}],
        [SIMPLE_RECORD],
        notes=["column 'output' is not used"],
        settings={"columns": {"prompt": "q", "responses": "answers", "scores": "votes"}},
    ),
    "keys of completions": Case(
        [
            {
                "instruction": Q,
                "completions": [
                    {"response": " 4", "overall_score": 2, "custom_system_prompt": "S"},
                    {"response": " 5", "overall_score": 1},
                ],
            }
        ],
        [SIMPLE_RECORD],
        notes=["key 'custom_system_prompt' of completions is not used"],
    ),
    "a name of one's own that is not there": Case(
        [SIMPLE], error="missing field: 'ask'", settings={"columns": {"prompt": "ask"}}
    ),
    # Files
    "CSV": Case(f'prompt,chosen,rejected,label\n"{Q}"," 4"," 5",\n'.encode(), [SIMPLE_RECORD], file="x.csv"),
    "CSV with lines in fields": Case(
        b'prompt,chosen,rejected\n"a\nb"," 4"," 5"\n', [("a\nb", [" 4" + EOS, " 5" + EOS], PAIR)], file="x.csv"
    ),
    "CSV with messages and scores": Case(
        b'prompt,responses,scores\n"[{""role"": ""user"", ""content"": ""2+2?""}]","["" 4"", "" 5""]","[2, 1]"\n',
        [(IM, [" 4<|im_end|>", " 5<|im_end|>"], PAIR)],
        file="x.csv",
        **CHAT,
    ),
    "CSV with labels": Case(
        b"prompt,completion,label\nQ,A,True\n", [("Q", ["A" + EOS], [])], settings=SFT, file="x.csv"
    ),
    "CSV with a field too many": Case(
        b"prompt,chosen,rejected\na,b,c,d\n", error="x.csv: row 1 is no row.*4 fields", file="x.csv"
    ),
    "CSV with an open quote": Case(b'prompt,chosen,rejected\n"a,b,c\n', error="x.csv: row 1 is no row", file="x.csv"),
    "TSV": Case(f"prompt\tchosen\trejected\n{Q}\t 4\t 5\n".encode(), [SIMPLE_RECORD], file="x.tsv"),
    "CSV, packed": Case(
        gzip.compress(f"prompt,chosen,rejected\n{Q}, 4, 5\n".encode()), [SIMPLE_RECORD], file="x.csv.gz"
    ),
    "zstd": Case(
        pa.compress(json.dumps(SIMPLE).encode() + b"\n", "zstd", asbytes=True), [SIMPLE_RECORD], file="x.jsonl.zst"
    ),
    "zstd, cut off": Case(
        pa.compress(json.dumps([SIMPLE] * 99).encode(), "zstd", asbytes=True)[:-40],
        error="x.json.zst: ",
        file="x.json.zst",
    ),
    "a long line": Case(
        b'{"prompt": "' + b"x" * 70_000 + b'"}\n',
        error=r"rows.jsonl:1: .* longer than 0.0625 MiB",
        settings={"max_row_mb": 1 / 16},
    ),
    "a long blank line": Case(
        b" " * 70_000 + json.dumps(SIMPLE).encode(),
        error=r"rows.jsonl:1: .*max_row_mb",
        settings={"max_row_mb": 1 / 16},
    ),
    "many blank lines": Case(
        b"\n" * 70_000 + json.dumps(SIMPLE).encode(), error=r"max_row_mb", settings={"max_row_mb": 1 / 16}
    ),
    "a long object of a list": Case(
        b'[{"prompt": "' + b"x" * 2_000_000 + b'"}]',
        error=r"x.json: row 1: .*max_row_mb",
        file="x.json",
        settings={"max_row_mb": 1 / 16},
    ),
    "a long field of CSV": Case(
        b"prompt,chosen,rejected\n" + b"x" * 70_000 + b",a,b\n",
        error=r"x.csv: row 1",
        file="x.csv",
        settings={"max_row_mb": 1 / 16},
    ),
}


def shown(record: Record, tokenizer: Any) -> tuple[str, list[str], list[tuple[int, int]]]:
    """A record as text; what does not count stands in « »."""
    texts = []
    for i, response in enumerate(record.responses):
        mask = record.masks[i] if record.masks else [True] * len(response)
        text, start = "", 0
        for end in range(1, len(mask) + 1):
            if end == len(mask) or mask[end] != mask[start]:
                part = tokenizer.decode(response[start:end])
                text, start = text + (part if mask[start] else f"«{part}»"), end
        texts.append(text)
    return tokenizer.decode(record.prompt), texts, record.pairs


def tokenizer_for(case: Case) -> Any:
    if case.template in STYLES:
        return tokenizer_of(case.template)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = case.template
    return tokenizer


def load(folder: Path, tokenizer: Any, name: str = "", split: str = "train", **settings: Any) -> PreferenceData:
    given = {
        "rows": "pairs",
        "holdout_fraction": 0.0,
        "max_length": 4096,
        "max_prompt_length": 2048,
        "num_proc": 1,
        "sources": {},
    }
    given |= {
        "names": (str(folder / name if name else folder),),
        "sources": {},
        "cache_dir": str(folder.parent / "cache"),
    }
    return load_data(DataSettings(**(given | settings)), tokenizer, split)


@pytest.mark.parametrize("name", CASES)
def test_a_row_is_what_it_says(tmp_path: Path, capsys: Any, name: str) -> None:
    case = CASES[name]
    tokenizer, folder = tokenizer_for(case), tmp_path / "data"
    folder.mkdir()
    content = case.rows if isinstance(case.rows, bytes) else "".join(json.dumps(r) + "\n" for r in case.rows).encode()
    (folder / case.file).write_bytes(content)
    if case.error:
        with pytest.raises(UserError, match=case.error) as error:
            load(folder, tokenizer, case.file, **case.settings)
        assert "Traceback" not in str(error.value)
        return
    data = load(folder, tokenizer, case.file, **case.settings)
    assert [shown(record, tokenizer) for record in data] == case.records
    (notes,), (funnel,) = data.notes.values(), data.funnel.values()
    assert len(notes) == len(case.notes) and all(any(n in note for note in notes) for n in case.notes), notes
    assert case.funnel.items() <= funnel.items()
    printed = capsys.readouterr().out
    assert all(note in printed for note in case.notes)


def test_the_table_is_long() -> None:
    assert len(CASES) >= 60


# Masks, by the model


def test_only_the_assistants_tokens_count(tmp_path: Path) -> None:
    """Sums of the log-probabilities of turns of the assistant, against transformers in float64."""
    import torch

    from dpo.data.batching import make_batch
    from dpo.loss import sum_tokens
    from dpo.model.logps import Computation, add_token_logps, response_logps

    tokenizer = tokenizer_of("chatml")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/x.jsonl").write_text(json.dumps(MULTI_ROW) + "\n")
    data = load(tmp_path / "data", tokenizer, "x.jsonl")
    model: Any = make_model()
    model.resize_token_embeddings(len(tokenizer))
    expected = []
    for side in ("chosen", "rejected"):  # by hand: which characters are the assistant's
        turns, ids, counts = MULTI_ROW[side], [], []
        for i, turn in enumerate(turns):
            head = ("" if i == 0 else "\n") + f"<|im_start|>{turn['role']}\n"
            for text, counted in ((head, False), (turn["content"] + "<|im_end|>", turn["role"] == "assistant")):
                new = tokenizer(text, add_special_tokens=False)["input_ids"]
                ids, counts = ids + new, counts + [counted] * len(new)
        with torch.no_grad():
            logps = model.double()(torch.tensor([ids])).logits.log_softmax(-1)[0]
        expected.append(sum(float(logps[i - 1, ids[i]]) for i in range(1, len(ids)) if counts[i]))
    batch = make_batch(data, [(0, 0)])
    model = add_token_logps(model.float())
    for layout in ("padded", "tree", "packed"):
        found = response_logps(model, batch, Computation(torch.float32, layout))
        sums = sum_tokens(found.logps, found.mask)
        assert sums.tolist() == pytest.approx(expected, abs=1e-4)


# Tokens


def spaced_tokenizer(scheme: str) -> PreTrainedTokenizerFast:
    """A tokenizer that puts a space before a text, as Llama's do."""
    merges = [("▁", "I"), ("▁I", "t"), ("▁", "i"), ("▁i", "s"), ("▁", "4"), ("▁", "Q"), ("▁", "▁")]
    tokens = ["<unk>", "<s>", "</s>", "▁", "\n", *"It is42+?Q:Anoyes.", *("".join(pair) for pair in merges)]
    pieces = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.BPE(vocab=pieces, merges=merges, unk_token="<unk>", fuse_unk=True))
    if scheme == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("scheme", ["prepend", "always", "first"])
def test_no_space_is_put_before_a_response(tmp_path: Path, scheme: str) -> None:
    tokenizer = spaced_tokenizer(scheme)
    (tmp_path / "data").mkdir()
    row = {"prompt": "Q:", "chosen": " It is 4", "rejected": "no"}
    (tmp_path / "data/x.jsonl").write_text(json.dumps(row) + "\n")
    data = load(tmp_path / "data", tokenizer, "x.jsonl")
    chosen, rejected = (tokenizer.convert_ids_to_tokens(ids) for ids in data[0].responses)
    assert chosen == ["▁It", "▁is", "▁4", "</s>"] and rejected == ["n", "o", "</s>"]
    assert tokenizer.convert_ids_to_tokens(data[0].prompt) == ["▁Q", ":"]
    assert not any("spell" in key for funnel in data.funnel.values() for key in funnel)


def test_tokens_that_do_not_spell_the_text_are_counted(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    (tmp_path / "data").mkdir()
    rows = [{"prompt": "q", "chosen": " Yes", "rejected": " no"}, {"prompt": "r", "chosen": " yes", "rejected": " no"}]
    (tmp_path / "data/x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (funnel,) = load(tmp_path / "data", tokenizer, "x.jsonl").funnel.values()
    assert funnel["prompts whose tokens do not spell their text"] == 1


@pytest.mark.parametrize("style", ["llama3", "olmo2", "mistral"])
def test_bos_of_a_template_survives_truncation(tmp_path: Path, style: str) -> None:
    tokenizer = tokenizer_of(style)
    row = {"prompt": [u("long " * 60), a("ok"), u("and " * 60)], "chosen": [a("4")], "rejected": [a("5")]}
    (tmp_path / "data").mkdir()
    (tmp_path / "data/x.jsonl").write_text(json.dumps(row) + "\n")
    prompt = load(tmp_path / "data", tokenizer, "x.jsonl", max_length=48, max_prompt_length=32)[0].prompt
    assert len(prompt) == 32 and prompt[0] == tokenizer.bos_token_id
    assert tokenizer.decode(prompt[1:]).count("long") == 0


# Pairs


def test_ranked_pairs_against_all_of_them() -> None:
    scores = [3, 1, 2, 2, 5, 1]
    every = [(i, j) for i in range(6) for j in range(6) if scores[i] > scores[j]]
    pairs, ties, over = ranked_pairs(scores, 100, 0)
    assert sorted(pairs) == sorted(every) and (ties, over) == (2, 0)
    some, ties, over = ranked_pairs(scores, 5, 0)
    assert len(some) == 5 and set(some) <= set(every) and (ties, over) == (2, len(every) - 5)
    assert ranked_pairs(scores, 5, 0) == (some, ties, over) != ranked_pairs(scores, 5, 1)
    one = [1] + [0] * 50_000  # 1.25e9 pairs, of which nearly all are ties
    pairs, ties, over = ranked_pairs(one, 7, 0)
    assert len(set(pairs)) == 7 and {i for i, _ in pairs} == {0} and over == 49_993 and ties == 50_000 * 49_999 // 2


def test_a_prompt_of_many_responses_has_few_pairs(tmp_path: Path) -> None:
    row = {"prompt": "Q", "responses": [f" {i}" for i in range(4000)], "scores": list(range(4000))}
    (tmp_path / "data").mkdir()
    (tmp_path / "data/x.jsonl").write_text(json.dumps(row) + "\n")
    data = load(tmp_path / "data", make_tokenizer(), "x.jsonl", max_pairs_per_prompt=300)
    (funnel,) = data.funnel.values()
    assert len(data[0].pairs) == funnel["examples"] == 300 and len(data[0].responses) <= 600
    assert funnel["pairs dropped: over max_pairs_per_prompt"] == 4000 * 3999 // 2 - 300
    texts = shown(data[0], make_tokenizer())[1]
    number = [int(text.removesuffix(EOS)) for text in texts]
    assert all(number[i] > number[j] for i, j in data[0].pairs)


def test_rows_of_one_prompt_share_the_limit(tmp_path: Path) -> None:
    rows = [{"prompt": "Q", "chosen": f" {i}", "rejected": " no"} for i in range(20)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data/x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load(tmp_path / "data", make_tokenizer(), "x.jsonl", max_pairs_per_prompt=7)
    (funnel,) = data.funnel.values()
    assert len(data[0].pairs) == 7 and funnel["pairs dropped: over max_pairs_per_prompt"] == 13


# Files of a folder

ROW = {"prompt": "Q?", "chosen": " yes", "rejected": " no"}
FOLDERS: dict[str, tuple[list[str], list[str] | str, list[str] | None]] = {
    # files; those for training, or the message; those for evaluation (None: held out)
    "nest": (["train_v2/train.jsonl", "train_v2/test.jsonl"], ["train_v2/train.jsonl"], ["train_v2/test.jsonl"]),
    "the mirror": (["test_v2/train.jsonl", "test_v2/test.jsonl"], ["test_v2/train.jsonl"], ["test_v2/test.jsonl"]),
    "names1": (["dpo_train.jsonl", "dpo_test.jsonl"], ["dpo_train.jsonl"], ["dpo_test.jsonl"]),
    "capitals": (["Train/a.jsonl", "Test/a.jsonl"], ["Train/a.jsonl"], ["Test/a.jsonl"]),
    "training, testing": (["training/a.jsonl", "testing/a.jsonl"], ["training/a.jsonl"], ["testing/a.jsonl"]),
    "eval": (["train.jsonl", "eval.jsonl"], ["train.jsonl"], ["eval.jsonl"]),
    "held_out": (["train.jsonl", "held_out.jsonl"], ["train.jsonl"], ["held_out.jsonl"]),
    "test before validation": (
        ["train-0.jsonl", "validation-0.jsonl", "test-0.jsonl"],
        ["train-0.jsonl"],
        ["test-0.jsonl"],
    ),
    "validation": (["train.jsonl", "dev.jsonl"], ["train.jsonl"], ["dev.jsonl"]),
    "several": (
        ["one/train.jsonl", "two/train-1.jsonl", "one/test.jsonl"],
        ["one/train.jsonl", "two/train-1.jsonl"],
        ["one/test.jsonl"],
    ),
    "hidden": (["train.jsonl", ".ipynb_checkpoints/train.jsonl", "__MACOSX/x.jsonl"], ["train.jsonl"], None),
    "no split": (["part-1.jsonl", "part-2.jsonl"], ["part-1.jsonl", "part-2.jsonl"], None),
    "one is unclear": (["train.jsonl", "test.jsonl", "more.jsonl"], r"Not clear .* 1 files:\n  more.jsonl", None),
    "both in one name": (["train_test.jsonl", "test.jsonl"], r"Not clear .* 1 files:\n  train_test.jsonl", None),
    "only tests": (["test.jsonl"], r"none named train", None),
    "described": (["train.jsonl", "test.jsonl", "dataset_infos.json", "state.json"], ["train.jsonl"], ["test.jsonl"]),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_files_of_a_folder(tmp_path: Path, name: str) -> None:
    files, train, test = FOLDERS[name]
    for number, file in enumerate(files):
        path = tmp_path / "data" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({**ROW, "prompt": f"Q{number} {i}?"}) + "\n" for i in range(20)))
    folder, fraction = tmp_path / "data", None
    if isinstance(train, str):
        with pytest.raises(UserError, match=train):
            load(folder, make_tokenizer(), holdout_fraction=fraction)
        return
    for split, expected in (("train", train), ("test", test or train)):
        data = load(folder, make_tokenizer(), split=split, holdout_fraction=fraction)
        assert data.sources[0]["files"] == sorted(expected)
        numbers = {shown(record, make_tokenizer())[0][1] for record in data}
        assert numbers == {str(files.index(file)) for file in expected} or test is None


def test_linked_folders_are_read_once(tmp_path: Path) -> None:
    real = tmp_path / "elsewhere"
    real.mkdir()
    (real / "train.jsonl").write_text(json.dumps(ROW) + "\n")
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a").symlink_to(real, target_is_directory=True)
    (folder / "b").symlink_to(real, target_is_directory=True)
    (real / "round").symlink_to(folder, target_is_directory=True)
    data = load(folder, make_tokenizer())
    assert len(data) == 1 and len(data.sources[0]["files"]) == 1


def test_save_to_disk_and_arrow(tmp_path: Path) -> None:
    import datasets

    rows = [{**ROW, "prompt": f"Q{i}?"} for i in range(6)]
    splits = {"train": datasets.Dataset.from_list(rows[:4]), "test": datasets.Dataset.from_list(rows[4:])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "data")
    assert [len(load(tmp_path / "data", make_tokenizer(), split=split)) for split in ("train", "test")] == [4, 2]
    splits["train"].save_to_disk(tmp_path / "one")
    assert len(load(tmp_path / "one", make_tokenizer())) == 4
    with pa.OSFile(str(tmp_path / "x.arrow"), "wb") as file:
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    assert len(load(tmp_path / "x.arrow", make_tokenizer())) == 6
    (tmp_path / "x.arrow").write_bytes((tmp_path / "x.arrow").read_bytes()[:200])
    with pytest.raises(UserError, match=r"x.arrow: not a readable arrow file"):
        load(tmp_path / "x.arrow", make_tokenizer())


COLUMNS: dict[str, Callable[[], Any]] = {
    "decimal scores": lambda: {"scores": pa.array([[Decimal("1.5"), Decimal("2")]])},
    "unsigned scores": lambda: {"scores": pa.array([[2**64 - 2, 2**64 - 1]], pa.list_(pa.uint64()))},
    "times": lambda: {"scores": pa.array([[1, 2]]), "when": pa.array([1], pa.timestamp("ns"))},
    "times beyond Python's": lambda: {"scores": pa.array([[1, 2]]), "when": pa.array([2**40], pa.timestamp("s"))},
    "bytes": lambda: {"scores": pa.array([[1, 2]]), "id": pa.array([b"\xff\xfe"])},
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_columns_of_parquet(tmp_path: Path, kind: str) -> None:
    table = pa.table({"prompt": ["Q"], "responses": [[" bad", " good"]], **COLUMNS[kind]()})
    (tmp_path / "data").mkdir()
    pq.write_table(table, tmp_path / "data/x.parquet")
    data = load(tmp_path / "data", make_tokenizer(), "x.parquet")
    assert shown(data[0], make_tokenizer()) == ("Q", [" good" + EOS, " bad" + EOS], PAIR)


def test_fields_that_arrow_fills_in_say_nothing(tmp_path: Path) -> None:
    rows = [{"prompt": [u("Q")], "chosen": [a("A", tool_calls=call(item="x"))], "rejected": [a("B", name="n")]}]
    (tmp_path / "data").mkdir()
    pq.write_table(pa.Table.from_pylist(rows * 2), tmp_path / "data/x.parquet")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = WITH_TOOLS
    data = load(tmp_path / "data", tokenizer, "x.parquet")
    assert data[0].pairs and list(data.notes.values()) == [
        {"key 'name' of messages is not used by the chat template": 2}
    ]


def test_times_inside_messages(tmp_path: Path) -> None:
    import datetime

    turns = [u("Q", when=datetime.datetime(2024, 1, 1)), a("A")]
    (tmp_path / "data").mkdir()
    pq.write_table(pa.Table.from_pylist([{"messages": turns}]), tmp_path / "data/x.parquet")
    assert len(load(tmp_path / "data", tokenizer_of("chatml"), "x.parquet", rows="targets")) == 1


def test_many_markers_are_read_in_no_time() -> None:
    from dpo.data.rows import BadRow, dialogue_parts, split_dialogues

    start, n = time.monotonic(), 10 * 2**20 // 12
    with pytest.raises(BadRow):
        split_dialogues("\n\nHuman: q" + "\n\nAssistant:" * n, "\n\nHuman: r" + "\n\nAssistant:" * n)
    dialogue_parts("a" + "\n\nHuman:" * n + "\n\nAssistant: b")
    dialogue_parts("\n\nHuman:x\n\nAssistant:" * n)
    assert time.monotonic() - start < 20  # quadratic, it takes more than a minute


def test_a_row_that_nothing_foresaw_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    def broken(self: Any, row: Any) -> Any:
        raise ZeroDivisionError("\x1b[31mwhat")

    monkeypatch.setattr("dpo.data.parse.ParseRows.parse", broken)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/x.jsonl").write_text(json.dumps(ROW) + "\n")
    with pytest.raises(UserError, match=r"x.jsonl:1: the row cannot be used \(ZeroDivisionError: \\x1b\[31mwhat\)"):
        load(tmp_path / "data", make_tokenizer(), "x.jsonl")


# Held-out prompts, overlap, caches


@pytest.mark.parametrize(("n", "expected"), [(1, 1), (9, 1), (64, 6), (400, 40), (600, 50), (8000, 80)])
def test_how_many_prompts_are_held_out(n: int, expected: int) -> None:
    from dpo.data.records import in_test_split

    hashes = np.random.default_rng(0).integers(0, 2**64, n, dtype=np.uint64)
    assert in_test_split(hashes, None).sum() == (expected if n > 1 else 0)


def test_the_same_prompts_are_held_out_whatever_the_format(tmp_path: Path) -> None:
    rows = [{"chosen": hh(f"Q{i}?") + " yes", "rejected": hh(f"Q{i}?") + " no"} for i in range(40)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data/x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = []
    for settings in ({}, {"rows": "targets"}, {"chat_format": "template"}, {"rows": "targets", "sft_turns": "all"}):
        data = load(tmp_path / "data", tokenizer_of("chatml"), "x.jsonl", "test", holdout_fraction=None, **settings)
        keys.append(sorted(data.keys.tolist()))
    assert len(keys[0]) == 4 and all(found == keys[0] for found in keys)


def test_overlap_is_counted_exactly(tmp_path: Path) -> None:
    def row(i: int, answer: str = "yes") -> dict[str, str]:
        return {"prompt": f"Q{i}?", "chosen": f" {answer}", "rejected": " no"}

    (tmp_path / "data").mkdir()
    for split, rows in (("train", [row(i) for i in range(10)]), ("test", [row(1), row(2), row(3, "other"), row(99)])):
        (tmp_path / f"data/{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train, test = (load(tmp_path / "data", make_tokenizer(), split=split) for split in ("train", "test"))
    assert overlap(train.keys, train.pair_keys, test) == (3, 2)


def test_two_tokenizers_do_not_share_prompts(tmp_path: Path) -> None:
    """The template is the same, but writes special tokens by their names."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/x.jsonl").write_text(json.dumps({"prompt": [u("Q")], "chosen": "A", "rejected": "B"}) + "\n")
    prompts = []
    for bos in ("<one>", "<two>"):
        tokenizer = make_tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": ["<one>", "<two>"]})
        tokenizer.bos_token = bos
        tokenizer.chat_template = "{{ bos_token }}" + CHATML.replace("<|im_end|>", EOS)
        prompts.append(tokenizer.decode(load(tmp_path / "data", tokenizer, "x.jsonl")[0].prompt))
    assert prompts[0].startswith("<one>") and prompts[1].startswith("<two>")


def test_a_comment_in_a_parser_makes_nothing_anew(tmp_path: Path) -> None:
    def of(text: str) -> Any:
        path = tmp_path / "parser.py"
        path.write_text(text)
        names: dict[str, Any] = {}
        exec(compile(text, str(path), "exec"), names)
        import linecache

        linecache.checkcache(str(path))
        return parser_identity(names["parse"])

    plain = of("def parse(row):\n    return row\n")
    assert of("def parse(row):\n    # a comment\n    return  row\n") == plain
    assert of("def parse(row):\n    return row[0]\n") != plain


def test_settings_reach_the_data() -> None:
    from settings import data_settings, load_config

    given = ["exp_name=x", "loss=dpo", "loss.beta=1", "columns.prompt=ask", "max_pairs_per_prompt=5", "max_row_mb=2"]
    settings = data_settings(load_config([*given, "sft_turns=all", "chat_date=2025-01-02", "holdout_fraction=0.2"]))
    assert settings == replace(settings, columns={**settings.columns, "prompt": "ask"}, max_pairs_per_prompt=5)
    assert (settings.max_row_mb, settings.sft_turns, settings.chat_date) == (2, "all", "2025-01-02")
    for wrong, message in (
        ("columns.nonsense=x", "columns.nonsense is not a column"),
        ("chat_date=tomorrow", "chat_date=tomorrow must be a date"),
        ("sft_turns=first", "sft_turns=first is not known"),
        ("max_pairs_per_prompt=0", "max_pairs_per_prompt=0 must be at least 1"),
        ("max_row_mb=0", "max_row_mb=0"),
    ):
        with pytest.raises(UserError, match=message):
            load_config([*given, f"+{wrong}" if "nonsense" in wrong else wrong])
