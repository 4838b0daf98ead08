"""Stand-ins for commands that reach other hosts or change this one, for tests that follow a page of the documentation.

``$PLACE`` is the folder of the page's reader. Another host is a folder in it, which is also the home of its user.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

COMMANDS = {
    "onnxsplit": f'exec {sys.executable} -P -m onnxsplit "$@"',
    "python": f'exec {sys.executable} "$@"',
    "curl": f'exec {shutil.which("curl")} --fail "$@"',
    # drops its options; the rest runs in the folder of the host
    "ssh": (
        "while [[ $1 == -* ]]; do [[ $1 == -o ]] && shift; shift; done\n"
        'export HOME="$PLACE/$1"; unset XDG_CONFIG_HOME; mkdir -p "$HOME" && cd "$HOME" || exit 1; shift; exec "$@"'
    ),
    # scp -r SOURCE HOST:TARGET
    "scp": '[[ $1 == -r ]] || exit 2\nhost=${3%%:*}; mkdir -p "$PLACE/$host"; exec cp -r "$2" "$PLACE/$host/${3#*:}"',
    # writes what it would apply, and the commands that follow
    "kubectl": (
        '[[ $1 == -n && $3 =~ ^(rollout|wait|delete)$ ]] && exec printf "%s\\n" "$*" >> kubectl.log\n'
        f'[[ "$1 $2" == "apply -k" ]] || exit 2\nexec {shutil.which("kubectl")} kustomize "$3" > applied.yaml'
    ),
    # a job of three tasks on one host
    "sbatch": '[[ $1 == --ntasks=* ]] || exit 2\nshift; SLURM_JOB_NODELIST=here exec bash "$@"',
    "scontrol": "echo here",
    "getent": "echo 127.0.0.1 here",
    "srun": (
        'shift; for n in 0 1 2 3; do SLURM_PROCID=$n "$@" & done\n'
        'trap "kill -TERM $(jobs -p | tr "\\n" " "); wait" TERM; wait'
    ),
    # answers once the job serves
    "squeue": (
        'until curl -s "http://127.0.0.1:$ONNXSPLIT_SERVE_HTTP_PORT/v2/health/ready"; do sleep 0.2; done >&2\n'
        "echo 127.0.0.1"
    ),
    "useradd": '[[ "$1" == --system ]]',
    "chown": "[[ $1 == -R && -e $3 ]]",
    # makes an environment that has this onnxsplit, and a pip that has nothing to do
    "python3": (
        '[[ "$1 $2" == "-m venv" ]] || exit 2\n'
        'mkdir -p "$3/bin" && ln -s "$(command -v onnxsplit)" "$3/bin/onnxsplit" && ln -s "/bin/true" "$3/bin/pip"'
    ),
    # runs ExecStart of an instance of a unit, as its user would find it
    "systemctl": (
        '[[ $1 == daemon-reload ]] && exit 0\n[[ "$1 $2" == "enable --now" ]] || exit 2\n'
        'unit="$PLACE/etc/systemd/system/${3%@*}@.service"; stage=${3#*@}\n'
        'line=$(sed -n "s/^ExecStart=//p" "$unit" | sed "s|/opt/|$PLACE/opt/|; s|/etc/|$PLACE/etc/|; s|%i|$stage|")\n'
        'source "$PLACE/$(sed -n "s|^EnvironmentFile=/||p" "$unit")"; eval "exec $line"'
    ),
}


def write(folder: Path) -> str:
    """Write the stand-ins into a folder, and return a ``PATH`` that begins with it."""
    folder.mkdir()
    for name, text in COMMANDS.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"
