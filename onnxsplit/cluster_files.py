"""Cluster files: TOML that describes devices and links (see :mod:`onnxsplit.cluster`)."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import msgspec
from msgspec import Meta

from onnxsplit.cluster import LOCAL, MOST_LATENCY_US, Cluster, Device, Link, parse_size
from onnxsplit.errors import ClusterError, one_line, shown
from onnxsplit.files import MOST_TEXT_BYTES, read_regular
from onnxsplit.plan_base import MOST_NODES, MOST_THREADS

# The limits of values, and the words for them in messages.
_Text = Annotated[str, Meta(min_length=1, description="a text that is not empty")]
_Factor = Annotated[float, Meta(ge=1e-9, lt=1e18, description="a number above 0, from 1e-09 to 1e18")]
_Rate = Annotated[float, Meta(ge=1, lt=1e18, description="a number above 0, from 1 to 1e18")]
_Microseconds = Annotated[
    float, Meta(ge=0, le=MOST_LATENCY_US, description=f"a number from 0 to {MOST_LATENCY_US:g} (microseconds)")
]
_Threads = Annotated[int, Meta(ge=1, le=MOST_THREADS, description=f"a whole number from 1 to {MOST_THREADS}")]
_Names = Annotated[tuple[str, ...], Meta(description="a list of names")]
_Pair = Annotated[tuple[str, str], Meta(description="a list of two hosts or devices")]
_Size = Annotated[str | int | float, Meta(description="a size such as 512M or 2.5G, at most 1024T")]
_Flag = Annotated[bool, Meta(description="true or false")]


class _DeviceTable(msgspec.Struct):
    """One ``[[device]]``."""

    name: _Text
    host: _Text = LOCAL
    provider: _Text = "cpu"
    speed: _Factor = 1.0
    memory: _Size | None = None
    threads: _Threads = 1
    only_ops: _Names = ()
    not_ops: _Names = ()


class _LinkTable(msgspec.Struct):
    """One ``[[link]]``."""

    between: _Pair
    latency_us: _Microseconds = Link().latency_ns / 1000
    delay_us: _Microseconds = Link().delay_ns / 1000
    bytes_per_s: _Rate = Link().bytes_per_s
    overlapped: _Flag = False
    compressed: _Flag = False


class _File(msgspec.Struct):
    """The whole file."""

    device: Annotated[list[dict[str, Any]], Meta(description="written as [[device]] tables")] = []
    link: Annotated[list[dict[str, Any]], Meta(description="written as [[link]] tables")] = []
    caller: Annotated[str, Meta(description="the name of a host or device")] | None = None


def load_cluster(path: str | Path) -> Cluster:
    """Read and check a cluster file.

    Raises:
        ClusterError: the file cannot be read, or does not describe a usable cluster; lists every violation.
    """
    path = Path(path)
    try:
        content = tomllib.loads(read_regular(path, most_bytes=MOST_TEXT_BYTES).decode())
    except FileNotFoundError as error:
        raise ClusterError(f"{path} does not exist; write one for this host with: onnxsplit cluster init") from error
    except OSError as error:
        raise ClusterError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # tomllib raises both, besides its own error
        raise ClusterError(f"{path} is not valid TOML: {one_line(error, 300)}") from error
    reader = _Reader()
    cluster = reader.cluster(content)
    if reader.problems:
        raise ClusterError("\n  - ".join([f"{path} does not describe a usable cluster:", *reader.problems]))
    return cluster


class _Reader:
    """Collects the violations while it decodes; a value that is not allowed counts as left out."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def cluster(self, content: Mapping[str, Any]) -> Cluster:
        file = _File(**self._decoded("the file", content, _File))
        devices = tuple(self._device(f"device {number}", table) for number, table in enumerate(file.device))
        names = [device.name for device in devices]
        if len(devices) > MOST_NODES:
            self.problems.append(f"it has {len(devices)} devices; at most {MOST_NODES} are allowed")
        if not devices:
            self.problems.append("it has no [[device]]; at least one is needed")
        self.problems += [f"the device {name!r} occurs twice" for name in sorted(set(names)) if names.count(name) > 1]
        ends = {*names, *(device.host for device in devices)}
        ends |= {LOCAL} if file.caller == LOCAL else set()
        links: dict[tuple[str, str], Link] = {}
        for number, table in enumerate(file.link):
            links |= self._link(f"link {number}", table, ends)
        if file.caller is not None:
            self._check_ends("caller", [file.caller], ends | {LOCAL})
        return Cluster(devices, links, file.caller)

    def _device(self, where: str, content: Mapping[str, Any]) -> Device:
        table = _DeviceTable(**{"name": where, **self._decoded(where, content, _DeviceTable)})
        size = parse_size(str(table.memory)) if table.memory is not None else None
        if table.memory is not None and size is None:
            self.problems.append(_refusal(where, "memory", table.memory, _Size))
        return Device(
            name=table.name,
            host=table.host,
            provider=table.provider,
            speed=table.speed,
            memory_bytes=size,
            threads=table.threads,
            only_ops=table.only_ops,
            not_ops=table.not_ops,
        )

    def _link(self, where: str, content: Mapping[str, Any], ends: set[str]) -> dict[tuple[str, str], Link]:
        """The link by its two ends; empty when they are not given."""
        values = self._decoded(where, content, _LinkTable)
        if "between" not in values:
            return {}
        table = _LinkTable(**values)
        if table.compressed and table.between[0] == table.between[1]:
            self.problems.append(f"{where}: compressed is only for links between hosts; remove it")
        self._check_ends(f"{where}: between", table.between, ends)
        link = Link(
            latency_ns=int(table.latency_us * 1000),
            delay_ns=int(table.delay_us * 1000),
            bytes_per_s=int(table.bytes_per_s),
            overlapped=table.overlapped,
            compressed=table.compressed,
        )
        return {(min(table.between), max(table.between)): link}

    def _check_ends(self, where: str, names: Sequence[str], ends: set[str]) -> None:
        self.problems += [
            f"{where}: {name!r} is not a device or host; known: {', '.join(sorted(ends))}"
            for name in names
            if name not in ends
        ]

    def _decoded(self, where: str, content: Mapping[str, Any], table: type[msgspec.Struct]) -> dict[str, Any]:
        """The allowed values of a table, by key; every other value is added to the problems."""
        fields = {field.name: field for field in msgspec.structs.fields(table)}
        values = {}
        for key, value in content.items():
            if key not in fields:
                self.problems.append(f"{where}: {key!r} is unknown; allowed: {', '.join(sorted(fields))}")
                continue
            try:
                values[key] = msgspec.convert(value, fields[key].type)
            except msgspec.ValidationError:
                self.problems.append(_refusal(where, key, value, fields[key].type))
        self.problems += [
            f"{where}: {key} is missing; it must be {_words(field.type)}"
            for key, field in fields.items()
            if field.required and key not in content
        ]
        return values


def _refusal(where: str, key: str, value: object, kind: Any) -> str:
    return f"{where}: {key} must be {_words(kind)}, found {shown(value)}"


def _words(kind: Any) -> str:
    """The values that a field allows, as its type describes them."""
    annotated = kind if hasattr(kind, "__metadata__") else get_args(kind)[0]
    return str(annotated.__metadata__[-1].description)
