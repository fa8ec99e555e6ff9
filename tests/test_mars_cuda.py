"""The CUDA kernels of the MARS family, on the emulator: results, races, launches, bytes moved."""

import pytest
import torch

from conftest import MODES
from mars_equations import (
    Codes,
    Numbers,
    Section,
    bits,
    call,
    clone,
    correction,
    expected,
    join,
    levels,
    random_halves,
    round_stochastic,
    squares,
    value,
)

pytestmark = pytest.mark.emulated

in_every_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
# nothing, less than a piece, around a quantum, a tail after four, two chunks
SIZES = (0, 1, 7, 255, 256, 1025, 40000)
# how p, g and h, how m, v and vmax, and the master are stored
STORAGE = {
    "float32": (torch.float32, torch.float32, "none"),
    "float64": (torch.float64, torch.float64, "none"),
    "float16": (torch.float16, torch.float32, "none"),
    "master": (torch.bfloat16, torch.float32, "fp32"),
    "split16": (torch.bfloat16, torch.float32, "split16"),
    "stochastic": (torch.bfloat16, torch.float32, "none"),
    "bfloat16 state": (torch.float32, torch.bfloat16, "none"),
    "8-bit state": (torch.bfloat16, torch.uint8, "fp32"),
}
EPS = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def stored(x, dtype, signed=True):
    return Codes(x, signed) if dtype == torch.uint8 else x.to(dtype)


def make_param(n, rule, storage="float32", flags=("corrected", "write_h"), seed=0):
    element, state, master = STORAGE[storage]
    random = torch.Generator().manual_seed(seed + n)
    p, g, h, m, v, vmax = (torch.randn(n, generator=random, dtype=torch.float64) for _ in range(6))
    scale = 1 / max(n, 1) ** 0.5  # norms near the clip
    y = {"p": p.to(element), "g": (g * scale).to(element)}
    if "corrected" in flags:
        y["h"] = stored(h * scale, torch.uint8 if state == torch.uint8 else element)
    if rule != "given":
        y["m"] = stored(m * scale, state)
    if rule != "given" or "stochastic" in flags:  # `given` looks at it for random bits
        y["step"] = torch.tensor(3.0)
    if rule == "adamw":
        y["v"] = stored((v * scale) ** 2, state, signed=False)
        if "amsgrad" in flags:
            y["vmax"] = stored((vmax * scale) ** 2, state, signed=False)
    if master == "fp32":
        y["master"] = p.float()
    if master == "split16":
        y["p"], y["master"] = split(p.float())
    return y


def split(x):
    bits = x.view(torch.int32).long() & 0xFFFFFFFF
    high = ((bits + 0x8000) >> 16 & 0xFFFF).to(torch.uint16).view(torch.bfloat16)
    return high, (bits & 0xFFFF).to(torch.uint16).view(torch.int16)


def make(rule="adamw", storage="float32", flags=None, sizes=SIZES, numbers=None, **options):
    if flags is None:
        flags = () if rule == "given" else ("corrected", "write_h")
    if storage == "stochastic":
        flags = (*flags, "stochastic")
    params = [make_param(n, rule, storage, flags) for n in sizes]
    return Section(
        params, rule, master=STORAGE[storage][2], flags=flags, numbers=numbers, **options
    )


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def check_array(name, got, want, eps=None):
    if isinstance(got, Codes):
        return check_codes(got, want)
    eps = eps or EPS[got.dtype]
    error, size = (got.double() - want).abs(), want.abs()
    scale = size.max().item() if size.numel() else 0
    smallest = 2**-25 if got.dtype == torch.float16 else 0  # half of its unit near zero
    assert (error <= eps * size + 4e-7 * scale + smallest).all(), (name, error.max())


