"""Deep Delta Learning in the calling style of hyper-connections: init, expand, reduce."""

import functools

from .nn_wrapper import DDLWrapper
from .ops import ddl_compress


def get_init_and_expand_reduce_stream_functions(
    value_channels, *, dim=None, disable=False, **options
):
    """(init_ddl, expand_stream, reduce_stream) for models written for hyper-connections.

        init_ddl, expand, reduce = get_init_and_expand_reduce_stream_functions(4, dim=512)
        branch = init_ddl(branch=layer)      # or init_ddl(): branch_input, add_residual = ...
        x = reduce(branch(expand(x)))

    Args:
        value_channels: d_v, in the place of the number of streams.
        dim: hidden size of every branch; None: `init_ddl(dim=...)` names it.
        disable: plain residual connections; expand and reduce return what they get.
        options: of each `DDLWrapper`.

    Returns:
        init_ddl(*, dim=dim, branch=None, **options): a `DDLWrapper`, without a branch the
        decomposed form; expand_stream(x [..., d]): the state [..., d, d_v], repeated;
        reduce_stream(X): the mean over channels, which gives back x. For d_v = 1 the last two
        change nothing.

    Raises:
        ValueError: as `DDLWrapper`.
    """
    init = functools.partial(_init, value_channels, dim, disable, options)
    if disable or value_channels == 1:
        return init, _same, _same
    return init, functools.partial(_repeat, value_channels), _mean


def _init(value_channels, default_dim, disable, defaults, *, dim=None, branch=None, **options):
    dim = default_dim if dim is None else dim
    if dim is None:
        raise ValueError("init_ddl: dim is not known, pass dim=...")
    chosen = {"disable": disable, **defaults, **options}
    return DDLWrapper(branch, dim, value_channels, **chosen)


def _same(x):
    return x


def _repeat(value_channels, x):
    return x.unsqueeze(-1).expand(*x.shape, value_channels).contiguous()


def _mean(x):
    return ddl_compress(x)
