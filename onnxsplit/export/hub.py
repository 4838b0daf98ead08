"""Repositories of the Hugging Face hub: the needed files are fetched once, and kept in the cache of its library."""

from __future__ import annotations

import os
from pathlib import Path

from onnxsplit.errors import ExportError, MissingDependency, one_line
from onnxsplit.export.conversion import ExportOptions
from onnxsplit.export.sources import Source

_EXTRA = "pip install 'onnxsplit[transformers]'"
_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


def fetched(source: Source, options: ExportOptions) -> tuple[Path, str]:
    """Fetch a repository's files, or one of them with its data; returns their path and revision.

    Raises:
        ExportError: the files cannot be fetched.
        MissingDependency: huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise MissingDependency(f"hf:// needs huggingface_hub: {_EXTRA}") from error
    assert source.repo is not None
    if source.file is not None and not source.file.endswith(".onnx"):
        raise ExportError(f"{source.text}: only the .onnx files of a repository can be exported alone")
    wanted = _FILES if source.file is None else [source.file, f"{source.file}_data*", f"{source.file}.data*"]
    offline = options.offline or os.environ.get("HF_HUB_OFFLINE") == "1"
    options.say(f"fetching {source.repo}")
    try:
        folder = snapshot_download(
            source.repo, revision=source.revision, allow_patterns=wanted, local_files_only=offline, etag_timeout=10
        )
    except LocalEntryNotFoundError as error:
        why = "the hub is not contacted (--offline)" if offline else "the hub cannot be reached"
        raise ExportError(
            f"{source.text} is not on this host, and {why}. Fetch it on a host with a network, or name a local folder"
        ) from error
    except HfHubHTTPError as error:
        raise ExportError(f"the hub refuses {source.text}: {str(error).strip().splitlines()[0]}") from error
    except Exception as error:  # an answer that does not come from a hub
        raise ExportError(f"cannot fetch {source.text}: {one_line(error, 300)}") from error
    if source.file is None:
        return Path(folder), Path(folder).name
    file = Path(folder) / source.file
    if not file.exists():
        raise ExportError(f"{source.repo} has no file {source.file!r}")
    return file, Path(folder).name
