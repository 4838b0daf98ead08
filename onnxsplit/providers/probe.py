"""What is known of each installed plugin: its devices, or what is wrong with it.

A plugin's library may end the process that loads it, so each plugin is loaded in a process of its own. That process is
this module itself.
"""

from __future__ import annotations

import os
import subprocess
import sys

import msgspec

from onnxsplit.errors import OnnxsplitError
from onnxsplit.providers.plugins import Plugin, installed_plugins
from onnxsplit.providers.runtime import load_runtime
from onnxsplit.providers.use import no_device

_PATIENCE_S = 60.0


class PluginState(msgspec.Struct, frozen=True, kw_only=True):
    """An installed plugin.

    Attributes:
        name: its short name, as ``--provider`` takes it.
        package: the name of the package.
        version: the version of the package.
        providers: ONNX Runtime's names of its providers.
        devices: the devices that it offers here, in words.
        problem: why it cannot be used; None if it can.
    """

    name: str
    package: str
    version: str
    providers: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    problem: str | None = None


def plugin_states() -> tuple[PluginState, ...]:
    """The state of every installed plugin. Starts a process for each."""
    return tuple(map(_state, installed_plugins()))


def _state(plugin: Plugin) -> PluginState:
    known = PluginState(name=plugin.name, package=plugin.package, version=plugin.version)
    command = [sys.executable, "-P", "-m", "onnxsplit.providers.probe", plugin.name]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_PATIENCE_S, check=False)
    except subprocess.TimeoutExpired:
        return msgspec.structs.replace(known, problem=f"its library did not load within {_PATIENCE_S:.0f} s")
    try:
        return msgspec.json.decode(done.stdout, type=PluginState)
    except msgspec.DecodeError:
        tail = done.stderr[-300:].decode(errors="replace").strip()
        problem = f"loading it ended the process with {done.returncode}" + (f": {tail}" if tail else "")
        return msgspec.structs.replace(known, problem=problem)


def _probed(name: str) -> PluginState:
    """The state of a plugin; loads its library into this process."""
    plugin = next(plugin for plugin in installed_plugins() if plugin.name == name)
    state = PluginState(name=name, package=plugin.package, version=plugin.version)
    try:
        ort = load_runtime()
        providers = plugin.provider_names()
        state = msgspec.structs.replace(state, providers=providers)
        offered = [device for provider in providers for device in plugin.devices(ort, provider)]
    except OnnxsplitError as error:
        return msgspec.structs.replace(state, problem=str(error))
    problem = None if offered else no_device(ort, plugin, providers[0] if providers else "")
    return msgspec.structs.replace(state, devices=tuple(map(str, offered)), problem=problem)


def _main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # other output must not mix with the answer
    answers.write(msgspec.json.encode(_probed(sys.argv[1])))
    answers.flush()


if __name__ == "__main__":
    _main()
