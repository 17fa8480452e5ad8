"""Raw rows -> one record a prompt -> token ids, kept in memory-mapped Arrow files that the next run reuses.

    rows (files, hub) --parse--> raw folder: prompt, responses, pairs --tokenise--> tokens folder: what `Record` holds

Both folders are named by a hash of everything they depend on and appear only when complete. A function per data set
turns a row into a `Judgement`; `REGISTRY` holds what else is particular about a set. Every row read is either in a
record or counted in the funnel under the reason why not; what of a row is not used is counted, too.
"""

import ast
import bisect
import difflib
import functools
import hashlib
import html.parser
import inspect
import itertools
import json
import random
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tokenizers import Tokenizer

from dpo.data.cache import ArrowRows, cached, digest, parallel, write_arrow
from dpo.data.files import (
    CHUNK_ROWS,
    PLAIN,
    SUFFIXES,
    Chunk,
    Layout,
    Row,
    Source,
    hub_source,
    local_source,
    log_once,
    numbered_rows,
)
from dpo.data.rendering import ChatFormat, leaves
from dpo.data.rows import (
    BadRow,
    Judgement,
    Pairs,
    Text,
    all_answers,
    dialogue_parts,
    generic,
    get,
    messages,
    rank,
    score_notes,
    split_conversations,
    to_messages,
)
from dpo.utils import UserError, log, progress, visible

# Raised whenever the code makes other rows or records of the same input. The caches' names hold it.
FORMAT = 1
MOST_FILES = 12  # named in the log; data_funnel.json names all


@dataclass(frozen=True)
class DataSettings:
    """What the data depends on, besides the tokenizer. Lengths are in tokens."""

    names: tuple[str, ...]  # built-in sets, files, folders or hub ids
    sources: Mapping[str, str | None]  # built-in name -> local copy in the hub's layout
    sft: bool  # one target a prompt instead of pairs
    max_length: int  # prompt + response with EOS
    max_prompt_length: int  # with BOS
    chat_format: str = "auto"  # "auto" | "template" | "hh"
    chat_date: str = "2024-07-26"  # today, for chat templates that write the date
    columns: Mapping[str, str | None] = field(default_factory=dict)  # what your own files call a column
    sft_turns: str = "last"  # "last" | "all": which answers of a conversation SFT learns
    max_pairs_per_prompt: int = 10_000
    max_row_mb: float = 16  # of a line, or of an object of a list, unpacked
    holdout_fraction: float | None = None  # of the prompts, if a source has no test split; None: see `n_held_out`
    drop_bad_rows: bool = False
    cache_dir: str = ".cache"
    num_proc: int = 0  # 0: all cores


@dataclass(frozen=True)
class Record:
    """One prompt, its distinct responses, and pairs (preferred, dispreferred) of their indices; SFT: one response.

    `masks` says of each token of each response whether it is the assistant's and counts; None: all do.
    """

    prompt: list[int]
    responses: list[list[int]]
    pairs: Pairs
    masks: list[list[bool]] | None = None


# --- One row -> one Judgement ---


# Known defects of built-in sets: counted and dropped, not fatal.
QUIRKS = {"empty response", "empty prompt", "text holds the EOS string"}
QUIRKS |= {"score ratio below 2", "no answers", "CNN/DM article, not a post"}


def human(text: str) -> str:
    return f"\n\nHuman: {text}\n\nAssistant:"


def shp(row: Row) -> Judgement:
    """Stanford Human Preferences; as in the paper's code, only pairs whose scores differ by a factor of 2 or more."""
    score_a, score_b, label = (get(row, name, int) for name in ("score_A", "score_B", "labels"))
    if label not in (0, 1):
        raise BadRow("wrong value", f"'labels' is {label}, not 0 (B preferred) or 1 (A preferred)")
    low, high = sorted((score_a, score_b))
    if high < 2 * low:
        raise BadRow("score ratio below 2")
    responses = [" " + get(row, "human_ref_A"), " " + get(row, "human_ref_B")]
    best = 0 if score_a >= score_b else 1
    pair = (0, 1) if label == 1 else (1, 0)
    return Judgement(human(get(row, "history")), responses, [pair], target=best, score=(score_a, score_b)[best])


class _HtmlText(html.parser.HTMLParser):
    """Blocks of text out of a post's HTML: inline tags vanish, list items get a dash, code blocks `<code>` marks."""

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
    parser = _HtmlText()
    parser.feed(source)
    parser.close()
    parser.end_block()
    return "\n\n".join(parser.blocks)


def se(row: Row) -> Judgement:
    """A StackExchange question and its answers; every pair of unequal `pm_score`."""
    found = get(row, "answers", list)
    if not found:
        raise BadRow("no answers")
    if not all(isinstance(answer, Mapping) for answer in found):
        raise BadRow("wrong type", "'answers' is not a list of {text, pm_score}")
    responses = [" " + html_to_text(get(answer, "text")) for answer in found]
    scores = [get(answer, "pm_score", int) for answer in found]
    return Judgement(human(html_to_text(get(row, "question"))), responses, [], **rank(scores))


