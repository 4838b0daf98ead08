"""Stages as bare processes in a ring of ZeroMQ PUSH and PULL sockets over ipc, without any guarantees."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import zmq
from peer import Peer, Plan, Runner, Stage, Tensors, main, pack, unpack


def sockets(context: zmq.Context, source: str, sink: str) -> tuple[zmq.Socket, zmq.Socket]:
    """A PULL socket that others reach at `source`, and a PUSH socket to `sink`."""
    pull, push = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    pull.bind(source)
    push.connect(sink)
    return pull, push


def receive(pull: zmq.Socket) -> Tensors:
    """Receive the tensors of the next message, or none at the end; they share the message's memory."""
    frames = [frame.buffer for frame in pull.recv_multipart(copy=False)]
    return unpack(frames) if len(frames[0]) else {}


def work(stage: Stage, source: str, sink: str) -> None:
    """Run a stage until the empty message, which is passed on."""
    run = Runner(stage)
    with zmq.Context() as context:
        pull, push = sockets(context, source, sink)
        with pull, push:
            while tensors := receive(pull):
                push.send_multipart(pack(run(tensors)), copy=False)
            push.send(b"")


class Ring(Peer):
    """The caller's end of the ring."""

    def __init__(self, pull: zmq.Socket, push: zmq.Socket) -> None:
        self.pull, self.push = pull, push

    def submit(self, tensors: Tensors) -> None:
        """Send one request."""
        self.push.send_multipart(pack(tensors), copy=False)

    def take(self) -> Tensors:
        """Wait for the next answer."""
        return receive(self.pull)


@contextmanager
def start(plan: Plan, known: Tensors, inflight: int) -> Iterator[Ring]:
    """Start a process per stage; the caller is between the last and the first."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, zmq.Context() as context:
        at = [f"ipc://{folder}/{index}" for index in range(len(plan.stages) + 1)]
        stages = [
            spawn.Process(target=work, args=(stage, at[index], at[index + 1]), daemon=True)
            for index, stage in enumerate(plan.stages)
        ]
        for process in stages:
            process.start()
        pull, push = sockets(context, at[-1], at[0])
        with pull, push:
            try:
                yield Ring(pull, push)
                push.send(b"")
                while receive(pull):
                    pass
                for process in stages:
                    process.join()
            finally:
                for process in stages:
                    process.terminate()
                    process.join()
                context.destroy(linger=0)


if __name__ == "__main__":
    main(start)
