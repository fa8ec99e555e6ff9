"""Calls of a differentiable operator in eager mode, without torch.library's machinery.

`torch.library.register_autograd` gives an operator a gradient that holds everywhere: in compiled
code, under functorch, while somebody traces. Its price is a walk through the dispatcher to Python
and back and an autograd.Function that reads the schema, which cost more than a small kernel. Where
nothing but autograd listens to the call, `Operator` has the same setup_context and backward in an
autograd.Function of its own, or calls the kernel at once if no gradient is asked for.
"""

import torch
from torch._C import DispatchKey, DispatchKeySet
from torch.overrides import has_torch_function

try:
    from torch._C import (
        _any_requires_grad,
        _AutoDispatchBelowAutograd,
        _dispatch_tls_is_dispatch_key_excluded,
        _dispatch_tls_local_include_set,
    )
except ImportError:  # private names: a torch without one of them keeps the registered path
    AVAILABLE = False
else:
    AVAILABLE = True

# What a thread adds to the keys of its tensors where nobody listens: modes, functorch, tracing and
# functionalisation all add a key of their own, inference mode takes one away.
_PLAIN = DispatchKeySet(DispatchKey.BackendSelect).add(DispatchKey.ADInplaceOrView)


class Operator:
    """An operator with its gradient; called with all arguments by position.

    Attributes:
        default: the operator with the gradient of `torch.library`.
    """

    __slots__ = ("_apply", "default")

    def __init__(self, overload, setup_context, backward):
        """setup_context and backward are those of `torch.library.register_autograd`."""
        self.default = overload
        self._apply = _apply_of(overload, setup_context, backward)

    def __call__(self, *args):
        if _is_heard(args):
            return self.default(*args)
        if torch.is_grad_enabled() and _any_requires_grad(*args):
            return self._apply(*args)
        with _AutoDispatchBelowAutograd():
            return self.default(*args)


def _is_heard(args):
    """Whether something else than autograd listens to a call with these arguments."""
    return (
        not AVAILABLE
        or torch.compiler.is_compiling()
        or has_torch_function(args)  # of a tensor among them, or of a mode
        or _dispatch_tls_local_include_set() != _PLAIN
        # within a mode's handler or an operator autograd is off, whatever the grad mode says
        or _dispatch_tls_is_dispatch_key_excluded(DispatchKey.AutogradFunctionality)
    )


def _apply_of(overload, setup_context, backward):
    """`apply` of an autograd.Function, without its search for what functorch left behind."""

    def forward(ctx, *args):
        with _AutoDispatchBelowAutograd():
            output = overload(*args)
            setup_context(ctx, args, output)
        return output

    def backwards(ctx, *grads):  # a function, as compiled autograd wants it
        return backward(ctx, *grads)

    name = f"GeneratedBackwardFor_{overload.namespace}_{overload._opname}_default"
    members = {"forward": staticmethod(forward), "backward": staticmethod(backwards)}
    function = type(name, (torch.autograd.Function,), members)
    return super(torch.autograd.Function, function).apply
