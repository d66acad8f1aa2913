"""What a long run does about signals."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class End:
    """A handler of SIGINT and SIGTERM that notes the first; one more than a second later ends the process at once."""

    def __init__(self) -> None:
        self.number: int | None = None  # of the signal that asked for the end
        self._since = 0.0

    def __call__(self, number: int, _) -> None:
        if self.number is None:
            self.number, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > 1.0:  # a supervisor and a terminal may send the first one twice
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def carry_out(self) -> None:
        """Raises what the signal would have."""
        raise KeyboardInterrupt if self.number == signal.SIGINT else SystemExit(128 + self.number)


@contextmanager
def interrupts() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt here even where it lands in a call of numba's, which makes SystemErrors of it."""
    try:
        yield
    except SystemError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, KeyboardInterrupt):
            cause = cause.__cause__
        if cause is None:
            raise
        raise KeyboardInterrupt from error


@contextmanager
def handled(wanted: dict[int, Callable]) -> Iterator[None]:
    """Signals are handled so, but for those that the process ignores; only in the main thread, no other can."""
    if threading.current_thread() is not threading.main_thread():
        wanted = {}
    wanted = {number: handler for number, handler in wanted.items() if signal.getsignal(number) is not signal.SIG_IGN}
    before = {number: signal.signal(number, handler) for number, handler in wanted.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is wanted[number]:
                signal.signal(number, handler)
