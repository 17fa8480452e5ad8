"""Chat with a trained policy on the terminal, and see the reward that it stands for of each reply.

    python scripts/chat.py RUN
    python scripts/chat.py RUN --reference                   # the reference replies, too, to the same conversation
    python scripts/chat.py RUN --message "Why is the sky blue?" --message "And at night?"

RUN is a run's folder, a checkpoint, a model folder or a hub id. A conversation is written as in the run's training: by
the chat template, or in the style of HH (`\\n\\nHuman: ...`); chat_format=template or hh chooses. If the prompts that
the run was trained on have no turns, each message is a prompt of its own, which the policy continues. The policy's
replies become part of the conversation. Rewards are known up to a function of the prompt: compare replies to one
prompt. With --message, or if stdin is no terminal (a message a line), it replies and ends. KEY=VALUE are overrides as
train.py takes them: device=cpu.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dpo.utils import UserError
from options import check_name, key_of, refused, take_overrides
from utils import HelpFormatter, run_main


def read_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.usage = "%(prog)s RUN [options] [KEY=VALUE ...]"
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--reference", action="store_true", help="show what the reference replies, too")
    parser.add_argument("--no-reward", action="store_true", help="do not load the reference: half the memory")
    parser.add_argument("--message", action="append", metavar="TEXT", help="reply to this, and end; may be repeated")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="of each reply")
    parser.add_argument("--temperature", type=float, default=0.7, help="1: the model's own distribution; 0: greedy")
    parser.add_argument("--top-p", type=float, default=1.0, help="1: the model's own distribution")
    parser.add_argument("--seed", type=int, default=0, help="with a reply's number it gives that reply")
    others, overrides = take_overrides(sys.argv[1:], ("--message",))
    given = parser.parse_args(others)
    rules = [
        ("max_new_tokens", given.max_new_tokens >= 1, "at least 1"),
        ("temperature", 0 <= given.temperature < float("inf"), "0 or more"),
        ("top_p", 0 < given.top_p <= 1, "above 0 and at most 1"),
        ("seed", 0 <= given.seed < 2**62, "0 or more, and less than 2^62"),
    ]
    wrong = refused(given, rules)
    if given.reference and given.no_reward:
        wrong.append("--no-reward leaves the reference out, and --reference shows it: give one of both")
    if wrong:
        raise UserError("\n".join(wrong))
    check_name(given.run)
    return given, overrides


if __name__ == "__main__":
    run_main(read_arguments)  # before the slow imports: --help and mistakes are answered at once

import torch

from dpo.data.batching import Batch, Tree
from dpo.data.rendering import ChatFormat
from dpo.data.rows import BadRow, text_or_messages
from dpo.loss import Responses, sum_tokens
from dpo.model.logps import response_logps
from dpo.model.patches import quiet_transformers
from dpo.run.saved import Saved
from dpo.sampling import Sampling, continuation, sample
from dpo.utils import log, visible
from opening import find_reference, find_saved
from sample import Prompt, as_prompt, check_lengths

HELP = "/new begins a new conversation, /quit or Ctrl-D ends"


def style_of(policy: Saved, overrides: Iterable[str]) -> str:
    """Return how messages become a prompt: a chat_format, or "plain" if the run was trained on text without turns."""
    chosen, formats = policy.config.chat_format, policy.state.get("formats") or []
    if "chat_format" in map(key_of, overrides) or not formats:
        return chosen
    if any(name.startswith("template") for name in formats):
        return "template" if chosen == "template" else "auto"
    samples = Path(policy.config.model.start).parent / "samples.jsonl"
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # it may not have sampled
        first = samples.read_text(encoding="utf-8").partition("\n")[0]
        return "hh" if "\n\nHuman:" in json.loads(first)["prompt"] else "plain"
    return "hh"


class Chat:
    """A conversation with the policy, and with the reference beside it."""

    def __init__(self, policy: Saved, reference: Saved | None, style: str, given: argparse.Namespace):
        self.saved = [saved for saved in (policy, reference) if saved is not None]
        self.model, self.tokenizer, self.how = policy.open()
        self.reference = reference.open()[0] if reference is not None else None
        self.plain, config = style == "plain", policy.config
        self.loss = config.loss
        self.format = ChatFormat(self.tokenizer, "hh" if self.plain else style, config.chat_date)
        self.both = given.reference
        options = (given.max_new_tokens, 1, given.seed, self.how.dtype, given.temperature, given.top_p)
        self.sampling, self.replies = Sampling(*options), 0
        self.messages: list[dict[str, str]] = []

    def answer(self, message: str) -> Iterator[str]:
        """Yield lines that show the replies to `message`. Raise UserError, and forget the message, if it cannot be a
        turn."""
        before = [] if self.plain else self.messages
        self.messages = [*before, {"role": "user", "content": message}]
        try:
            prompt = self._prompt(message)
            check_lengths([prompt], self.saved, self.sampling.max_new_tokens)
        except BadRow as bad:
            self.messages = before
            raise UserError(f"the message cannot be rendered: {bad}") from None
        except UserError as error:
            self.messages = before
            raise UserError(f"{error}; or begin anew with /new") from None
        how = replace(self.sampling, first_batch=self.replies)
        self.replies += 1
        for name, model in (("policy", self.model), ("reference", self.reference if self.both else None)):
            if model is not None:
                [response] = sample(model, self.tokenizer, [prompt.ids], how)
                text = continuation(self.tokenizer, prompt.ids, response)
                if name == "policy":
                    self.messages.append({"role": "assistant", "content": text.strip()})
                yield f"{name}: {visible(text if self.plain else text.strip())}"
                yield f"  {self._reward(prompt.ids, response)}"

    def _prompt(self, message: str) -> Prompt:
        turns = message if self.plain else text_or_messages({"prompt": self.messages}, "prompt")
        return as_prompt("the conversation", turns, self.tokenizer, self.format)

    @torch.no_grad()
    def _reward(self, prompt: list[int], response: list[int]) -> str:
        """Return the implicit reward of a response, or the log-ratio if the loss defines none, in words."""
        size = f"{len(response)} tokens" + ("" if response[-1] == self.tokenizer.eos_token_id else ", cut")
        if self.reference is None:
            return size
        batch, how = Batch([Tree(prompt, [response])], [], None), replace(self.how, layout="padded", flex=False)
        found = [response_logps(model, batch, how) for model in (self.model, self.reference)]
        ours, theirs = (sum_tokens(logps.logps.double(), logps.mask).cpu() for logps in found)
        ratio = f"log policy / reference {(ours - theirs).item():+.3f} nats, {size}"
        reward = self.loss.rewards(Responses(ours, torch.tensor([float(len(response))]), theirs))
        return ratio if reward is None else f"reward {reward.item():+.4f}, {ratio}"


def typed() -> Iterator[str]:
    """Yield the messages that a user types; those of a pipe without a prompt sign."""
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):  # input() edits lines with it; Windows has none
            import readline  # noqa: F401
        log(HELP)
    with contextlib.suppress(EOFError):
        while True:
            message = input("\nyou: ") if interactive else input()
            if message.strip():
                yield message


def main() -> None:
    given, overrides = read_arguments()
    quiet_transformers()
    policy, reference = find_saved(given.run, overrides), None
    if not given.no_reward:
        try:
            reference = find_reference(policy, None, overrides)
        except UserError as error:
            if given.reference or policy.trained:
                raise UserError(f"{error}, or chat without rewards: --no-reward") from error
            log("no rewards: it is not known what this model was trained against")
    style = style_of(policy, overrides)
    chat = Chat(policy, reference, style, given)
    how = "each message is a prompt of its own, continued as plain text" if chat.plain else f"turns: {chat.format.name}"
    log(f"{policy.config.model.start}; {how}")
    once = given.message or not sys.stdin.isatty()
    for message in given.message or typed():
        if message.strip() == "/quit":
            return
        if message.strip() == "/new":
            chat.messages = []
            continue
        try:
            for line in chat.answer(message):
                print(line, flush=True)
        except UserError as error:
            if once:
                raise
            log(f"error: {error}")


if __name__ == "__main__":
    run_main(main)
