"""Weights and moments that FSDP2 has sharded over two processes are saved whole and put back as shards."""

import multiprocessing
import os
import socket

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from student_train.checkpoint import load_optimizer_state, optimizer_state, put_weights, trained_weights


class Layers(nn.Sequential):
    """As `Student` to `trained_weights`: every parameter belongs to a part."""

    def part_of(self, name: str) -> str:
        return "projector" if name.startswith("0") else "llm"


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def make(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    module = Layers(nn.Linear(6, 8), nn.Linear(8, 3))
    mesh = init_device_mesh("cpu", (2,))
    for layer in module:
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    return module, torch.optim.AdamW(module.parameters(), lr=0.1)


def walk(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    module(torch.arange(12.0).reshape(2, 6)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def work(rank: int, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    module, optimizer = make(0)
    walk(module, optimizer)
    shared = trained_weights(module, {"projector", "llm"}, keep=rank == 0)
    assert list(shared) == (["0.weight", "0.bias", "1.weight", "1.bias"] if rank == 0 else [])
    weights = {name: value.clone() for name, value in trained_weights(module, {"projector", "llm"}).items()}
    moments = {name: value.clone() for name, value in optimizer_state(optimizer, module).items()}
    assert not any(isinstance(value, DTensor) for value in (*weights.values(), *moments.values()))
    assert weights["0.weight"].shape == moments["0.weight|exp_avg"].shape == (8, 6)
    walk(module, optimizer)

    other, fresh = make(1)
    put_weights(other, weights)
    load_optimizer_state(fresh, other, moments)
    walk(other, fresh)
    for ours, theirs in zip(module.parameters(), other.parameters(), strict=True):
        assert isinstance(theirs, DTensor)
        assert ours.to_local().equal(theirs.to_local())
    distributed.barrier()  # who leaves first must not pull the connection from under the other
    distributed.destroy_process_group()
    os._exit(0)  # torch's threads now and then abort an interpreter that takes itself apart


@pytest.mark.slow
def test_sharded_state_goes_on_bit_for_bit():
    context, port = multiprocessing.get_context("spawn"), free_port()
    processes = [context.Process(target=work, args=(rank, port)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
