"""The built-in data sets: for each a function that parses one row, and an entry of `REGISTRY`.

To add one, write both here. Its name then works in `datasets=[<name>]`; `dataset_sources.<name>=<folder>` reads a local
copy. Parsed rows are cached under the parser's own code and that of the functions in this file that it calls.
"""

import hashlib
import html.parser
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import dpo.data
from dpo.data.files import Layout, Row
from dpo.data.records import PreferenceData
from dpo.data.rows import (
    BadRow,
    ParsedRow,
    SkippedRow,
    generic,
    get,
    messages,
    number,
    rank,
    score_notes,
    split_conversations,
)
from dpo.data.sources import DataSet, DataSettings


def human(text: str) -> str:
    """Return a prompt in the style of HH."""
    return f"\n\nHuman: {text}\n\nAssistant:"


def shp(row: Row) -> ParsedRow:
    """Parse Stanford Human Preferences. As in the paper's code, scores must differ by a factor of 2 or more."""
    score_a, score_b, label = (get(row, name, int) for name in ("score_A", "score_B", "labels"))
    if label not in (0, 1):
        raise BadRow("wrong value", f"'labels' is {label}, not 0 (B preferred) or 1 (A preferred)")
    low, high = sorted((score_a, score_b))
    if high < 2 * low:
        raise SkippedRow("score ratio below 2")
    responses = [" " + get(row, "human_ref_A"), " " + get(row, "human_ref_B")]
    best = 0 if score_a >= score_b else 1
    pair = (0, 1) if label == 1 else (1, 0)
    return ParsedRow(human(get(row, "history")), responses, [pair], target=best, score=(score_a, score_b)[best])


class _HtmlText(html.parser.HTMLParser):
    """Blocks of text of a post's HTML: inline tags vanish, list items get a dash, code blocks `<code>` marks."""

    BLOCKS = re.compile("p|li|ul|ol|blockquote|pre|div|h[1-6r]|table|tr|dl|dt|dd")

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[str] = []
        self.text, self.prefix, self.preformatted = "", "", False

    def end_block(self) -> None:
        text, self.text = self.text, ""
        if not text.strip():
            return
        if self.preformatted:
            text = f"<code>{text.strip(chr(10))}</code>"
        else:
            text = "\n".join(" ".join(line.split()) for line in text.split("\0"))  # NUL stands for <br>
        self.blocks.append(self.prefix + text.strip())
        self.prefix = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if self.BLOCKS.fullmatch(tag):
            self.end_block()
        if tag == "br":
            self.text += "\n" if self.preformatted else "\0"
        self.prefix = "- " if tag == "li" else self.prefix
        self.preformatted |= tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if self.BLOCKS.fullmatch(tag):
            self.end_block()
        self.prefix = "" if tag == "li" else self.prefix
        self.preformatted &= tag != "pre"

    def handle_data(self, data: str) -> None:
        self.text += data.replace("\0", "")


def html_to_text(source: str) -> str:
    """Return the text of a post's HTML."""
    parser = _HtmlText()
    parser.feed(source)
    parser.close()
    parser.end_block()
    return "\n\n".join(parser.blocks)


def se(row: Row) -> ParsedRow:
    """Parse a StackExchange question and its answers: every pair of unequal `pm_score`."""
    answers = get(row, "answers", list)
    if not answers:
        raise SkippedRow("no answers")
    if not all(isinstance(answer, Mapping) for answer in answers):
        raise BadRow("wrong type", "'answers' is not a list of {text, pm_score}")
    responses = [" " + html_to_text(get(answer, "text")) for answer in answers]
    scores = [number(answer, "pm_score") for answer in answers]
    return ParsedRow(human(html_to_text(get(row, "question"))), responses, [], **rank(scores))


def tldr(row: Row) -> ParsedRow:
    """Parse OpenAI's comparisons of Reddit summaries, or their mirrors (prompt with chosen, rejected or completion).

    Truncation keeps the "TL;DR:" at the end of a long post.
    """
    if "info" not in row:
        return replace(generic(row), keep_end=True)
    info, summaries, choice = get(row, "info", Mapping), get(row, "summaries", list), get(row, "choice", int)
    if info.get("article"):
        raise SkippedRow("CNN/DM article, not a post")
    if len(summaries) != 2 or choice not in (0, 1):
        raise BadRow("wrong value", f"{len(summaries)} summaries, choice {choice}; not 2 summaries, choice 0 or 1")
    subreddit, title, post = (get(info, name) for name in ("subreddit", "title", "post"))
    prompt = f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
    responses = [" " + get(summary, "text").lstrip() for summary in summaries]
    return ParsedRow(prompt, responses, [(choice, 1 - choice)], target=choice, keep_end=True)


def ultrafeedback(row: Row) -> ParsedRow:
    """Parse UltraFeedback, binarized: two conversations and their scores."""
    parsed = split_conversations(messages(row, "chosen"), messages(row, "rejected"))
    chosen, rejected = (get(row, f"score_{side}", int, float) for side in ("chosen", "rejected"))
    if chosen == rejected:
        parsed.pairs, parsed.ties = [], 1
    parsed.notes += score_notes(chosen, rejected)
    return parsed


def imdb(row: Row) -> ParsedRow:
    """Parse a review. The prompt is its first 2 to 8 words (DPO paper, section 6)."""
    words = re.sub(r"<br\s*/?>", " ", get(row, "text")).split()
    if not words:
        raise BadRow("empty response", "'text'")
    number = hashlib.blake2b(" ".join(words).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    n_prompt = min(2 + int.from_bytes(number, "little") % 7, len(words) - 1)
    return ParsedRow(" ".join(words[:n_prompt]), [" " + " ".join(words[n_prompt:])], [], demonstration=True)


REGISTRY: dict[str, DataSet] = {
    "hh": DataSet(generic, "Anthropic/hh-rlhf"),
    "shp": DataSet(shp, "stanfordnlp/SHP"),
    "se": DataSet(se, "HuggingFaceH4/stack-exchange-preferences"),
    "tldr": DataSet(
        tldr,
        "openai/summarize_from_feedback",
        Layout(test=("validation", "test"), loader={"data_dir": "comparisons", "revision": "refs/convert/parquet"}),
        sft_hub="trl-lib/tldr",
    ),
    "ultrafeedback": DataSet(
        ultrafeedback, "HuggingFaceH4/ultrafeedback_binarized", Layout(("train_prefs",), ("test_prefs",))
    ),
    "imdb": DataSet(imdb, "stanfordnlp/imdb", sft_only=True),
    "sentiment": DataSet(generic, local=Path(__file__).parent / "data/sentiment"),
}


def load_data(settings: DataSettings, tokenizer: Any, split: str) -> PreferenceData:
    """Load the "train" or "test" split of the data sets in `settings.names`. Raises UserError."""
    return dpo.data.load(settings, tokenizer, split, REGISTRY)