def tldr(row: Row) -> Judgement:
    """OpenAI's comparisons of Reddit summaries, or rows of its mirrors (prompt with chosen, rejected or completion).

    A long post does not lose the "TL;DR:" that asks for the summary.
    """
    if "info" not in row:
        return replace(generic(row), keep_end=True)
    info, summaries, choice = get(row, "info", Mapping), get(row, "summaries", list), get(row, "choice", int)
    if info.get("article"):
        raise BadRow("CNN/DM article, not a post")
    if len(summaries) != 2 or choice not in (0, 1):
        raise BadRow("wrong value", f"{len(summaries)} summaries, choice {choice}; not 2 summaries, choice 0 or 1")
    subreddit, title, post = (get(info, name) for name in ("subreddit", "title", "post"))
    prompt = f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
    responses = [" " + get(summary, "text").lstrip() for summary in summaries]
    return Judgement(prompt, responses, [(choice, 1 - choice)], target=choice, keep_end=True)


def ultrafeedback(row: Row) -> Judgement:
    judged = split_conversations(messages(row, "chosen"), messages(row, "rejected"))
    chosen, rejected = (get(row, f"score_{side}", int, float) for side in ("chosen", "rejected"))
    if chosen == rejected:
        judged.pairs, judged.ties = [], 1
    judged.notes += score_notes(chosen, rejected)
    return judged


def imdb(row: Row) -> Judgement:
    """A review, cut after its first 2 to 8 words as the prompts of the sentiment task are (DPO paper, section 6)."""
    words = re.sub(r"<br\s*/?>", " ", get(row, "text")).split()
    if not words:
        raise BadRow("empty response", "'text'")
    opener = min(2 + _hash64(" ".join(words)) % 7, len(words) - 1)
    return Judgement(" ".join(words[:opener]), [" " + " ".join(words[opener:])], [], demonstration=True)


# --- The registry ---


@dataclass(frozen=True)
class SetFacts:
    """What is particular about a data set."""

    parse: Callable[..., Judgement]
    hub: str | None = None
    layout: Layout = PLAIN
    embedded: str | None = None  # a folder beside this file
    sft_hub: str | None = None  # demonstrations live elsewhere
    sft_only: bool = False


REGISTRY: dict[str, SetFacts] = {
    "hh": SetFacts(generic, "Anthropic/hh-rlhf"),
    "shp": SetFacts(shp, "stanfordnlp/SHP"),
    "se": SetFacts(se, "HuggingFaceH4/stack-exchange-preferences"),
    "tldr": SetFacts(
        tldr,
        "openai/summarize_from_feedback",
        Layout(test=("validation", "test"), loader={"data_dir": "comparisons", "revision": "refs/convert/parquet"}),
        sft_hub="trl-lib/tldr",
    ),
    "ultrafeedback": SetFacts(
        ultrafeedback, "HuggingFaceH4/ultrafeedback_binarized", Layout(("train_prefs",), ("test_prefs",))
    ),
    "imdb": SetFacts(imdb, "stanfordnlp/imdb", sft_only=True),
    "sentiment": SetFacts(generic, embedded="data/sentiment"),
}


def find_source(name: str, settings: DataSettings, split: str) -> tuple[SetFacts, Source]:
    """The facts and rows of the data set called `name`: built in, a path, or a hub id. Raises UserError for others."""
    longest = round(settings.max_row_mb * 2**20)
    if name in REGISTRY:
        facts = REGISTRY[name]
        if facts.sft_only and not settings.sft:
            raise UserError(f"data set {name!r} has no preferences, so it is for loss=sft only; choose another")
        embedded = Path(__file__).parent / facts.embedded if facts.embedded else None
        if local := settings.sources.get(name) or embedded:
            return facts, local_source(Path(local).expanduser(), facts.layout, split, longest, strict=False)
        hub, layout = (facts.sft_hub, PLAIN) if settings.sft and facts.sft_hub else (facts.hub, facts.layout)
        advice = f"Where the hub is out of reach, give a local copy in its layout: dataset_sources.{name}=<folder>"
        return facts, hub_source(str(hub), layout, split, advice)
    path = Path(name).expanduser()
    columns = {column: own for column, own in settings.columns.items() if own is not None}
    facts = SetFacts(functools.partial(generic, columns=columns) if columns else generic)
    if path.exists() or name.lower().endswith(SUFFIXES) or name.startswith(("/", ".", "~")):
        return facts, local_source(path, PLAIN, split, longest, strict=True)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return facts, hub_source(name, PLAIN, split, "Check the id, or give a local copy's path.")
    close = difflib.get_close_matches(name, REGISTRY, n=1)
    raise UserError(
        f"unknown data set {name!r}.{f' Did you mean {close[0]!r}?' if close else ''} "
        f"Known are {', '.join(REGISTRY)}; a path to a file or folder or a hub id (owner/name) works too."
    )


# --- Parsing: chunk -> Arrow batch of rendered rows ---

