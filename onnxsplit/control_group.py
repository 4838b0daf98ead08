"""The limits of the control groups (versions 1 and 2) of this process, as a container has them.

The folder of a group is named in ``/proc/self/cgroup``. Inside a container it may be mounted as the root instead, so
both are tried. A limit of a group above the own one, as of a whole Kubernetes pod, counts too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


def free_in_group_bytes(unlimited: int, *, root: Path = _ROOT, own: Path = _OWN) -> int:
    """Bytes of memory that the groups have left; what can be dropped from the page cache counts as free.

    Args:
        unlimited: the answer where there is no limit.
        root: where the groups are mounted.
        own: the file that names the groups of this process.
    """
    left = [unlimited]
    for folder in _folders("memory", root, own):
        for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            allowed, taken = _number(folder / limit), _number(folder / used)
            if allowed is not None and taken is not None:
                left.append(allowed - max(0, taken - _reclaimable_bytes(folder)))
    return max(0, min(left))


def quota_processors(*, root: Path = _ROOT, own: Path = _OWN) -> float | None:
    """The processors that the groups allow at once, on average; None where there is no limit."""
    quotas = []
    for folder in _folders("cpu", root, own):
        quota, period = [*_words(folder / "cpu.max"), "", ""][:2]
        if not period:
            quota, period = (" ".join(_words(folder / f"cpu.cfs_{name}_us")) for name in ("quota", "period"))
        if quota.isdecimal() and period.isdecimal() and int(period):  # neither "max" nor -1
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def _folders(controller: str, root: Path, own: Path) -> Iterator[Path]:
    """The folders of the own groups for a controller, and of all groups above them."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, names, path = [*line.split(":", 2), "", ""][:3]
        if number != "0" and controller not in names.split(","):
            continue
        top = root / controller if names else root
        folder = top / path.strip("/")
        while folder != top:
            yield folder
            folder = folder.parent
        yield top


def _reclaimable_bytes(folder: Path) -> int:
    """Bytes of files in memory that were not used of late."""
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    values = {name: value for name, _, value in (line.partition(" ") for line in lines)}
    found = values.get("total_inactive_file") or values.get("inactive_file") or ""
    return int(found) if found.isdecimal() else 0


def _number(file: Path) -> int | None:
    words = _words(file)
    return int(words[0]) if words and words[0].isdecimal() else None


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []
