"""The rendered rows of a prompt -> one record of token ids: merged, truncated, with BOS and EOS."""

import itertools
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from dpo.data.cache import ArrowRows, digest
from dpo.data.parse import PAIR_LIST, hash64
from dpo.data.rows import Pairs
from dpo.data.sources import LABELLED, PAIRS, RANKED, TARGETS, DataSettings
from dpo.utils import UserError

IDS = pa.list_(pa.int32())
RECORDS = pa.schema(
    {
        "prompt": IDS,
        "responses": pa.list_(IDS),
        "pairs": PAIR_LIST,
        "masks": pa.list_(pa.list_(pa.bool_())),
        "columns": pa.list_(pa.list_(pa.float64())),  # [pairs, pair_columns]; SFT: [1, pair_columns]
        "key": pa.uint64(),
        "pair_keys": pa.list_(pa.uint64()),  # of prompt, chosen and rejected; SFT: of prompt and response
    }
)
# The funnel's lines after those of rows and prompts
OVER = "pairs dropped: over max_pairs_per_prompt"
PAIR_COUNTS = (
    "pairs",
    "pairs dropped: equal scores",
    OVER,
    "pairs dropped: identical responses",
    "pairs dropped: identical after truncation",
    "prompts dropped: no pair",
)
RANK_COUNTS = (
    "rankings",
    "rankings dropped: another of the same prompt",
    "responses dropped: equal scores",
    "responses dropped: identical",
    "prompts dropped: no ranking",
)
MERGED = "rows not used: one target a prompt"
UNSPELLED = "prompts whose tokens do not spell their text"
COUNTS = ("prompts truncated", UNSPELLED, "responses", "responses truncated (EOS lost)", "records", "examples")


def own_bos(tokenizer: Any) -> list[int]:
    """Return the BOS token that the tokenizer itself puts before a text: [] or one id."""
    first = list(tokenizer("x")["input_ids"])[:1]
    return first if first == [tokenizer.bos_token_id] else []


