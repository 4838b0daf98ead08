"""Stages as ranks of torch.distributed.pipelining over gloo: a GPipe schedule, forward only, around ORT sessions.

The caller hands requests to the first rank and gets answers from the last, over pipes: torch has no caller outside
the ranks. A step of the schedule is one request; steps follow each other without a barrier, so that they overlap.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Thread

import torch
from peer import Peer, Plan, Runner, Stage, Tensors, join, main, split
from torch import distributed
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

Batch = tuple[torch.Tensor, ...]


def batch(tensors: Tensors, names: tuple[str, ...]) -> Batch:
    """Convert tensors to torch's without a copy, with a leading axis for the schedule to divide into requests."""
    return tuple(torch.from_numpy(tensors[name])[None] for name in names)


class Module(torch.nn.Module):
    """A stage as a torch module; torch and NumPy arrays share memory in both directions."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage, self.runner = stage, Runner(stage)

    def forward(self, *arrived: torch.Tensor) -> Batch:
        """Run the stage."""
        tensors = {name: tensor[0].numpy() for name, tensor in zip(self.stage.arrives, arrived, strict=True)}
        return batch(self.runner(tensors), self.stage.leaves)


def work(plan: Plan, known: Tensors, rank: int, folder: str, pipe: Connection) -> None:
    """Run a rank: a step for every message of the caller, until an empty one."""
    torch.set_num_threads(1)
    ranks, stage = len(plan.stages), plan.stages[rank]
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    given, made = batch(known, stage.arrives), batch(known, stage.leaves)
    module = Module(stage).eval()
    schedule = ScheduleGPipe(PipelineStage(module, rank, ranks, torch.device("cpu"), given, made), n_microbatches=1)
    pipe.send_bytes(b"open")
    while message := pipe.recv_bytes():
        outputs = schedule.eval(*batch(split(message), stage.arrives)) if rank == 0 else schedule.eval()
        if rank == ranks - 1:
            outputs = outputs if isinstance(outputs, tuple | list) else (outputs,)
            pipe.send_bytes(join({name: row[0].numpy() for name, row in zip(stage.leaves, outputs, strict=True)}))
    distributed.destroy_process_group()


class Ranks(Peer):
    """The caller's pipes to the ranks; a thread empties the last one, so that no rank blocks on a full pipe."""

    def __init__(self, pipes: list[Connection]) -> None:
        self.pipes = pipes
        self.answers: SimpleQueue[bytes] = SimpleQueue()
        Thread(target=self.listen, daemon=True).start()

    def listen(self) -> None:
        """Receive answers when they arrive."""
        with suppress(EOFError, OSError):
            while True:
                self.answers.put(self.pipes[-1].recv_bytes())

    def submit(self, tensors: Tensors) -> None:
        """Send one request."""
        self.pipes[0].send_bytes(join(tensors))
        for pipe in self.pipes[1:]:
            pipe.send_bytes(b"step")

    def take(self) -> Tensors:
        """Wait for the next answer."""
        return split(self.answers.get())


@contextmanager
def start(plan: Plan, known: Tensors, inflight: int) -> Iterator[Ranks]:
    """Start a rank per stage."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        ends = [spawn.Pipe() for _ in plan.stages]
        ranks = [
            spawn.Process(target=work, args=(plan, known, rank, folder, end), daemon=True)
            for rank, (_, end) in enumerate(ends)
        ]
        for rank in ranks:
            rank.start()
        pipes = [pipe for pipe, _ in ends]
        for _, end in ends:
            end.close()
        try:
            for pipe in pipes:
                pipe.recv_bytes()
            yield Ranks(pipes)
            for pipe in pipes:
                pipe.send_bytes(b"")
            for rank in ranks:
                rank.join()
        finally:
            for rank in ranks:
                rank.terminate()
                rank.join()


if __name__ == "__main__":
    main(start)
