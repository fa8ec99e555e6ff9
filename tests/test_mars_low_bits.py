"""MARS with few bits: masters, stochastic rounding, bfloat16 and 8-bit state."""

import io

import pytest
import torch

from deltafuse import MARS, _library
from deltafuse.optim import reference_low_bits as low_bits
from test_mars import LIMIT, LR, assert_same, everything, gradients, parameters, train

SHAPES = [(37, 53), (1025,), (), (300, 401), (8,)]
KINDS = ["mars-adamw", "mars-lion", "mars-m"]
pytestmark = pytest.mark.filterwarnings("ignore:MARS. weight_decay is 0")


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


def patterns():
    """Floats of all exponents, every tie of 16 bits, infinities, NaN, subnormals."""
    generator = torch.Generator().manual_seed(0)
    any_bits = torch.randint(-(2**31), 2**31, (300_000,), generator=generator).to(torch.int32)
    ties = (torch.arange(65536) * 65536 + 0x8000 - 2**31).to(torch.int32)
    return torch.cat((any_bits, ties)).view(torch.float32)


def test_split_and_join_restore_every_float():
    x = patterns()
    high, low = low_bits.split(x)
    again = low_bits.join(high, low)
    number = ~x.isnan()
    assert torch.equal(again.view(torch.int32)[number], x.view(torch.int32)[number])
    assert again[~number].isnan().all() and (low[~number] == 0).all()
    # the upper half is the float rounded to bfloat16; only ties may go the other way
    other = high.float() != x.bfloat16().float()
    assert (x[other & number].view(torch.int32) & 0xFFFF == 0x8000).all()


def test_random_bits_are_those_of_philox():
    """The known answer of Random123 for philox4x32-10 with counter and key zero."""
    first = low_bits.random_bits(8, 0, 0, 0, 0).tolist()
    words = [first[2 * i] | first[2 * i + 1] << 16 for i in range(4)]
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("master", ["fp32", "split16"])
def test_master_is_a_float32_run(master, kind):
    """What the parameter is rounded from takes the steps of a float32 parameter, bitwise."""
    params = parameters(torch.bfloat16, SHAPES)
    twins = [torch.nn.Parameter(p.detach().float()) for p in params]
    options = dict(lr=LR, mars_type=kind, weight_decay=0.1, caution="elementwise")
    ours, other = MARS(params, master=master, **options), MARS(twins, **options)
    for step in range(5):
        for p, q, g in zip(params, twins, gradients(params, step), strict=True):
            p.grad, q.grad = g, g.float()
        ours.step(), other.step()
    for p, q in zip(params, twins, strict=True):
        state = ours.state[p]
        if master == "fp32":
            assert torch.equal(state["master"], q) and torch.equal(p, q.bfloat16())
        else:
            assert torch.equal(low_bits.join(p.detach(), state["master_lo"]), q)
            assert torch.equal(p, low_bits.split(q.detach())[0])


@pytest.mark.parametrize("kind", ["mars-adamw", "mars-m"])
def test_stochastic_rounding_goes_to_neighbours_and_is_right_on_average(kind):
    generator = torch.Generator().manual_seed(0)
    start, g = (torch.randn(16, 40, generator=generator).bfloat16() for _ in range(2))
    options = dict(lr=LR, mars_type=kind, clip=None)

    def stepped(p, **more):
        p = torch.nn.Parameter(p.clone())
        p.grad = g.to(p.dtype)
        MARS([p], **options, **more).step()
        return p.detach()

    exact = stepped(start.float())
    down = (exact.view(torch.int32) & -65536).view(torch.float32)
    up = ((exact.view(torch.int32) & -65536) + 65536).view(torch.float32)
    total, count = torch.zeros(16, 40, dtype=torch.float64), 512
    for seed in range(count):
        p = stepped(start, rounding="stochastic", seed=seed).float()
        assert ((p == down) | (p == up)).all()
        total += p
    share = ((exact - down) / (up - down)).double()
    sigma = (up - down).abs().double() * (share * (1 - share) / count).sqrt()
    off = (total / count - exact).abs() / sigma.clamp(min=1e-30)
    assert off.max() < 5 and (off < 1).double().mean() > 0.6
    a, b = (stepped(start, rounding="stochastic", seed=3) for _ in range(2))
    assert torch.equal(a, b)