def _backend(tokenizer: Any) -> dict[str, Any] | None:
    """Return the description of a fast tokenizer, without truncation and padding, which its last call set."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return json.loads(backend.to_str()) | {"truncation": None, "padding": None} if backend is not None else None


def tokenizer_identity(tokenizer: Any) -> str:
    """Return a hash of all that decides which ids a text gets."""
    content: Any = _backend(tokenizer)
    if content is None:
        content = [sorted(tokenizer.get_vocab().items()), str(getattr(tokenizer, "init_kwargs", ""))]
    return digest(type(tokenizer).__name__, content, tokenizer.bos_token_id, tokenizer.eos_token_id, own_bos(tokenizer))


def _no_prefix(part: Any) -> Any:
    """Return a part of a tokenizer's description without what puts a space before a text."""
    if isinstance(part, list):
        return [_no_prefix(inner) for inner in part if not (isinstance(inner, dict) and inner.get("type") == "Prepend")]
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
    """Text -> token ids, of a text that stands alone or of one that continues another.

    Some tokenizers put a space before every text. Before one that continues another there must be none.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.without_prefix: Tokenizer | None = None
        if (content := _backend(tokenizer)) is not None:
            plain = content | {key: _no_prefix(content[key]) for key in ("normalizer", "pre_tokenizer")}
            if plain != content:
                self.without_prefix = Tokenizer.from_str(json.dumps(plain))

    def __call__(self, texts: list[str]) -> list[list[int]]:
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        return self.tokenizer(texts, **options)["input_ids"] if texts else []

    def continuing(self, texts: list[str]) -> list[list[int]]:
        if self.without_prefix is None:
            return self(texts)
        return [found.ids for found in self.without_prefix.encode_batch(texts, add_special_tokens=False)]

    def spells(self, prompt: str, response: str, prompt_ids: list[int], response_ids: list[int]) -> bool:
        """Return whether the ids decode to their texts. White space of the prompt may differ: some tokenizers have
        their own before special tokens."""
        whole = self._decode(prompt_ids + response_ids)
        if whole == prompt + response:
            return True
        start = self._decode(prompt_ids)
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


def compact(responses: Sequence[Any], pairs: Pairs) -> tuple[list[int], Pairs, list[int]]:
    """Drop pairs of equal responses and merge equal responses.

    Returns the distinct responses in a pair, as indices of their first occurrence; the pairs left, as indices of
    those; and which of `pairs` they are.
    """
    kept = [i for i, (a, b) in enumerate(pairs) if responses[a] != responses[b]]
    number: dict[Any, int] = {}
    first: list[int] = []
    for i in itertools.chain.from_iterable(pairs[k] for k in kept):
        if responses[i] not in number:
            number[responses[i]] = len(number)
            first.append(i)
    return first, [(number[responses[pairs[k][0]]], number[responses[pairs[k][1]]]) for k in kept], kept


@dataclass
class Merged:
    """The rows of one prompt together. Responses are in parts, as in `ROWS`."""

    prompt: str
    responses: list[tuple[str, ...]]
    pairs: Pairs
    columns: list[list[float]]  # [pairs, pair_columns]; SFT: [1, pair_columns]
    keep_end: bool
    key: int

    def pair_keys(self) -> list[int]:
        sides: Sequence[Sequence[int]] = self.pairs or [(0,)]
        texts = ["".join(parts) for parts in self.responses]
        return [hash64("\0".join((str(self.key), *(texts[i] for i in side)))) for side in sides]


class TokeniseRecords:
    """Row numbers, one array a prompt -> (Arrow batch in the schema `RECORDS`, counts for the funnel)."""

    def __init__(self, rows: Path, tokenizer: Any, settings: DataSettings):
        self.rows, self.tokenizer, self.settings = rows, tokenizer, settings
        self.encode, self.bos = Encoder(tokenizer), own_bos(tokenizer)
        self.table: ArrowRows | None = None

    def __call__(self, groups: list[np.ndarray]) -> tuple[pa.RecordBatch, Counter[str]]:
        self.table = self.table or ArrowRows(self.rows)  # each worker opens its own
        counts: Counter[str] = Counter()
        rows = ([self.table.row(i).to_pylist()[0] for i in group.tolist()] for group in groups)
        trees = [tree for group in rows if (tree := self.merge(group, counts))]
        prompts = self.encode([tree.prompt for tree in trees])
        parts = iter(self.encode.continuing([part for tree in trees for parts in tree.responses for part in parts]))
        records = []
        for tree, prompt in zip(trees, prompts, strict=True):
            responses = [[next(parts) for _ in texts] for texts in tree.responses]
            records.append(self.record(tree, prompt, responses, counts))
        return pa.RecordBatch.from_pylist([r for r in records if r is not None], schema=RECORDS), counts

    def merge(self, rows: list[dict[str, Any]], counts: Counter[str]) -> Merged | None:
        """Merge the rows of one prompt; None if they state no preference."""
        merged = Merged(rows[0]["prompt"], [], [], [], rows[0]["keep_end"], rows[0]["key"])
        if self.settings.rows == LABELLED:
            merged.responses, merged.columns = [tuple(rows[0]["responses"][0])], [rows[0]["columns"]]
            return merged
        if self.settings.rows == RANKED:
            return self._ranking(merged, rows, counts)
        if self.settings.rows == TARGETS:
            rated = [row for row in rows if row["score"] is not None]
            best = max(rated, key=lambda row: row["score"]) if rated else rows[-1]
            counts[MERGED] += len(rows) - 1
            merged.responses, merged.columns = [tuple(best["responses"][best["target"]])], [best["columns"]]
            return merged
        responses: list[tuple[str, ...]] = []
        pairs: Pairs = []
        columns: list[list[float]] = []
        for row in rows:
            columns += [row["columns"]] * len(row["pairs"])
            pairs += [(len(responses) + a, len(responses) + b) for a, b in row["pairs"]]
            responses += map(tuple, row["responses"])
            counts["pairs"] += len(row["pairs"]) + row["ties"] + row["over"]
            counts["pairs dropped: equal scores"] += row["ties"]
            counts[OVER] += row["over"]
        most = self.settings.max_pairs_per_prompt
        if len(pairs) > most:
            counts[OVER] += len(pairs) - most
            chosen = sorted(random.Random(merged.key).sample(range(len(pairs)), most))
            pairs, columns = [pairs[i] for i in chosen], [columns[i] for i in chosen]
        first, merged.pairs, kept = compact(responses, pairs)
        merged.responses, merged.columns = [responses[i] for i in first], [columns[i] for i in kept]
        counts["pairs dropped: identical responses"] += len(pairs) - len(kept)
        if not merged.pairs:
            counts["prompts dropped: no pair"] += 1
            return None
        return merged

    def _ranking(self, merged: Merged, rows: list[dict[str, Any]], counts: Counter[str]) -> Merged | None:
        """Put the first ranking among `rows` into `merged`: its responses, best first. A pair is a ranking of two."""
        rankings = [row for row in rows if row["places"] or len(row["pairs"]) == 1]  # several pairs may be no ranking
        counts["rankings dropped: another of the same prompt"] += max(len(rankings) - 1, 0)
        for row in rankings[:1]:
            counts["rankings"] += 1
            places = row["places"]
            order = sorted(range(len(places)), key=lambda i: places[i]) if places else [*row["pairs"][0]]
            places = places or [i == order[1] for i in range(len(row["responses"]))]
            strict = [i for k, i in enumerate(order) if not k or places[i] > places[order[k - 1]]]
            distinct = dict.fromkeys(tuple(row["responses"][i]) for i in strict)
            counts["responses dropped: equal scores"] += len(order) - len(strict)
            counts["responses dropped: identical"] += len(strict) - len(distinct)
            merged.responses, merged.columns = list(distinct), [row["columns"]]
            merged.pairs = [(0, len(distinct) - 1)] if len(distinct) > 1 else []
        counts["prompts dropped: no ranking"] += not merged.pairs
        return merged if merged.pairs else None

    def record(
        self, tree: Merged, prompt: list[int], parts: list[list[list[int]]], counts: Counter[str]
    ) -> dict[str, Any] | None:
        """Build a record from the ids of its prompt and of its responses' parts; None if no pair is left."""
        texts = "".join(itertools.chain.from_iterable(tree.responses))
        flat = [token for response in parts for part in response for token in part]
        counts[UNSPELLED] += not self.encode.spells(tree.prompt, texts, prompt, flat)
        prompt, n_bos = self._with_bos(prompt)
        if not prompt:
            raise UserError(f"the prompt {tree.prompt[:80]!r} has no tokens under this tokenizer; drop its rows")
        eos, s = self.tokenizer.eos_token_id, self.settings
        responses = [[*itertools.chain.from_iterable(response), eos] for response in parts]
        cut, ends = truncate(prompt, responses, n_bos, s.max_length, s.max_prompt_length, tree.keep_end)
        masks = [[i % 2 == 0 for i, part in enumerate(response) for _ in part] + [True] for response in parts]
        masks = [mask[: len(end)] for mask, end in zip(masks, ends, strict=True)]
        keys, columns, first, pairs = tree.pair_keys(), tree.columns, [0], tree.pairs
        sides = [(*end, None, *mask) for end, mask in zip(ends, masks)]
        if s.rows == RANKED:
            first = [i for i, side in enumerate(sides) if side not in sides[:i]]
            counts["responses dropped: identical"] += len(sides) - len(first)
            pairs = [(0, len(first) - 1)]
            if len(first) < 2:
                counts["prompts dropped: no ranking"] += 1
                return None
        elif s.rows == PAIRS:
            first, pairs, kept = compact(sides, tree.pairs)
            keys, columns = [keys[i] for i in kept], [columns[i] for i in kept]
            counts["pairs dropped: identical after truncation"] += len(tree.pairs) - len(kept)
            if not pairs:
                counts["prompts dropped: no pair"] += 1
                return None
        counts["prompts truncated"] += len(cut) < len(prompt)
        counts["responses"] += len(ends)
        counts["responses truncated (EOS lost)"] += sum(len(a) < len(b) for a, b in zip(ends, responses, strict=True))
        counts["records"] += 1
        counts["examples"] += len(pairs) or 1  # of a ranking: one
        masks = [masks[i] for i in first]
        return {
            **{"prompt": cut, "responses": [ends[i] for i in first], "pairs": pairs, "columns": columns},
            **{"masks": None if all(map(all, masks)) else masks, "key": tree.key, "pair_keys": keys},
        }

    def _with_bos(self, prompt: list[int]) -> tuple[list[int], int]:
        """Return the prompt, with BOS if the tokenizer's convention has it, and the number of BOS it begins with.

        A BOS that a chat template wrote counts, too. A token that begins every turn is none.
        """
        if self.bos:
            return (prompt if prompt[:1] == self.bos else self.bos + prompt), 1
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        return prompt, int(bos is not None and prompt[:1] == [bos] and (prompt.count(bos) == 1 or bos == eos))
