"""The package's logger, and how to show what it says while work goes on."""

import contextlib
import logging
from collections.abc import Callable, Iterator

NAME = "recache_compile"
"""Every module logs to a child of this logger: stages at level INFO, causes of what is caught at DEBUG."""


class _Teller(logging.Handler):
    """Hands messages on as text."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__()
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        self._tell(record.getMessage())


@contextlib.contextmanager
def told(tell: Callable[[str], None]) -> Iterator[None]:
    """Until the block ends, hand every stage to a function as it begins.

    Args:
        tell: shows one line.
    """
    logger, teller = logging.getLogger(NAME), _Teller(tell)
    level = logger.level
    logger.addHandler(teller)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(teller)
        logger.setLevel(level)
