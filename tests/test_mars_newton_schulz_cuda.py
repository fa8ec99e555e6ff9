"""The Newton-Schulz iteration on CUDA: each product, five steps, launches, FLOPs, bytes, races."""

import pytest
import torch

from conftest import DEVICES, MODES
from deltafuse import MARS, _library, backend_info
from deltafuse.bench import REGISTRY
from deltafuse.bench.measure import measure
from deltafuse.optim import matrix
from test_mars import gradients, parameters

BF16, F16 = torch.bfloat16, torch.float16
A, B, C = matrix.COEFFICIENTS
ROUNDING = {BF16: 2**-8, F16: 2**-11}  # of a number to its nearest neighbour
on_cuda = pytest.mark.parametrize("device", DEVICES[1:], indirect=True)
emulated_only = pytest.mark.emulated
# columns with which rows start on 16 bytes, and with which not. Rows of A and B that end within 16
# bytes would not do: the emulator counts whole copies only.
TRAFFIC = {"vectors": (2, 256, 320), "elements": (1, 136, 259)}


def iterate(x, steps=1, a=A, b=B, c=C):
    operator = _library.kernel("newton_schulz", x)
    assert operator is not None
    return operator(x, steps, a, b, c)


def scaled(*shape, dtype=BF16, device="cpu", seed=0):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=random, dtype=torch.float64)
    return (x / x.norm(dim=(-2, -1), keepdim=True)).to(device, dtype)


def error(x, expected):
    return ((x.double() - expected).norm() / expected.norm()).item()


def check_product(found, terms):
    """found is the sum of the factors' products, rounded once; terms: [(coefficient, L, R)]."""
    exact = sum(k * (left.double() @ right.double()) for k, left, right in terms)
    size = sum(abs(k) * (left.double().abs() @ right.double().abs()) for k, left, right in terms)
    smallest = 2**-25 if found.dtype == F16 else 0
    limit = ROUNDING[found.dtype] * exact.abs() + 1e-5 * size + smallest
    assert ((found.double() - exact).abs() <= limit).all()


# one, less than a box, a box, a tile and one more, on rows that start anywhere and on 16 bytes; the
# second tile of columns, more than the ring has slots
@on_cuda
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize(
    "rows, cols",
    [(1, 2), (16, 40), (64, 128), (65, 131), (100, 400), (128, 264), (129, 258)],
    ids=str,
)
def test_each_product_is_rounded_once(device, rows, cols, dtype):
    """X = [I | Y], so that the first columns of a step's result are its polynomial as it is."""
    eye = torch.eye(rows, dtype=dtype, device=device)
    x = torch.cat([eye, scaled(rows, cols - rows, dtype=dtype, device=device)], -1)[None]
    gram = iterate(x, a=0, b=1, c=0)[..., :rows]
    check_product(gram, [(1, x, x.mT)])
    polynomial = iterate(x, a=0)[..., :rows]
    check_product(polynomial, [(B, gram, eye), (C, gram, gram)])
    for symmetric in (gram, polynomial):
        assert torch.equal(symmetric, symmetric.mT)
    check_product(iterate(x), [(A, eye, x), (1, polynomial, x)])


FIVE = {
    "one number": (1, 1),
    "16": (16, 16),
    "box": (64, 64),
    "rows start anywhere": (65, 130),
    "tile": (128, 128),
    "batch of two tiles and one": (3, 129, 257),
    "batch, wide": (3, 40, 200),
    "tall": (200, 64),
    "tall, anywhere": (2, 2, 77, 33),
}