def check_codes(got, want):
    assert torch.allclose(got.double().abs(), want.abs(), rtol=0.5, atol=1e-2)
    n = want.numel()
    blocks = torch.nn.functional.pad(want, (0, -n % 256)).view(-1, 256)
    torch.testing.assert_close(got.absmax.double(), blocks.abs().amax(1), rtol=2e-6, atol=0)
    unit = want / got.absmax.double().repeat_interleave(256)[:n]
    table = levels(got.signed)
    nearest = (unit[:, None] - table).abs().amin(1)
    if not got.signed:  # only zeros are stored as 0
        assert ((got.codes == 0) == (want == 0)).all()
        nearest = nearest.maximum(torch.where(want > 0, table[1], 0))
    assert ((table[got.codes.long()] - unit).abs() <= 1.001 * nearest + 1e-6).all()


def check_param(section, after, want):
    for name in ("m", "v", "vmax", "h", "step"):
        if name in want:  # v is rounded up or down in bfloat16
            up_or_down = name == "v" and want[name].numel() and getattr(after[name], "dtype", 0)
            eps = 2**-7 if up_or_down == torch.bfloat16 else None
            check_array(name, after[name], want[name], eps)
    p, master = after["p"], section.master
    if master == "split16":
        high, low = split(join(p, after["master"]))
        assert torch.equal(high.view(torch.int16), p.view(torch.int16))
        assert torch.equal(low, after["master"])
    if master == "fp32":
        assert torch.equal(p, after["master"].to(p.dtype))
    if "stochastic" in section:
        return check_array("p", p, want["p"], 2**-7)
    x = value(section, after) if master != "none" else p
    check_array("p", x, want["p"], EPS[torch.float32] if master != "none" else None)


def check(sections, **options):
    before = [clone(section) for section in sections]
    scale = options.get("grad_scale")
    call(sections, **options)
    number, norms = 0, options.get("norms")
    for section, old in zip(sections, before, strict=True):
        for after, param in zip(section.params, old.params, strict=True):
            norm = None if norms is None else norms[number].item()
            want = expected(old, param, norm, 1.0 if scale is None else scale.item())
            check_param(section, after, want)
            assert torch.equal(after["g"], param["g"])
            number += 1


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("rule", ("adamw", "lion", "sgd", "momentum", "given"))
def test_rules_on_all_sizes_and_storage(emulated, rule, storage):
    if rule == "momentum" and STORAGE[storage][2] != "none":
        pytest.skip("a direction has no master")
    check([make(rule, storage)])


