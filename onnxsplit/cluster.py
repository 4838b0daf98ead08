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
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from onnxsplit.errors import ClusterError, one_line
from onnxsplit.files import MOST_TEXT_BYTES, read_regular
from onnxsplit.numbers import MOST_BYTES
from onnxsplit.plan import MOST_NODES, MOST_THREADS

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
LOCAL = "local"
_MOST_LATENCY_US = 1e9


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


def load_cluster(path: str | Path) -> Cluster:
    """Read and check a cluster file.

    Raises:
        ClusterError: naming every violation found.
    """
    path = Path(path)
    try:
        content = tomllib.loads(read_regular(path, most_bytes=MOST_TEXT_BYTES).decode())
    except FileNotFoundError as error:
        raise ClusterError(f"{path} does not exist; write one for this host with: onnxsplit cluster init") from error
    except OSError as error:
        raise ClusterError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # tomllib raises both beside its own
        raise ClusterError(f"{path} is no valid TOML: {one_line(error, 300)}") from error
    reader = _Reader()
    cluster = reader.cluster(content)
    if reader.problems:
        raise ClusterError("\n  - ".join([f"{path} describes no usable cluster:", *reader.problems]))
    return cluster


class _Reader:
    """Collects what is wrong while it reads."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def cluster(self, content: Mapping[str, Any]) -> Cluster:
        self._known("the file", content, {"device", "link", "caller"})
        devices = tuple(
            self._device(f"device {number}", table) for number, table in enumerate(self._tables(content, "device"))
        )
        names = [device.name for device in devices]
        if len(devices) > MOST_NODES:
            self.problems.append(f"it has {len(devices)} devices; at most {MOST_NODES} are allowed")
        if not devices:
            self.problems.append("it has no [[device]]; at least one is needed")
        self.problems += [f"the device {name!r} is there twice" for name in sorted(set(names)) if names.count(name) > 1]
        ends = {*names, *(device.host for device in devices)}
        caller = content.get("caller")
        ends |= {LOCAL} if caller == LOCAL else set()
        links: dict[tuple[str, str], Link] = {}
        for number, table in enumerate(self._tables(content, "link")):
            where = f"link {number}"
            pair, link = self._link(where, table)
            if pair is not None:
                self.problems += [
                    f"{where}: {end!r} is no device or host; known: {', '.join(sorted(ends))}"
                    for end in pair
                    if end not in ends
                ]
                links[min(pair), max(pair)] = link
        if caller is not None and caller not in ends:
            self.problems.append(f"caller {caller!r} is no device or host; known: {', '.join(sorted(ends))}")
        return Cluster(devices, links, caller)

    def _tables(self, content: Mapping[str, Any], key: str) -> Sequence[Mapping[str, Any]]:
        tables = content.get(key, [])
        if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
            self.problems.append(f"{key} must be written as [[{key}]] tables")
            return []
        return tables

    def _device(self, where: str, table: Mapping[str, Any]) -> Device:
        self._known(where, table, {f.name for f in fields(Device)} - {"memory_bytes"} | {"memory"})
        memory = table.get("memory")
        size = parse_size(str(memory)) if memory is not None else None
        if memory is not None and size is None:
            self.problems.append(f"{where}: memory {memory!r} is no size; write 512M or 2.5G, at most 1024T")
        name = self._value(where, table, "name", str, None)
        return Device(
            name=name or where,
            host=self._value(where, table, "host", str, LOCAL),
            provider=self._value(where, table, "provider", str, "cpu"),
            speed=self._positive(where, table, "speed", 1.0),
            memory_bytes=size,
            threads=self._threads(where, table),
            only_ops=self._names(where, table, "only_ops"),
            not_ops=self._names(where, table, "not_ops"),
        )

    def _link(self, where: str, table: Mapping[str, Any]) -> tuple[tuple[str, str] | None, Link]:
        self._known(where, table, {"between", "latency_us", "delay_us", "bytes_per_s", "overlapped"})
        pair = self._names(where, table, "between")
        if len(pair) != 2:
            self.problems.append(f"{where}: between must name two hosts or devices")
        default = Link()
        link = Link(
            latency_ns=self._time_ns(where, table, "latency_us", default.latency_ns),
            delay_ns=self._time_ns(where, table, "delay_us", default.delay_ns),
            bytes_per_s=int(self._positive(where, table, "bytes_per_s", default.bytes_per_s, least=1)),
            overlapped=self._value(where, table, "overlapped", bool, False),
        )
        return ((pair[0], pair[1]) if len(pair) == 2 else None), link

    def _time_ns(self, where: str, table: Mapping[str, Any], key: str, default_ns: int) -> int:
        value = table.get(key, default_ns / 1000)
        if not _is_number(value) or not 0 <= value <= _MOST_LATENCY_US:
            self.problems.append(f"{where}: {key} must be a number from 0 to {_MOST_LATENCY_US:g}, found {value!r}")
            return default_ns
        return int(value * 1000)

    def _known(self, where: str, table: Mapping[str, Any], keys: set[str]) -> None:
        self.problems += [
            f"{where}: {key!r} is unknown; allowed: {', '.join(sorted(keys))}" for key in table if key not in keys
        ]

    def _value(self, where: str, table: Mapping[str, Any], key: str, kind: type, default: Any) -> Any:
        value = table.get(key, default)
        if not isinstance(value, kind) or value == "":
            self.problems.append(f"{where}: {key} must be a {kind.__name__}, found {value!r}")
            return default
        return value

    def _positive(
        self, where: str, table: Mapping[str, Any], key: str, default: float, *, least: float = 1e-9
    ) -> float:
        value = table.get(key, default)
        if not _is_number(value) or not least <= value < 1e18:
            self.problems.append(f"{where}: {key} must be a number above 0, from {least:g} to 1e18, found {value!r}")
            return default
        return float(value)

    def _threads(self, where: str, table: Mapping[str, Any]) -> int:
        value = table.get("threads", 1)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST_THREADS:
            self.problems.append(f"{where}: threads must be a whole number from 1 to {MOST_THREADS}, found {value!r}")
            return 1
        return value

    def _names(self, where: str, table: Mapping[str, Any], key: str) -> tuple[str, ...]:
        value = table.get(key, [])
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            self.problems.append(f"{where}: {key} must be a list of names, found {value!r}")
            return ()
        return tuple(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(value: str) -> str:
    """A TOML basic string."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c >= " " and c != "\x7f" else f"\\u{ord(c):04x}" for c in escaped) + '"'
