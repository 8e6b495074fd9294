"""Progress of many runs: a bar in JupyterLab and on a terminal, lines of text everywhere else."""

import sys
import time
from contextlib import AbstractContextManager
from typing import Protocol

_FIRST_LINE, _BETWEEN_LINES = 20.0, 600.0  # seconds, for lines of text within an epoch


def headless() -> bool:
    """Whether output goes neither to JupyterLab nor to a terminal."""
    return not ("ipykernel" in sys.modules or sys.stderr.isatty())


def clock(seconds: float) -> str:
    """``m:ss`` or ``h:mm:ss``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class ProgressReporter(Protocol):
    """Receives the progress of training; each front end shows it in its own way."""

    def number(self, runs: int) -> str:
        """Number the next ``runs`` runs and return their label: ``run 3-5 of 12``."""

    def advance(self, units: float, text: str) -> None:
        """Count finished units; one unit is one epoch of one network."""

    def within(self, label: str, units: float, text: str = "") -> None:
        """Set the units done of the unfinished epoch of the runs ``label``; 0 once :meth:`advance` counts them."""

    def skip(self, units: float) -> None:
        """Take units off the total: they were finished earlier."""

    def say(self, text: str) -> None:
        """Show a message."""


class Progress(AbstractContextManager):
    """Counts units of work up to ``total`` and estimates the time left from the pace so far."""

    def __init__(self, total: float, title: str, runs: int = 1, bar: bool | None = None) -> None:
        self.total, self.title, self.runs = total, title, runs
        self.done, self._numbered, self._started = 0.0, 0, time.monotonic()
        self._begun: dict[str, float] = {}  # unfinished units of :meth:`within`, by label
        self._next_line = _FIRST_LINE  # seconds from the start
        shown = not headless() if bar is None else bar
        self._bar = None
        if shown:
            from tqdm.auto import tqdm  # in JupyterLab this imports the widgets

            self._bar = tqdm(total=total, desc=title, bar_format="{l_bar}{bar}| {postfix}")

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def number(self, runs: int) -> str:
        first, last = self._numbered + 1, self._numbered + runs
        self._numbered = last
        return f"run {first if runs == 1 else f'{first}-{last}'} of {self.runs}"

    def advance(self, units: float, text: str) -> None:
        self.done += units
        if self._bar is not None:
            self._bar.update(units)
        self._show(text)

    def within(self, label: str, units: float, text: str = "") -> None:
        self._begun[label] = units
        if text and (self._bar is not None or time.monotonic() - self._started > self._next_line):
            self._show(text)

    def _show(self, text: str) -> None:
        elapsed = time.monotonic() - self._started
        done = self.done + sum(self._begun.values())
        left = elapsed / done * max(0.0, self.total - done) if done else 0.0
        line = f"{text}; {clock(elapsed)} gone, about {clock(left)} left"
        self._next_line = elapsed + _BETWEEN_LINES
        if self._bar is None:
            print(f"  {self.title}: {line}", flush=True)
        else:
            self._bar.set_postfix_str(line)

    def skip(self, units: float) -> None:
        self.total -= units
        if self._bar is not None:
            self._bar.total = self.total
            self._bar.refresh()

    def say(self, text: str) -> None:
        print(f"  {text}", flush=True)
