"""Benchmarks of MARS: steps of MARS-AdamW on GPT-2 small, of MARS-M on matrices; Newton-Schulz."""

import torch

from .. import _library
from ..optim import MARS, mars_reference_, matrix
from .case import Benchmark, Case

CHECK = {"layers": 1, "width": 96, "vocabulary": 257, "context": 65}


def parameter_sizes(shape):
    """Sizes of a GPT-2: embeddings, blocks of two norms and four linear maps, the last norm."""
    n = shape["width"]
    block = [(n,), (n,), (3 * n, n), (3 * n,), (n, n), (n,)]
    block += [(n,), (n,), (4 * n, n), (4 * n,), (n, 4 * n), (n,)]
    embeddings = [(shape["vocabulary"], n), (shape["context"], n)]
    return embeddings + block * shape["layers"] + [(n,), (n,)]


def count(shape):
    return sum(torch.Size(size).numel() for size in parameter_sizes(shape))


def parameters(shape, device):
    torch.manual_seed(0)
    params = [
        torch.nn.Parameter(0.02 * torch.randn(*size, device=device))
        for size in parameter_sizes(shape)
    ]
    for p in params:
        p.grad = 1e-3 * torch.randn_like(p)
    return params


def updates(make, limit, **options):
    """Three steps of ours and of the oracle on a small list: pairs of updates to compare."""
    ours, oracle = make(), make()
    start = [p.detach().clone() for p in ours]
    for params, backend in ((ours, "native"), (oracle, "reference")):
        optimizer = MARS(params, lr=1e-3, weight_decay=0.1, **options)
        with _library.use(backend):
            for _ in range(3):
                optimizer.step()
    return [
        (f"update of parameter {i}", (a - p).detach(), (b - p).detach(), limit)
        for i, (a, b, p) in enumerate(zip(ours, oracle, start, strict=True))
    ]


def by_reference(optimizer):
    """Its step in plain PyTorch."""

    def step():
        with _library.use("reference"):
            optimizer.step()

    return step


def tensor_by_tensor(function, params, **options):
    """A step of mars_reference_, as it is or compiled, on one parameter after another.

    Of the whole list torch.compile would make one program, for minutes.
    """
    states = []
    for p in params:
        m, v, h = (torch.zeros_like(p) for _ in range(3))
        states.append(([m], [v], [h] if p.ndim == 2 else [], [], [p.new_zeros(())]))

    @torch.no_grad()
    def step():
        for p, state in zip(params, states, strict=True):
            # not the Parameter: torch.compile takes each one's shape for a constant
            function([p.detach()], [p.grad], *state, **options)

    return step


def mars_case(shape, device):
    params = parameters(shape, device)
    options = dict(lr=1e-4, weight_decay=0.1)
    kinds = {"fused": {"fused": True}, "foreach": {"foreach": True}, "loop": {"foreach": False}}
    baselines = {
        f"torch AdamW {kind}": torch.optim.AdamW(params, **options, **flags).step
        for kind, flags in kinds.items()
    }
    # one list of parameters for all: memory; each optimizer has its own state
    ours, oracle = MARS(params, **options), MARS(params, **options)

    return Case(
        ours=ours.step,
        reference=by_reference(oracle),
        baselines=baselines,
        check=lambda: updates(lambda: parameters(CHECK, device), 1e-4),
        compiled=lambda wrap: tensor_by_tensor(wrap(mars_reference_), params, **options),
    )


def matrices(shape, device):
    return [p for p in parameters(shape, device) if p.ndim == 2]


def exact_matrices(device):
    """float64, where Newton-Schulz adds no rounding to compare."""
    found = []
    for p in matrices(CHECK, device):
        found.append(torch.nn.Parameter(p.detach().double()))
        found[-1].grad = p.grad.double()
    return found


def mars_m_case(shape, device):
    params = matrices(shape, device)
    options = dict(lr=1e-4, weight_decay=0.1)
    muon = torch.optim.Muon(params, adjust_lr_fn="match_rms_adamw", **options)
    ours, oracle = (MARS(params, mars_type="mars-m", **options) for _ in range(2))

    return Case(
        ours=ours.step,
        reference=by_reference(oracle),
        baselines={"torch Muon": muon.step},
        check=lambda: updates(
            lambda: exact_matrices(device), 1e-9, mars_type="mars-m", ns_dtype=torch.float64
        ),
    )


def newton_schulz_flops(sizes):
    """5 (4 n^2 k + 2 n^3) a matrix of sides n <= k, without use of symmetry."""
    sides = [sorted(size) for size in sizes if len(size) == 2]
    return sum(5 * (4 * n * n * k + 2 * n**3) for n, k in sides)


def newton_schulz_case(shape, device):
    """Five iterations of the operator and of torch's products, from the same scaled matrices."""
    torch.manual_seed(0)
    x = torch.randn(shape["n"], shape["rows"], shape["cols"], device=device)
    x = (x / x.norm(dim=(-2, -1), keepdim=True)).bfloat16()
    operator = _library.kernel("newton_schulz", x) or matrix.by_torch

    def run(function, x):
        return function(x, 5, *matrix.COEFFICIENTS)

    return Case(
        ours=lambda: run(operator, x),
        reference=lambda: run(matrix.by_torch, x),
        check=lambda: [("X", run(operator, x), run(matrix.by_torch, x.double()), 3e-2)],
    )


def matrices_of(n, rows, cols):
    return {"n": n, "rows": rows, "cols": cols}


ENTRIES = {
    "mars": Benchmark(
        title="MARS-AdamW step on the parameters of GPT-2 small",
        reference="eager oracle (mars_reference_)",
        kernel="mars_",
        shapes=({"layers": 12, "width": 768, "vocabulary": 50257, "context": 1024},),
        tiny={"layers": 1, "width": 24, "vocabulary": 33, "context": 17},
        make=mars_case,
        flops=lambda s: 20 * count(s),
        bytes=lambda s: 36 * count(s),  # p, g, h, m, v read, p, h, m, v written
        targets=(("torch AdamW fused", 1 / 1.65),),
    ),
    "mars_m": Benchmark(
        title="MARS-M step on the matrices of a small GPT",
        reference="eager oracle around the same matrix products",
        kernel="mars_",
        shapes=({"layers": 4, "width": 384, "vocabulary": 512, "context": 256},),
        tiny={"layers": 1, "width": 24, "vocabulary": 33, "context": 17},
        make=mars_m_case,
        flops=lambda s: newton_schulz_flops(parameter_sizes(s)),
        bytes=lambda s: 28 * count(s),  # p, g, h, m read, p, h, m written
        targets=(("torch Muon", 1.0),),
    ),
    "newton_schulz": Benchmark(
        title="five Newton-Schulz iterations on a batch of bfloat16 matrices",
        reference="torch's batched products",
        kernel="newton_schulz",
        shapes=(
            matrices_of(12, 768, 768),
            matrices_of(12, 768, 3072),
            matrices_of(1, 4096, 4096),
            matrices_of(1, 4096, 11008),
        ),
        tiny=matrices_of(2, 40, 72),
        make=newton_schulz_case,
        flops=lambda s: s["n"] * newton_schulz_flops([(s["rows"], s["cols"])]),
        bytes=lambda s: 4 * s["n"] * s["rows"] * s["cols"],  # X read and written
        targets=(("reference", 1.0),),
        dtype="bfloat16",
        devices=("cuda",),
    ),
}
