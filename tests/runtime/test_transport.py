from __future__ import annotations

import socket
import threading

import numpy as np
import pytest
from waiting import wait_until

from runtime.errors import PipelineError
from runtime.wire.links import Inlet
from runtime.wire.security import Security, check_address, new_key_pair
from runtime.wire.sockets import Sockets
from runtime.wire.wakeup import Wakeup


@pytest.mark.parametrize(
    "address",
    ["ipc:///tmp/x", "tcp://127.0.0.1:5555", "tcp://127.0.0.9:*", "tcp://[::1]:5", "tcp://localhost:1"],
)
def test_addresses_of_this_host_are_allowed(address):
    check_address(address)


@pytest.mark.parametrize(
    "address", ["tcp://0.0.0.0:5", "tcp://*:5", "tcp://10.0.0.1:5", "tcp://example.org:5", "tcp://[::]:5"]
)
def test_addresses_that_leave_the_host_are_refused(address):
    with pytest.raises(PipelineError, match="leaves this host, and there are no keys"):
        check_address(address)


@pytest.mark.parametrize(
    "address", ["", "x", "udp://127.0.0.1:5", "tcp://127.0.0.1", "tcp://127.0.0.1:x", "tcp://127.0.0.1:65536", "ipc://"]
)
def test_malformed_addresses_are_refused(address):
    with pytest.raises(PipelineError, match="expected tcp://HOST:PORT"):
        check_address(address)


def receive(sockets: Sockets, inlet: Inlet):
    while (message := inlet.receive(sockets.wait(60))) is None:
        pass
    return bytes(message[0]), message[1]


@pytest.mark.parametrize("kind", ["ipc", "tcp"])
@pytest.mark.parametrize("size", [0, 10, 100_000, 3_000_000])
def test_frames_arrive_as_they_were_sent(tmp_path, kind, size):
    payload = np.random.default_rng(0).integers(0, 255, size, dtype=np.uint8)
    with Sockets() as sockets:
        inlet = sockets.inlet(f"ipc://{tmp_path}/s" if kind == "ipc" else "tcp://127.0.0.1:*")
        sockets.connect(inlet.address).send(b"header", [payload, b"tail"])
        header, frames = receive(sockets, inlet)
        assert header == b"header"
        assert bytes(frames[0]) == payload.tobytes()
        assert bytes(frames[1]) == b"tail"
    assert list(tmp_path.iterdir()) == []


def test_a_message_sent_before_the_other_side_is_there_arrives(tmp_path):
    address = f"ipc://{tmp_path}/late"
    with Sockets() as early, Sockets() as late:
        early.connect(address).send(b"hello")
        assert receive(late, late.inlet(address))[0] == b"hello"


def test_the_shortcut_takes_what_needs_no_frames_and_zmq_the_rest(tmp_path):
    with Sockets() as sockets:
        inlet = sockets.inlet(f"ipc://{tmp_path}/s", shortcut=tmp_path / "short")
        outlet = sockets.connect(inlet.address, shortcut=str(tmp_path / "short"))
        outlet.send(b"alone")
        outlet.send(b"with", [b"frame"])
        outlet.send(bytes(900_000))
        received = sorted((len(header), len(frames)) for header, frames in (receive(sockets, inlet) for _ in range(3)))
        assert received == [(4, 1), (5, 0), (900_000, 0)]
    assert list(tmp_path.iterdir()) == []


def test_what_finds_the_shortcut_s_queue_full_arrives_all_the_same(tmp_path):
    with Sockets() as sockets:
        inlet = sockets.inlet(f"ipc://{tmp_path}/s", shortcut=tmp_path / "short")
        outlet = sockets.connect(inlet.address, shortcut=str(tmp_path / "short"))
        for number in range(500):
            outlet.send(b"%d" % number)
        assert sorted(int(receive(sockets, inlet)[0]) for _ in range(500)) == list(range(500))


def test_a_shortcut_that_is_not_there_is_not_needed(tmp_path):
    with Sockets() as sockets:
        inlet = sockets.inlet(f"ipc://{tmp_path}/s")
        sockets.connect(inlet.address, shortcut=str(tmp_path / "nothing")).send(b"hello")
        assert receive(sockets, inlet)[0] == b"hello"


def test_an_address_in_use_is_an_error_that_says_so():
    with Sockets() as sockets:
        taken = sockets.inlet("tcp://127.0.0.1:*").address
        with pytest.raises(PipelineError, match=r"(?i)in use.*another address"):
            sockets.inlet(taken)


def test_a_ring_wakes_the_waiting_thread():
    with Sockets() as sockets:
        wakeup = Wakeup()
        sockets.watch(wakeup.fileno())
        assert sockets.wait(0) == set()
        wakeup.ring()
        wakeup.ring()
        assert sockets.wait(60) == {wakeup.fileno()}
        wakeup.clear()
        assert sockets.wait(0) == set()
        wakeup.close()


