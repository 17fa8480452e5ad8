"""Compare a run's data: training with test rows, and both with what model.archive was trained on."""

import io
from pathlib import Path
from typing import Any

import numpy as np

from dpo.data.records import PreferenceData
from dpo.utils import UserError, log

TRAINED_ON = "trained_on/prompts.npy"
"""A checkpoint's file with hashes of the prompts that its weights have seen."""


def trained_on(train: PreferenceData, archive: Path | None) -> dict[str, bytes]:
    """Return the content of TRAINED_ON after training on `train` from `archive`: sorted hashes of all their prompts,
    even if n_examples takes only a part."""
    buffer = io.BytesIO()
    np.save(buffer, np.union1d(train.keys, _prompts(archive)), allow_pickle=False)
    return {TRAINED_ON: buffer.getvalue()}


def _prompts(archive: Path | None) -> np.ndarray:
    """Return the hashes in a checkpoint; none if the folder has no such file. Raises UserError if it is damaged."""
    path = archive / TRAINED_ON if archive is not None else None
    if path is None or not path.is_file():
        return np.empty(0, dtype=np.uint64)
    try:
        found = np.load(path, allow_pickle=False)
        if found.dtype != np.uint64 or found.ndim != 1:
            raise ValueError(f"{found.dtype} {found.shape}")
    except (ValueError, OSError, EOFError, MemoryError) as error:
        raise UserError(f"{path} holds no hashes of prompts ({error}); take another checkpoint") from error
    return found


def overlap(train_keys: np.ndarray, train_pairs: np.ndarray, test: PreferenceData) -> tuple[int, int]:
    """Return how many prompts and how many examples of `test` are among those of training."""
    return int(np.isin(test.keys, train_keys).sum()), int(np.isin(test.pair_keys, train_pairs).sum())


def check_overlap(
    train: PreferenceData, test: PreferenceData | None, archive: Path | None
) -> dict[str, dict[str, int]]:
    """Warn of evaluation prompts and pairs that training, or that of `archive`, has seen. Return their numbers."""
    if test is None:
        return {}
    total = {"prompts": len(test), "pairs": len(test.pair_keys)}
    found = {"training data": dict(zip(("prompts", "pairs"), overlap(train.keys, train.pair_keys, test)))}
    if len(seen := _prompts(archive)):  # its examples may have another form, so they are not compared
        found["training data of model.archive"] = {"prompts": overlap(seen, train.pair_keys[:0], test)[0]}
    for where, shared in found.items():
        examples = f", and {shared['pairs']} of their {total['pairs']} examples," if "pairs" in shared else ""
        if shared["prompts"]:
            log(
                f"warning: {shared['prompts']} of the {total['prompts']} prompts held for evaluation{examples} are in "
                f"the {where} too: numbers on them do not tell how well the model does on new prompts"
            )
    return found


def check_format(data: PreferenceData, trained: list[str], tokenizer: Any) -> None:
    """Warn if rows are rendered in another way than those that the model was trained on (`trained`; []: not known)."""
    if warning := format_warning(data.formats, trained):
        log(f"warning: {warning}")
    elif not trained and data.formats == ["text"] and getattr(tokenizer, "chat_template", None):
        log(
            "note: the rows are text and the tokenizer has a chat template; chat_format=template makes them turns of it"
        )


def format_warning(formats: list[str], trained: list[str]) -> str:
    """Return a warning if rows are rendered as `formats` and the model was trained on other formats; else ""."""
    other = sorted(set(formats) - set(trained)) if trained else []
    if not other:
        return ""
    names = {"text": "plain text", "hh": "the style of HH (\\n\\nHuman: ...)"}
    shown = [" and ".join(names.get(name, f"a chat template ({name.partition(':')[2]})") for name in kinds)
             for kinds in (other, trained)]  # fmt: skip
    return (
        f"these rows are {shown[0]}, and the model was trained on {shown[1]}: set chat_format to what it was trained on"
    )
