"""Raw rows -> one record a prompt -> token ids, kept in memory-mapped Arrow files that the next run reuses.

    rows (files, hub) --parse--> raw folder: prompt, responses, pairs --tokenise--> tokens folder: what `Record` holds

Both folders are named by a hash of everything they depend on and appear only when complete. A function per data set
turns a row into a `Judgement`; `REGISTRY` holds what else is particular about a set. Every row read is either in a
record or counted in the funnel under the reason why not.
"""

import difflib
import hashlib
import html.parser
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from arrow_cache import ArrowRows, cached, digest, parallel, write_arrow
from data_files import CHUNK_ROWS, PLAIN, SUFFIXES, Chunk, Layout, Row, Source, hub_source, local_source, numbered_rows
from utils import UserError, file_hash, log, progress

Message = Mapping[str, str]
Text = str | list[Message]
Pairs = list[tuple[int, int]]

# The caches hold what this code makes: an edit makes them anew.
_CODE = [
    file_hash(Path(__file__).parent / f"{name}.py") for name in ("preference_datasets", "data_files", "arrow_cache")
]

FORMS = """  chosen, rejected                  two dialogues: text as in HH, or lists of {role, content}
  prompt, chosen, rejected
  prompt, responses, scores         every pair of unequal scores
  prompt, completion                demonstrations, for loss=sft
prompt, chosen, rejected, completion and each response may be text or lists of {role, content}."""


@dataclass(frozen=True)
class DataSettings:
    """What the data depends on, besides the tokenizer. Lengths are in tokens."""

    names: tuple[str, ...]  # built-in sets, files, folders or hub ids
    sources: Mapping[str, str | None]  # built-in name -> local copy in the hub's layout
    sft: bool  # one target a prompt instead of pairs
    max_length: int  # prompt + response with EOS
    max_prompt_length: int  # with BOS
    chat_format: str = "auto"  # "auto" | "template" | "hh"
    holdout_fraction: float = 0.01  # of the prompts, where a source has no test split
    drop_bad_rows: bool = False
    cache_dir: str = ".cache"
    num_proc: int = 0  # 0: all cores


@dataclass(frozen=True)
class Record:
    """One prompt, its distinct responses, and pairs (preferred, dispreferred) of their indices; SFT: one response."""

    prompt: list[int]
    responses: list[list[int]]
    pairs: Pairs


# --- One row -> one Judgement ---


# Of what is found in the built-in sets, this is known: it is counted, and no reason to stop.
QUIRKS = {"empty response", "empty prompt", "text holds the EOS string"}
QUIRKS |= {"score ratio below 2", "no answers", "CNN/DM article, not a post"}


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
    target: int = 0  # the response that SFT learns
    score: float | None = None  # the target's; among rows of one prompt the highest wins, without scores the last row
    ties: int = 0  # pairs of equal score
    keep_end: bool = False  # truncation keeps the prompt's end, not its start: it ends in what asks for the response
    demonstration: bool = False  # states no preference, and is not merged with other rows of its prompt


def get(row: Row, name: str, *types: type) -> Any:
    """The field `name` of `row`, which must be of one of `types` (str unless told). Raises BadRow."""
    types = types or (str,)
    if name not in row:
        raise BadRow("missing field", f"'{name}'; the row has {', '.join(map(repr, row)) or 'no fields'}")
    value = row[name]
    if value is None:
        raise BadRow("null field", f"'{name}'")
    # bool is an int to Python, but true is no score
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        wanted = " or ".join(t.__name__ for t in types)
        raise BadRow("wrong type", f"'{name}' is {type(value).__name__} ({str(value)[:40]!r}), not {wanted}")
    return value


def messages(row: Row, name: str) -> list[Message]:
    """The field `name` as a non-empty list of messages, each with text in `role` and `content`. Raises BadRow."""
    value = get(row, name, list)
    if not value:
        raise BadRow("empty conversation", f"'{name}'")
    for number, message in enumerate(value, 1):
        if not isinstance(message, Mapping):
            found = type(message).__name__
            raise BadRow("wrong type", f"message {number} of '{name}' is {found}, not {{role, content}}")
    return [{key: get(message, key) for key in ("role", "content")} for message in value]


def text_or_messages(row: Row, name: str) -> Text:
    return get(row, name) if isinstance(get(row, name, str, list), str) else messages(row, name)


