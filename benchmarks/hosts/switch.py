"""A switch in user space: passes Ethernet frames between interfaces, with a rate, a delay and losses.

    ip netns exec NS python switch.py INTERFACE [INTERFACE ...] --rate 1e9 --delay-ms 1 --loss 0

It replaces netem for kernels without it. Each interface's frames leave one after the other at the rate, arrive after
the delay, and are dropped when the queue is longer than 100 ms. Segments whose cutting the kernel leaves to the network
card travel whole; they are lost if any of their packets is. Commands are lines on standard input: ``cut NUMBER`` and
``mend NUMBER`` of an interface, ``rate BITS``, ``delay MS``, ``loss SHARE``.
"""

from __future__ import annotations

import argparse
import heapq
import random
import select
import socket
import sys
import time

SOL_PACKET, PACKET_ADD_MEMBERSHIP, PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING = 263, 1, 15, 23
PACKET_MR_PROMISC = 1
HEADER = 10  # struct virtio_net_hdr
PACKET = 1460
OVERHEAD = 78  # overhead of a packet: Ethernet, IP, TCP, and the gap between frames
QUEUE_S = 0.1
LARGEST = 1 << 17


class Wire:
    """A switch between interfaces."""

    def __init__(self, names: list[str], rate: float, delay_s: float, loss: float) -> None:
        self.rate, self.delay_s, self.loss = rate, delay_s, loss
        self.ports = [self._open(name) for name in names]
        self.free_at = [0.0] * len(names)
        self.cut: set[int] = set()
        self.homes: dict[bytes, int] = {}
        self.due: list[tuple[float, int, int, bytes]] = []
        self.count = self.dropped = 0

    @staticmethod
    def _open(name: str) -> socket.socket:
        port = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        port.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        port.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        port.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
        port.bind((name, 0))
        index = socket.if_nametoindex(name)
        request = index.to_bytes(4, sys.byteorder) + PACKET_MR_PROMISC.to_bytes(2, sys.byteorder) + bytes(10)
        port.setsockopt(SOL_PACKET, PACKET_ADD_MEMBERSHIP, request)
        port.setblocking(False)
        return port

    def take(self, source: int, now: float) -> None:
        """Receive all waiting frames of an interface."""
        while True:
            try:
                frame = self.ports[source].recv(LARGEST)
            except BlockingIOError:
                return
            size = len(frame) - HEADER
            packets = max(1, -(-size // PACKET))
            self.homes[frame[HEADER + 6 : HEADER + 12]] = source
            begins = max(now, self.free_at[source])
            lost = self.loss and random.random() > (1 - self.loss) ** packets
            if source in self.cut or lost or begins - now > QUEUE_S:
                self.dropped += 1
                continue
            self.free_at[source] = begins + (size + packets * OVERHEAD) * 8 / self.rate
            self.count += 1
            heapq.heappush(self.due, (self.free_at[source] + self.delay_s, self.count, source, frame))

    def give(self, now: float) -> None:
        """Send the frames that are due."""
        while self.due and self.due[0][0] <= now:
            _, _, source, frame = heapq.heappop(self.due)
            home = self.homes.get(frame[HEADER : HEADER + 6])
            for number in range(len(self.ports)) if home is None else (home,):
                if number != source and number not in self.cut:
                    try:
                        self.ports[number].send(frame)
                    except OSError:
                        self.dropped += 1

    def obey(self, line: str) -> None:
        """Obey one command."""
        what, value = line.split()
        if what == "cut":
            self.cut.add(int(value))
        elif what == "mend":
            self.cut.discard(int(value))
        elif what == "rate":
            self.rate = float(value)
        elif what == "delay":
            self.delay_s = float(value) / 1000
        elif what == "loss":
            self.loss = float(value)

    def run(self) -> None:
        """Pass frames on until standard input ends."""
        poll = select.epoll()
        numbers = {port.fileno(): number for number, port in enumerate(self.ports)}
        for descriptor in (*numbers, sys.stdin.fileno()):
            poll.register(descriptor, select.EPOLLIN)
        while True:
            wait = max(0.0, self.due[0][0] - time.monotonic()) if self.due else 1.0
            for descriptor, _ in poll.poll(wait):
                if descriptor in numbers:
                    self.take(numbers[descriptor], time.monotonic())
                    continue
                line = sys.stdin.readline()
                if not line:
                    return
                self.obey(line)
                print("done", flush=True)
            self.give(time.monotonic())


def main() -> None:
    """Start the switch."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("interfaces", nargs="+")
    parser.add_argument("--rate", type=float, default=1e9, help="bits per second")
    parser.add_argument("--delay-ms", type=float, default=1.0)
    parser.add_argument("--loss", type=float, default=0.0)
    given = parser.parse_args()
    print("up", flush=True)
    Wire(given.interfaces, given.rate, given.delay_ms / 1000, given.loss).run()


if __name__ == "__main__":
    main()
