"""Runs the pods of rendered manifests as Kubernetes would, each in a network namespace of its own.

The commands, arguments, environment and probes are those of the objects. A pod's volumes are folders, and stand for
the paths at which they are mounted. Names of headless Services are in the pods' ``/etc/hosts``.
"""

from __future__ import annotations

import base64
import ctypes
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import pytest
from rendered import selects
from waiting import wait_until

_NETWORK = "10.79.0"
_CLONE_NEWNET = 0x40000000
_LISTENS = "0A"
_T = TypeVar("_T")

Document = dict[str, Any]


def need_namespaces() -> None:
    """Skip the test where network namespaces cannot be made, or Kustomize is missing."""
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("kubectl") is None:
        pytest.skip("needs root, the command ip (iproute2), and kubectl")
    name = f"onnxsplit-{os.getpid()}-try"
    made = subprocess.run(["ip", "netns", "add", name], check=False, capture_output=True, text=True)
    if made.returncode != 0:
        pytest.skip(f"network namespaces cannot be made here: {made.stderr.strip()}")
    _ip("netns", "del", name)


def _ip(*words: object) -> None:
    subprocess.run(["ip", *map(str, words)], check=True, capture_output=True, text=True)


class Pod:
    """A running pod.

    Attributes:
        labels: Its labels.
        address: Its IP address.
        process: The process of its only container.
        ending: True once it was told to end.
    """

    def __init__(self, cluster: Cluster, template: Document, number: int) -> None:
        self.labels: dict[str, str] = template["metadata"]["labels"]
        self.address = f"{_NETWORK}.{number}"
        self.ending = False
        self._cluster, self._spec = cluster, template["spec"]
        (self._container,) = self._spec["containers"]
        self._namespace = cluster.join(number)
        self._folder = cluster.folder / f"pod-{number}"
        self._volumes = {v["name"]: cluster.volume(v, self._folder) for v in self._spec["volumes"]}
        self._hosts = self._folder / "hosts"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Pod:
        """Run the init containers, and start the container."""
        self.write_hosts()
        for container in self._spec.get("initContainers", ()):
            done = self._popen(container, container["command"])
            assert done.wait(60) == 0, (self._folder / "log").read_text()
        command = self._container.get("command") or ["onnxsplit"]  # the image's entrypoint
        self.process = self._popen(self._container, [*command, *self._container["args"]])
        return self

    def write_hosts(self) -> None:
        """Tell the pod the present names of Services."""
        self._hosts.write_text("127.0.0.1 localhost\n" + self._cluster.hosts())

    def probe(self, name: str) -> bool:
        """Ask a probe of the container once."""
        probe = self._container[name]
        if "exec" in probe:
            return self._popen(self._container, probe["exec"]["command"]).wait(60) == 0
        asked = probe["httpGet"]
        port = asked["port"] if isinstance(asked["port"], int) else self.ports[asked["port"]]
        try:
            return self.get(asked.get("scheme", "HTTP").lower(), port, asked["path"])[0] < 400
        except OSError:
            return False

    def get(self, scheme: str, port: int, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
        """Send one HTTP request from another host; certificates are not checked, as by the kubelet."""
        context = ssl._create_unverified_context() if scheme == "https" else None

        def ask() -> tuple[int, bytes]:
            request = urllib.request.Request(f"{scheme}://{self.address}:{port}{path}", body, headers)
            try:
                with urllib.request.urlopen(request, timeout=60, context=context) as answer:
                    return answer.status, answer.read()
            except urllib.error.HTTPError as error:
                with error:
                    return error.code, error.read()

        return self._cluster.outside(ask)

    @property
    def ports(self) -> dict[str, int]:
        """The ports of the container, by name."""
        return {port["name"]: port["containerPort"] for port in self._container["ports"]}

    def listens(self) -> set[int]:
        """The TCP ports at which something listens that other hosts can reach."""
        command = ["ip", "netns", "exec", self._namespace, "cat", "/proc/net/tcp", "/proc/net/tcp6"]
        found = set()
        for line in subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines():
            words = line.split()
            if words[3] == _LISTENS and not words[1].startswith("0100007F"):
                found.add(int(words[1].rpartition(":")[2], 16))
        return found

    def end(self) -> int:
        """End the pod as Kubernetes does, with its hook and SIGTERM; its exit status.

        Raises:
            TimeoutExpired: It has not ended within the grace period, and would be killed.
        """
        assert self.process is not None
        self.ending = True
        if hook := self._container.get("lifecycle", {}).get("preStop"):
            assert self._popen(self._container, hook["exec"]["command"]).wait(60) == 0
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(self._spec["terminationGracePeriodSeconds"])

    def log(self) -> str:
        """What the containers have written."""
        return (self._folder / "log").read_text()

    def _popen(self, container: Document, command: Iterable[str]) -> subprocess.Popen[bytes]:
        given = {
            entry["name"]: entry["value"] if "value" in entry else self._field(entry) for entry in container["env"]
        }
        folders = {
            mount["mountPath"]: str(self._volumes[mount["name"]] / mount.get("subPath", ""))
            for mount in container["volumeMounts"]
        }
        paths = "|".join(map(re.escape, sorted(folders, key=len, reverse=True)))

        def here(text: str) -> str:
            text = re.sub(rf"(?<![\w./-])({paths})(?=[\s/]|$)", lambda found: folders[found[1]], text)
            return re.sub(r"\$\(([A-Za-z_]\w*)\)", lambda found: given.get(found[1], found[0]), text)

        environment = {**self._cluster.environment, "TMPDIR": folders["/tmp"]}
        environment |= {name: here(value) for name, value in given.items()}
        inside = ["ip", "netns", "exec", self._namespace, "sh", "-c", 'mount --bind "$0" /etc/hosts && exec "$@"']
        with (self._folder / "log").open("ab") as log:
            process = subprocess.Popen(
                [*inside, str(self._hosts), *map(here, command)], env=environment, stdout=log, stderr=log
            )
        self._cluster.stack.callback(_finish, process)
        return process

    def _field(self, entry: Document) -> str:
        assert entry["valueFrom"]["fieldRef"]["fieldPath"] == "status.podIP"
        return self.address


def _finish(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
    process.wait(60)


class Cluster:
    """Hosts joined by a bridge. A context manager that ends all pods.

    Args:
        environment: The environment of a process that imports this checkout.
        claims: The folders of PersistentVolumeClaims.
    """

    def __init__(self, environment: dict[str, str], claims: Mapping[str, Path]) -> None:
        self._claims = claims
        self.stack = ExitStack()
        self.folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory(prefix="c-")))
        installed = self.folder / "bin" / "onnxsplit"
        installed.parent.mkdir()
        installed.write_text(f'#!/bin/sh\nexec {sys.executable} -P -m onnxsplit "$@"\n')
        installed.chmod(0o755)
        self.environment = {**environment, "PATH": f"{installed.parent}{os.pathsep}{environment['PATH']}"}
        self.pods: list[Pod] = []
        self._objects: dict[tuple[str, str], Document] = {}
        self._name = f"onnxsplit-{os.getpid()}-hub"

    def __enter__(self) -> Cluster:
        try:
            self._open()
        except BaseException:
            self.stack.close()
            raise
        return self

    def _open(self) -> None:
        _ip("netns", "add", self._name)
        self.stack.callback(_ip, "netns", "del", self._name)
        _ip("-n", self._name, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self._name, "addr", "add", f"{_NETWORK}.1/24", "dev", "bridge")
        _ip("-n", self._name, "link", "set", "bridge", "up")
        self._threads = ThreadPoolExecutor(4, initializer=_enter, initargs=(self._name,))
        self.stack.callback(self._threads.shutdown)

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def wait_until_ready(self, *pods: Pod) -> None:
        """Wait until the readiness probes of some pods pass.

        Raises:
            AssertionError: They do not; with what the pods have written.
        """
        try:
            wait_until(lambda: all(pod.probe("readinessProbe") for pod in pods), every_s=0.2)
        except AssertionError as error:
            raise AssertionError("".join(f"{pod.address}:\n{pod.log()}" for pod in pods)) from error

    def outside(self, call: Callable[[], _T]) -> _T:
        """Call a function in a thread whose sockets are on a host without pods."""
        return self._threads.submit(call).result(120)

    def join(self, number: int) -> str:
        """Add a host to the network; its namespace."""
        name, link = f"onnxsplit-{os.getpid()}-{number}", f"o{os.getpid()}p{number}"
        _ip("netns", "add", name)
        self.stack.callback(_ip, "netns", "del", name)
        _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", self._name, "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("-n", self._name, "link", "set", link, "master", "bridge", "up")
        _ip("-n", name, "addr", "add", f"{_NETWORK}.{number}/24", "dev", "eth0")
        _ip("-n", name, "link", "set", "eth0", "up")
        return name

    def apply(self, documents: Iterable[Document]) -> None:
        """Take over objects, as ``kubectl apply`` does; volumes of ConfigMaps change in running pods."""
        for document in documents:
            key = document["kind"], document["metadata"]["name"]
            self._objects[key] = document
            for volume in self.folder.glob(f"pod-*/{'.'.join(key)}"):
                self._fill(volume, document, None)

    def start(self, template: Document) -> Pod:
        """Start one pod."""
        pod = Pod(self, template, 10 + len(self.pods))
        self.pods.append(pod)
        return pod.start()

    def run(self, kind: str) -> list[Pod]:
        """Start the pods of all objects of a kind that have none yet, in the numbers that the cluster would run."""
        started = []
        for (found, name), document in list(self._objects.items()):
            labels = document["spec"]["template"]["metadata"]["labels"] if found == kind else {}
            if found != kind or any(pod.labels == labels for pod in self.pods):
                continue
            scaler = self._objects.get(("HorizontalPodAutoscaler", name))
            count = document["spec"].get("replicas") or (scaler["spec"]["minReplicas"] if scaler else 1)
            started += [self.start(document["spec"]["template"]) for _ in range(count)]
        for pod in self.pods:
            pod.write_hosts()
        return started

    def delete(self, labels: Callable[[Mapping[str, str]], bool]) -> list[Pod]:
        """Remove the objects that a label selector selects; the pods of those that had some."""
        gone = [d for d in self._objects.values() if labels(d["metadata"].get("labels", {}))]
        for document in gone:
            del self._objects[document["kind"], document["metadata"]["name"]]
        sets = [d["spec"]["selector"]["matchLabels"] for d in gone if d["kind"] == "StatefulSet"]
        return [pod for pod in self.pods if not pod.ending and any(selects(chosen, pod.labels) for chosen in sets)]

    def endpoints(self, service: str) -> list[Pod]:
        """The pods to which a Service sends clients now."""
        selector = self._objects["Service", service]["spec"]["selector"]
        chosen = [pod for pod in self.pods if not pod.ending and selects(selector, pod.labels)]
        return [pod for pod in chosen if pod.probe("readinessProbe")]

    def hosts(self) -> str:
        """The names of headless Services, and the addresses of all their pods."""
        lines = [
            f"{pod.address} {name}\n"
            for (kind, name), document in self._objects.items()
            if kind == "Service" and document["spec"].get("clusterIP") == "None"
            for pod in self.pods
            if not pod.ending and selects(document["spec"]["selector"], pod.labels)
        ]
        return "".join(lines)

    def volume(self, volume: Document, pod: Path) -> Path:
        """The folder of a volume of a pod."""
        if claim := volume.get("persistentVolumeClaim"):
            return self._claims[claim["claimName"]]
        if "emptyDir" in volume:
            folder = pod / volume["name"]
            folder.mkdir(parents=True)
            folder.chmod(0o2777)
            return folder
        kind, source = ("Secret", volume["secret"]) if "secret" in volume else ("ConfigMap", volume["configMap"])
        name = source.get("secretName") or source["name"]
        folder = pod / f"{kind}.{name}"
        folder.mkdir(parents=True)
        self._fill(folder, self._objects[kind, name], source.get("items"), source.get("defaultMode", 0o644))
        return folder

    def _fill(self, volume: Path, document: Document, items: list[Document] | None, mode: int = 0o644) -> None:
        """Write a volume as the kubelet does: files in a new folder, to which one link is switched."""
        version = Path(tempfile.mkdtemp(prefix="..", dir=volume))
        version.chmod(0o755)
        for item in items or [{"key": key, "path": key} for key in document["data"]]:
            text = document["data"][item["key"]]
            content = base64.b64decode(text) if document["kind"] == "Secret" else text.encode()
            (version / item["path"]).parent.mkdir(exist_ok=True)
            (version / item["path"]).write_bytes(content)
            (version / item["path"]).chmod(mode)
            first = Path(item["path"]).parts[0]
            if not (volume / first).is_symlink():
                (volume / first).symlink_to(f"..data/{first}")
        before = (volume / "..data").resolve() if (volume / "..data").exists() else None
        (volume / "..new").symlink_to(version.name)
        (volume / "..new").rename(volume / "..data")
        for link in volume.iterdir():
            if not link.exists():
                link.unlink()
        if before is not None:
            shutil.rmtree(before)


def _enter(namespace: str) -> None:
    """Move this thread to a network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/run/netns", namespace).open() as opened:
        if libc.setns(opened.fileno(), _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