def rank(scores: Sequence[float]) -> dict[str, Any]:
    """A Judgement's facts: every pair of unequal scores; the first of the highest scored is the SFT target."""
    pairs = [(i, j) if scores[i] > scores[j] else (j, i) for i, j in itertools.combinations(range(len(scores)), 2)]
    unequal = [(i, j) for i, j in pairs if scores[i] != scores[j]]
    best = max(scores)
    return {"pairs": unequal, "ties": len(pairs) - len(unequal), "target": scores.index(best), "score": best}


def split_dialogues(chosen: str, rejected: str) -> Judgement:
    """The prompt is the shared text up to and with its last assistant marker.

    Chosen's own last marker will not do: a few HH rows part at an earlier turn, and their rejected text would be cut
    in the wrong place.
    """
    marker = "\n\nAssistant:"
    end = chosen.rfind(marker)
    while end >= 0 and not rejected.startswith(chosen[: end + len(marker)]):
        end = chosen.rfind(marker, 0, end)
    if end < 0:
        advice = "dialogues look as in HH, other texts need a column 'prompt'"
        raise BadRow("no shared assistant turn", f"chosen and rejected have no common {marker!r}; {advice}")
    end += len(marker)
    return Judgement(chosen[:end], [chosen[end:], rejected[end:]], [(0, 1)], keep_end=True)


def split_conversations(chosen: list[Message], rejected: list[Message]) -> Judgement:
    """The prompt is the messages that both sides share, up to the last point where both go on with the assistant."""
    shared = sum(1 for _ in itertools.takewhile(lambda ab: ab[0] == ab[1], zip(chosen, rejected)))
    shared = min(shared, len(chosen) - 1, len(rejected) - 1)
    while shared > 0 and not chosen[shared]["role"] == rejected[shared]["role"] == "assistant":
        shared -= 1
    if shared <= 0:
        raise BadRow("no shared prompt", "chosen and rejected share no messages before one of the assistant")
    return Judgement(chosen[:shared], [chosen[shared:], rejected[shared:]], [(0, 1)], keep_end=True)


def answers(prompt: Text, sides: Sequence[Text], **facts: Any) -> Judgement:
    """Prompt and responses given apart. Where any is a list of messages, text among them becomes a message."""
    if isinstance(prompt, str) and all(isinstance(side, str) for side in sides):
        return Judgement(prompt, sides, **facts)

    def turn(role: str, text: Text) -> list[Message]:
        return [{"role": role, "content": text}] if isinstance(text, str) else text

    asked, said = turn("user", prompt), [turn("assistant", side) for side in sides]
    if any(side[0]["role"] != "assistant" for side in said):
        raise BadRow("wrong role", "a response must begin with a message of the assistant")
    return Judgement(asked, said, keep_end=True, **facts)


def generic(row: Row) -> Judgement:
    """A row whose columns say what it is (`FORMS`)."""
    if "responses" in row or "scores" in row:
        return scored(row)
    if "chosen" in row or "rejected" in row:
        chosen, rejected = text_or_messages(row, "chosen"), text_or_messages(row, "rejected")
        whole = not isinstance(chosen, str) and chosen[0]["role"] != "assistant"
        if "prompt" in row and not whole:
            return answers(text_or_messages(row, "prompt"), [chosen, rejected], pairs=[(0, 1)])
        if isinstance(chosen, str) and isinstance(rejected, str):
            return split_dialogues(chosen, rejected)
        if isinstance(chosen, str) or isinstance(rejected, str):
            raise BadRow("wrong type", "one of 'chosen' and 'rejected' is text, the other a list of messages")
        return split_conversations(chosen, rejected)
    if "completion" in row:
        completion = text_or_messages(row, "completion")
        return answers(text_or_messages(row, "prompt"), [completion], pairs=[], demonstration=True)
    raise BadRow("columns fit no known form", f"{', '.join(map(repr, row)) or 'none'}; accepted are\n{FORMS}")