def test_what_comes_in_while_sending_is_not_overlooked(tmp_path):
    """ZeroMQ's descriptor is edge-triggered, and a send may consume the notification."""
    with Sockets() as here, Sockets() as there:
        inlet = here.answering(f"ipc://{tmp_path}/s")
        outlet = there.connect(inlet.address, receive=True)
        for number in range(200):
            outlet.send(b"ask %d" % number)
            while (message := inlet.receive()) is None:
                assert here.wait(60)
            inlet.send(message[0], b"answer")
            outlet.send(b"more")  # possibly after the answer arrived
            while outlet.receive() is None:
                assert there.wait(60), number
            while inlet.receive() is None:
                assert here.wait(60), number


def test_a_link_tells_when_it_is_connected_and_when_it_is_not():
    with Sockets() as sockets:
        other = Sockets()
        inlet = other.inlet("tcp://127.0.0.1:*")
        outlet = sockets.connect(inlet.address)
        wait_until(lambda: outlet.connected)
        other.__exit__()
        wait_until(lambda: not outlet.connected)
        with Sockets() as again:
            again.inlet(inlet.address)
            wait_until(lambda: outlet.connected)
        outlet.close()
        assert sockets.connect(inlet.address).connected is False


@pytest.fixture
def pairs():
    return new_key_pair(), new_key_pair()


def test_what_is_sent_before_the_other_side_learns_the_key_arrives_afterwards(pairs):
    """Before, ZeroMQ never tried again, and the sender ended at its next message."""
    own, theirs = pairs
    known: set[str] = set()
    with (
        Sockets(security=Security(own, allows=known.__contains__, learns=True)) as here,
        Sockets(security=Security(theirs)) as there,
    ):
        inlet = here.inlet("tcp://127.0.0.1:*")
        outlet = there.connect(inlet.address, key=own.public)
        for number in range(3):
            outlet.send(b"%d" % number, [b"tensor"])
            here.wait(0.4)
            assert inlet.receive({inlet.raw}) is None
        assert not outlet.connected
        known.add(theirs.public)
        assert [receive(here, inlet)[0] for _ in range(3)] == [b"0", b"1", b"2"]
        assert outlet.connected


def test_what_arrives_over_an_open_link_whose_key_was_revoked_is_dropped(pairs):
    own, theirs = pairs
    others, revoked = new_key_pair(), set()
    security = Security(own, allows=lambda _: True, revoked=lambda: frozenset(revoked))
    with (
        Sockets(security=security) as here,
        Sockets(security=Security(theirs)) as there,
        Sockets(security=Security(others)) as elsewhere,
    ):
        inlet = here.inlet("tcp://127.0.0.1:*")
        outlets = [sockets.connect(inlet.address, key=own.public) for sockets in (there, elsewhere)]
        for outlet in outlets:
            outlet.send(b"first", [b"tensor"])
        assert [receive(here, inlet)[0] for _ in range(2)] == [b"first"] * 2
        revoked.add(theirs.public)
        for number in range(3):
            for outlet in outlets:
                outlet.send(b"%d from %d" % (number, outlets.index(outlet)), [b"tensor", b"tail"])
        assert [receive(here, inlet)[0] for _ in range(3)] == [b"0 from 1", b"1 from 1", b"2 from 1"]
        assert inlet.receive(here.wait(0.5)) is None


def test_messages_to_a_process_that_refuses_the_key_are_dropped(pairs):
    own, theirs = pairs
    with Sockets(security=Security(own)) as here, Sockets(security=Security(theirs)) as there:
        inlet = here.inlet("tcp://127.0.0.1:*")
        outlet = there.connect(inlet.address, receive=True, key=own.public)
        wait_until(lambda: outlet.refused() is not None)
        outlet.send(b"header")
        outlet.send(b"header", [b"tensor"])
        assert inlet.receive({inlet.raw}) is None


def test_a_link_whose_other_side_hangs_up_at_once_is_not_connected():
    with socket.create_server(("127.0.0.1", 0)) as refusing, Sockets() as sockets:
        done = threading.Event()

        def refuse() -> None:
            for _ in range(5):
                refusing.accept()[0].close()
            done.set()

        threading.Thread(target=refuse, daemon=True).start()
        outlet = sockets.connect(f"tcp://127.0.0.1:{refusing.getsockname()[1]}")
        assert done.wait(60)
        assert not outlet.connected


def test_a_path_that_no_socket_can_have_is_refused_with_its_length(tmp_path):
    """Before, ZeroMQ raised an error that was not translated."""
    longest = "/" + "a" * 106
    check_address(f"ipc://{longest}")
    for path, words in ((f"{longest}a", "108 bytes; a socket.s path may have at most 107"), ("ä" * 54, "108 bytes")):
        with pytest.raises(PipelineError, match=words):
            check_address(f"ipc://{path}")
    with pytest.raises(PipelineError, match="NUL"):
        check_address("ipc:///tmp/\0")


def test_the_message_about_a_long_address_is_short():
    with pytest.raises(PipelineError) as refused:
        check_address("x" * 100_000)
    assert len(str(refused.value)) < 300
