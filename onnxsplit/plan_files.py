"""Plan directories: reading, checking and writing ``plan.json`` and the files that it lists."""

from __future__ import annotations

import hashlib
import inspect
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec

from onnxsplit.errors import PlanError, one_line, shown
from onnxsplit.files import check_parent, is_text, open_regular, read_regular
from onnxsplit.plan import FORMAT_VERSION, PLAN_FILE, Plan, TensorSpec
from onnxsplit.plan_base import FileEntry
from onnxsplit.plan_check import plan_problems

_MOST_PLAN_BYTES = 64 << 20
_MOST_NAMES = 5  # names of a listing in a message
_MOST_INPUTS = 20  # inputs with their types and shapes in a message
_SECOND_FIELDS = b"\x12\x1a\x22\x28\x32\x3a\x42\x72"  # tags of protobuf: producer_name, ..., graph, opset_import

_MOST_PROBLEM = 300  # characters of one problem in a message


class _Version(msgspec.Struct):
    format_version: Annotated[int, msgspec.Meta(ge=1)]


def load_plan(folder: str | Path, *, check_files: bool = True) -> Plan:
    """Read and check a plan directory.

    Args:
        folder: the plan directory.
        check_files: True also compares every file's size and SHA-256 with the plan.

    Raises:
        PlanError: the directory is missing, damaged, incomplete or newer than this version; lists every violation.
    """
    folder = Path(folder)
    plan = parse_plan(read_plan_file(folder), where=folder)
    if check_files:
        check_content(folder, plan)
    return plan


def check_content(folder: Path, plan: Plan) -> None:
    """Compare the size and the SHA-256 of every file of a plan directory with the plan.

    Raises:
        PlanError: a file is missing or was changed; lists every violation.
    """
    problems = [problem for entry in plan.files() for problem in check_file(folder, entry)]
    if problems:
        raise PlanError(_listed(f"the plan {folder} was changed or is incomplete", problems))


def read_plan_file(folder: Path) -> bytes:
    """The bytes of the ``plan.json`` in a plan directory.

    Raises:
        PlanError: the file is missing or cannot be read.
    """
    if not is_text(folder):
        raise PlanError(f"the path of the plan, {str(folder)!r}, is not UTF-8 text; give the folder another name")
    try:
        return read_regular(folder / PLAN_FILE, most_bytes=_MOST_PLAN_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise PlanError(f"{folder} is not a plan directory: {_what_instead(folder)}") from error
    except OSError as error:
        raise PlanError(f"cannot read {folder / PLAN_FILE}: {error.strerror}") from error


def _what_instead(path: Path) -> str:
    """What a path is that is not a plan directory, and what to do, as text."""
    make = "Make one with: onnxsplit partition MODEL"
    if path.is_dir():
        return _what_folder(path) or f"it has no {PLAN_FILE}. {make}"
    if not path.exists():
        return f"it is missing. {make}"
    if (path.parent / PLAN_FILE).is_file():
        return f"it is a file of the plan {path.parent}. Name the folder: {shlex.quote(str(path.parent))}"
    if path.suffix == ".npz":
        return "it holds tensors (.npz), as --inputs takes them. Name the folder of a plan"
    if _begins_as_model(path):
        return f"it is a model. Make a plan of it: onnxsplit partition {shlex.quote(str(path))}"
    return f"it is a file. {make}"


def _what_folder(folder: Path) -> str | None:
    """What a folder without ``plan.json`` holds, and what to do; None when it holds neither plans nor models."""
    try:
        plans = sorted(path.parent.name for path in folder.glob(f"*/{PLAN_FILE}"))
        models = sorted(path.name for path in folder.glob("*.onnx"))
    except OSError:
        return None
    if plans:
        first = shlex.quote(str(folder / plans[0]))
        served = "; serve takes the folder, as the versions of one model" if all(map(str.isdecimal, plans)) else ""
        return f"it holds the plans {_first_names(plans)}. Name one of them, such as {first}{served}"
    if models:
        first = shlex.quote(str(folder / models[0]))
        return f"it holds the models {_first_names(models)}. Make a plan of one: onnxsplit partition {first}"
    return None


def _first_names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(map(shown, names[:_MOST_NAMES])) + more


def _begins_as_model(path: Path) -> bool:
    """Whether a file begins as ONNX models do: with their first field, the IR version, and another field after it."""
    try:
        with open_regular(path) as stream:
            head = stream.read(3)
    except OSError:
        return False
    return len(head) == 3 and head[0] == 0x08 and 0 < head[1] < 0x80 and head[2] in _SECOND_FIELDS


def parse_plan(text: bytes, *, where: Path) -> Plan:
    """Decode and check the bytes of a ``plan.json``; messages name ``where`` as its place.

    Raises:
        PlanError: the plan is damaged, contradicts itself, or is newer than this version; lists every violation.
    """
    if len(text) > _MOST_PLAN_BYTES:
        raise PlanError(f"{where}: plan.json has {len(text)} bytes; at most {_MOST_PLAN_BYTES} are allowed")
    try:
        version = msgspec.json.decode(text, type=_Version).format_version
        if version > FORMAT_VERSION:
            raise PlanError(
                f"{where}: the plan has format {version}; this onnxsplit reads up to {FORMAT_VERSION}. "
                "Upgrade onnxsplit, or partition the model again with this version"
            )
        plan = msgspec.json.decode(text, type=Plan)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise PlanError(
            f"{where}: plan.json is damaged: {_short(one_line(error))}. Partition the model again"
        ) from error
    except RecursionError as error:
        raise PlanError(f"{where}: plan.json is damaged: it is nested too deeply. Partition the model again") from error
    problems = plan_problems(plan)
    if problems:
        raise PlanError(_listed(f"{where}: plan.json contradicts itself", problems))
    return plan


def checked_json(plan: Plan) -> bytes:
    """The bytes of a new ``plan.json``, checked so that it can be read back.

    Raises:
        PlanError: the plan holds a number or a reference that is not allowed.
    """
    text = plan.to_json()
    try:
        parse_plan(text, where=Path(plan.model.name))
    except PlanError as error:
        raise PlanError(f"the new plan exceeds the limits of plans, so it was not written: {error}") from error
    return text


def check_plan_folder(folder: Path, option: str = "-o") -> None:
    """Refuse to write a plan over anything but a plan or an empty folder.

    Args:
        folder: the plan directory.
        option: the command's option that names it, for the message.

    Raises:
        PlanError: something else is there, or the parent folder is missing; names it.
    """
    if not is_text(folder):
        raise PlanError(f"the path {str(folder)!r} is not UTF-8 text; choose another place with {option} DIR")
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise PlanError(f"{folder} exists and is not a folder; choose another place with {option} DIR")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / PLAN_FILE).is_file():
        raise PlanError(
            f"{folder} exists and holds no plan; nothing was touched. Choose another place with {option} DIR"
        )
    check_parent(folder, option)


