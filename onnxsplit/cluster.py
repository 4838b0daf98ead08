"""The devices and links that a plan is made for, and the TOML that describes them.

caller = "host-a"         # the host or device that requests come from; default: the caller has the default link to all

[[device]]
name = "big"              # the device's name in the plan
host = "host-a"           # devices of one host share its memory and its fast link; default: "local"
provider = "cuda:0"       # the execution provider, as --provider takes it; default: "cpu"
speed = 4.0               # speed relative to the device that costs are measured on; default: 1
memory = "16G"            # memory that a stage may need on this device; default: no limit
threads = 2               # threads of the stage's session on a CPU; default: 1
only_ops = ["Conv"]       # op types that the device may run; default: all
not_ops = ["Loop"]        # op types that the device may not run; default: none

[[link]]
between = ["host-a", "host-b"]   # two hosts or devices; one host twice: the link between its devices
latency_us = 500.0               # time that a tensor of any size occupies both devices
delay_us = 2000.0                # further time until the tensor arrives; occupies neither device
bytes_per_s = 125e6              # bandwidth
overlapped = false               # true: tensors move while both devices compute
compressed = false               # true: int8 borders cross compressed; only between hosts
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from onnxsplit.numbers import MOST_BYTES

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
LOCAL = "local"
"""The name of this host, for devices whose table names no host."""

MOST_LATENCY_US = 1e9
"""The largest latency and delay of a link, in microseconds."""


@dataclass(frozen=True)
class Link:
    """The cost of moving a tensor, which the sending and the receiving device both pay.

    The defaults were measured between two nodes of one host. What a request costs a node, whatever its tensors, is not
    part of the link (:class:`~onnxsplit.plan.HostCosts`).

    Attributes:
        latency_ns: time for a tensor of any size, in nanoseconds.
        bytes_per_s: bandwidth in bytes per second.
        overlapped: True when tensors move while the device computes, so that only the longer of the two counts.
        delay_ns: further nanoseconds until a tensor arrives. The delay occupies neither device, so it adds to the
            latency of a request only.
        compressed: True when ``int8`` borders cross compressed with Zstandard. Costs do not count what this saves.
    """

    latency_ns: int = 3_000
    bytes_per_s: int = 12_000_000_000
    overlapped: bool = False
    delay_ns: int = 0
    compressed: bool = False

    def transfer_ns(self, size_bytes: int) -> int:
        """Nanoseconds that one transfer of a tensor occupies each of the two devices."""
        return self.latency_ns + size_bytes * 1_000_000_000 // self.bytes_per_s

    def slower(self, factor: int) -> Link:
        """The same link, over which a transfer costs so many times as much."""
        return replace(self, latency_ns=factor * self.latency_ns, bytes_per_s=max(1, self.bytes_per_s // factor))


@dataclass(frozen=True)
class Device:
    """A device that runs a stage; the module's docstring describes each field.

    Attributes:
        memory_bytes: memory that a stage may need on this device; None for no limit.
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
        """Whether ops of a type may run on this device."""
        return op_type not in self.not_ops and (not self.only_ops or op_type in self.only_ops)


@dataclass(frozen=True)
class Cluster:
    """The devices that a plan is made for, and the links between them.

    Attributes:
        devices: the devices, in the file's order.
        links: links by the pair of hosts or devices that they join, each pair in order of name.
        caller: the host or device that requests come from; None when it is not known.
    """

    devices: tuple[Device, ...]
    links: Mapping[tuple[str, str], Link]
    caller: str | None = None

    def link(self, one: Device, other: Device) -> Link:
        """The link between two devices: the one given for them, else their hosts' link, else the default."""
        for pair in ((one.name, other.name), (one.host, other.host)):
            link = self.links.get((min(pair), max(pair)))
            if link is not None:
                return link
        return Link()

    def caller_link(self, device: Device) -> Link:
        """The link between the caller and a device."""
        if self.caller is None:
            return Link()
        return self.link(Device(name=self.caller, host=self._host_of(self.caller)), device)

    @property
    def caller_host(self) -> str:
        """The host that requests come from; this host when it is not known."""
        return LOCAL if self.caller is None else self._host_of(self.caller)

    def _host_of(self, name: str) -> str:
        """The host of the device with this name; the name itself when it names a host."""
        return next((device.host for device in self.devices if device.name == name), name)

    def to_toml(self) -> str:
        """The cluster as TOML that :func:`~onnxsplit.cluster_files.load_cluster` reads back."""
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
            lines.append(f"overlapped = {str(link.overlapped).lower()}")
            lines += ["compressed = true", ""] if link.compressed else [""]
        return "\n".join(lines)


def parse_size(text: str) -> int | None:
    """Read a size such as ``512M`` or ``2.5G`` in bytes (units are powers of 1024).

    Returns:
        The size in bytes; None when the text is not a size or the size is above one pebibyte.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    size = float(match[1]) * _UNITS[match[2].upper()] if match is not None else math.inf
    return int(size) if size <= MOST_BYTES else None


def _text(value: str) -> str:
    """A text as a TOML basic string."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c >= " " and c != "\x7f" else f"\\u{ord(c):04x}" for c in escaped) + '"'
