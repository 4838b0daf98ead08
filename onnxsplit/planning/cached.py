"""Plans in a cache: the same model with the same options is cut once."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from importlib.metadata import distributions
from pathlib import Path
from typing import Unpack

import numpy as np

import onnxsplit
from onnxsplit.arguments import check_names, option_names
from onnxsplit.decoder.files import TEXT_FILES
from onnxsplit.errors import PlanError
from onnxsplit.file_cache import LockedCache, cache_folder
from onnxsplit.model.external_data import is_external, location_of
from onnxsplit.model.in_memory import ModelLike, open_any
from onnxsplit.model.protobuf import graph_tensors
from onnxsplit.model.source import SourceModel
from onnxsplit.planning.examine import ModelOptions
from onnxsplit.planning.options import CURRENT_NAMES, CutOptions
from onnxsplit.planning.planner import PartitionArguments, partition
from onnxsplit.session import host_cores

_UNUSED_S = 30 * 24 * 3600.0
_KEY_CHARACTERS = 16
_MOST_NAME = 60
_NOT_IN_NAMES = re.compile(r"[^\w-]+")


class PlanCache(LockedCache):
    """The plans of this user that :meth:`onnxsplit.Pipeline.from_model` has made.

    They are in ``$XDG_CACHE_HOME/onnxsplit/plans``, by default in ``~/.cache``. A plan belongs to the model's bytes,
    the options, the versions of this package and of ONNX Runtime, and the number of cores. Plans that were not used for
    30 days are removed when another is made.
    """

    def __init__(self) -> None:
        super().__init__(cache_folder("plans"))

    def plan(self, model: ModelLike, /, **options: Unpack[PartitionArguments]) -> Path:
        """The plan of a model, which is cut if the cache does not hold it. The plan stays until :meth:`close`.

        Processes that ask for the same plan wait for one of them to make it.

        Args:
            model: as for :func:`onnxsplit.partition`.
            options: the options of :func:`onnxsplit.partition`.

        Raises:
            PartitionError, ModelError, InputError: as for :func:`onnxsplit.partition`.
            PlanError: the cache cannot be written.
        """
        check_names(options, [*option_names(CutOptions, ModelOptions), *CURRENT_NAMES])
        source = open_any(model)
        name = _NOT_IN_NAMES.sub("_", source.path.stem)[:_MOST_NAME]
        key = f"{name}-{_digest(source, options)}"

        def make(folder: Path) -> None:
            partition(model, out=folder, **options)

        try:
            entry = self.obtain(key, make)
            self.evict(unused_s=_UNUSED_S, keep=key)
        except OSError as error:
            raise PlanError(
                f"the plan cannot be kept in {self.folder}: {error}. Set XDG_CACHE_HOME to a folder of yours, or cut "
                "the model with onnxsplit.partition"
            ) from error
        return entry


def _digest(source: SourceModel, options: Mapping[str, object]) -> str:
    """A digest of everything that decides the plan."""
    folder = source.place.parent
    tensors = filter(is_external, graph_tensors(source.proto.graph))
    data = sorted({folder / location_of(tensor) for tensor in tensors})
    beside = [folder / name for name in TEXT_FILES] if source.path.is_file() else []
    known: list[object] = [onnxsplit.__version__, _runtimes(), host_cores(), source.sha256]
    known += [_stamp(file) for file in (*data, *beside)]
    known += [(name, _told(options[name])) for name in sorted(options)]
    return hashlib.sha256(repr(known).encode()).hexdigest()[:_KEY_CHARACTERS]


def _runtimes() -> list[tuple[str, str]]:
    """The installed builds of ONNX Runtime and their versions. ONNX Runtime is not imported for that."""
    return sorted({(one.name, one.version) for one in distributions() if one.name.startswith("onnxruntime")})


def _told(value: object) -> object:
    """An option's value as something whose ``repr`` tells it from other values; files count with their changes."""
    if isinstance(value, np.ndarray):
        if value.dtype.hasobject:
            return repr(value.tolist())
        return str(value.dtype), value.shape, hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
    if isinstance(value, str | os.PathLike):
        return os.fspath(value), _stamp(Path(value))
    if isinstance(value, Mapping):
        return [(_told(key), _told(value[key])) for key in value]
    if isinstance(value, list | tuple | set | frozenset):
        return [_told(one) for one in value]
    return _told(np.asarray(value)) if hasattr(value, "__array__") else value


def _stamp(file: Path) -> object:
    """The place, the size and the time of the last change of a file; None for what is no file."""
    try:
        found = file.stat()
    except (OSError, ValueError):
        return None
    return str(file.absolute()), found.st_size, found.st_mtime_ns, found.st_ctime_ns