IDS = pa.list_(pa.int32())
PAIRS = pa.list_(pa.list_(pa.int32(), 2))
ROWS = pa.schema(
    {
        "prompt": pa.string(),
        "responses": pa.list_(pa.list_(pa.string())),  # each in parts: the assistant's and, in turn, what is between
        "pairs": PAIRS,
        "target": pa.int32(),
        "score": pa.float64(),
        "ties": pa.int64(),
        "over": pa.int64(),  # pairs beyond max_pairs_per_prompt
        "keep_end": pa.bool_(),
        "demonstration": pa.bool_(),
        "undesired": pa.bool_(),
        "hash": pa.uint64(),  # rows of one prompt have the same
        "key": pa.uint64(),  # of the prompt, however it is rendered
    }
)
SILENT = "rows that state no preference are not used"
UNDESIRED = "label is false: the completion is not wanted"


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _prompt_key(judged: Judgement) -> int:
    """A hash of what a prompt says, whether it says it as text or in messages, and in whatever format."""
    turns: Any = to_messages(replace(judged, responses=[])).prompt
    said = [(message["role"], message["content"].strip()) for message in turns]
    return _hash64(json.dumps([said, judged.tools], sort_keys=True, default=str))


def ranked_pairs(scores: Sequence[float], most: int, seed: int) -> tuple[Pairs, int, int]:
    """(pairs of unequal scores, the higher first; how many are equal; how many unequal ones are beyond `most`).

    Of more than `most` a random choice is taken, which no one else's pairs change.
    """
    order = sorted(range(len(scores)), key=lambda i: scores[i])
    n_lower: list[int] = []  # how many of `order` have a lower score than each
    for place, i in enumerate(order):
        equal = place > 0 and scores[i] == scores[order[place - 1]]
        n_lower.append(n_lower[-1] if equal else place)
    starts = [0, *itertools.accumulate(n_lower)]  # pair number starts[p] + q is (order[p], order[q])
    unequal = starts[-1]
    ties = len(scores) * (len(scores) - 1) // 2 - unequal
    numbers = range(unequal) if unequal <= most else random.Random(seed).sample(range(unequal), most)
    places = ((number, bisect.bisect_right(starts, number) - 1) for number in numbers)
    pairs = [(order[place], order[number - starts[place]]) for number, place in places]
    return sorted(pairs, key=lambda pair: (min(pair), max(pair))), ties, unequal - len(pairs)


@dataclass
class Tally:
    """What is to be said of rows: how many, by reason or kind, and where the first of each is."""

    dropped: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)  # "text", "hh" or "template:<its hash>"
    first: dict[str, str] = field(default_factory=dict)

    def count(self, kind: Counter[str], what: str, where: str) -> None:
        kind[what] += 1
        self.first.setdefault(what, where)

    def add(self, other: "Tally") -> None:
        self.dropped += other.dropped
        self.notes += other.notes
        self.formats += other.formats
        self.first = other.first | self.first


class ParseRows:
    """Chunk -> (Arrow batch in the schema `ROWS`, tally). Raises UserError at a row that must not be dropped."""

    def __init__(self, facts: SetFacts, chat: ChatFormat, eos: str, settings: DataSettings):
        self.facts, self.chat, self.eos = facts, chat, eos
        self.drop_bad_rows, self.most_pairs = settings.drop_bad_rows, settings.max_pairs_per_prompt
        self.all_turns = settings.sft and settings.sft_turns == "all"

    def __call__(self, chunk: Chunk) -> tuple[pa.RecordBatch, Tally]:
        kept: list[dict[str, Any]] = []
        tally = Tally()
        for where, row in numbered_rows(chunk):
            try:
                parsed, format_, notes = self.parse(row)
            except BadRow as bad:
                if not (self.drop_bad_rows or (self.facts.hub and bad.reason in QUIRKS)):
                    advice = "Mend the row, or set drop_bad_rows=true to drop such rows and count them."
                    raise UserError(f"{where}: {visible(str(bad))}\n{advice}") from None
                tally.count(tally.dropped, bad.reason, where)
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
            except Exception as error:  # whatever a row may hold, it must not end in a traceback
                told = visible(f"{type(error).__name__}: {error}")
                raise UserError(f"{where}: the row cannot be used ({told}); mend or remove it") from error
            else:
                kept.append(parsed)
                for note in notes:
                    tally.count(tally.notes, note, where)
                tally.count(tally.formats, format_, where)
        try:
            return pa.RecordBatch.from_pylist(kept, schema=ROWS), tally
        except (pa.ArrowException, OverflowError, ValueError) as error:
            where = f"{chunk.where}{chunk.numbers[0]} to {chunk.numbers[-1]}"
            raise UserError(f"{where}: a number or text of these rows is too large ({error})") from error

    def parse(self, row: bytes | Row) -> tuple[dict[str, Any], str, list[str]]:
        """What the row says in the schema `ROWS`, how it was rendered, and what is to be noted. Raises BadRow."""
        if isinstance(row, bytes):
            row = self.decode(row)
        if not isinstance(row, Mapping):
            raise BadRow("not an object", f"a row is {{...}}, this one is {type(row).__name__}")
        judged = self.facts.parse(row)
        self.check(judged.prompt, "prompt")
        for response in judged.responses:
            self.check(response, "response")
        if self.chat.wraps_text:
            judged = to_messages(judged)
        exact = judged.prompt
        if not isinstance(exact, str):
            exact = json.dumps([exact, judged.tools], default=str)
        facts: dict[str, Any] = {"hash": _hash64(exact), "key": _prompt_key(judged), "over": 0}
        if judged.scores is not None:
            judged.pairs, judged.ties, facts["over"] = ranked_pairs(judged.scores, self.most_pairs, facts["key"])
        if self.all_turns:
            judged = all_answers(judged)
        notes = judged.notes + ([UNDESIRED] if judged.undesired else [])
        if isinstance(judged.prompt, str):
            responses, format_ = [dialogue_parts(str(side)) for side in judged.responses], "text"
            if not judged.prompt.startswith("\n\nHuman:"):
                responses = [[str(side)] for side in judged.responses]
            return vars(judged) | facts | {"responses": responses}, format_, notes
        sides = [self.chat(judged.prompt, side, judged.tools) for side in judged.responses]  # type: ignore[arg-type]
        if any(side.prompt != sides[0].prompt for side in sides):
            raise BadRow("unfit chat template", "it renders the prompt in other ways before other responses")
        notes += dict.fromkeys(note for side in sides for note in side.notes)
        facts |= {"prompt": sides[0].prompt, "responses": [side.parts for side in sides]}
        return vars(judged) | facts, self.chat.name, notes

    @staticmethod
    def decode(line: bytes) -> Any:
        try:
            return json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise BadRow("not UTF-8", str(error)) from None
        except (ValueError, RecursionError) as error:
            raise BadRow("invalid JSON", str(error)) from None

    def check(self, side: Text, kind: str) -> None:
        """Raise BadRow for text that is empty, no text, or holds the EOS string. A prompt that is text may hold it, as
        one that is rendered already does."""
        if isinstance(side, str):
            self._check_text(side, kind, may_be_empty=False, may_hold_eos=kind == "prompt")
            return
        for message in side:
            others = message["role"] not in ("user", "assistant") or "tool_calls" in message
            self._check_text(message["content"], kind, others, may_hold_eos=False)
            for text in leaves({key: value for key, value in message.items() if key not in ("role", "content")}):
                self._check_text(text, kind, may_be_empty=True, may_hold_eos=False)

    def _check_text(self, text: str, kind: str, may_be_empty: bool, may_hold_eos: bool) -> None:
        if not text.strip() and not may_be_empty:
            raise BadRow(f"empty {kind}")
        if self.eos in text and not may_hold_eos:
            detail = f"{self.eos!r} in the {kind}; the model would learn to stop there"
            raise BadRow("text holds the EOS string", detail)
        try:
            text.encode()
        except UnicodeEncodeError:
            raise BadRow("broken Unicode", f"half of a surrogate pair in the {kind}") from None


