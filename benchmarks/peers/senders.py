"""Senders of one tensor to a process, each timed from the send until the receiver has it.

    python senders.py zmq-ipc|zmq-tcp|datagram|iceoryx2|ray SIZE

Says ``ready``; then, for every line with a number, sends as often, one at a time, and answers with a JSON list of
microseconds. Both ends read the same monotonic clock.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

Send = Callable[[], float]


def zmq_receiver(address: str, back: str) -> None:
    """Print the address, then answer each message with the time of its arrival."""
    import zmq

    context = zmq.Context()
    pull, push = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    pull.bind(address)
    push.connect(back)
    push.send(pull.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0"))
    while True:
        frames = pull.recv_multipart(copy=False)
        push.send(time.monotonic_ns().to_bytes(8, "little"))
        del frames


@contextmanager
def zmq_sender(kind: str, size: int) -> Iterator[Send]:
    """Sends from PUSH to PULL, without a copy where that is faster."""
    import zmq

    with tempfile.TemporaryDirectory() as folder:
        back = f"ipc://{folder}/here"
        context = zmq.Context()
        pull, push = context.socket(zmq.PULL), context.socket(zmq.PUSH)
        pull.rcvtimeo = 30_000  # an error when the receiver does not answer
        pull.bind(back)
        address = "tcp://127.0.0.1:*" if kind == "zmq-tcp" else f"ipc://{folder}/there"
        process = multiprocessing.Process(target=zmq_receiver, args=(address, back), daemon=True)
        process.start()
        push.connect(pull.recv().decode())
        payload = np.ones(size, np.uint8)

        def send() -> float:
            begun = time.monotonic_ns()
            push.send_multipart([b"header", payload.data], copy=size < 65536)
            return (int.from_bytes(pull.recv(), "little") - begun) / 1e3

        yield send
        process.terminate()
        process.join()
        context.destroy(linger=0)


def datagram_receiver(path: str, answers) -> None:
    """Receives datagrams and reports the times."""
    receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    receiver.bind(path)
    answers.send_bytes(bytes(8))
    room = bytearray(1 << 16)
    while True:
        receiver.recv_into(room)
        answers.send_bytes(time.monotonic_ns().to_bytes(8, "little"))


@contextmanager
def datagram_sender() -> Iterator[Send]:
    """Sends a Unix datagram of 200 bytes, the size of a header: the least that a hop in shared memory needs."""
    with tempfile.TemporaryDirectory() as folder:
        here, there = multiprocessing.Pipe()
        path = f"{folder}/there"
        process = multiprocessing.Process(target=datagram_receiver, args=(path, there), daemon=True)
        process.start()
        taken(here)
        sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        sender.connect(path)

        def send() -> float:
            begun = time.monotonic_ns()
            sender.send(bytes(200))
            return (taken(here) - begun) / 1e3

        yield send
        process.terminate()
        process.join()


def iceoryx_node(name: str):
    """A node of iceoryx2 with a data service and an event beside it."""
    import iceoryx2 as iox2

    iox2.set_log_level(iox2.LogLevel.Error)
    node = iox2.NodeBuilder.new().create(iox2.ServiceType.Ipc)
    data = (
        node.service_builder(iox2.ServiceName.new(name)).publish_subscribe(iox2.Slice[ctypes.c_uint8]).open_or_create()
    )
    event = node.service_builder(iox2.ServiceName.new(f"{name}/bell")).event().open_or_create()
    return node, data, event


def iceoryx_receiver(name: str, answers) -> None:
    """Waits for the event, takes the sample, and reports the time."""
    import iceoryx2 as iox2

    _node, data, event = iceoryx_node(name)
    subscriber = data.subscriber_builder().create()
    listener = event.listener_builder().create()
    answers.send_bytes(bytes(8))
    while True:
        listener.timed_wait(iox2.Duration.from_secs(1))
        while (sample := subscriber.receive()) is not None:
            now = time.monotonic_ns()
            del sample
            answers.send_bytes(now.to_bytes(8, "little"))


def taken(answers) -> int:
    """Return the time at which the receiver had it; raise an error if it does not answer."""
    if not answers.poll(30):
        raise TimeoutError("the receiver does not answer")
    return int.from_bytes(answers.recv_bytes(), "little")


@contextmanager
def iceoryx_sender(size: int) -> Iterator[Send]:
    """Loans the receiver's memory and sends it unwritten, as if a session had written it."""
    name = f"onnxsplit/hop/{os.getpid()}"
    _node, data, event = iceoryx_node(name)
    publisher = data.publisher_builder().initial_max_slice_len(size).create()
    notifier = event.notifier_builder().create()
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=iceoryx_receiver, args=(name, there), daemon=True)
    process.start()
    taken(here)

    def send() -> float:
        begun = time.monotonic_ns()
        publisher.loan_slice_uninit(size).assume_init().send()
        notifier.notify()
        return (taken(here) - begun) / 1e3

    yield send
    process.terminate()
    process.join()


@contextmanager
def ray_sender(size: int) -> Iterator[Send]:
    """Calls an actor with the tensor and measures the time until the call arrives."""
    os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    import ray

    class Receiver:
        def take(self, payload) -> int:  # noqa: ARG002  it is the way that counts
            return time.monotonic_ns()

    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        ray.init(address="local", num_cpus=2, include_dashboard=False, _temp_dir=folder, object_store_memory=1 << 30)
        actor = ray.remote(num_cpus=0)(Receiver).remote()
        payload = np.ones(size, np.uint8)

        def send() -> float:
            begun = time.monotonic_ns()
            return (ray.get(actor.take.remote(payload)) - begun) / 1e3

        send()
        yield send
        ray.shutdown()


def main() -> None:
    """Serve one kind."""
    kind, size = sys.argv[1], int(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what else prints must not mix with the answers
    senders = {"datagram": datagram_sender, "iceoryx2": lambda: iceoryx_sender(size), "ray": lambda: ray_sender(size)}
    with senders.get(kind, lambda: zmq_sender(kind, size))() as send:
        print("ready", file=answers)
        for line in sys.stdin:
            print(json.dumps([send() for _ in range(int(line))]), file=answers)


if __name__ == "__main__":
    main()
