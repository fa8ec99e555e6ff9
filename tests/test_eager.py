"""The shortcut of eager mode (_eager.py) against the operators as torch.library has them."""

import torch
from torch.autograd import forward_ad

from deltafuse import _library, ddl, gated_delta
from eager_cases import (
    CASES,
    assert_same,
    both,
    call,
    error_of,
    every_case,
    gradients,
    inputs_of,
    no_grad,
    normal,
)


@every_case
def test_results_and_gradients(name, registered):
    def run():
        inputs = inputs_of(name)
        outputs = call(name, inputs)
        node = outputs[0].grad_fn
        return [*outputs, *gradients(outputs, inputs)], [out.requires_grad for out in outputs], node

    (ours, flags, node), (theirs, expected, registered_node) = both(registered, run)
    assert_same(ours, theirs)
    assert flags == expected and node.name() == registered_node.name()


@every_case
def test_results_without_gradients(name, registered):
    def run():
        return [*call(name, inputs_of(name, False)), *no_grad(name)]

    ours, theirs = both(registered, run)
    assert_same(ours, theirs)
    assert not any(out.requires_grad for out in ours)


@every_case
def test_each_input_alone(name, registered):
    def run():
        found = []
        for i in range(len(CASES[name][1])):
            inputs = inputs_of(name, False)
            inputs[i].requires_grad_()
            outputs = [out for out in call(name, inputs) if out.requires_grad]
            torch.autograd.backward(outputs, [normal(*out.shape).to(out.dtype) for out in outputs])
            assert [t.grad is not None for t in inputs] == [j == i for j in range(len(inputs))]
            found.append(inputs[i].grad)
        return found

    assert_same(*both(registered, run))


def test_a_result_that_nobody_used(registered):
    """set_materialize_grads(False): None reaches the backward, not zeros."""

    def run():
        inputs = inputs_of("chunk_gated_delta_rule")
        o, state = call("chunk_gated_delta_rule", inputs)
        return [
            *gradients([state], inputs, retain_graph=True, allow_unused=True),
            *gradients([o], inputs),
        ]

    assert_same(*both(registered, run))


def test_emulated(emulated, registered):
    def run():
        inputs = inputs_of("l2norm")
        return gradients(call("l2norm", inputs), inputs)

    assert_same(*both(registered, run))


# What autograd refuses


@every_case
def test_double_backward_is_refused(name, registered):
    def run():
        inputs = inputs_of(name)
        outputs = call(name, inputs)
        incoming = [normal(*out.shape).to(out.dtype).requires_grad_() for out in outputs]
        grads = torch.autograd.grad(outputs, inputs, incoming, create_graph=True)
        total = sum(g.square().sum() for g in grads)
        return error_of(lambda: gradients([total], incoming))

    ours, theirs = both(registered, run)
    assert ours == theirs
    assert ours[0] is RuntimeError and "gradient of the gradient is not implemented" in ours[1]


@every_case
def test_changes_in_place_are_detected(name, registered):
    def run():
        inputs = inputs_of(name)
        at = 0 if name == "ddl_expand" else len(inputs) - 1  # of its weight a copy is saved
        changed = inputs[at].clone()
        outputs = call(name, [*inputs[:at], changed, *inputs[at + 1 :]])
        changed.add_(1)
        return error_of(lambda: gradients(outputs, inputs[at]))

    ours, theirs = both(registered, run)
    if name == "cumulative_phase":  # which saves nothing
        assert ours is theirs is None
    else:
        assert ours[0] is theirs[0] is RuntimeError
        assert all("modified by an inplace operation" in text for _, text in (ours, theirs))


def test_a_result_may_be_changed_in_place(registered):
    def run():
        (x,) = inputs_of("l2norm")
        y = gated_delta.l2norm(x)
        y.mul_(2)
        return gradients([y], [x])

    assert_same(*both(registered, run))


def test_marked_results_are_not_differentiable():
    x, k, v, beta, read, norm, W_v, W_beta = inputs_of("ddl_boundary")
    rows = (x.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), beta.flatten())
    op = _library.kernel("ddl_boundary_fwd", x)
    numbers = (0, 1e-5, 1e-5, 4.0, ddl.raw.Options(norm=True).flags(True))
    *results, saved = op(*rows, None, read, norm, W_v, None, W_beta, None, *numbers)
    assert all(t.requires_grad for t in results) and not saved.requires_grad


@every_case
def test_forward_mode_is_refused(name, registered):
    def run():
        with forward_ad.dual_level():
            inputs = inputs_of(name)
            inputs[0] = forward_ad.make_dual(inputs[0], torch.ones_like(inputs[0]))
            return error_of(lambda: call(name, inputs))

    ours, theirs = both(registered, run)
    assert ours == theirs and issubclass(ours[0], RuntimeError)
