"""ONNX Runtime sessions: the only place that sets their options.

Every measurement and every node opens its session here, so that sessions are measured as they run: the number of
threads is always explicit, idle threads do not spin unless requested, and a provider that cannot be used is an
error instead of a silent fall-back to the CPU.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from onnxsplit.binding import SMALL_BYTES, Binding, address, first_lines, view_of
from onnxsplit.control_group import quota_processors
from onnxsplit.custom_ops import Library, unchanged
from onnxsplit.errors import (
    CustomOpsError,
    InputError,
    ModelError,
    ModelRefused,
    OnnxsplitError,
    ProviderError,
)
from onnxsplit.files import check_regular
from onnxsplit.numbers import whole_problem
from onnxsplit.plan import Level
from onnxsplit.plan_base import MOST_THREADS
from onnxsplit.providers import CPU, Provider, load_runtime, parse_provider, use_provider, why_not_loaded
from onnxsplit.string_value import string_value
from onnxsplit.tensors import ONNX_TYPE_NUMBER, Array, is_native

_BINDINGS = 256  # the most bindings that a session keeps
_UNKNOWN_OP = "is not a registered function/op"
_RUNTIME_TYPES = {"float": "float32", "double": "float64"}


def host_cores() -> int:
    """The number of cores that this process may use: those of its affinity, at most the quota of its container."""
    cores, quota = len(os.sched_getaffinity(0)), quota_processors()
    return cores if quota is None else max(1, min(cores, int(quota)))


def threads_per_node(nodes: int) -> int:
    """The number of threads for each of several nodes that share this host's cores; at least one."""
    return max(1, host_cores() // max(1, nodes))


def quiet_environment() -> dict[str, str]:
    """The environment for a child process whose libraries must not start threads of their own."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@contextmanager
def without_interrupts() -> Iterator[None]:
    """Processes that this thread starts in the ``with`` block never get Ctrl-C: the parent handles it.

    The signal is blocked while they start, and they inherit that. A process that ignores the signal by itself does so
    only once its interpreter runs.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Session:
    """An ONNX Runtime session for one model, which takes and returns NumPy arrays by name.

    Attributes:
        inputs: name and ONNX type name of every input; the type is None for sequences, maps and optionals.
        outputs: the same for every output.
        bindable: whether :meth:`run_into` can be used: all inputs and outputs are tensors other than strings.
        left_to_cpu: name and type of every op that the session's provider left to the CPU; None if ONNX Runtime does
            not tell.
        binds_once: whether :meth:`bound` can be used: the session is bindable and runs on the CPU alone.
    """

    def __init__(
        self, raw: Any, left_to_cpu: tuple[tuple[str, str], ...] | None = (), *, binds_once: bool = True
    ) -> None:
        self._raw, self.left_to_cpu = raw, left_to_cpu
        self.inputs = tuple((value.name, runtime_type(value.type)) for value in raw.get_inputs())
        self.outputs = tuple((value.name, runtime_type(value.type)) for value in raw.get_outputs())
        self._names = [name for name, _ in self.outputs]
        self._plain = all(kind is not None and is_native(kind) for _, kind in (*self.inputs, *self.outputs))
        self._small: dict[tuple[str, tuple[int, ...]], Array] = {}
        # A binding holds addresses only, so the copies of small inputs must live as long as it does.
        self._bindings: dict[tuple[tuple[int, tuple[int, ...]], ...], tuple[Any, list[Array]]] = {}
        self.bindable = all(kind is not None and kind != "string" for _, kind in (*self.inputs, *self.outputs))
        self.binds_once = self.bindable and binds_once

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the model once.

        Args:
            inputs: all inputs by name.

        Returns:
            All outputs by name.

        Raises:
            ModelError: ONNX Runtime could not run the model; carries its message.
        """
        try:
            if self._plain:
                return dict(zip(self._names, self._raw.run(self._names, inputs), strict=True))
            return self._run_with_values(inputs)
        except OnnxsplitError:
            raise
        except Exception as error:  # ONNX Runtime's errors share no base class
            raise ModelError(first_lines(error)) from error

    def run_into(self, inputs: Mapping[str, Array], into: Mapping[str, Array]) -> Mapping[str, Array]:
        """Run the model once and write outputs in place. The session must be ``bindable``.

        Args:
            inputs: all inputs by name, as contiguous arrays; they are read in place.
            into: arrays for some of the outputs. Each must have exactly the type and shape of the output, and the
                output must not also be an input of the model: ONNX Runtime does not write such an output.

        Returns:
            ``into`` itself if it holds all outputs; else all outputs by name: those of ``into``, and arrays in ONNX
            Runtime's own memory.

        Raises:
            ModelError: ONNX Runtime could not run the model, or an output has another shape than its array.
        """
        try:
            if len(into) == len(self._names):
                bound = self._bound(inputs, into) if self.binds_once else self._bind(inputs, into)
                self._raw.run_with_iobinding(bound)
                return into
            binding = self._bind(inputs, into)
            self._raw.run_with_iobinding(binding)
            values = zip(self.outputs, binding.get_outputs(), strict=True)
            return {name: into[name] if name in into else view_of(value, kind) for (name, kind), value in values}
        except Exception as error:  # ONNX Runtime's errors share no base class
            raise ModelError(first_lines(error)) from error

    def bound(self, inputs: Mapping[str, Array], into: Mapping[str, Array]) -> Callable[[], None]:
        """A run that reads and writes these arrays each time it is called. The session must be ``binds_once``.

        Args:
            inputs: as for :meth:`run_into`; their memory must stay as long as the run is used.
            into: the same for all outputs.

        Returns:
            A function, which raises as :meth:`run_into` does.
        """
        raw, binding = self._raw, self._bind(inputs, into)

        def run() -> None:
            try:
                raw.run_with_iobinding(binding)
            except Exception as error:  # ONNX Runtime's errors share no base class
                raise ModelError(first_lines(error)) from error

        return run

    def _bound(self, inputs: Mapping[str, Array], into: Mapping[str, Array]) -> Any:
        """A binding of all inputs and outputs to their addresses. Addresses recur, so bindings are kept.

        Small inputs are copied to a fixed place first, because every message has another address.
        """
        inputs = {
            name: array if array.nbytes > SMALL_BYTES else self._moved(name, array) for name, array in inputs.items()
        }
        arrays = [inputs[name] for name, _ in self.inputs]
        arrays += [into[name] for name in self._names]
        key = tuple([(address(array), array.shape) for array in arrays])
        bound = self._bindings.get(key)
        if bound is None:
            if len(self._bindings) >= _BINDINGS:
                self._bindings.clear()
                self._small.clear()
            own = [array for array in inputs.values() if array.nbytes <= SMALL_BYTES]
            bound = self._bindings[key] = self._bind(inputs, into), own
        return bound[0]

    def _moved(self, name: str, array: Array) -> Array:
        kept = self._small.get((name, array.shape))
        if kept is None:
            kept = self._small[name, array.shape] = np.array(array)
        else:
            kept[...] = array
        return kept

    def _bind(self, inputs: Mapping[str, Array], into: Mapping[str, Array]) -> Any:
        """Make a new binding. It serves one run if an output has no array: a second run would overwrite that output."""
        binding = self._raw.io_binding()
        for name, kind in self.inputs:
            array = inputs[name]
            binding.bind_input(name, "cpu", 0, ONNX_TYPE_NUMBER[kind], array.shape, address(array))  # type: ignore[index]
        for name, kind in self.outputs:
            if name in into:
                array = into[name]
                binding.bind_output(name, "cpu", 0, ONNX_TYPE_NUMBER[kind], array.shape, address(array))  # type: ignore[index]
            else:
                binding.bind_output(name, "cpu")
        return binding

    def _run_with_values(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Like :meth:`run`, for element types that ONNX Runtime does not take as NumPy arrays."""
        runtime = load_runtime()
        value_type = runtime.OrtValue
        values = {}
        for name, kind in self.inputs:
            array = inputs[name]
            if kind is not None and not is_native(kind):
                values[name] = value_type.ortvalue_from_numpy_with_onnx_type(
                    array.view(f"u{array.dtype.itemsize}"), ONNX_TYPE_NUMBER[kind]
                )
            elif kind == "string":
                values[name] = string_value(runtime, array)
            else:
                values[name] = value_type.ortvalue_from_numpy(array)
        results = self._raw.run_with_ort_values(self._names, values)
        return {
            name: value.numpy() if kind is None or is_native(kind) else np.array(view_of(value, kind))
            for (name, kind), value in zip(self.outputs, results, strict=True)
        }

    def binding(self) -> Binding:
        """A new binding, for runs whose inputs and outputs mostly stay where they are. Must be ``bindable``."""
        return Binding(self._raw, dict(self.inputs), dict(self.outputs))

    def view(self, name: str, value: Any) -> Array:
        """An array in the memory of an output that a binding has made; the value lives as long as the array."""
        return view_of(value, dict(self.outputs)[name])

    def end_profiling(self) -> Path:
        """Stop the profile that this session was opened with, and return its file."""
        return Path(self._raw.end_profiling())


def runtime_type(text: str) -> str | None:
    """ONNX's name for a type such as ONNX Runtime's ``tensor(float)``; None if it is not a tensor type."""
    if not text.startswith("tensor(") or not text.endswith(")"):
        return None
    name = text[len("tensor(") : -1]
    return _RUNTIME_TYPES.get(name, name)


def open_session(
    model: Path | bytes,
    *,
    threads: int,
    level: Level = "all",
    provider: str = "cpu",
    spinning: bool = False,
    external_data_folder: Path | None = None,
    profile_prefix: Path | None = None,
    save_packed: Path | None = None,
    custom_ops: Sequence[Library] = (),
) -> Session:
    """Open a session.

    Args:
        model: a model file, or the bytes of a model.
        threads: threads that compute one op; ops run one after the other.
        level: graph optimisation level.
        provider: execution provider, as :func:`~onnxsplit.providers.parse_provider` reads it.
        spinning: True lets idle threads spin, for a session that has the host to itself.
        external_data_folder: the folder of the external data of a model given as bytes.
        profile_prefix: when given, ONNX Runtime profiles every run into a file with this prefix.
        save_packed: when given, the optimised model is written to this file, and its weights beside it in the layout
            that this CPU's kernels use; a session on that file at the level ``disabled`` maps them.
        custom_ops: libraries of custom ops to load.

    Raises:
        MissingDependency: ONNX Runtime is not installed.
        InputError: the number of threads is not allowed.
        ModelError: the file does not exist, or is not a regular file.
        ProviderError: the provider cannot be used; says what is missing.
        ModelRefused: ONNX Runtime refuses the model.
        CustomOpsError: a library of custom ops does not load.
    """
    problem = whole_problem("threads", threads, 1, MOST_THREADS)
    if problem:
        raise InputError(problem)
    ort = load_runtime()
    wanted = parse_provider(provider)
    options = _options(ort, int(threads), level, spinning=spinning)
    providers = use_provider(ort, options, wanted, int(threads))
    if wanted.name != CPU:
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if external_data_folder is not None:
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(external_data_folder)
        )
    if profile_prefix is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile_prefix)
    if save_packed is not None:
        _save_packed(options, save_packed)
    for library in custom_ops:
        _register(options, library)
    raw = _loaded(ort, model, options, wanted, providers)
    # ONNX Runtime copies an input to another device when it is bound, so a kept binding would run on old values there.
    return Session(raw, _left_to_cpu(raw, wanted), binds_once=wanted.name == CPU)