OPTIONS = {
    "fp32 master": {"master": "fp32"},
    "split16": {"master": "split16", "state_dtype": torch.bfloat16},
    "all bfloat16": {"rounding": "stochastic", "state_dtype": torch.bfloat16, "seed": 5},
    "8 bits": {"state_bits": 8, "rounding": "stochastic", "seed": 1 << 40},
    "8 bits, amsgrad, maximize": {"state_bits": 8, "amsgrad": True, "maximize": True},
    "8 bits, global clip": {"state_bits": 8, "clip_scope": "global"},
    "8 bits, folded": {"state_bits": 8, "clip": None},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_kernel_and_loop_have_the_same_formats(kind, options, cpu_isa):
    """One step from the same state; the loop may round the float32 arithmetic otherwise."""
    options = {"lr": LR, "mars_type": kind, **options}
    params, twins = parameters(torch.bfloat16, SHAPES), parameters(torch.bfloat16, SHAPES)
    ours, loop = MARS(params, **options), MARS(twins, **options)
    train(params, ours, 2)
    with _library.use("reference"):
        train(twins, loop, 2)
    for p, q in zip(params, twins, strict=True):
        a, b = ours.state[p], loop.state[q]
        assert a.keys() == b.keys()
        for name in a.keys() - {"master_lo"}:  # of no meaning without the upper half
            assert a[name].dtype == b[name].dtype, name
            different = (a[name].double() - b[name].double()).abs() > 1e-5 + 1e-2 * b[name].abs()
            # a code of 8 bits or a rounding that was a close decision
            assert different.sum() <= a[name].numel() // 100, name
        torch.testing.assert_close(p.float(), q.float(), rtol=1.6e-2, atol=2 * LR)


@pytest.mark.parametrize("signed", [True, False])
def test_quantization_keeps_the_largest_and_is_near_elsewhere(signed):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3000, generator=generator) * 10 ** (
        torch.rand(3000, generator=generator) * 5 - 5
    )
    x = x if signed else x.abs()
    codes, absmax = torch.zeros(3000, dtype=torch.uint8), torch.zeros(12)
    low_bits.quantize(x, codes, absmax, signed)
    y = low_bits.dequantize(codes, absmax, signed)
    for i, block in enumerate(x.split(256)):
        assert absmax[i] == block.abs().max()
        j = int(block.abs().argmax())
        assert y[256 * i + j] == block[j]
        unit = block / absmax[i]
        large = unit.abs() > 0.1
        error = (y[256 * i : 256 * i + 256] / absmax[i] - unit).abs()
        assert error[large].max() <= (0.9 / 128 / (1 if not signed else 0.5)) / 2 * 1.01
        assert (error[~large] <= 0.5 * unit[~large].abs() + 1e-6).all()
    if not signed:
        assert (y[x > 0] > 0).all()
    again = torch.zeros_like(codes)
    low_bits.quantize(y, again, absmax, signed)
    assert torch.equal(low_bits.dequantize(again, absmax, signed), y)


def test_quantization_of_zeros_and_every_code():
    codes, absmax = torch.ones(300, dtype=torch.uint8), torch.ones(2)
    low_bits.quantize(torch.zeros(300), codes, absmax, True)
    assert (codes == 0).all() and (absmax == 0).all()
    for signed in (True, False):
        levels = low_bits.levels(signed)
        half = levels[:128] if signed else levels
        assert half[0] == 0 and half[-1] == 1 and (half.diff() > 0).all()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_resuming_equals_going_on(kind, options):
    options = {"mars_type": kind, **options}
    params = parameters(torch.bfloat16, SHAPES)
    optimizer = MARS(params, lr=1e-2, **options)
    train(params, optimizer, 3)
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), [p.detach() for p in params]], file)
    file.seek(0)
    saved, values = torch.load(file)
    twins = [torch.nn.Parameter(v) for v in values]
    resumed = MARS(twins, lr=1.0, **options)
    resumed.load_state_dict(saved)
    train(params, optimizer, 3, first=3)
    train(twins, resumed, 3, first=3)
    assert_same(everything(params, optimizer), everything(twins, resumed))


