"""DTensor parameters: local shards, and norms over all of them with one collective."""

import torch


def is_sharded(t):
    return hasattr(t, "placements")


def local(t):
    """The shard on this rank, without copying; any other tensor as it is."""
    return t.to_local() if is_sharded(t) else t


def check_placements(name, p):
    """ValueError for a parameter whose shards do not add up to it."""
    for placement in p.placements:
        if placement.is_partial():
            raise ValueError(f"MARS: {name} is a DTensor with the placement {placement}")


def _groups(t):
    """Process groups over which the shards of a DTensor together are the tensor."""
    return tuple(
        t.device_mesh.get_group(dim)
        for dim, placement in enumerate(t.placements)
        if placement.is_shard()
    )


def add_shards(squares, tensors):
    """squares [n], of this rank's shards of n tensors, summed over the ranks that share each.

    One all-reduce for each set of process groups; a mesh of one dimension is one such set.
    """
    kinds = {}
    for i, t in enumerate(tensors):
        if is_sharded(t) and _groups(t):
            kinds.setdefault(_groups(t), []).append(i)
    single = list(squares.unbind())
    for groups, indices in kinds.items():
        part = torch.stack([single[i] for i in indices])
        for group in groups:
            torch.distributed.all_reduce(part, group=group)
        for i, total in zip(indices, part.unbind(), strict=True):
            single[i] = total
    return torch.stack(single)


def gathered(shard, like):
    """The whole tensor of which this is the local shard; laid out as the DTensor `like`."""
    from torch.distributed.tensor import DTensor

    whole = DTensor.from_local(
        shard, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
    )
    return whole.full_tensor()


def shard_of(whole, like):
    """This rank's part of a whole tensor that every rank has."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        whole, like.device_mesh, like.placements, src_data_rank=None
    ).to_local()
