"""When a run is asked to end early: signals of a user or a scheduler, and a deadline."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

import psutil

from dpo.utils import notice

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: run again to go on
WARNING = signal.SIGUSR1  # what schedulers can be asked to send some time before the end
ENDS = (signal.SIGINT, signal.SIGTERM)
# Shells and schedulers may send one request to a whole group of processes, which then pass it on to each other.
SAME_REQUEST = 2.0
Handler = Callable[[int, FrameType | None], None]
_asked: str | None = None
_end_asked_at: float | None = None
_asked_twice = False
# When this process started, by the monotonic clock: the other one may be set while the process runs.
_started = time.monotonic() - max(time.time() - psutil.Process().create_time(), 0.0)


def _forked() -> None:
    global _started
    _started = time.monotonic()


os.register_at_fork(after_in_child=_forked)


class Stopped(SystemExit):
    """Training ended early, with a checkpoint of where it was, if it had begun; the process exits with EXIT_CODE."""

    def __init__(self) -> None:
        super().__init__(EXIT_CODE)


def listen() -> None:
    """From here on take a WARNING, one that waits because it was blocked included, as a request to stop.

    Until `gracefully` SIGTERM ends the run at once: nothing is trained that could be saved.
    """
    global _asked, _end_asked_at, _asked_twice
    _asked, _end_asked_at, _asked_twice = None, None, False
    if signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:  # as it is in a group, where the parent does the same
        signal.signal(signal.SIGTERM, _end)
    signal.signal(WARNING, _ask)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {WARNING})


def _end(number: int, frame: FrameType | None) -> None:
    raise Stopped


@contextlib.contextmanager
def final() -> Iterator[None]:
    """Leaving it with EXIT_CODE is the last word. A signal that came while the interpreter shuts down would end the
    process with a code of its own."""
    try:
        yield
    except SystemExit as ended:
        if ended.code == EXIT_CODE:
            for number in (*ENDS, WARNING):
                signal.signal(number, signal.SIG_IGN)
        raise


@contextlib.contextmanager
def _handled(handler: Handler, numbers: Sequence[signal.Signals], was_asked: Callable[[], bool]) -> Iterator[None]:
    """The handler stays if a stop was asked for: the same request may come once more while the process ends."""
    before = {number: signal.signal(number, handler) for number in numbers}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
    try:
        yield
    finally:
        for number, earlier in before.items():
            if not was_asked():
                signal.signal(number, earlier)


def asked() -> bool:
    """Whether a signal asked this process to stop."""
    return _asked is not None


def gracefully() -> contextlib.AbstractContextManager[None]:
    """While inside, SIGINT and SIGTERM are requests to stop, too; a second one stops at once."""
    return _handled(_ask, ENDS, asked)


def _ask(number: int, frame: FrameType | None) -> None:
    global _asked, _end_asked_at, _asked_twice
    now = time.monotonic()
    if _asked is None:
        _asked = signal.Signals(number).name
        notice(f"{_asked}: this step is finished and saved, then training stops; a second signal stops it at once")
    if number not in ENDS:
        return
    _end_asked_at = _end_asked_at or now
    if now - _end_asked_at > SAME_REQUEST:
        _asked_twice = True
        raise KeyboardInterrupt


def at_once() -> None:
    """Raise KeyboardInterrupt if a second signal came: libraries may have made another exception of it."""
    if _asked_twice:
        raise KeyboardInterrupt


def passing_on(pids: Sequence[int]) -> contextlib.AbstractContextManager[None]:
    """While inside, a first request to stop goes to the processes `pids`; a second ends this one."""
    end_asked_at, was_asked = None, False

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal end_asked_at, was_asked
        was_asked = True
        if number in ENDS:
            end_asked_at = end_asked_at or time.monotonic()
            if time.monotonic() - end_asked_at > SAME_REQUEST:
                raise KeyboardInterrupt
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    return _handled(pass_on, (*ENDS, WARNING), lambda: was_asked)


class Deadline:
    """Tells when what is left of `hours` since this process started is just enough for one more save.

    The longest time between two calls, in which a step, an evaluation and a save may lie, stands for the next.
    """

    def __init__(self, hours: float | None):
        self.at = None if hours is None else _started + 3600 * hours
        self.last, self.longest = time.monotonic(), 0.0

    def start(self) -> None:
        """What took time until now will not be repeated."""
        self.last = time.monotonic()

    def passed(self, save_seconds: float) -> bool:
        """Whether to stop now, with `save_seconds` for the checkpoint."""
        now = time.monotonic()
        self.longest, self.last = max(self.longest, now - self.last), now
        return self.at is not None and now + self.longest + save_seconds > self.at


def reason(deadline: Deadline, save_seconds: float) -> str | None:
    """Why this process should stop now; None: it should not."""
    return _asked or ("max_runtime" if deadline.passed(save_seconds) else None)
