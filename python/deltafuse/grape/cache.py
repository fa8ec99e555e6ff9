"""What one attention layer keeps between calls, so that streams have the numbers of training."""

import torch

from .. import _checks


class GrapeCache:
    """State of one layer of a stream of tokens: where it is, its phase, its keys and values.

    A key is rotated once, at its own position, and kept; a query is rotated where it is. The phase
    is an integer (`cumulative_phase`), so a stream reaches the phases of one call over all tokens
    bit by bit, however it is divided (arXiv 2512.07805, Section 2: the angle between two tokens
    depends on what lies between them alone).

    Attributes:
        position: tokens that the layer's rotation has seen; the next one is at this position.
        phase: int64, the `final` of `cumulative_phase`, or None before the first token.
        frame: (W, theta) of a `GrapeMixture`, which prepares it with the stream's first tokens;
            parameters that change in the middle of a stream take effect with the next one, since
            the kept keys have been rotated by the old ones.
    """

    def __init__(self):
        self.reset()

    def reset(self):
        """As new: for another stream."""
        self.position = 0
        self.phase = self.frame = None
        self._length = 0
        self._k = self._v = None

    def __len__(self):
        """Tokens whose keys and values are kept."""
        return self._length

    def append(self, k, v):
        """Keeps the keys and values of new tokens.

        Args:
            k: [B, T, H, D], rotated.
            v: [B, T, Hv, Dv].

        Returns:
            (k, v) of all tokens so far, these included, to be read until the next `append`. Without
            gradients views of buffers that grow by doubling; else concatenated.

        Raises:
            ValueError: shapes or dtypes that do not continue those before.
        """
        for name, new, old in (("k", k, self._k), ("v", v, self._v)):
            _checks.expect_dim("GrapeCache", name, new, 4, "[B, T, H, D]")
            if old is not None and (
                new.dtype != old.dtype
                or new.shape[0] != old.shape[0]
                or new.shape[2:] != old.shape[2:]
            ):
                _checks.fail(
                    "GrapeCache",
                    f"{name} must continue {tuple(old.shape)} {old.dtype}, got "
                    f"{tuple(new.shape)} {new.dtype}",
                )
        if v.shape[:2] != k.shape[:2]:
            _checks.fail(
                "GrapeCache", f"v must have the B, T of k: {tuple(v.shape)}, {tuple(k.shape)}"
            )
        before, self._length = self._length, self._length + k.shape[1]
        self._k = _extended(self._k, before, k)
        self._v = _extended(self._v, before, v)
        return self._k[:, : self._length], self._v[:, : self._length]

    def __repr__(self):
        return f"GrapeCache(position={self.position}, keys={self._length})"


def _extended(buffer, length, new):
    """A buffer whose first tokens are the `length` before, then the new ones."""
    if torch.is_grad_enabled():
        return new if buffer is None else torch.cat((buffer[:, :length], new), 1)
    total = length + new.shape[1]
    if buffer is None or buffer.shape[1] < total or buffer.requires_grad:
        capacity = total if buffer is None else max(total, 2 * length)
        grown = new.new_empty(new.shape[0], capacity, *new.shape[2:])
        if length:
            grown[:, :length] = buffer[:, :length]
        buffer = grown
    buffer[:, length:total] = new
    return buffer
