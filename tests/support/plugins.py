"""Plugin packages that hold no plugin: what a user has whose package is damaged, or made for another system."""

from __future__ import annotations

from pathlib import Path


def fake_plugin(site: Path, name: str, *, library: str | None = None, code: str | None = None) -> Path:
    """Write the package ``onnxruntime-ep-NAME`` into a folder, and return its library.

    Args:
        site: a folder on ``sys.path``.
        name: the plugin's short name.
        library: the text in the library's place; None for no file.
        code: the module's code; None for code that follows the convention of such packages.
    """
    module = "onnxruntime_ep_" + name.replace("-", "_")
    package, info = site / module, site / f"{module}-0.0.1.dist-info"
    package.mkdir()
    info.mkdir()
    file = package / "libplugin.so"
    if library is not None:
        file.write_text(library)
    (package / "__init__.py").write_text(
        code
        or f"def get_library_path():\n    return {str(file)!r}\n\n\n"
        f"def get_ep_names():\n    return ['{name.title().replace('-', '')}ExecutionProvider']\n"
    )
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: onnxruntime-ep-{name}\nVersion: 0.0.1\n")
    (info / "top_level.txt").write_text(f"{module}\n")
    return file
