"""When a run is asked to end early: signals of a user or a scheduler, and a deadline."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

import psutil

from utils import notice

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: run again to go on
WARNING = signal.SIGUSR1  # what schedulers can be asked to send some time before the end
ENDS = (signal.SIGINT, signal.SIGTERM)
# Shells and schedulers may send one request to a whole group of processes, which then pass it on to each other.
SAME_REQUEST = 2.0
_asked: str | None = None
_asked_at = 0.0
_asked_twice = False


class Stopped(SystemExit):
    """Training ended early, with a checkpoint of where it was; the process exits with EXIT_CODE."""

    def __init__(self) -> None:
        super().__init__(EXIT_CODE)


def listen() -> None:
    """From here on take a WARNING, one that waits because it was blocked included, as a request to stop."""
    global _asked, _asked_twice
    _asked, _asked_twice = None, False
    signal.signal(WARNING, _ask)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {WARNING})


@contextlib.contextmanager
def _handled(handler: Callable[[int, FrameType | None], None], numbers: Sequence[signal.Signals]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in numbers}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def gracefully() -> contextlib.AbstractContextManager[None]:
    """While inside, SIGINT and SIGTERM are requests to stop, too; a second one stops at once."""
    return _handled(_ask, ENDS)


def _ask(number: int, frame: FrameType | None) -> None:
    global _asked, _asked_at, _asked_twice
    now = time.monotonic()
    if _asked is None:
        _asked, _asked_at = signal.Signals(number).name, now
        notice(f"{_asked}: this step is finished and saved, then training stops; a second signal stops it at once")
    elif number in ENDS and now - _asked_at > SAME_REQUEST:
        _asked_twice = True
        raise KeyboardInterrupt


def at_once() -> None:
    """Raise KeyboardInterrupt if a second signal came: libraries may have made another exception of it."""
    if _asked_twice:
        raise KeyboardInterrupt


def passing_on(pids: Sequence[int]) -> contextlib.AbstractContextManager[None]:
    """While inside, a first request to stop goes to the processes `pids`; a second ends this one."""
    asked_at = None

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal asked_at
        if asked_at is not None and number in ENDS and time.monotonic() - asked_at > SAME_REQUEST:
            raise KeyboardInterrupt
        asked_at = asked_at or time.monotonic()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    return _handled(pass_on, (*ENDS, WARNING))


class Deadline:
    """Tells when what is left of `hours` since this process started is just enough for one more save.

    The longest time between two calls, in which a step, an evaluation and a save may lie, stands for the next.
    """

    def __init__(self, hours: float | None):
        self.at = None if hours is None else psutil.Process().create_time() + 3600 * hours
        self.last, self.longest = time.time(), 0.0

    def start(self) -> None:
        """What took time until now will not be repeated."""
        self.last = time.time()

    def passed(self, save_seconds: float) -> bool:
        """Whether to stop now, with `save_seconds` for the checkpoint."""
        now = time.time()
        self.longest, self.last = max(self.longest, now - self.last), now
        return self.at is not None and now + self.longest + save_seconds > self.at


def reason(deadline: Deadline, save_seconds: float) -> str | None:
    """Why this process should stop now; None: it should not."""
    return _asked or ("max_runtime" if deadline.passed(save_seconds) else None)