# --- Tokenising: the rows of a prompt -> one record ---

RECORDS = pa.schema(
    {
        "prompt": IDS,
        "responses": pa.list_(IDS),
        "pairs": PAIRS,
        "masks": pa.list_(pa.list_(pa.bool_())),
        "key": pa.uint64(),
        "pair_keys": pa.list_(pa.uint64()),  # of prompt, chosen and rejected; SFT: of prompt and response
    }
)


def own_bos(tokenizer: Any) -> list[int]:
    """The BOS token that the tokenizer itself puts before a text: [] or one id."""
    first = list(tokenizer("x")["input_ids"])[:1]
    return first if first == [tokenizer.bos_token_id] else []


def _no_prefix(part: Any) -> Any:
    """A part of a tokenizer's description without what puts a space before a text."""
    if isinstance(part, list):
        return [_no_prefix(one) for one in part if not (isinstance(one, dict) and one.get("type") == "Prepend")]
    if not isinstance(part, dict):
        return part
    if part.get("type") == "Prepend":
        return None
    part = {key: _no_prefix(value) for key, value in part.items()}
    if part.get("type") == "Metaspace":
        part["prepend_scheme"] = "never"
        part.pop("add_prefix_space", None)
    return part | ({"add_prefix_space": False} if part.get("type") == "ByteLevel" else {})


