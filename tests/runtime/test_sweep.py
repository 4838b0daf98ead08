"""The folders of killed processes are removed by the user's next process; folders of live ones are kept."""

from __future__ import annotations

import os
import subprocess
import sys

from runtime.home import hold, private_folder, sweep


def test_only_folders_without_a_live_process_are_removed(python_environment):
    mine = private_folder()
    held = hold(mine)
    code = "from runtime.home import hold, private_folder; import os, sys, signal; "
    code += "home = private_folder(); hold(home); print(home); sys.stdout.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    environment = {**python_environment, "TMPDIR": os.environ["TMPDIR"]}
    killed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    left = mine.parent / killed.stdout.strip().rpartition("/")[2]
    assert left.is_dir()
    sweep()
    assert not left.exists()
    assert mine.is_dir()
    os.close(held)
    sweep()
    assert not mine.exists()
