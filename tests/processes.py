"""Functions in several processes that form a group of gloo."""

import os
import socket

import torch
import torch.multiprocessing as mp


def join(rank, port, world):
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    torch.set_num_threads(1)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def in_processes(function, world=2):
    """What function(rank, world, results) writes to the dict `results` in each of the processes."""
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_run, (function, free_port(), world, results), nprocs=world)
        return dict(results)


def _run(rank, function, port, world, results):
    join(rank, port, world)
    function(rank, world, results)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    # without finalizing Python: gloo's threads still release tensors now and then, and an
    # interpreter that is ending aborts a thread that asks for it
    os._exit(0)
