"""Ctrl-C and SIGTERM as a request that the loop answers after its current step."""

import signal


class StopRequest:
    """with StopRequest() as stop: `stop.name` is the signal's name once one came, else None.

    A second signal ends the process at once, as if there were no handler.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __enter__(self):
        self.name = None
        self._before = {number: signal.getsignal(number) for number in self.SIGNALS}
        for number in self.SIGNALS:
            signal.signal(number, self._ask)
        return self

    def _ask(self, number, frame):
        self.name = signal.Signals(number).name
        self._restore()

    def _restore(self):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __exit__(self, *exception):
        self._restore()
