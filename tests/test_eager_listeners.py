"""Who else may listen to an operator in eager mode finds it as torch.library has it (_eager.py)."""

import threading

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from deltafuse import _eager, _library, gated_delta
from eager_cases import (
    assert_same,
    both,
    boundary,
    call,
    error_of,
    every_case,
    gradients,
    inputs_of,
    no_grad,
    normal,
)


@every_case
def test_hooks_of_saved_tensors(name, registered):
    def run():
        packed, unpacked = [], []

        def pack(t):
            packed.append((t.shape, t.dtype))
            return t

        def unpack(t):
            unpacked.append((t.shape, t.dtype))
            return t

        inputs = inputs_of(name)
        with saved_tensors_hooks(pack, unpack):
            outputs = call(name, inputs)
        gradients(outputs, inputs)
        return packed, unpacked

    ours, theirs = both(registered, run)
    assert ours == theirs and len(ours[0]) == len(ours[1])
    assert ours[0] or name == "cumulative_phase"


def test_checkpoint(registered):
    def run():
        inputs = inputs_of("ddl_boundary")
        return gradients(checkpoint(boundary, *inputs, use_reentrant=False), inputs)

    ours, theirs = both(registered, run)
    assert_same(ours, theirs)
    inputs = inputs_of("ddl_boundary")
    assert_same(ours, gradients(boundary(*inputs), inputs))


@pytest.mark.parametrize("name", ["ddl_boundary", "rotary_qk", "gated_rms_norm"])
def test_compiled_autograd(name):
    """The backward of a call in eager mode, compiled."""
    inputs = inputs_of(name)
    compiler = torch.compile(backend="eager", fullgraph=True)
    with torch._dynamo.compiled_autograd._enable(compiler):
        compiled = gradients(call(name, inputs), inputs)
    assert_same(compiled, gradients(call(name, inputs), inputs))


def test_another_thread():
    found = []

    def run():
        inputs = inputs_of("l2norm")
        found.append((_eager._is_heard(inputs), gradients(call("l2norm", inputs), inputs)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    ((heard, grads),) = found
    inputs = inputs_of("l2norm")
    assert not heard
    assert_same(grads, gradients(call("l2norm", inputs), inputs))


def test_autocast(registered):
    def run():
        inputs = inputs_of("chunk_gated_delta_rule")
        with torch.autocast("cpu", torch.bfloat16):
            outputs = call("chunk_gated_delta_rule", inputs)
        assert outputs[0].dtype == torch.bfloat16
        return [*outputs, *gradients(outputs, inputs)]

    assert_same(*both(registered, run))


@every_case
def test_inference_mode(name):
    inputs = inputs_of(name)
    with torch.inference_mode():
        outputs = call(name, inputs)
    assert all(out.is_inference() and not out.requires_grad for out in outputs)
    assert_same([out.clone() for out in outputs], no_grad(name))


class Recorder(TorchDispatchMode):
    """The names of the package's operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "deltafuse":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def test_modes_see_the_operators():
    inputs = inputs_of("l2norm")
    with Recorder() as seen:
        gradients(call("l2norm", inputs), inputs)
    assert seen.names == ["l2norm_fwd", "l2norm_bwd"]

    class Functions(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            names.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    names = []
    with Functions():
        assert call("l2norm", inputs)[0].requires_grad
    assert "l2norm_fwd.default" in names or "l2norm_fwd" in names


class Doubling(torch.Tensor):
    """A subclass with an l2norm of its own, which autograd has to record."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is _library.kernel("l2norm_fwd", torch.empty(0)).default:
            with torch._C.DisableTorchFunctionSubclass():
                return 2 * args[0]
        return super().__torch_function__(func, types, args, kwargs or {})


def test_subclasses_see_the_operators(registered):
    def run():
        x = normal(2, 4).requires_grad_()
        y = gated_delta.l2norm(x.as_subclass(Doubling))
        return [y.detach(), *gradients([y], [x])]

    ours, theirs = both(registered, run)
    assert_same(ours, theirs)
    assert torch.equal(ours[0], 2 * normal(2, 4))


def transformed(transform, name):
    """What a transform of torch.func gives for the first input, or how it fails."""
    first, *others = inputs_of(name, False)

    def function(t):
        return call(name, [t, *others])[0].sum()

    found = []
    error = error_of(lambda: found.append(transform(function)(first)))
    return error, found


@every_case
@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_transforms(name, transform, registered):
    transforms = {
        "grad": torch.func.grad,
        "vmap": lambda f: torch.func.vmap(lambda t: call_batched(name, t)),
        "jvp": lambda f: lambda t: torch.func.jvp(f, (t,), (t,))[1],
    }
    ours, theirs = both(registered, lambda: transformed(transforms[transform], name))
    assert ours[0] == theirs[0]
    assert_same(ours[1], theirs[1])


def call_batched(name, t):
    first, *others = inputs_of(name, False)
    return call(name, [first + t.sum(), *others])[0]


def test_a_tensor_that_functorch_left_behind(registered):
    def run():
        leaked = []
        torch.func.grad(lambda t: leaked.append(t) or t.sum())(normal(2, 8))
        y = gated_delta.l2norm(leaked[0])
        x = normal(2, 8).requires_grad_()
        dead = gated_delta.gated_rms_norm(x, torch.ones(8), leaked[0])
        return [y + 0, dead.detach(), *gradients([dead], [x])]

    assert_same(*both(registered, run))


def test_below_autograd_nothing_is_recorded(registered):
    """As within the implementation of an operator that calls ours."""

    def run():
        x = normal(2, 8).requires_grad_()
        with torch._C._AutoDispatchBelowAutograd():
            return gated_delta.l2norm(x)

    ours, theirs = both(registered, run)
    assert not ours.requires_grad and not theirs.requires_grad
    assert torch.equal(ours, theirs)


def test_when_the_shortcut_is_taken():
    args, heard = (normal(2),), []

    def ask(result):
        heard.append(_eager._is_heard(args))
        return result

    fake = torch._subclasses.FakeTensorMode()
    for context in (fake, Recorder(), torch.inference_mode(), torch.device("cpu")):
        with context:
            ask(None)
    with torch._C._AutoDispatchBelowAutograd():
        ask(None)
    torch.func.grad(lambda t: ask(t.sum()))(normal(2))
    torch.func.vmap(lambda t: ask(t))(normal(2))
    torch.func.functionalize(lambda t: ask(t))(normal(2))
    torch.jit.trace(lambda t: ask(t + 1), normal(2), check_trace=False)
    make_fx(lambda t: ask(t + 1), pre_dispatch=True)(normal(2))
    make_fx(lambda t: ask(t + 1))(normal(2))
    assert heard == [True] * 11
    for context in (torch.no_grad(), torch.enable_grad(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            assert not _eager._is_heard(args)


def test_operators_answer_in_their_namespace(emulator):
    """The operator of another library is another object, and so is its gradient's."""
    tensor = torch.empty(0)
    native = _library.kernel("l2norm_fwd", tensor)
    with _library.use("cuda-emulated-sm80"):
        emulated = _library.kernel("l2norm_fwd", tensor)
    assert native.default.namespace == "deltafuse"
    assert emulated.default.namespace == "deltafuse_emulated_sm80"
    with _library.use("reference"):
        assert _library.kernel("l2norm_fwd", tensor) is None


def test_a_torch_without_the_private_names(monkeypatch):
    assert not _eager._is_heard(())
    monkeypatch.setattr(_eager, "AVAILABLE", False)
    assert _eager._is_heard(())
