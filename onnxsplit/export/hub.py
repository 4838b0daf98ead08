"""Repositories of a hub: what is needed of one, fetched once and kept where its own library keeps it."""

from __future__ import annotations

import os
from pathlib import Path

from onnxsplit.errors import ExportError, MissingDependency, one_line
from onnxsplit.export.conversion import ExportOptions
from onnxsplit.export.sources import Source

_EXTRA = "pip install 'onnxsplit[transformers]'"
_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]


def fetched(source: Source, options: ExportOptions) -> tuple[Path, str]:
    """A repository's files, or one of them with its data, and the revision they are of.

    Raises:
        ExportError: they cannot be had.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise MissingDependency(f"hf:// needs huggingface_hub: {_EXTRA}") from error
    assert source.repo is not None
    if source.file is not None and not source.file.endswith(".onnx"):
        raise ExportError(f"{source.text}: of a repository's files, only .onnx ones can be exported by themselves")
    wanted = _FILES if source.file is None else [source.file, f"{source.file}_data*", f"{source.file}.data*"]
    offline = options.offline or os.environ.get("HF_HUB_OFFLINE") == "1"
    options.say(f"fetching {source.repo}")
    try:
        folder = snapshot_download(
            source.repo, revision=source.revision, allow_patterns=wanted, local_files_only=offline, etag_timeout=10
        )
    except LocalEntryNotFoundError as error:
        why = "you asked for no hub (--offline)" if offline else "the hub cannot be reached"
        raise ExportError(
            f"{source.text} is not on this host, and {why}. Fetch it where there is a network, or name a local folder"
        ) from error
    except HfHubHTTPError as error:
        raise ExportError(f"the hub does not give {source.text}: {str(error).strip().splitlines()[0]}") from error
    except Exception as error:  # an answer that is none of a hub's
        raise ExportError(f"cannot fetch {source.text}: {one_line(error, 300)}") from error
    if source.file is None:
        return Path(folder), Path(folder).name
    found = Path(folder) / source.file
    if not found.exists():
        raise ExportError(f"{source.repo} has no file {source.file!r}")
    return found, Path(folder).name