def scored(row: Row) -> Judgement:
    prompt, responses, scores = text_or_messages(row, "prompt"), get(row, "responses", list), get(row, "scores", list)
    if not responses or len(responses) != len(scores):
        raise BadRow("scores do not match responses", f"{len(responses)} responses, {len(scores)} scores")
    for i, score in enumerate(scores):
        if not math.isfinite(get({f"scores[{i}]": score}, f"scores[{i}]", int, float)):
            raise BadRow("score not finite", f"scores[{i}] is {score}")
    sides = [text_or_messages({f"responses[{i}]": side}, f"responses[{i}]") for i, side in enumerate(responses)]
    return answers(prompt, sides, **rank(scores))


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
    return Judgement(human(html_to_text(get(row, "question"))), responses, **rank(scores))


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
    if get(row, "score_chosen", int, float) == get(row, "score_rejected", int, float):
        judged.pairs, judged.ties = [], 1
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

    parse: Callable[[Row], Judgement]
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
GENERIC = SetFacts(generic)


def find_source(name: str, settings: DataSettings, split: str) -> tuple[SetFacts, Source]:
    """The facts and rows of the data set called `name`: built in, a path, or a hub id. Raises UserError for others."""
    if name in REGISTRY:
        facts = REGISTRY[name]
        if facts.sft_only and not settings.sft:
            raise UserError(f"data set {name!r} has no preferences, so it is for loss=sft only; choose another")
        embedded = Path(__file__).parent / facts.embedded if facts.embedded else None
        if local := settings.sources.get(name) or embedded:
            return facts, local_source(Path(local).expanduser(), facts.layout, split)
        hub, layout = (facts.sft_hub, PLAIN) if settings.sft and facts.sft_hub else (facts.hub, facts.layout)
        advice = f"Where the hub is out of reach, give a local copy in its layout: dataset_sources.{name}=<folder>"
        return facts, hub_source(str(hub), layout, split, advice)
    path = Path(name).expanduser()
    if path.exists() or name.endswith(SUFFIXES) or name.startswith(("/", ".", "~")):
        return GENERIC, local_source(path, PLAIN, split)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return GENERIC, hub_source(name, PLAIN, split, "Check the id, or give a local copy's path.")
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
        "responses": pa.list_(pa.string()),
        "pairs": PAIRS,
        "target": pa.int32(),
        "score": pa.float64(),
        "ties": pa.int32(),
        "keep_end": pa.bool_(),
        "demonstration": pa.bool_(),
        "hash": pa.uint64(),
    }
)


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


HH_MARKERS = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: ", "system": ""}


class ChatFormat:
    """Renders messages with the tokenizer's chat template or in the style of HH."""

    def __init__(self, tokenizer: Any, style: str):
        has_template = getattr(tokenizer, "chat_template", None) is not None
        if style == "template" and not has_template:
            raise UserError("chat_format=template, but the tokenizer has no chat template; use chat_format=hh or auto")
        self.tokenizer = tokenizer if has_template and style != "hh" else None
        self.identity = str(tokenizer.chat_template) if self.tokenizer is not None else "hh"

    def __call__(self, prompt: list[Message], response: list[Message]) -> tuple[str, str]:
        """The prompt up to where the assistant speaks, and what follows without a closing EOS. Raises BadRow."""
        if self.tokenizer is None:
            asked, said = self._hh(prompt) + "\n\nAssistant:", self._hh(response)
            return asked, said.removeprefix("\n\nAssistant:")
        try:
            asked = self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
            whole = self.tokenizer.apply_chat_template([*prompt, *response], tokenize=False)
        except Exception as error:  # templates raise what they like
            raise BadRow("refused by the chat template", f"{error}; chat_format=hh needs no template") from error
        if not whole.startswith(asked):
            raise BadRow("unfit chat template", "its generation prompt is not how an answer begins; use chat_format=hh")
        said = whole[len(asked) :]
        eos = self.tokenizer.eos_token
        return asked, said.rstrip().removesuffix(eos) if said.rstrip().endswith(eos) else said

    def _hh(self, turns: list[Message]) -> str:
        unknown = [turn["role"] for turn in turns if turn["role"] not in HH_MARKERS]
        if unknown:
            raise BadRow("wrong role", f"{unknown[0]!r} is not one of {', '.join(HH_MARKERS)}")
        return "".join(HH_MARKERS[turn["role"]] + turn["content"] for turn in turns)


