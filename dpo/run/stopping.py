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
WARNING = signal.SIGUSR1  # the signal that schedulers can be asked to send some time before the end
ENDS = (signal.SIGINT, signal.SIGTERM)
# Shells and schedulers may send one request to a whole group of processes, which then pass it on to each other.
SAME_REQUEST = 2.0  # seconds within which signals are one request
Handler = Callable[[int, FrameType | None], None]


class Stopped(SystemExit):
    """Training ended early, with a checkpoint of where it was, if it had begun. The process exits with EXIT_CODE."""

    def __init__(self) -> None:
        super().__init__(EXIT_CODE)


class StopRequest:
    """Listens for signals that ask this process to stop. One is created per run and passed to all who need it."""

    def __init__(self) -> None:
        self.name: str | None = None  # of the first signal
        self._end_asked_at: float | None = None
        self._asked_twice = False

    def listen(self) -> None:
        """From here on take a WARNING as a request to stop, even one that waits because it was blocked.

        Until `gracefully` SIGTERM ends the run at once: nothing is trained that could be saved.
        """
        if signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:  # as it is in a group, whose parent does the same
            signal.signal(signal.SIGTERM, _end)
        signal.signal(WARNING, self._ask)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {WARNING})

    def gracefully(self) -> contextlib.AbstractContextManager[None]:
        """Inside, SIGINT and SIGTERM are requests to stop, too; a second one stops at once."""
        return _handled(self._ask, ENDS, lambda: self.name is not None)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.name is None:
            self.name = signal.Signals(number).name
            notice(
                f"{self.name}: this step is finished and saved, then training stops; a second signal stops it at once"
            )
        if number not in ENDS:
            return
        self._end_asked_at = self._end_asked_at or now
        if now - self._end_asked_at > SAME_REQUEST:
            self._asked_twice = True
            raise KeyboardInterrupt

    def at_once(self) -> None:
        """Raise KeyboardInterrupt if a second signal came: libraries may have made another exception of it."""
        if self._asked_twice:
            raise KeyboardInterrupt


def _end(number: int, frame: FrameType | None) -> None:
    raise Stopped


@contextlib.contextmanager
def final() -> Iterator[None]:
    """Ignore signals after leaving this with EXIT_CODE. A signal that comes while the interpreter shuts down would
    change the process's exit code."""
    try:
        yield
    except SystemExit as ended:
        if ended.code == EXIT_CODE:
            for number in (*ENDS, WARNING):
                signal.signal(number, signal.SIG_IGN)
        raise


@contextlib.contextmanager
def _handled(handler: Handler, numbers: Sequence[signal.Signals], was_asked: Callable[[], bool]) -> Iterator[None]:
    """Handle signals inside. The handler stays if a stop was asked for: the request may come again while the process
    ends."""
    before = {number: signal.signal(number, handler) for number in numbers}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
    try:
        yield
    finally:
        for number, earlier in before.items():
            if not was_asked():
                signal.signal(number, earlier)


def passing_on(pids: Sequence[int]) -> contextlib.AbstractContextManager[None]:
    """Inside, pass a first request to stop on to the processes `pids`; end this one at a second."""
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


def process_age() -> float:
    """Return the seconds since this process started."""
    return max(time.time() - psutil.Process().create_time(), 0.0)


class Deadline:
    """Tells when the rest of `hours` since this process started is just enough for one more save.

    The longest time between two calls, which may hold a step, an evaluation and a save, stands for the next. Time is
    that of the monotonic clock: the other one may be set while the process runs.
    """

    def __init__(self, hours: float | None):
        self.last, self.longest = time.monotonic(), 0.0
        self.at = None if hours is None else self.last - process_age() + 3600 * hours

    def start(self) -> None:
        """Forget the time until now, which is not repeated."""
        self.last = time.monotonic()

    def passed(self, save_seconds: float) -> bool:
        """Return whether to stop now, with `save_seconds` for the checkpoint."""
        now = time.monotonic()
        self.longest, self.last = max(self.longest, now - self.last), now
        return self.at is not None and now + self.longest + save_seconds > self.at