@on_cuda
@pytest.mark.parametrize(
    "name, dtype", [*((name, BF16) for name in FIVE), ("rows start anywhere", F16), ("tile", F16)]
)
def test_five_steps_are_those_of_torch(device, name, dtype):
    m = scaled(*FIVE[name], dtype=torch.float32, device=device)
    found = matrix.newton_schulz(m, 5, dtype)
    assert found.shape == m.shape and found.dtype == dtype
    exact = matrix.newton_schulz(m.double(), 5)
    torchs = matrix.newton_schulz(m, 5, dtype, loop=True)
    # rounding of X and of its products, in both; between them one last bit here and there
    assert error(found, exact) <= 1.1 * error(torchs, exact) + ROUNDING[dtype] / 4
    assert error(found, torchs.double()) <= 4 * ROUNDING[dtype]


@on_cuda
def test_every_number_of_steps(device):
    for cols in (72, 75):  # with and without the result as a buffer of the steps between
        x = scaled(2, 40, cols, device=device)
        for steps in range(1, 5):
            expected = x
            for _ in range(steps):
                expected = iterate(expected)
            found = iterate(x, steps)
            # a row that starts anywhere is loaded and multiplied by the other kernel
            assert error(found, expected.double()) <= (0 if cols == 72 else 4 * ROUNDING[BF16])


@pytest.mark.slow
@on_cuda
def test_seventeen_tiles_a_side(device):
    """More rows of tiles than a band of the full product, 153 tiles of a symmetric one."""
    x = scaled(1, 2056, 2056, device=device)
    assert error(iterate(x), matrix.by_torch(x.double(), 1, A, B, C)) <= ROUNDING[BF16]


@on_cuda
def test_layouts(device):
    given = scaled(3, 72, 140, device=device)[..., :136]
    buffer = torch.zeros(3 * 72 * 136 + 1, dtype=BF16, device=device)
    shifted = buffer[1:].view(3, 72, 136).copy_(given)
    transposed = given.mT.contiguous().mT
    expected = iterate(given.contiguous(), 2).double()
    for x in (given, shifted, transposed, given.transpose(0, 1).contiguous().transpose(0, 1)):
        before = x.clone()
        assert error(iterate(x, 2), expected) <= 2 * ROUNDING[BF16]
        assert torch.equal(x, before)
    assert iterate(given[:0]).shape == (0, 72, 136)
    assert iterate(given[:, :0]).shape == (3, 0, 136)


@on_cuda
def test_matrices_of_a_batch_do_not_meet(device):
    x = scaled(3, 70, 136, device=device)
    found = iterate(x, 2)
    assert torch.equal(iterate(x, 2), found)
    for i in range(3):
        assert torch.equal(iterate(x[i : i + 1], 2)[0], found[i])
    x[1, 3, 5] = float("nan")
    broken = iterate(x, 2)
    assert broken[1].isnan().all()
    assert torch.equal(broken[0], found[0]) and torch.equal(broken[2], found[2])
    assert not iterate(torch.zeros_like(x), 5).any()


@on_cuda
@pytest.mark.parametrize("shape", [(1, 70, 131), (2, 33, 72)], ids=str)
def test_padding_of_the_buffers_is_not_read(device, shape, nan_filled_memory):
    assert iterate(scaled(*shape, device=device), 3).isfinite().all()


@on_cuda
def test_what_the_operator_refuses(device):
    x = scaled(1, 8, 16, device=device)
    operator = _library.kernel("newton_schulz", x)
    for bad, steps in ((x.mT, 1), (x[0], 1), (x, 0), (x.float(), 1), (x.double(), 1)):
        with pytest.raises(RuntimeError, match="newton_schulz: "):
            operator(bad, steps, A, B, C)
    for other in (x.float(), x.double()):
        assert _library.kernel("newton_schulz", other) is None
    assert backend_info()["ops"]["newton_schulz"]["cuda float32"] == "reference"


@on_cuda
def test_fake_kernel_and_compilation(device):
    x = scaled(2, 24, 40, device=device)
    operator = _library.kernel("newton_schulz", x)
    torch.library.opcheck(operator, (x, 2, A, B, C), test_utils=("test_schema", "test_faketensor"))
    compiled = torch.compile(matrix.newton_schulz, backend="aot_eager", fullgraph=True)
    for m in (x, x.mT):
        assert torch.equal(compiled(m), matrix.newton_schulz(m))