class ParseRows:
    """Chunk -> (Arrow batch in the schema `ROWS`, (how many rows are dropped by reason, the first of each)).

    Raises UserError at a row that must not be dropped.
    """

    def __init__(self, facts: SetFacts, chat: ChatFormat, eos: str, drop_bad_rows: bool):
        self.facts, self.chat, self.eos, self.drop_bad_rows = facts, chat, eos, drop_bad_rows

    def __call__(self, chunk: Chunk) -> tuple[pa.RecordBatch, tuple[Counter[str], dict[str, str]]]:
        kept: list[dict[str, Any]] = []
        dropped: Counter[str] = Counter()
        first: dict[str, str] = {}
        for where, row in numbered_rows(chunk):
            try:
                kept.append(self.parse(row))
            except BadRow as bad:
                if not (self.drop_bad_rows or (self.facts.hub and bad.reason in QUIRKS)):
                    advice = "Mend the row, or set drop_bad_rows=true to drop such rows and count them."
                    raise UserError(f"{where}: {bad}\n{advice}") from None
                dropped[bad.reason] += 1
                first.setdefault(bad.reason, where)
        return pa.RecordBatch.from_pylist(kept, schema=ROWS), (dropped, first)

    def parse(self, row: bytes | Row) -> dict[str, Any]:
        if isinstance(row, bytes):
            row = self.decode(row)
        if not isinstance(row, Mapping):
            raise BadRow("not an object", f"a row is {{...}}, this one is {type(row).__name__}")
        judged = self.facts.parse(row)
        self.check(judged.prompt, "prompt")
        for response in judged.responses:
            self.check(response, "response")
        prompt, responses = judged.prompt, judged.responses
        if not isinstance(prompt, str):
            sides = [self.chat(prompt, response) for response in responses]  # type: ignore[arg-type]
            prompt, responses = sides[0][0], [said for _, said in sides]
        return vars(judged) | {"prompt": prompt, "responses": responses, "hash": _hash64(prompt)}

    @staticmethod
    def decode(line: bytes) -> Any:
        try:
            return json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise BadRow("not UTF-8", str(error)) from None
        except (ValueError, RecursionError) as error:
            raise BadRow("invalid JSON", str(error)) from None

    def check(self, side: Text, kind: str) -> None:
        for text in [side] if isinstance(side, str) else [turn["content"] for turn in side]:
            if not text.strip():
                raise BadRow(f"empty {kind}")
            if self.eos in text:
                raise BadRow(
                    "text holds the EOS string", f"{self.eos!r} in the {kind}; the model would learn to stop there"
                )
            try:
                text.encode()
            except UnicodeEncodeError:
                raise BadRow("broken Unicode", f"half of a surrogate pair in the {kind}") from None


# --- Tokenising: the rows of a prompt -> one record ---

RECORDS = pa.schema({"prompt": IDS, "responses": pa.list_(IDS), "pairs": PAIRS})


def own_bos(tokenizer: Any) -> list[int]:
    """The BOS token that the tokenizer itself puts before a text: [] or one id."""
    first = list(tokenizer("x")["input_ids"])[:1]
    return first if first == [tokenizer.bos_token_id] else []


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


def compact(responses: Sequence[Any], pairs: Pairs) -> tuple[list[Any], Pairs, int]:
    """The distinct responses that stand in a pair, the pairs among them, and how many pairs were of equal responses."""
    kept = [(a, b) for a, b in pairs if responses[a] != responses[b]]
    index: dict[Any, int] = {}
    for i in itertools.chain.from_iterable(kept):
        index.setdefault(responses[i], len(index))
    return list(index), [(index[responses[a]], index[responses[b]]) for a, b in kept], len(pairs) - len(kept)


# The funnel's lines after those of rows and prompts
PAIR_COUNTS = (
    "pairs",
    "pairs dropped: equal scores",
    "pairs dropped: identical responses",
    "pairs dropped: identical after truncation",
    "prompts dropped: no pair",
)
MERGED = "rows not used: one target a prompt"
COUNTS = ("prompts truncated", "responses", "responses truncated (EOS lost)", "records", "examples")


