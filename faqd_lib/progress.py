"""Progress of many runs: a bar where somebody watches (JupyterLab, a terminal), lines of text where nobody does."""

import os
import sys
import time

from tqdm.auto import tqdm


def headless() -> bool:
    """Whether progress is to be lines of text: ``FAQD_PROGRESS=text`` (set by ``run_all.sh``), or output to a file."""
    style = os.environ.get("FAQD_PROGRESS")
    if style not in (None, "text", "bar"):
        raise ValueError(f"FAQD_PROGRESS must be 'text' or 'bar', got {style!r}")
    in_jupyter = "ipykernel" in sys.modules
    return style == "text" if style else not (in_jupyter or sys.stderr.isatty())


def clock(seconds: float) -> str:
    """``m:ss`` or ``h:mm:ss``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Progress:
    """Counts units of work (one network, one epoch) up to ``total`` and estimates the time left from their pace."""

    def __init__(self, total: float, title: str) -> None:
        self.total, self.title, self.done, self._started = total, title, 0.0, time.monotonic()
        self._bar = None if headless() else tqdm(total=total, desc=title, bar_format="{l_bar}{bar}| {postfix}")

    def advance(self, units: float, text: str) -> None:
        self.done += units
        elapsed = time.monotonic() - self._started
        left = elapsed / self.done * max(0.0, self.total - self.done)
        line = f"{text}; {clock(elapsed)} gone, about {clock(left)} left"
        if self._bar is None:
            print(f"  {self.title}: {line}", flush=True)
        else:
            self._bar.update(units)
            self._bar.set_postfix_str(line)

    def skip(self, units: float) -> None:
        """Leave out units that turn out to be done already."""
        self.total -= units
        if self._bar is not None:
            self._bar.total = self.total
            self._bar.refresh()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
