"""Matrix functions of MARS-Shampoo and MARS-M: the nearest semi-orthogonal matrix."""

import math

import torch

from deltafuse import _library

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
SMALLEST_HALVED = 256
ADJUSTMENTS = ("original", "match_rms_adamw", "none")

_library.register("newton_schulz", lambda x, *args: x.new_empty(x.shape))
_library.not_on_cuda(torch.float32, "newton_schulz")
_library.not_on_cuda(torch.float64, "newton_schulz")


def _is_halved(a):
    return a.shape[-2] >= SMALLEST_HALVED and a.device.type == "cpu"


def symmetric_product(a, b):
    """a @ b, which has to be symmetric: [..., n, n].

    Large ones on the CPU skip the lower left quarter, a tenth of the time of newton_schulz (Intel
    Xeon, 2026-11-25, sides of 384 and 768); on a GPU one product is one launch.
    """
    if not _is_halved(a):
        return a @ b
    n = a.shape[-2]
    half = n // 2
    product = a.new_empty(*a.shape[:-1], n)
    product[..., :half, :] = a[..., :half, :] @ b
    product[..., half:, half:] = a[..., half:, :] @ b[..., half:]
    product[..., half:, :half] = product[..., :half, half:].mT
    return product


def by_torch(x, steps, a, b, c):
    """`steps` iterations on x [n, rows, cols] in torch's products; the oracle of the operator."""
    for _ in range(steps):
        gram = symmetric_product(x, x.mT)
        if _is_halved(gram):
            polynomial = symmetric_product(gram, gram).mul_(c).add_(gram, alpha=b)
        else:
            polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


def _iteration(x):
    """The operator that iterates on x [n, rows, cols], rows <= cols; None: torch's products.

    The one place that chooses between the two. It always takes the operator, which there is on CUDA
    for bfloat16 and float16: the two have not been compared on a GPU yet (`deltafuse bench
    newton_schulz --device cuda` does it), so no size is known from which torch is faster.
    """
    return _library.kernel("newton_schulz", x)


def _with_whole_rows(x):
    """x, or a copy of which each row starts on 16 bytes: the operator loads others by elements."""
    cols = x.shape[-1]
    if x.stride(-1) == 1 and all(stride % 8 == 0 for stride in x.stride()[:-1]):
        return x
    return x.new_empty(*x.shape[:-1], cols + -cols % 8)[..., :cols].copy_(x)


def newton_schulz(matrix, steps=5, dtype=torch.bfloat16, loop=False):
    """An approximation of U V^T of the singular value decomposition, without the decomposition.

    X = M / (||M||_F + 1e-7), then `steps` times A = X X^T; X <- 3.4445 X + (-4.7750 A +
    2.0315 A^2) X (Jordan et al., Muon, 2024). Singular values above a hundredth of the norm land in
    [0.68, 1.14]; zero stays zero.

    Args:
        matrix: [..., rows, cols], any floating dtype; dtype: of the products and the
            result; float64 stays; loop: torch's products in any case.
    """
    x = matrix.reshape(-1, *matrix.shape[-2:])
    x = x if x.dtype == torch.float64 else x.to(dtype)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    iteration = None if loop else _iteration(x)
    if iteration is None:
        x = by_torch(x.contiguous() if tall else x, steps, *COEFFICIENTS)
    else:
        x = iteration(_with_whole_rows(x), steps, *COEFFICIENTS)
    return (x.mT if tall else x).reshape(matrix.shape)


def polar(matrix):
    """U V^T by the singular value decomposition, in float32 or float64."""
    x = matrix if matrix.dtype == torch.float64 else matrix.float()
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    return u @ vh


def adjustment(name, rows, cols):
    """What lr is multiplied by; names as in torch.optim.Muon's adjust_lr_fn."""
    if name == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, cols))
    return math.sqrt(max(1.0, rows / cols)) if name == "original" else 1.0


def flat(tensor):
    """[dim 0, the rest]: convolution weights as matrices."""
    return tensor.flatten(1) if tensor.ndim > 2 else tensor


def orthogonalized(directions, steps, dtype, loop=False):
    """newton_schulz of each matrix (polar if steps is None), equal shapes in one batch."""
    shapes = {}
    for i, d in enumerate(directions):
        shapes.setdefault((flat(d).shape, d.dtype, d.device), []).append(i)
    results = [None] * len(directions)
    for indices in shapes.values():
        batch = torch.stack([flat(directions[i]) for i in indices])
        if batch.numel():
            batch = polar(batch) if steps is None else newton_schulz(batch, steps, dtype, loop)
        for i, x in zip(indices, batch.unbind(), strict=True):
            results[i] = x.reshape(directions[i].shape)
    return results