class TokeniseRecords:
    """Row numbers, one array a prompt -> (Arrow batch in the schema `RECORDS`, counts for the funnel)."""

    def __init__(self, rows: Path, tokenizer: Any, settings: DataSettings):
        self.rows, self.tokenizer, self.settings = rows, tokenizer, settings
        self.bos = own_bos(tokenizer)
        self.table: ArrowRows | None = None

    def __call__(self, groups: list[np.ndarray]) -> tuple[pa.RecordBatch, Counter[str]]:
        self.table = self.table or ArrowRows(self.rows)  # opened by the worker, not carried to it
        counts: Counter[str] = Counter()
        rows = ([self.table.row(i).to_pylist()[0] for i in group.tolist()] for group in groups)
        trees = [tree for group in rows if (tree := self.merge(group, counts))]
        texts = [text for tree in trees for text in (tree.prompt, *tree.responses)]
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        ids = iter(self.tokenizer(texts, **options)["input_ids"] if texts else [])
        records = [self.record(tree, next(ids), [next(ids) for _ in tree.responses], counts) for tree in trees]
        return pa.RecordBatch.from_pylist([r for r in records if r is not None], schema=RECORDS), counts

    def merge(self, rows: list[dict[str, Any]], counts: Counter[str]) -> Judgement | None:
        """What the rows of one prompt say together; None where that is no preference."""
        prompt, keep_end = rows[0]["prompt"], rows[0]["keep_end"]
        if self.settings.sft:
            rated = [row for row in rows if row["score"] is not None]
            best = max(rated, key=lambda row: row["score"]) if rated else rows[-1]
            counts[MERGED] += len(rows) - 1
            return Judgement(prompt, [best["responses"][best["target"]]], [], keep_end=keep_end)
        responses: list[str] = []
        pairs: Pairs = []
        for row in rows:
            pairs += [(len(responses) + a, len(responses) + b) for a, b in row["pairs"]]
            responses += row["responses"]
            counts["pairs"] += len(row["pairs"]) + row["ties"]
            counts["pairs dropped: equal scores"] += row["ties"]
        distinct, kept, n_identical = compact(responses, pairs)
        counts["pairs dropped: identical responses"] += n_identical
        if not kept:
            counts["prompts dropped: no pair"] += 1
            return None
        return Judgement(prompt, distinct, kept, keep_end=keep_end)

    def record(
        self, tree: Judgement, prompt: list[int], responses: list[list[int]], counts: Counter[str]
    ) -> dict[str, Any] | None:
        prompt = prompt if prompt[: len(self.bos)] == self.bos else self.bos + prompt
        if not prompt:
            raise UserError(f"the prompt {tree.prompt[:80]!r} has no tokens under this tokenizer; drop its rows")
        responses = [[*response, self.tokenizer.eos_token_id] for response in responses]
        s = self.settings
        cut, ends = truncate(prompt, responses, len(self.bos), s.max_length, s.max_prompt_length, tree.keep_end)
        n_cut = sum(len(end) < len(response) for end, response in zip(ends, responses, strict=True))
        distinct, pairs, n_identical = compact([tuple(end) for end in ends], tree.pairs)
        if not s.sft:
            counts["pairs dropped: identical after truncation"] += n_identical
            if not pairs:
                counts["prompts dropped: no pair"] += 1
                return None
        counts["prompts truncated"] += len(cut) < len(prompt)
        counts["responses"] += len(ends)
        counts["responses truncated (EOS lost)"] += n_cut
        counts["records"] += 1
        counts["examples"] += len(pairs) or 1
        return {"prompt": cut, "responses": ends if s.sft else distinct, "pairs": pairs}


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


def in_test_split(hashes: np.ndarray, fraction: float) -> np.ndarray:
    """Which prompts are held out: those whose hash lies in the lowest `fraction` of the range, at least one.

    A prompt's side does not depend on the other rows, so that no loss and no filter moves it to the other split.
    """
    distinct = np.unique(hashes)
    if not fraction or not len(distinct):
        return np.zeros(len(hashes), dtype=bool)
    n_below = int(np.searchsorted(distinct, np.uint64(int(fraction * 2**64))))
    n_test = min(max(n_below, 1), len(distinct) - 1)
    return hashes < distinct[n_test]


