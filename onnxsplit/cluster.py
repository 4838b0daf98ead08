"""The devices and links that a plan is made for, and the TOML they are written in.

caller = "host-a"         # the host or device that requests come from; over the default link to all when left out

[[device]]
name = "big"              # how the plan names it
host = "host-a"           # devices of a host share its memory and its fast link; "local" when left out
provider = "cuda:0"       # as --provider; "cpu" when left out
speed = 4.0               # how often as fast as the device that costs are measured on; 1 when left out
memory = "16G"            # what a stage may need there; no limit when left out
threads = 2               # of the stage's session, on a CPU; 1 when left out
only_ops = ["Conv"]       # op types it may run; all when left out
not_ops = ["Loop"]        # op types it may not run

[[link]]
between = ["host-a", "host-b"]   # hosts or devices; a host with itself for the devices on it
latency_us = 500.0               # a tensor occupies the device so long, whatever its size
delay_us = 2000.0                # it is on its way so much longer, and occupies nobody
bytes_per_s = 125e6
overlapped = false               # true: moves tensors while both devices compute
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from onnxsplit.numbers import MOST_BYTES

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
LOCAL = "local"
MOST_LATENCY_US = 1e9


@dataclass(frozen=True)
class Link:
    """What moving a tensor costs the device that sends it and, likewise, the one that receives it.

    The defaults were measured between two processes of one host.

    Attributes:
        latency_ns: for a tensor, whatever its size.
        bytes_per_s: bytes a second.
        overlapped: tensors move while the device computes, so that only the longer of the two counts.
        delay_ns: a tensor arrives so much later; occupies neither end, so it counts for the time of a request alone.
    """

    latency_ns: int = 60_000
    bytes_per_s: int = 6_000_000_000
    overlapped: bool = False
    delay_ns: int = 0

    def transfer_ns(self, size_bytes: int) -> int:
        """Nanoseconds for one crossing of a tensor."""
        return self.latency_ns + size_bytes * 1_000_000_000 // self.bytes_per_s


@dataclass(frozen=True)
class Device:
    """Something that runs a stage; see the module's description for each field.

    Attributes:
        memory_bytes: None for no limit.
    """

    name: str
    host: str = LOCAL
    provider: str = "cpu"
    speed: float = 1.0
    memory_bytes: int | None = None
    threads: int = 1
    only_ops: tuple[str, ...] = ()
    not_ops: tuple[str, ...] = ()

    def may_run(self, op_type: str) -> bool:
        """Whether ops of a type may be placed here."""
        return op_type not in self.not_ops and (not self.only_ops or op_type in self.only_ops)


@dataclass(frozen=True)
class Cluster:
    """What a plan is made for.

    Attributes:
        devices: in the file's order.
        links: by the pair of hosts or devices they join, in order of name.
        caller: the host or device that requests come from; None for nowhere in particular.
    """

    devices: tuple[Device, ...]
    links: Mapping[tuple[str, str], Link]
    caller: str | None = None

    def link(self, one: Device, other: Device) -> Link:
        """The link of two devices: theirs by name, else their hosts', else the default."""
        for pair in ((one.name, other.name), (one.host, other.host)):
            found = self.links.get((min(pair), max(pair)))
            if found is not None:
                return found
        return Link()

    def caller_link(self, device: Device) -> Link:
        """The link of the caller with a device."""
        if self.caller is None:
            return Link()
        return self.link(Device(name=self.caller, host=self._host_of(self.caller)), device)

    def _host_of(self, name: str) -> str:
        """The host of a device; a host's own name."""
        return next((device.host for device in self.devices if device.name == name), name)

    def to_toml(self) -> str:
        """The text that :func:`load_cluster` reads back."""
        lines = [f"caller = {_text(self.caller)}", ""] if self.caller is not None else []
        for device in self.devices:
            lines += ["[[device]]", f"name = {_text(device.name)}", f"host = {_text(device.host)}"]
            lines += [f"provider = {_text(device.provider)}", f"speed = {device.speed:g}"]
            lines += [f'memory = "{device.memory_bytes}"'] if device.memory_bytes is not None else []
            lines.append(f"threads = {device.threads}")
            for key in ("only_ops", "not_ops"):
                if getattr(device, key):
                    lines.append(f"{key} = [{', '.join(map(_text, getattr(device, key)))}]")
            lines.append("")
        for (one, other), link in self.links.items():
            lines += ["[[link]]", f"between = [{_text(one)}, {_text(other)}]"]
            lines += [f"latency_us = {link.latency_ns / 1000:g}", f"bytes_per_s = {float(link.bytes_per_s):g}"]
            lines += [f"delay_us = {link.delay_ns / 1000:g}"] if link.delay_ns else []
            lines += [f"overlapped = {str(link.overlapped).lower()}", ""]
        return "\n".join(lines)


def parse_size(text: str) -> int | None:
    """Bytes of ``512M`` or ``2.5G`` (powers of 1024), at most a pebibyte; None for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    size = float(found[1]) * _UNITS[found[2].upper()] if found is not None else math.inf
    return int(size) if size <= MOST_BYTES else None


def _text(value: str) -> str:
    """A TOML basic string."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c >= " " and c != "\x7f" else f"\\u{ord(c):04x}" for c in escaped) + '"'
