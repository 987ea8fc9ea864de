"""How far a run has come, on standard error."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm.auto import tqdm

_SECONDS_BETWEEN_LINES = 60
_LINE = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class Progress:
    """A bar on a terminal or in a notebook; elsewhere, as in a log file, a line a minute.

    Args:
        title: of the bar.
        step: that the run starts from.
        shown: False shows nothing.
    """

    def __init__(self, title: str, step: int, total_steps: int, *, shown: bool) -> None:
        alive = sys.stderr.isatty() or "ipykernel" in sys.modules
        self._bar = tqdm(total=total_steps, initial=step, unit="step", desc=title, disable=not (shown and alive))
        self._lines = shown and not alive
        self._step = {"total": total_steps, "initial": step, "unit": "step", "prefix": title, "bar_format": _LINE}
        self._started = time.monotonic()
        self._due = self._started

    def advance(self) -> None:
        """A step is done."""
        self._bar.update()

    def tell(self, step: int, loss: float) -> None:
        """Shows the loss of a step, with the next update or line."""
        self._bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        now = time.monotonic()
        if self._lines and now >= self._due:
            self._due = now + _SECONDS_BETWEEN_LINES
            line = tqdm.format_meter(step, elapsed=now - self._started, postfix=f"loss={loss:.4f}", **self._step)
            print(line, file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