def _options(ort: Any, threads: int, level: Level, *, spinning: bool) -> Any:
    """The session options that every session sets."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = getattr(
        ort.GraphOptimizationLevel,
        {"disabled": "ORT_DISABLE_ALL"}.get(level, f"ORT_ENABLE_{level.upper()}"),
    )
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
    options.add_session_config_entry("session.inter_op.allow_spinning", str(int(spinning)))
    return options


def _save_packed(options: Any, file: Path) -> None:
    """Let a session write its optimised model with packed weights."""
    options.optimized_model_filepath = str(file)
    prefix = "session.optimized_model_external_initializers"
    options.add_session_config_entry(f"{prefix}_file_name", f"{file.stem}.data")
    options.add_session_config_entry(f"{prefix}_min_size_in_bytes", "1024")
    options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")


def _loaded(ort: Any, model: Path | bytes, options: Any, wanted: Provider, providers: list[Any]) -> Any:
    """ONNX Runtime's own session, with the requested provider."""
    if not isinstance(model, bytes):
        try:
            check_regular(Path(model))
        except OSError as error:
            raise ModelError(f"cannot read {model}: {error.strerror}") from error
    try:
        # ONNX Runtime's own fall-back would open the session on the CPU instead, with a message on standard output.
        raw = ort.InferenceSession(
            model if isinstance(model, bytes) else str(model), options, providers=providers or None, enable_fallback=0
        )
    except Exception as error:  # ONNX Runtime's errors share no base class
        text = first_lines(error)
        if _UNKNOWN_OP in text:
            text += ". If a library of custom ops defines it, name the library: --custom-ops FILE.so"
        where = "" if wanted.name == CPU else f" on the provider {wanted.text!r}"
        raise ModelRefused(f"ONNX Runtime {ort.__version__} refuses the model{where}: {text}") from error
    if wanted.name not in raw.get_providers():
        raise ProviderError(why_not_loaded(ort, wanted))
    return raw


def _left_to_cpu(raw: Any, wanted: Provider) -> tuple[tuple[str, str], ...] | None:
    """Name and type of the ops that a provider left to the CPU; None if ONNX Runtime does not tell (before 1.24).

    Raises:
        ProviderError: the provider left all ops to the CPU.
    """
    if wanted.name == CPU:
        return ()
    if not hasattr(raw, "get_provider_graph_assignment_info"):
        return None
    groups = raw.get_provider_graph_assignment_info()
    left = [(op.name, op.op_type) for group in groups if group.ep_name != wanted.name for op in group.get_nodes()]
    if left and all(group.ep_name != wanted.name for group in groups):
        kinds = ", ".join(sorted({kind for _, kind in left}))
        raise ProviderError(
            f"provider {wanted.text!r} was asked for, and it runs none of the {len(left)} ops of this model ({kinds}); "
            "use the provider cpu"
        )
    return tuple(left)


def _register(options: Any, library: Library) -> None:
    """Load a library of custom ops into the options of a session."""
    with unchanged(library) as path:
        try:
            options.register_custom_ops_library(path)
        except Exception as error:  # ONNX Runtime's errors share no base class
            raise CustomOpsError(f"the custom op library {path} does not load: {first_lines(error)}") from error