class Encoder:
    """Text -> token ids: those of a text by itself, or of one that goes on from another, before which no tokenizer
    puts the space that some put before every text."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.inner: Tokenizer | None = None
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is not None:
            content = json.loads(backend.to_str())
            content["truncation"] = content["padding"] = None
            plain = content | {key: _no_prefix(content[key]) for key in ("normalizer", "pre_tokenizer")}
            if plain != content:
                self.inner = Tokenizer.from_str(json.dumps(plain))

    def __call__(self, texts: list[str]) -> list[list[int]]:
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        return self.tokenizer(texts, **options)["input_ids"] if texts else []

    def going_on(self, texts: list[str]) -> list[list[int]]:
        if self.inner is None:
            return self(texts)
        return [found.ids for found in self.inner.encode_batch(texts, add_special_tokens=False)]

    def spells(self, prompt: str, response: str, ids: tuple[list[int], list[int]]) -> bool:
        """Whether the ids of a prompt and what follows decode to their texts. White space of the prompt may differ:
        some tokenizers have their own before special tokens."""
        whole = self._decode(ids[0] + ids[1])
        if whole == prompt + response:
            return True
        start = self._decode(ids[0])
        return "".join(start.split()) == "".join(prompt.split()) and whole == start + response

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def truncate(
    prompt: list[int], responses: list[list[int]], n_bos: int, max_length: int, max_prompt_length: int, keep_end: bool
) -> tuple[list[int], list[list[int]]]:
    """Cut one prompt's tree to `max_length` tokens a prompt + response. Responses include EOS, the prompt `n_bos` BOS.

    As in the original: if the longest does not fit, the prompt is cut to `max_prompt_length`, at its start (`keep_end`)
    or end; then a response that still does not fit loses its end. Unlike there, it gets all that the prompt leaves.
    """
    if len(prompt) + max(map(len, responses)) <= max_length:
        return prompt, responses
    if len(prompt) > max_prompt_length:
        n_body = max_prompt_length - n_bos
        body = prompt[len(prompt) - n_body :] if keep_end else prompt[n_bos : n_bos + n_body]
        prompt = prompt[:n_bos] + body
    return prompt, [response[: max_length - len(prompt)] for response in responses]


def compact(responses: Sequence[Any], pairs: Pairs) -> tuple[list[int], Pairs, int]:
    """The distinct responses that stand in a pair (where they first do), the pairs among them, and how many pairs were
    of equal responses."""
    kept = [(a, b) for a, b in pairs if responses[a] != responses[b]]
    index: dict[Any, int] = {}
    first: list[int] = []
    for i in itertools.chain.from_iterable(kept):
        if responses[i] not in index:
            index[responses[i]] = len(index)
            first.append(i)
    return first, [(index[responses[a]], index[responses[b]]) for a, b in kept], len(pairs) - len(kept)


# The funnel's lines after those of rows and prompts
PAIR_COUNTS = (
    "pairs",
    "pairs dropped: equal scores",
    "pairs dropped: over max_pairs_per_prompt",
    "pairs dropped: identical responses",
    "pairs dropped: identical after truncation",
    "prompts dropped: no pair",
)
MERGED = "rows not used: one target a prompt"
UNSPELLED = "prompts whose tokens do not spell their text"
COUNTS = ("prompts truncated", UNSPELLED, "responses", "responses truncated (EOS lost)", "records", "examples")


@dataclass
class Merged:
    """What the rows of one prompt say together. Responses are in parts, as in `ROWS`."""

    prompt: str
    responses: list[tuple[str, ...]]
    pairs: Pairs
    keep_end: bool
    key: int

    def pair_keys(self) -> list[int]:
        sides: Sequence[Sequence[int]] = self.pairs or [(0,)]
        texts = ["".join(parts) for parts in self.responses]
        return [_hash64("\0".join((str(self.key), *(texts[i] for i in side)))) for side in sides]


class TokeniseRecords:
    """Row numbers, one array a prompt -> (Arrow batch in the schema `RECORDS`, counts for the funnel)."""

    def __init__(self, rows: Path, tokenizer: Any, settings: DataSettings):
        self.rows, self.tokenizer, self.settings = rows, tokenizer, settings
        self.encode, self.bos = Encoder(tokenizer), own_bos(tokenizer)
        self.table: ArrowRows | None = None

    def __call__(self, groups: list[np.ndarray]) -> tuple[pa.RecordBatch, Counter[str]]:
        self.table = self.table or ArrowRows(self.rows)  # opened by the worker, not carried to it
        counts: Counter[str] = Counter()
        rows = ([self.table.row(i).to_pylist()[0] for i in group.tolist()] for group in groups)
        trees = [tree for group in rows if (tree := self.merge(group, counts))]
        prompts = self.encode([tree.prompt for tree in trees])
        parts = iter(self.encode.going_on([part for tree in trees for parts in tree.responses for part in parts]))
        records = []
        for tree, prompt in zip(trees, prompts, strict=True):
            responses = [[next(parts) for _ in texts] for texts in tree.responses]
            records.append(self.record(tree, prompt, responses, counts))
        return pa.RecordBatch.from_pylist([r for r in records if r is not None], schema=RECORDS), counts

    def merge(self, rows: list[dict[str, Any]], counts: Counter[str]) -> Merged | None:
        """What the rows of one prompt say together; None if that is no preference."""
        merged = Merged(rows[0]["prompt"], [], [], rows[0]["keep_end"], rows[0]["key"])
        if self.settings.sft:
            rated = [row for row in rows if row["score"] is not None]
            best = max(rated, key=lambda row: row["score"]) if rated else rows[-1]
            counts[MERGED] += len(rows) - 1
            merged.responses = [tuple(best["responses"][best["target"]])]
            return merged
        responses: list[tuple[str, ...]] = []
        pairs: Pairs = []
        for row in rows:
            pairs += [(len(responses) + a, len(responses) + b) for a, b in row["pairs"]]
            responses += map(tuple, row["responses"])
            counts["pairs"] += len(row["pairs"]) + row["ties"] + row["over"]
            counts["pairs dropped: equal scores"] += row["ties"]
            counts["pairs dropped: over max_pairs_per_prompt"] += row["over"]
        most = self.settings.max_pairs_per_prompt
        if len(pairs) > most:
            counts["pairs dropped: over max_pairs_per_prompt"] += len(pairs) - most
            pairs = [pairs[i] for i in sorted(random.Random(merged.key).sample(range(len(pairs)), most))]
        first, merged.pairs, n_identical = compact(responses, pairs)
        merged.responses = [responses[i] for i in first]
        counts["pairs dropped: identical responses"] += n_identical
        if not merged.pairs:
            counts["prompts dropped: no pair"] += 1
            return None
        return merged

    def record(
        self, tree: Merged, prompt: list[int], parts: list[list[list[int]]], counts: Counter[str]
    ) -> dict[str, Any] | None:
        """The record of a prompt, from the ids of its prompt and of its responses' parts; None if no pair is left."""
        texts = "".join(itertools.chain.from_iterable(tree.responses))
        flat = [token for response in parts for part in response for token in part]
        counts[UNSPELLED] += not self.encode.spells(tree.prompt, texts, (prompt, flat))
        prompt, n_bos = self._with_bos(prompt)
        if not prompt:
            raise UserError(f"the prompt {tree.prompt[:80]!r} has no tokens under this tokenizer; drop its rows")
        eos, s = self.tokenizer.eos_token_id, self.settings
        responses = [[*itertools.chain.from_iterable(response), eos] for response in parts]
        masks = [[i % 2 == 0 for i, part in enumerate(response) for _ in part] + [True] for response in parts]
        cut, ends = truncate(prompt, responses, n_bos, s.max_length, s.max_prompt_length, tree.keep_end)
        masks = [mask[: len(end)] for mask, end in zip(masks, ends, strict=True)]
        n_cut = sum(len(end) < len(response) for end, response in zip(ends, responses, strict=True))
        keys = tree.pair_keys()
        first, pairs, n_identical = compact([(*end, None, *mask) for end, mask in zip(ends, masks)], tree.pairs)
        if s.sft:
            first = [0]
        else:
            keys = [key for key, (a, b) in zip(keys, tree.pairs) if (ends[a], masks[a]) != (ends[b], masks[b])]
            counts["pairs dropped: identical after truncation"] += n_identical
            if not pairs:
                counts["prompts dropped: no pair"] += 1
                return None
        counts["prompts truncated"] += len(cut) < len(prompt)
        counts["responses"] += len(ends)
        counts["responses truncated (EOS lost)"] += n_cut
        counts["records"] += 1
        counts["examples"] += len(pairs) or 1
        kept = [masks[i] for i in first]
        return {
            **{"prompt": cut, "responses": [ends[i] for i in first], "pairs": pairs},
            **{"masks": None if all(map(all, kept)) else kept, "key": tree.key, "pair_keys": keys},
        }

    def _with_bos(self, prompt: list[int]) -> tuple[list[int], int]:
        """The prompt with BOS once if the tokenizer's convention has it, and how many BOS it begins with: one that a
        chat template wrote counts, too. (A token that begins every turn is none.)"""
        if self.bos:
            return (prompt if prompt[:1] == self.bos else self.bos + prompt), 1
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        return prompt, int(bos is not None and prompt[:1] == [bos] and (prompt.count(bos) == 1 or bos == eos))


