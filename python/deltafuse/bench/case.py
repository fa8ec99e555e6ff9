"""What a benchmark is: a recipe (`Benchmark`) and its functions on given inputs (`Case`)."""

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Case:
    """The functions to time, all on the same inputs.

    Attributes:
        ours, reference: functions without arguments; the reference is the plain PyTorch that the
            operator falls back on, except where a benchmark says otherwise. None: it is not timed.
        baselines: further implementations of the same function, by name.
        check: () -> [(name, ours, expected, limit)], the correctness gate on fresh tensors.
        compiled: torch.compile -> the plain PyTorch function wrapped in it, or None.
    """

    ours: Callable
    reference: Callable | None
    baselines: dict = field(default_factory=dict)
    check: Callable = list
    compiled: Callable | None = None


@dataclass(frozen=True)
class Benchmark:
    """A measured function of the package.

    Attributes:
        title: one line for the list and the table.
        reference: what the reference row is, in words.
        kernel: the operator of `backend_info()` that does the work.
        shapes: measured sizes, each a dict of integers; tiny: sizes for tests and `--quick`.
        make: (shape, device) -> Case.
        flops, bytes: shape -> count of one call, or None where the count says nothing.
        targets: (row name, factor) pairs: ours is to be that many times as fast as the row, with 2
            threads. A target on "torch.compile" has that row measured without being asked for.
        dtype: of the main inputs, for the table.
        devices: those it is meant for; goal: shape -> seconds that ours is to reach there, or None.
    """

    title: str
    reference: str
    kernel: str
    shapes: tuple
    tiny: dict
    make: Callable
    flops: Callable
    bytes: Callable
    targets: tuple = ()
    dtype: str = "float32"
    devices: tuple = ("cpu", "cuda")
    goal: Callable = lambda shape: None
