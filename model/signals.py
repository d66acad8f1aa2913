"""What a long run does about signals."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def handled(wanted: dict[int, Callable]) -> Iterator[None]:
    """Signals are handled so, where that is possible: in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        wanted = {}
    before = {number: signal.signal(number, handler) for number, handler in wanted.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