def tokenizer_identity(tokenizer: Any) -> str:
    """A hash of all that decides which ids a text gets."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        content["truncation"] = content["padding"] = None  # left behind by the last call, and no part of the text's ids
    else:
        content = [sorted(tokenizer.get_vocab().items()), str(getattr(tokenizer, "init_kwargs", ""))]
    return digest(type(tokenizer).__name__, content, tokenizer.bos_token_id, tokenizer.eos_token_id, own_bos(tokenizer))


# --- Loading ---


def group_rows(table: ArrowRows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows by prompt, prompts in the order they first occur: prompt i has the rows `order[starts[i]:ends[i]]`.

    Prompts are the same if their 64-bit hashes are; a row that is a demonstration is on its own.
    """
    hashes, alone = table.table["hash"].to_numpy(), table.table["demonstration"].to_numpy()
    order = np.lexsort((alone, hashes))
    new = np.ones(len(order), dtype=bool)
    new[1:] = (hashes[order[1:]] != hashes[order[:-1]]) | alone[order[1:]]
    starts = np.flatnonzero(new)
    ends = np.append(starts, len(order))[1:]
    by_first = np.argsort(order[starts])
    return order, starts[by_first], ends[by_first]


def in_test_split(hashes: np.ndarray, fraction: float | None) -> np.ndarray:
    """Which prompts are held out: those of the lowest hashes, at least one.

    With a `fraction` those in the lowest part of the range, so that a prompt's side does not depend on the other rows.
    None: 1 % of the prompts but at least 50, or a tenth of them if that is fewer.
    """
    distinct = np.unique(hashes)
    if fraction == 0 or not len(distinct):
        return np.zeros(len(hashes), dtype=bool)
    if fraction is None:
        n_below = max(len(distinct) // 100, min(50, len(distinct) // 10))
    else:
        n_below = int(np.searchsorted(distinct, np.uint64(int(fraction * 2**64))))
    n_test = min(max(n_below, 1), len(distinct) - 1)
    return hashes < distinct[n_test]


def parser_identity(parse: Callable[..., Judgement]) -> list[Any]:
    """What a parser does, as far as its own text tells it: comments and layout are no part of that."""
    columns = dict(parse.keywords["columns"]) if isinstance(parse, functools.partial) else {}
    function = parse.func if isinstance(parse, functools.partial) else parse
    try:
        text = ast.dump(ast.parse(textwrap.dedent(inspect.getsource(function))))
    except (OSError, TypeError, SyntaxError):  # it was defined where no text is kept
        text = function.__qualname__
    return [text, columns]


@dataclass(frozen=True)
class LoadedSet:
    """One split of one data set: the folder of its records, and what became of its rows."""

    folder: Path
    funnel: dict[str, int]
    notes: dict[str, int]
    formats: list[str]
    source: Source


class Loader:
    """One data set, one split: finds the rows, parses and tokenises what is not cached yet."""

    def __init__(self, name: str, settings: DataSettings, tokenizer: Any, split: str):
        self.name, self.settings, self.tokenizer, self.split = name, settings, tokenizer, split
        self.cache_dir = Path(settings.cache_dir)
        self.facts, self.source = find_source(name, settings, split)
        if self.source.held_out and split == "test" and settings.holdout_fraction == 0:
            raise UserError(
                f"data set {name!r} ({self.source.label}) has no test split and holdout_fraction=0 holds none out; "
                "set holdout_fraction, for example 0.01, or add test files"
            )

    def load(self) -> LoadedSet:
        """The records' folder and what is to be said of them. Raises UserError if no example is left."""
        s = self.settings
        chat = ChatFormat(self.tokenizer, s.chat_format, s.chat_date)
        parser = ParseRows(self.facts, chat, self.tokenizer.eos_token, s)
        parsed_by = [FORMAT, parser_identity(self.facts.parse), self.facts.hub, parser.eos, chat.identity]
        raw = digest(parsed_by, self.source.identity, s.drop_bad_rows, s.max_pairs_per_prompt, parser.all_turns)
        held_out = (self.split, s.holdout_fraction) if self.source.held_out else None
        tokens = digest(raw, tokenizer_identity(self.tokenizer), s.max_length, s.max_prompt_length, s.sft, held_out)

        def tokenise(folder: Path) -> None:
            rows = cached(self.cache_dir, f"rows-{raw}", lambda folder: self.write_rows(folder, parser))
            self.write_records(folder, rows)

        folder = cached(self.cache_dir, f"tokens-{tokens}", tokenise)
        told = json.loads((folder / "funnel.json").read_text(encoding="utf-8"))
        funnel, first = told["funnel"], told["first"]
        for note, n in told["notes"].items():
            log_once(f"warning: {self.name}: {note} ({n} rows, the first at {first[note]})")
        if not funnel["examples"]:
            hint = ""
            if self.split == "test" and self.source.held_out and funnel.get("prompts", 0) < 2:
                hint = "\nToo few prompts to hold one out for evaluation: add rows, or set n_eval_examples=0."
            elif not s.sft and UNDESIRED in told["notes"]:
                hint = "\nThe rows are completions with labels, which state no preferences."
            elif not s.sft and not funnel["pairs"]:
                hint = "\nThe rows state no preferences: use loss=sft."
            table = _table({self.name: funnel})
            raise UserError(f"data set {self.name!r} ({self.split}) has no example left:\n{table}{hint}")
        return LoadedSet(folder, funnel, told["notes"], told["formats"], self.source)

    def write_rows(self, folder: Path, parser: ParseRows) -> None:
        bar = progress(desc=f"{self.name}: reading", unit=" rows")
        batches = parallel(parser, self.source.chunks(), self.settings.num_proc)
        total = Tally()
        for tally in write_arrow(folder / "rows.arrow", ROWS, batches, bar):
            total.add(tally)
        for reason, count in total.dropped.items():
            log(f"{self.name}: dropped {count} rows ({reason}), the first at {total.first[reason]}")
        (folder / "tally.json").write_text(json.dumps(vars(total), sort_keys=True), encoding="utf-8")

    def write_records(self, folder: Path, rows: Path) -> None:
        table = ArrowRows(rows / "rows.arrow")
        told = json.loads((rows / "tally.json").read_text(encoding="utf-8"))
        undesired = table.table["undesired"].to_numpy()
        silent = 0 if self.settings.sft else int(table.table["demonstration"].to_numpy().sum())
        if self.settings.sft and undesired.any():
            self.refuse_undesired(told)
        dropped = dict(told["dropped"])
        funnel = {"rows": len(table) + sum(dropped.values())}
        funnel |= {f"rows dropped: {reason}": count for reason, count in dropped.items()}
        order, starts, ends = group_rows(table)
        if self.settings.sft and undesired.any():  # each is a record of its own
            kept = ~undesired[order[starts]]
            funnel[f"rows dropped: {UNDESIRED}"] = int(undesired.sum())
            starts, ends = starts[kept], ends[kept]
        funnel |= {"rows kept": int((ends - starts).sum()), "prompts": len(starts)}
        if self.source.held_out:
            test = in_test_split(table.table["key"].to_numpy()[order[starts]], self.settings.holdout_fraction)
            chosen = test if self.split == "test" else ~test
            other = "held out for evaluation" if self.split == "train" else "used for training"
            funnel[f"prompts dropped: {other}"] = int((~chosen).sum())
            starts, ends = starts[chosen], ends[chosen]
        groups = (order[a:b] for a, b in zip(starts, ends, strict=True))
        chunks = iter(lambda: list(itertools.islice(groups, CHUNK_ROWS)), [])
        bar = progress(desc=f"{self.name}: tokenising", total=len(starts), unit=" prompts")
        work = TokeniseRecords(rows / "rows.arrow", self.tokenizer, self.settings)
        batches = parallel(work, chunks, self.settings.num_proc)
        counts: Counter[str] = sum(write_arrow(folder / "records.arrow", RECORDS, batches, bar), Counter())
        wanted = (MERGED, *COUNTS) if self.settings.sft else PAIR_COUNTS + COUNTS
        funnel |= {key: counts[key] for key in wanted if counts[key] or key != UNSPELLED}
        if 0 < silent < len(table):
            told["notes"] |= {SILENT: silent}
            told["first"].setdefault(SILENT, "a row of the form prompt, completion or messages")
        told |= {"funnel": funnel, "formats": sorted(told["formats"])}
        (folder / "funnel.json").write_text(json.dumps(told), encoding="utf-8")

    def refuse_undesired(self, told: dict[str, Any]) -> None:
        """Raise UserError: SFT would learn completions that are labelled as bad; unless such rows are to be dropped."""
        if not self.settings.drop_bad_rows:
            raise UserError(
                f"{told['first'][UNDESIRED]}: {UNDESIRED}, and loss=sft would learn it. Remove such rows (there are "
                f"{told['notes'][UNDESIRED]}), or set drop_bad_rows=true to leave them out"
            )


class PreferenceData:
    """One split of a mixture: `Record`s read from disk when asked for."""

    def __init__(self, names: tuple[str, ...], sets: Sequence[LoadedSet]):
        self.names = names
        self.funnel = {name: one.funnel for name, one in zip(names, sets, strict=True)}
        self.notes = {name: one.notes for name, one in zip(names, sets, strict=True)}
        self.identity = [one.folder.name for one in sets]  # for each data set, of all that its records depend on
        self.formats = sorted({name for one in sets for name in one.formats})  # how rows were rendered
        self.sources = [  # where the rows come from, and a hash of their content
            {
                "name": name,
                "path": one.source.label,
                "files": [*one.source.files],
                "digest": digest(one.source.identity),
            }
            for name, one in zip(names, sets, strict=True)
        ]
        sizes = [one.funnel["records"] for one in sets]
        self.source = np.repeat(np.arange(len(names)), sizes)  # [records], index into `names`
        self._rows = ArrowRows(*(one.folder / "records.arrow" for one in sets))
        n_pairs = pc.list_value_length(self._rows.table["pairs"]).to_numpy().astype(np.int64)
        self.n_examples = np.maximum(n_pairs, 1)  # [records]; one for SFT, where there are no pairs
        self.keys = self._rows.table["key"].to_numpy()  # [records], a hash of each prompt, however it is rendered
        self.pair_keys = pc.list_flatten(self._rows.table["pair_keys"]).to_numpy()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> Record:
        row = self._rows.row(range(len(self))[i])
        prompt, responses, pairs, masks = (row.column(name)[0] for name in RECORDS.names[:4])
        return Record(
            prompt.values.to_numpy().tolist(),
            [response.values.to_numpy().tolist() for response in responses],
            [(a, b) for a, b in pairs.as_py()],
            masks.as_py(),
        )


def load_data(settings: DataSettings, tokenizer: Any, split: str) -> PreferenceData:
    """The "train" or "test" split of the mixture `settings.names`. Raises UserError for whatever a user can mend."""
    if split not in ("train", "test"):
        raise UserError(f"split={split!r} is not one of train, test")
    longest, longest_prompt = settings.max_length, settings.max_prompt_length
    if not len(own_bos(tokenizer)) < longest_prompt < longest:
        raise UserError(f"max_prompt_length={longest_prompt} must hold a token and be less than max_length={longest}")
    twice = [name for name, count in Counter(settings.names).items() if count > 1]
    if twice:
        raise UserError(f"datasets names {twice[0]!r} twice; name each once")
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no EOS token, which ends every response; choose a tokenizer that has one")
    return PreferenceData(settings.names, [Loader(name, settings, tokenizer, split).load() for name in settings.names])


def overlap(train_keys: np.ndarray, train_pairs: np.ndarray, test: PreferenceData) -> tuple[int, int]:
    """How many of the prompts of `test`, and of its pairs (SFT: of its demonstrations), are among those given."""
    return int(np.isin(test.keys, train_keys).sum()), int(np.isin(test.pair_keys, train_pairs).sum())


def short_names(names: Sequence[str]) -> list[str]:
    """The last part of each path or hub id, or all of it where that does not tell it from the others."""
    last = [Path(name).name or name for name in names]
    return [short if last.count(short) == 1 else name for short, name in zip(last, names)]


def _table(funnel: Mapping[str, Mapping[str, int]]) -> str:
    keys: list[str] = []
    for counts in funnel.values():  # a key that only a later set has goes where that set has it
        at = 0
        for key in counts:
            if key not in keys:
                keys.insert(at, key)
            at = keys.index(key) + 1
    cells = [[f"{counts[key]:,}" if key in counts else "-" for counts in funnel.values()] for key in keys]
    rows = [["", *short_names(list(funnel))], *([key, *line] for key, line in zip(keys, cells))]
    left, *widths = (max(map(len, column)) for column in zip(*rows))
    return "\n".join("  ".join([row[0].ljust(left), *map(str.rjust, row[1:], widths)]) for row in rows)


def format_funnel(data: PreferenceData) -> str:
    """What became of the rows, a line a count and a column a data set; and the files that they were read from."""
    lines = [_table(data.funnel)]
    for source in data.sources:
        files = source["files"]
        more = f" and {len(files) - MOST_FILES} more" if len(files) > MOST_FILES else ""
        lines.append(f"{source['path']}: {', '.join(files[:MOST_FILES])}{more}")
    return visible("\n".join(lines))
