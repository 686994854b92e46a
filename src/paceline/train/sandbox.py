"""Chat templates come with models of others: bounds on their rendering, and a clock that is given.

On import, the sandbox of transformers is replaced by `BoundedSandbox`, for all that renders chat
templates in this process. A template that takes too long or too much raises a TemplateError.
"""

import random
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, datetime, time
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils import chat_template_utils

SECONDS = 5.0  # of computing for one conversation
BYTES = 2**30  # of memory for one conversation, beside what the process has
BITS = 2**14  # of an integer that a product or a power makes

_day: date | None = None


@contextmanager
def clock(day: date | None) -> Iterator[None]:
    """Let the clock of chat templates, `strftime_now`, show a day; None is the present."""
    global _day
    before, _day = _day, day
    try:
        yield
    finally:
        _day = before


def _strftime_now(form: str) -> str:
    return (datetime.combine(_day, time()) if _day else datetime.now()).strftime(form)


@contextmanager
def bounded() -> Iterator[None]:
    """Bound time and memory, and draw the same random numbers each time.

    Time is bounded in the main thread, memory on Linux.

    Raises:
        TemplateError: a bound was passed.
    """
    state = random.getstate()
    random.seed(0)
    try:
        with _bounded_time(), _bounded_memory():
            yield
    except MemoryError as error:
        raise TemplateError(f"it needs more than {BYTES >> 20} MiB for one conversation") from error
    finally:
        random.setstate(state)


@contextmanager
def _bounded_time() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread() or sys.platform == "win32":
        yield
        return

    def stop(*_: Any) -> None:
        raise TemplateError(f"it computes for more than {SECONDS:g} s on one conversation")

    handler = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS, 0.1)  # again, where the error was lost
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, handler)


@contextmanager
def _bounded_memory() -> Iterator[None]:
    if sys.platform != "linux":
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + BYTES
    if before[0] != resource.RLIM_INFINITY:
        most = min(most, before[0])
    resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


class BoundedTemplate(Template):
    """A template whose rendering is bounded."""

    def render(self, *args: Any, **kwargs: Any) -> str:
        """Render at once."""
        with bounded():
            return super().render(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Iterator[str]:
        """Render piece by piece."""
        with bounded():
            yield from super().generate(*args, **kwargs)


class BoundedSandbox(ImmutableSandboxedEnvironment):
    """A sandbox whose templates are compiled and rendered within bounds."""

    template_class = BoundedTemplate
    # One operation on large integers can take hours, in which no signal is heard.
    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """A product or a power, unless it is a huge integer."""
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length()
            bits = bits * max(right, 1) if operator == "**" else bits + right.bit_length()
            if bits > BITS:
                raise TemplateError("it computes with huge integers")
        return super().call_binop(context, operator, left, right)

    def from_string(self, *args: Any, **kwargs: Any) -> Any:
        """Compile, which computes what is constant."""
        self.globals["strftime_now"] = _strftime_now
        with bounded():
            return super().from_string(*args, **kwargs)


_host: Any = chat_template_utils
_host.ImmutableSandboxedEnvironment = BoundedSandbox
_host._compile_jinja_template.cache_clear()