def plan_id(text: bytes) -> str:
    """The identity of a plan: the SHA-256 of the bytes of its ``plan.json``, in hexadecimal."""
    return hashlib.sha256(text).hexdigest()


def check_file(folder: Path, entry: FileEntry) -> list[str]:
    """The problems of one file of a plan directory: missing, a link, another size, or another content."""
    path = folder / entry.name
    try:
        if path.is_symlink():
            return [f"{entry.name}: is a link"]
        with open_regular(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            if size != entry.size_bytes:
                return [f"{entry.name}: {size} bytes, the plan says {entry.size_bytes}"]
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except FileNotFoundError:
        return [f"{entry.name}: missing"]
    except OSError as error:
        return [f"{entry.name}: {error.strerror}"]
    return [] if digest == entry.sha256 else [f"{entry.name}: its SHA-256 is not the plan's"]


def is_damaged(folder: Path) -> bool:
    """Whether a plan directory cannot be loaded."""
    try:
        load_plan(folder)
    except PlanError:
        return True
    return False


def example_file(folder: Path, plan: Plan) -> Path:
    """The file of the plan's own example inputs.

    Raises:
        PlanError: the plan holds no example inputs.
    """
    if plan.example_inputs is None:
        names = [name for name in plan.inputs if name not in plan.defaults]
        more = f" and {len(names) - _MOST_INPUTS} more" if len(names) > _MOST_INPUTS else ""
        wanted = ", ".join(_declared(name, plan.tensors[name]) for name in names[:_MOST_INPUTS]) + more
        raise PlanError(f"{folder} holds no example inputs; give some with --inputs FILE.npz, which holds {wanted}")
    return folder / plan.example_inputs.name


def _declared(name: str, spec: TensorSpec) -> str:
    """A tensor as text: ``'x': float32 [batch, 32]``."""
    shape = "of any rank" if spec.shape is None else f"[{', '.join(map(str, spec.shape))}]"
    return f"{shown(name)}: {spec.dtype} {shape}"


def default_files(folder: Path, plan: Plan) -> dict[str, Path]:
    """The files with the defaults of a plan's inputs, by input: each an ``.npz`` with one tensor of the same name."""
    return {name: folder / entry.name for name, entry in plan.defaults.items()}


def plan_schema() -> bytes:
    """The JSON Schema of ``plan.json``, which the package holds as ``plan.schema.json``."""
    schema = msgspec.json.schema(Plan)
    for definition in schema["$defs"].values():  # before Python 3.13, docstrings keep their indentation
        definition["description"] = inspect.cleandoc(definition["description"])
    return msgspec.json.format(msgspec.json.encode(schema, order="sorted"), indent=2) + b"\n"


def _listed(head: str, problems: list[str]) -> str:
    shown = [_short(problem) for problem in problems[:20]]
    more = [f"and {len(problems) - len(shown)} more"] if len(problems) > len(shown) else []
    return "\n  - ".join([head + ":", *shown, *more])


def _short(problem: str) -> str:
    """A problem, shortened in the middle if it is long, because names in a plan may have any length."""
    half = _MOST_PROBLEM // 2
    return problem if len(problem) <= _MOST_PROBLEM else f"{problem[:half]} ... {problem[-half:]}"