OPTIONS = {
    "maximize": {"flags": ("corrected", "write_h", "maximize")},
    "exact": {"flags": ("corrected",)},
    "exact, maximize": {"flags": ("corrected", "maximize")},
    "amsgrad": {"flags": ("corrected", "write_h", "amsgrad")},
    "amsgrad, 8-bit": {"flags": ("corrected", "write_h", "amsgrad"), "storage": "8-bit state"},
    "amsgrad, bfloat16": {"flags": ("corrected", "amsgrad"), "storage": "bfloat16 state"},
    "no correction": {"flags": ()},
    "stateless": {"flags": ("stateless",), "rule": "sgd"},
    "stateless lion, mean": {"flags": ("stateless",), "rule": "lion", "caution": "mean"},
    "elementwise": {"caution": "elementwise"},
    "mean": {"caution": "mean"},
    "mean, float64": {"caution": "mean", "storage": "float64"},
    "mean, momentum": {"caution": "mean", "rule": "momentum"},
    "mean, unclipped": {"caution": "mean", "numbers": Numbers(clip=float("inf"))},
    "unclipped": {"numbers": Numbers(clip=float("inf"))},
    "small clip": {"numbers": Numbers(clip=1e-3)},
    "factor": {"numbers": Numbers(factor=0.3), "rule": "sgd"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(emulated, options):
    check([make(**options)])


def several(sizes=(1025, 40000)):
    return [
        make("adamw", "float32", sizes=sizes),
        make("lion", "split16", sizes=sizes, caution="mean"),
        make("sgd", "master", sizes=sizes, flags=("stateless",)),
        make("adamw", "8-bit state", sizes=sizes, flags=("corrected", "write_h", "amsgrad")),
        make("momentum", "float32", sizes=sizes, caution="mean", numbers=Numbers(clip=0.3)),
        make("adamw", "stochastic", sizes=sizes, flags=()),
        make("given", "bfloat16 state", sizes=sizes),
    ]


def test_several_sections_in_one_launch(emulated):
    with emulated.profile() as launches:
        check(several())
    assert len(launches) == 1


def test_compute_types_are_a_launch_each(emulated):
    with emulated.profile() as launches:
        check([make("adamw", "float64"), make("lion"), make("sgd", "float64")])
    assert len(launches) == 2


def test_a_large_table_goes_through_the_workspace(emulated):
    sections = [make("lion", sizes=(17,) * 190), make("adamw", sizes=(9,) * 200)]
    with emulated.profile() as launches:
        check(sections)
    assert len(launches) == 1 + 3  # 390 tensors, 173 a part


@in_every_mode
def test_several_sections_in_every_mode(emulated_with, mode):
    with emulated_with(**mode):
        check(several(sizes=(1, 300, 33000)))


@in_every_mode
def test_squares_in_every_mode(emulated_with, mode):
    with emulated_with(**mode):
        check_squares([make(sizes=(300, 40000)), make("lion", "float64", sizes=(0, 40000, 5))])


def check_squares(sections, scale=None):
    got = squares(sections, grad_scale=scale)
    c = [
        correction(section, param, 1.0 if scale is None else scale.item())[1]
        for section in sections
        for param in section.params
    ]
    torch.testing.assert_close(got, torch.stack([x.square().sum() for x in c]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("storage", STORAGE)
def test_squares(emulated, storage):
    check_squares([make(storage=storage), make("sgd", storage)], torch.tensor(4.0))
    section = make(storage="float32", sizes=(1000,))
    section.params[0]["g"] *= 1e30  # squares beyond float32
    check_squares([section])


def test_device_numbers(emulated):
    section, plain = make(), make("sgd", flags=(), sizes=(300,))
    schedule = torch.tensor([[1e-2, 0.2, 0.05], [2e-2, 0.0, 0.0]], dtype=torch.float64)
    names = ("lr", "weight_decay", "gamma")
    for x, row in zip((section, plain), schedule, strict=True):
        x.numbers = Numbers(**dict(zip(names, row.tolist(), strict=True)))
    before = [clone(section), clone(plain)]
    for x in (section, plain):
        x.numbers = Numbers(lr=9.0)
    norms = torch.linspace(0.1, 8, 8, dtype=torch.float64)
    call([section, plain], schedule, norms, torch.tensor(2.0))
    number = 0
    for x, old in zip((section, plain), before, strict=True):
        for after, param in zip(x.params, old.params, strict=True):
            check_param(x, after, expected(old, param, norms[number].item(), 2.0))
            number += 1


def test_found_inf_changes_nothing(emulated):
    sections = several()
    before = bits(sections)
    call(sections, found_inf=torch.tensor(1.0))
    assert equal(before, bits(sections))
    check(sections, found_inf=torch.tensor(0.0))


def test_steps_saturate(emulated):
    section = make(sizes=(5,))
    section.params[0]["step"] = torch.tensor(2.0**24)
    call([section])
    assert section.params[0]["step"] == 2**24


@pytest.mark.parametrize("storage", STORAGE)
def test_unaligned_arrays(emulated, storage):
    section = make(storage=storage, sizes=(1025,), flags=("corrected", "write_h", "amsgrad"))

    def shift(x):
        buffer = x.new_zeros(x.numel() + 1)
        buffer[1:] = x
        return buffer[1:]

    for name, x in section.params[0].items():
        if isinstance(x, Codes):
            x.codes = shift(x.codes)
        elif x.dim():
            section.params[0][name] = shift(x)
    check([section])


def test_transposed_arrays_are_walked_linearly(emulated):
    section = make(sizes=(24,))
    param = section.params[0]
    section.params[0] = {k: x.view(4, 6).t() if x.dim() else x for k, x in param.items()}
    check([section])


def test_nan_and_infinity(emulated):
    section = make(sizes=(300, 40000), flags=("corrected", "write_h", "amsgrad"))
    section.params[1]["g"][7] = float("nan")
    call([section])
    assert section.params[0]["p"].isfinite().all()
    for name in ("p", "m", "v", "vmax"):
        assert section.params[1][name].isnan().all()
    lion = make("lion", flags=(), sizes=(300,))
    lion.params[0]["g"][:3] = torch.tensor([float("nan"), float("inf"), 0.0])
    lion.params[0]["m"][2] = 0
    p = lion.params[0]["p"].clone()
    call([lion])
    assert lion.params[0]["p"][0].isnan() and lion.params[0]["p"][1:].isfinite().all()
    torch.testing.assert_close(lion.params[0]["p"][2], p[2] * (1 - 3e-4))


def test_equal_bits_in_every_schedule(emulated_with):
    results = []
    for seed in (0, 1, 2):
        sections = several()
        with emulated_with(seed=seed):
            call(sections, seed=5)
        results.append(bits(sections))
    assert equal(results[0], results[1]) and equal(results[0], results[2])


def test_random_rounding_is_exact(emulated):
    """The float32 result, as a master keeps it, and the bits of the generator."""
    random, master = make("adamw", "stochastic"), make("adamw", "master")
    seed = 0x123456789ABCDEF
    for a, b in zip(random.params, master.params, strict=True):
        b.update({name: x.clone() for name, x in a.items()}, master=a["p"].float())
        a["v"], b["v"] = a["v"].bfloat16(), a["v"].bfloat16().float()
    call([random], seed=seed)
    call([master], seed=seed)
    for i, (a, b) in enumerate(zip(random.params, master.params, strict=True)):
        for stream, rounded, exact in ((0, a["p"], b["master"]), (1, a["v"], b["v"])):
            halves = random_halves(seed, exact.numel(), 4, i, stream)
            assert torch.equal(rounded, round_stochastic(exact, halves))


def test_random_rounding_is_unbiased(emulated):
    x = torch.full((20000,), 1 + 2**-7 * 0.3)  # three tenths of the way between neighbours
    p, step = torch.zeros(20000, dtype=torch.bfloat16), torch.tensor(1.0)
    param = {"p": p, "g": -x, "step": step}
    numbers = Numbers(lr=1.0, weight_decay=0.0)
    call([Section([param], "given", flags=("stochastic",), numbers=numbers)], seed=3)
    upper = p == 1 + 2**-7
    assert (upper | (p == 1)).all() and step == 1
    assert abs(upper.double().mean().item() - 0.3) < 4 * (0.21 / 20000) ** 0.5


# bytes an element: what has to move, and with g and h read once more for the norm
TRAFFIC = {
    "float32": (36, 44),
    "float64": (72, 88),
    "master": (32, 36),
    "split16": (30, 34),
    "stochastic": (26, 30),
    "bfloat16 state": (28, 36),
    "8-bit state": (18.1, 23.1),  # float32 master; a lane asks for its factor
}


@pytest.mark.parametrize("storage", TRAFFIC)
def test_bytes_and_sectors(emulated_with, storage):
    n = 1 << 17
    section = make(storage=storage, sizes=(n,))
    with emulated_with(threads=1) as emulated, emulated.profile() as launches:
        call([section])  # one host thread: waiting CTAs poll the same number of times
    (launch,) = launches
    once, total = TRAFFIC[storage]
    small = 20000  # tables, counters, partial sums
    unique = launch["unique_bytes_read"] + launch["unique_bytes_written"]
    assert unique <= once * n * 1.02 + small
    assert launch["global_load_bytes"] + launch["global_store_bytes"] <= total * n * 1.02 + small
    for kind in ("load", "store"):
        ideal = launch[f"global_{kind}_sectors_ideal"]
        assert launch[f"global_{kind}_sectors"] <= 1.02 * ideal + 100, kind
    assert launch["local_loads"] == launch["local_stores"] == 0