@emulated_only
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("shape", [(1, 136, 272), (1, 70, 131)], ids=str)
def test_in_every_mode(emulated_with, mode, shape):
    x = scaled(*shape)
    expected = iterate(x, 3)
    with emulated_with(**mode):
        assert torch.equal(iterate(x, 3), expected)


def profiled(emulated, call):
    with emulated.profile() as launches:
        call()
    return launches


@emulated_only
@pytest.mark.parametrize("name", TRAFFIC)
def test_flops_bytes_and_wavefronts(emulated, name):
    n, rows, cols = TRAFFIC[name]
    launches = profiled(emulated, lambda: iterate(scaled(n, rows, cols)))
    tiles, across = -(-rows // 128), -(-cols // 128)
    steps = -(-cols // 64), -(-rows // 64), -(-rows // 64)
    symmetric = tiles * (tiles + 1) // 2
    tile_counts = symmetric, symmetric, tiles * across
    square, x = 2 * n * rows * rows, 2 * n * rows * cols  # bytes
    traffic = (x, square), (square, square), (square + x, x)
    for launch, k, count, (read, written) in zip(
        launches, steps, tile_counts, traffic, strict=True
    ):
        assert launch["grid"][0] == n * count
        assert launch["tensor_flops"] == n * count * k * 2 * 128 * 128 * 64
        assert launch["unique_bytes_read"] == read
        assert launch["unique_bytes_written"] == written
        assert launch["local_loads"] == launch["local_stores"] == 0
        for kind in ("load", "store"):
            wavefronts = launch[f"shared_{kind}_wavefronts"]
            assert wavefronts <= 1.1 * launch[f"shared_{kind}_wavefronts_ideal"], kind
            if name == "vectors":
                sectors = launch[f"global_{kind}_sectors"]
                assert sectors == launch[f"global_{kind}_sectors_ideal"], kind


@emulated_only
@pytest.mark.parametrize("steps", [1, 5])
def test_three_launches_a_step(emulated, steps):
    x = scaled(3, 24, 40)
    assert len(profiled(emulated, lambda: iterate(x, steps))) == 3 * steps


@emulated_only
@pytest.mark.parametrize("shape", [(2, 20, 33), (1, 33, 20), (1, 1), (40, 24)], ids=str)
def test_no_launch_loads_element_by_element(emulated, shape):
    """Of the public function: matrices whose rows start anywhere are copied once."""
    launches = profiled(emulated, lambda: matrix.newton_schulz(scaled(*shape)))
    fast = "product_async" if "90a" in backend_info()["build"] else "ELb1EEEv"
    assert len(launches) == 15 and all(fast in launch["kernel"] for launch in launches)


@emulated_only
@pytest.mark.parametrize("loop", [False, True], ids=["kernels", "loop"])
def test_launches_of_an_optimizer_step(emulated, loop):
    """Momenta, 15 a shape, parameters; the PyTorch loop launches nothing."""
    shapes = [(24, 40), (40, 24), (24, 40), (7,)]
    params = parameters(shapes=shapes)
    optimizer = MARS(params, mars_type="mars-m", weight_decay=0.1, fused=False if loop else None)
    for step in range(2):
        for p, g in zip(params, gradients(params, step), strict=True):
            p.grad = g
        launches = profiled(emulated, optimizer.step)
        assert len(launches) == (0 if loop else 1 + 15 * 2 + 1)


@emulated_only
def test_the_benchmark(emulated):
    entry = REGISTRY["newton_schulz"]
    row = measure("newton_schulz", entry, entry.tiny, rounds=1)
    assert row["correct"]["ok"] and row["backend"] == "cpu"
    assert entry.flops(entry.tiny) == 2 * 5 * (4 * 40**2 * 72 + 2 * 40**3)
