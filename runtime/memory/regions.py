"""Shared memory for tensors on one host: written by its owner, read in place by the owner's peers.

Every process of a pipeline, the caller's included, owns one arena and maps the arenas of its neighbours for reading. A
process writes only into its own arena, so a process that was suspended and resumes late cannot damage another one.

    part          size                  content
    token         32 bytes, 1 page      random bytes, by which a peer checks that it has mapped the right memory
    board         whole pages           the owner's load; see runtime/balance/board.py
    ledger        4096 x u64            by request number modulo 4096: the request, its attempt, and the owner's step
    generations   1024 x u64            by slot: the number of its present use
    returns       peers x 1024 x u64    by peer and the peer's slot: the last use that the owner has finished reading
    sleep         1 page                whether the owner sleeps; see runtime/memory/lane.py
    rows          peers x 512 bytes     by peer: how far the owner has read the peer's lane
    rings         peers x 32 KiB        by peer: the lane that the peer reads
    data          the rest              tensors, each at a multiple of 64 bytes

The owner lends a slot to some readers for one use. A reader that has finished writes the slot's generation into the
returns of its own arena, and the slot is free when all its readers have done so. The owner looks there when it needs
room, so no message is needed. After a run, a reader compares the generation again: if it has changed, the owner had
taken the memory back, and the reader drops its result. The ledger can also be read after its owner has died.

The memory is a sealed memfd. It cannot shrink under a reader, leaves no file behind, and can be opened by a peer
through ``/proc/PID/fd`` even after its owner was killed.
"""

from __future__ import annotations

import fcntl
import functools
import mmap
import os
from pathlib import Path

from runtime.balance.board import BOARD_BYTES, PEERS
from runtime.memory.lane import RING_BYTES, ROW_WORDS
from runtime.wire.messages.data import SLOTS

LEDGER_ENTRIES = 4096
TOKEN_BYTES = 32
PAGE = mmap.PAGESIZE
BOARD_AT = PAGE
LEDGER_AT = BOARD_AT + -(-BOARD_BYTES // PAGE) * PAGE
GENERATIONS_AT = LEDGER_AT + 8 * LEDGER_ENTRIES
RETURNS_AT = GENERATIONS_AT + 8 * SLOTS
SLEEP_AT = RETURNS_AT + 8 * SLOTS * PEERS
ROWS_AT = SLEEP_AT + PAGE
RINGS_AT = ROWS_AT + 8 * ROW_WORDS * PEERS
DATA_AT = -(-(RINGS_AT + RING_BYTES * PEERS) // PAGE) * PAGE
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
STEP_BYTES = 1 << 20  # memory is allocated in steps of this size
ATTEMPTS = 1 << 8  # attempts at a request that the ledger distinguishes


def ring_of(memory: mmap.mmap, reader: int) -> memoryview:
    """The ring of a lane in its writer's memory; it keeps the memory mapped."""
    return memoryview(memory)[RINGS_AT + reader * RING_BYTES : RINGS_AT + (reader + 1) * RING_BYTES]


def row_of(memory: mmap.mmap, writer: int) -> memoryview:
    """The row of a lane in its reader's memory; it keeps the memory mapped."""
    at = ROWS_AT + 8 * ROW_WORDS * writer
    return memoryview(memory)[at : at + 8 * ROW_WORDS].cast("Q")


@functools.cache
def host_token() -> str:
    """Identifies the boot, the PID namespace and the user: equal in processes that can map each other's memory."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.readlink('/proc/self/ns/pid')}/{os.getuid()}"  # noqa: PTH115  no path