class Loader:
    """One data set, one split: finds the rows, parses and tokenises what is not cached yet."""

    def __init__(self, name: str, settings: DataSettings, tokenizer: Any, split: str):
        self.name, self.settings, self.tokenizer, self.split = name, settings, tokenizer, split
        self.cache_dir = Path(settings.cache_dir)
        self.facts, self.source = find_source(name, settings, split)
        if self.source.held_out and split == "test" and not settings.holdout_fraction:
            raise UserError(
                f"data set {name!r} ({self.source.label}) has no test split and holdout_fraction=0 holds none out; "
                "set holdout_fraction, for example 0.01, or add test files"
            )

    def load(self) -> tuple[Path, dict[str, int]]:
        """The folder of the records, and the funnel. Raises UserError if no example is left."""
        s = self.settings
        chat = ChatFormat(self.tokenizer, s.chat_format)
        parser = ParseRows(self.facts, chat, self.tokenizer.eos_token, s.drop_bad_rows)
        facts = (self.facts.parse.__name__, self.facts.hub)
        raw = digest(_CODE, self.source.identity, facts, parser.eos, chat.identity, s.drop_bad_rows)
        held_out = (self.split, s.holdout_fraction) if self.source.held_out else None
        tokens = digest(raw, tokenizer_identity(self.tokenizer), s.max_length, s.max_prompt_length, s.sft, held_out)

        def tokenise(folder: Path) -> None:
            rows = cached(self.cache_dir, f"rows-{raw}", lambda folder: self.write_rows(folder, parser))
            self.write_records(folder, rows)

        folder = cached(self.cache_dir, f"tokens-{tokens}", tokenise)
        funnel = json.loads((folder / "funnel.json").read_text())
        if not funnel["examples"]:
            hint = "\nThe rows state no preferences: use loss=sft." if not s.sft and not funnel["pairs"] else ""
            table = _table({self.name: funnel})
            raise UserError(f"data set {self.name!r} ({self.split}) has no example left:\n{table}{hint}")
        return folder, funnel

    def write_rows(self, folder: Path, parser: ParseRows) -> None:
        bar = progress(desc=f"{self.name}: reading", unit=" rows")
        batches = parallel(parser, self.source.chunks(), self.settings.num_proc)
        total: Counter[str] = Counter()
        first: dict[str, str] = {}
        for dropped, where in write_arrow(folder / "rows.arrow", ROWS, batches, bar):
            total += dropped
            first = where | first
        for reason, count in total.items():
            log(f"{self.name}: dropped {count} rows ({reason}), the first at {first[reason]}")
        (folder / "dropped.json").write_text(json.dumps(total, sort_keys=True))

    def write_records(self, folder: Path, rows: Path) -> None:
        table = ArrowRows(rows / "rows.arrow")
        dropped = json.loads((rows / "dropped.json").read_text())
        funnel = {"rows": len(table) + sum(dropped.values())}
        funnel |= {f"rows dropped: {reason}": count for reason, count in dropped.items()}
        order, starts, ends = group_rows(table)
        funnel |= {"rows kept": len(table), "prompts": len(starts)}
        if self.source.held_out:
            test = in_test_split(table.table["hash"].to_numpy()[order[starts]], self.settings.holdout_fraction)
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
        (folder / "funnel.json").write_text(json.dumps(funnel | {key: counts[key] for key in wanted}))


class PreferenceData:
    """One split of a mixture: `Record`s read from disk when asked for."""

    def __init__(self, names: tuple[str, ...], folders: Sequence[Path], funnel: dict[str, dict[str, int]]):
        self.names, self.funnel = names, funnel
        self.identity = [folder.name for folder in folders]  # for each data set, of all that its records depend on
        sizes = [funnel[name]["records"] for name in names]
        self.source = np.repeat(np.arange(len(names)), sizes)  # [records], index into `names`
        self._rows = ArrowRows(*(folder / "records.arrow" for folder in folders))
        n_pairs = pc.list_value_length(self._rows.table["pairs"]).to_numpy().astype(np.int64)
        self.n_examples = np.maximum(n_pairs, 1)  # [records]; one for SFT, where there are no pairs

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> Record:
        row = self._rows.row(range(len(self))[i])
        prompt, responses, pairs = (row.column(name)[0] for name in RECORDS.names)
        return Record(
            prompt.values.to_numpy().tolist(),
            [response.values.to_numpy().tolist() for response in responses],
            [(a, b) for a, b in pairs.as_py()],
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
    folders, funnels = zip(*(Loader(name, settings, tokenizer, split).load() for name in settings.names))
    return PreferenceData(settings.names, folders, dict(zip(settings.names, funnels)))


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
    """What became of the rows, a line a count and a column a data set."""
    return _table(data.funnel)
