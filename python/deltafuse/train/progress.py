"""Progress on stderr: a bar that rewrites itself on a terminal, else a plain line now and then."""

import shutil
import sys
import time

PLAIN_SECONDS = 10.0
BAR_SECONDS = 0.1


class Progress:
    """Shows step, loss, tokens a second and time left.

    Args:
        steps: of the whole run; first: steps that were done before this process.
        stream: default sys.stderr; None or a closed stream shows nothing.
    """

    def __init__(self, steps, first=0, stream=None):
        self.steps, self.first = steps, first
        self.stream = sys.stderr if stream is None else stream
        self.terminal = bool(self.stream) and not self.stream.closed and self.stream.isatty()
        self.start = time.monotonic()
        self.shown_at = -float("inf")

    def update(self, step, loss, tokens_per_second):
        now = time.monotonic()
        pause = BAR_SECONDS if self.terminal else PLAIN_SECONDS
        if now - self.shown_at < pause and step < self.steps:
            return
        self.shown_at = now
        left = (now - self.start) / max(1, step - self.first) * (self.steps - step)
        text = (
            f"step {step}/{self.steps}  loss {loss:.3f}  "
            f"{tokens_per_second:.0f} tokens/s  {clock(left)} left"
        )
        if self.terminal:
            width = shutil.get_terminal_size().columns - 1
            size = max(0, min(30, width - len(text) - 3))
            filled = size * step // self.steps
            text = f"[{'#' * filled}{'.' * (size - filled)}] {text}" if size > 4 else text
            self._write("\r" + text[:width].ljust(width))
        else:
            self._write(text + "\n")

    def line(self, text):
        """A line of its own, above the bar."""
        if self.terminal:
            width = shutil.get_terminal_size().columns - 1
            text = "\r" + text.ljust(width)
        self._write(text + "\n")

    def close(self):
        if self.terminal:
            self._write("\n")

    def _write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()
        except (OSError, ValueError, AttributeError):
            self.terminal = False  # nobody is looking any more: training goes on


def clock(seconds):
    """75 -> "1:15", 3700 -> "1:01:40"."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