def test_a_resumed_run_keeps_its_random_bits():
    """Without a given seed, too: that of the run that was saved, not of the new process."""
    params = parameters(torch.bfloat16, [(37, 53)])
    optimizer = MARS(params, rounding="stochastic")
    train(params, optimizer, 1)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    torch.manual_seed(torch.initial_seed() + 1)
    resumed = MARS(twins, rounding="stochastic")
    resumed.load_state_dict(optimizer.state_dict())
    train(params, optimizer, 2, first=1), train(twins, resumed, 2, first=1)
    assert_same(everything(params, optimizer), everything(twins, resumed))


def test_a_checkpoint_changes_its_format():
    params = parameters(torch.float32, [(300, 40)])
    wide = MARS(params)
    train(params, wide, 3)
    narrow = MARS(params, state_bits=8)
    narrow.load_state_dict({**narrow.state_dict(), "state": wide.state_dict()["state"]})
    state, exact = narrow.state[params[0]], wide.state[params[0]]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.uint8
    m = low_bits.dequantize(state["exp_avg"], state["exp_avg_absmax"], True)
    assert (m - exact["exp_avg"]).norm() < 0.02 * m.norm()
    back = MARS(params)
    back.load_state_dict({**back.state_dict(), "state": narrow.state_dict()["state"]})
    assert torch.equal(back.state[params[0]]["exp_avg"], m)


@pytest.mark.parametrize("options", [{"state_bits": 8}, {"state_dtype": torch.bfloat16}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64], ids=str)
def test_wide_parameters_keep_wide_state(dtype, options):
    p = torch.nn.Parameter(torch.randn(80, 60).to(dtype))
    optimizer = MARS([p], **options)
    p.grad = torch.randn(80, 60).to(dtype)
    optimizer.step()
    state = optimizer.state[p]
    assert state["exp_avg"].dtype == state["last_grad"].dtype == dtype


def bytes_of_state(**options):
    p = torch.nn.Parameter(torch.zeros(512, 512, dtype=torch.bfloat16))
    optimizer = MARS([p], **options)
    p.grad = torch.randn(512, 512).bfloat16()
    optimizer.step()
    state = optimizer.state[p]
    return sum(t.numel() * t.element_size() for n, t in state.items() if n != "step") / p.numel()


def test_bytes_of_state_a_parameter():
    assert bytes_of_state() == 12
    assert bytes_of_state(amsgrad=True) == 16
    assert bytes_of_state(master="split16") == 14
    assert bytes_of_state(state_dtype=torch.bfloat16) == 6
    assert bytes_of_state(last_grad_dtype=torch.bfloat16) == 10
    assert bytes_of_state(state_bits=8) == 3 * (1 + 4 / 256)
    for kind in ("lion", "sgd", "shampoo", "m"):
        assert bytes_of_state(mars_type=kind) == 8
        assert bytes_of_state(mars_type=kind, clip=None) == 4


@pytest.mark.parametrize("options", [*list(OPTIONS.values())[:4], {}], ids=str)
def test_learns_a_regression_in_bfloat16(options):
    torch.manual_seed(0)
    x, target = torch.randn(256, 64), torch.randn(64, 8)
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 128), torch.nn.Tanh(), torch.nn.Linear(128, 8)
    ).bfloat16()
    optimizer = MARS(model.parameters(), lr=1e-2, lr_1d=1e-2, weight_decay_1d=0.0, **options)
    losses = []
    for _ in range(120):
        loss = (model(x.bfloat16()).float() - (x @ target / 8).tanh()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < (0.1 if options else 0.2) * losses[0]


def test_limit_is_that_of_float32():
    """The bound that the master runs are held to is the one of float32 parameters."""
    params = parameters(torch.bfloat16, [(37, 53)])
    exact = [torch.nn.Parameter(p.detach().double()) for p in params]
    ours, oracle = MARS(params, lr=LR, master="split16"), MARS(exact, lr=LR)
    for step in range(10):
        for p, q, g in zip(params, exact, gradients(params, step), strict=True):
            p.grad, q.grad = g, g.double()
        ours.step(), oracle.step()
    master = low_bits.join(params[0].detach(), ours.state[params[0]]["master_lo"])
    absolute, relative = LIMIT[torch.float32]
    limit = absolute + relative * exact[0].abs().max()
    assert (master.double() - exact[0]).abs().max() <= limit
