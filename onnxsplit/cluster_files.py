"""Cluster files: TOML that describes devices and links."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from onnxsplit.cluster import LOCAL, MOST_LATENCY_US, Cluster, Device, Link, parse_size
from onnxsplit.errors import ClusterError, one_line
from onnxsplit.files import MOST_TEXT_BYTES, read_regular
from onnxsplit.plan import MOST_NODES, MOST_THREADS


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
        if not _is_number(value) or not 0 <= value <= MOST_LATENCY_US:
            self.problems.append(f"{where}: {key} must be a number from 0 to {MOST_LATENCY_US:g}, found {value!r}")
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
