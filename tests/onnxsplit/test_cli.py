"""The command line as other tools call it: exit codes, --json, messages, and the speed of help."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import build
import click
import click.testing
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxsplit.cli import bench as bench_command
from onnxsplit.cli import cli
from onnxsplit.cli.output import Output
from onnxsplit.npz import load_npz, save_npz


@pytest.fixture
def onnxsplit(python_environment, tmp_path):
    def call(*arguments: object, code: int = 0):
        done = subprocess.run(
            [sys.executable, "-m", "onnxsplit", *map(str, arguments)],
            capture_output=True, text=True, env=python_environment, cwd=tmp_path, check=False, timeout=120,
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done

    return call


def test_partition_verify_run_with_no_other_option(onnxsplit, tmp_path):
    build.save(build.chain(), tmp_path)
    table = onnxsplit("partition", "model.onnx").stdout
    for word in (
        "whole model",
        "stage 0",
        "stage 1",
        "ideal",
        "weights",
        "bytes out",
        "Next: onnxsplit verify model.plan",
    ):
        assert word in table
    assert "equal" in onnxsplit("verify", "model.plan", "model.onnx").stdout
    save_npz(tmp_path / "in.npz", {"x": np.ones((5, 32), np.float32)})
    onnxsplit("run", "model.plan", "--inputs", "in.npz", "--outputs", "out.npz")
    assert load_npz(tmp_path / "out.npz")["y"].shape == (5, 32)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.npz", "model.onnx", "model.plan", "out.npz"]


def test_json_is_one_object_on_stdout(onnxsplit, tmp_path):
    build.save(build.chain(), tmp_path)
    made = json.loads(onnxsplit("partition", "model.onnx", "--costs", "analytic", "--json").stdout)
    assert len(made["summary"]["stages"]) == 2
    assert json.loads(onnxsplit("verify", "model.plan", "model.onnx", "--json").stdout)["good"] is True
    assert (
        json.loads(onnxsplit("inspect", "model.onnx", "--costs", "analytic", "--json").stdout)["inspection"]["ops"]
        == 12
    )
    ran = json.loads(onnxsplit("run", "model.plan", "--json", "--outputs-only", "y").stdout)
    assert ran["outputs"]["y"]["shape"] == [1, 32]


def test_inspect_tells_ops_cost_and_cuts(onnxsplit, tmp_path):
    build.save(build.chain(), tmp_path)
    told = onnxsplit("inspect", "model.onnx").stdout
    for word in ("12 ops in 12 atoms", "MatMul", "Input x: float32 [batch, 32]", "best cuts in two"):
        assert word in told


QUICK_BENCH = ("bench", "model.plan", "--slices", 3, "--slice-seconds", 0.1)


@pytest.mark.parametrize("given", [("--model", "model.onnx"), ()])
def test_bench_puts_the_pipeline_beside_its_ceiling_and_the_whole_model(onnxsplit, tmp_path, given):
    build.save(build.chain(8, width=256), tmp_path)
    onnxsplit("partition", "model.onnx", "--costs", "analytic")
    report = json.loads(onnxsplit(*QUICK_BENCH, *given, "--json").stdout)["bench"]
    assert len(report["rows"]) == 4
    assert all(row["per_s"] > 0 for row in report["rows"])
    assert [row["ratio"] for row in report["rows"] if row["name"] == report["basis"]] == [1.0]
    assert report["basis"].startswith("one session")
    assert [(load["name"], load["share"]) for load in report["loads"]] == [
        ("pipeline", 0.5), (report["basis"], 0.5), ("pipeline", 0.8), (report["basis"], 0.8),
    ]  # fmt: skip
    assert all(0 < load["p50_ns"] <= load["p99_ns"] for load in report["loads"])
    assert not report["without_whole"]


def test_bench_says_in_its_heads_what_it_compares_with(onnxsplit, tmp_path):
    build.save(build.chain(), tmp_path)
    onnxsplit("partition", "model.onnx", "--costs", "analytic")
    told = onnxsplit(*QUICK_BENCH).stdout
    assert "x one session" in " ".join(told.split())
    assert "Latency at shares of the pipeline's rate" in told


def test_bench_compares_a_plan_without_some_outputs_with_its_merged_stages(onnxsplit, tmp_path):
    build.save(build.heads(), tmp_path)
    onnxsplit("partition", "model.onnx", "--costs", "analytic", "--drop-output", "left", "-o", "model.plan")
    report = json.loads(onnxsplit(*QUICK_BENCH, "--json").stdout)["bench"]
    assert report["basis"].startswith("one session")
    assert "without --model" in onnxsplit(*QUICK_BENCH, "--model", "model.onnx", code=1).stderr


def test_bench_says_why_it_does_not_compare_with_the_whole_model(onnxsplit, tmp_path, monkeypatch):
    build.save(build.chain(), tmp_path)
    onnxsplit("partition", "model.onnx", "--costs", "analytic")
    monkeypatch.setattr("onnxsplit.memory.free_memory_bytes", lambda: 1000)
    with bench_command._whole(Output(as_json=False), tmp_path / "model.plan", None) as (whole, reason):
        assert whole is None
        assert "1000 B are free" in reason


def test_a_cluster_file_is_written_measured_and_cut_for(onnxsplit, tmp_path):
    build.save(build.chain(), tmp_path)
    assert "cluster measure" in onnxsplit("cluster", "init").stdout
    assert "--force" in onnxsplit("cluster", "init", code=1).stderr
    found = json.loads(onnxsplit("cluster", "measure", "model.onnx", "--json").stdout)
    assert set(found["speeds"]) == {"cpu0", "cpu1"}
    assert found["links"][0]["bytes_per_s"] > found["links"][0]["latency_ns"] > 0
    made = json.loads(onnxsplit("partition", "model.onnx", "--cluster", "cluster.toml", "--stages", 2, "--json").stdout)
    assert [stage["device"] for stage in made["summary"]["stages"]] in (["cpu0", "cpu1"], ["cpu1", "cpu0"])


def test_a_report_and_an_annotated_model_come_with_the_plan(onnxsplit, tmp_path):
    build.save(build.chain(), tmp_path)
    beside = ("--html", "r.html", "--annotate", "a.onnx", "--costs", "analytic")
    made = json.loads(onnxsplit("partition", "model.onnx", *beside, "--json").stdout)
    names = {Path(file).name for file in made["files"]}
    assert names == {"a.onnx", "a.onnx.memory.json", "a.onnx.time.json", "r.html"}
    assert names < {path.name for path in tmp_path.iterdir()}
    told = onnxsplit("inspect", "model.onnx", "--sweep", "--html", "i.html", "--costs", "analytic").stdout
    assert "no cut below" in told
    assert (tmp_path / "i.html").stat().st_size > 100_000


def test_a_dry_run_shows_the_plan_and_writes_none(onnxsplit, tmp_path):
    build.save(build.chain(), tmp_path)
    assert "Wrote no plan" in onnxsplit("partition", "model.onnx", "--dry-run", "--costs", "analytic").stdout
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_shares_and_times_are_read(onnxsplit, tmp_path):
    build.save(build.chain(), tmp_path)
    onnxsplit("partition", "model.onnx", "--gap", "1%", "--time-limit", "2s", "--dry-run", "--costs", "analytic")
    onnxsplit("partition", "model.onnx", "--gap", "much", code=2)
    onnxsplit("partition", "model.onnx", "--time-limit", "soon", code=2)
    onnxsplit("partition", "model.onnx", "--place", "x", code=2)


def test_failures_exit_with_1_and_one_message(onnxsplit, tmp_path):
    assert onnxsplit("partition", "absent.onnx", code=1).stderr == "onnxsplit: no such model file: absent.onnx\n"
    error = json.loads(onnxsplit("partition", "absent.onnx", "--json", code=1).stdout)["error"]
    assert error == {"type": "ModelError", "message": "no such model file: absent.onnx"}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [["nonsense"], ["partition"], ["partition", "m", "--dim", "x"], ["run", "p", "--mode", "both"]],
)
def test_wrong_usage_exits_with_2(onnxsplit, arguments):
    onnxsplit(*arguments, code=2)


def test_an_environment_variable_stands_for_an_option(onnxsplit, tmp_path, python_environment):
    build.save(build.chain(), tmp_path)
    python_environment["ONNXSPLIT_PARTITION_STAGES"] = "3"
    made = json.loads(onnxsplit("partition", "model.onnx", "--costs", "analytic", "--json").stdout)
    assert len(made["summary"]["stages"]) == 3


@pytest.mark.parametrize("way", ["command line", "environment", "settings file"])
def test_former_names_of_options_are_taken_with_a_note(onnxsplit, tmp_path, python_environment, way):
    model = build.save(build.chain(), tmp_path)
    former = []
    if way == "command line":
        former = ["--cut", "h0", "--keep", "m3", "h3"]
    elif way == "environment":
        python_environment |= {"ONNXSPLIT_PARTITION_CUT": "h0", "ONNXSPLIT_PARTITION_KEEP": "m3 h3"}
    else:
        (tmp_path / "onnxsplit.toml").write_text('[partition]\ncut = "h0"\nkeep = ["m3", "h3"]\n')
    done = onnxsplit("partition", model, "--costs", "analytic", "--dry-run", "--json", *former)
    assert "--cut is now --also-cut" in done.stderr
    assert "--keep is now --no-cut" in done.stderr
    assert "h0" in {cut["tensor"] for cut in json.loads(done.stdout)["summary"]["cuts"]}


def test_the_command_line_wins_over_a_former_name_in_a_settings_file(onnxsplit, tmp_path):
    build.save(build.chain(), tmp_path)
    (tmp_path / "onnxsplit.toml").write_text('[partition]\ncut = "h0"\n')
    done = onnxsplit("partition", "model.onnx", "--also-cut", "h2", "--costs", "analytic", "--dry-run", "--json")
    assert [cut["tensor"] for cut in json.loads(done.stdout)["summary"]["cuts"]] == ["h2"]


def test_a_list_in_a_settings_file_for_an_option_with_one_value_is_refused(onnxsplit, tmp_path):
    (tmp_path / "onnxsplit.toml").write_text("[partition]\nstages = [1, 2]\n")
    done = onnxsplit("partition", "model.onnx", code=2)
    assert "partition.stages is [1, 2]; it takes one value, not a list" in done.stderr


def test_new_names_of_options_are_in_the_help_and_former_ones_are_not(onnxsplit, tmp_path):
    words = onnxsplit("partition", "--help").stdout.split()
    assert {"--also-cut", "--no-cut", "--cut-at"} <= set(words)
    assert not {"--cut", "--keep"} & set(words)
    build.save(build.chain(), tmp_path)
    done = onnxsplit(
        "partition", "model.onnx", "--also-cut", "h0", "--no-cut", "h2", "--costs", "analytic", "--dry-run"
    )
    assert "is now" not in done.stderr


def test_help_comes_at_once(python_environment):
    """Counts the loaded modules, since their number does not depend on the machine; it was 130 at first."""
    code = (
        "import atexit, sys\n"
        "atexit.register(lambda: print(len(sys.modules), file=sys.stderr))\n"
        "sys.argv = ['onnxsplit', '--help']\n"
        "from onnxsplit.cli import main\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=python_environment)
    assert "partition" in done.stdout
    assert int(done.stderr) < 200


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_at_the_very_end_does_not_change_the_exit_code(python_environment, name):
    code = (
        "import os, signal, sys\n"
        "class Late:\n"
        f"    def __del__(self, kill=os.kill, own=os.getpid(), number=signal.{name}):\n"
        "        kill(own, number)\n"
        "late = Late()\n"
        "sys.argv = ['onnxsplit', '--version']\n"
        "from onnxsplit.cli import main\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=python_environment)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_loads_nothing_heavy(python_environment):
    code = (
        "import onnxsplit, sys; print(sorted({'onnx', 'onnxruntime', 'networkx', 'numpy', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=python_environment)
    assert done.stdout == "[]\n"


def test_help_of_every_command_imports_nothing_heavy(python_environment):
    code = (
        "import sys, click.testing, onnxsplit.cli as c\n"
        "for name in c.cli.list_commands(None):\n"
        "    assert click.testing.CliRunner().invoke(c.cli, [name, '--help']).exit_code == 0\n"
        "print(sorted({'onnx', 'onnxruntime', 'networkx', 'numpy', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=python_environment)
    assert done.stdout == "[]\n", done.stderr


BAD = [
    (["partition", "absent.onnx"], "no such model file: absent.onnx"),
    (["inspect", "/dev/zero"], "cannot read /dev/zero: it is a character device; only a regular file can be read"),
    (["verify", "good.plan", "fifo"], "cannot read fifo: it is a FIFO"),
    (["run", "good.plan", "--inputs", "fifo"], "cannot read fifo: it is a FIFO"),
    (["place", "good.plan", "--cluster", "fifo"], "cannot read fifo: it is a FIFO"),
    (["run", "good.plan", "--replicas", "128"], "256 replicas together; at most 255 nodes make a pipeline"),
    (["partition", "."], ". is a folder; name the .onnx file in it"),
    (["partition", "junk.onnx"], "junk.onnx is not an ONNX model"),
    (["partition", "empty.onnx"], "empty.onnx is empty"),
    (["partition", "model.onnx", "--stages", "99", "--costs", "analytic"], "Ask for 12 stages or fewer"),
    (["partition", "model.onnx", "--cut-at", "nowhere", "--costs", "analytic"], "The nearest that can"),
    (["partition", "model.onnx", "-o", "letters"], "letters exists and holds no plan; nothing was touched"),
    (["partition", "model.onnx", "-o", "nowhere/m.plan"], "does not exist; create it or choose another with -o DIR"),
    (["partition", "model.onnx", "--dim", "bach=2"], "its free dimensions are: batch"),
    (["partition", "model.onnx", "--inputs", "junk.npz"], "cannot read junk.npz"),
    (["partition", "model.onnx", "--inputs", "pickled.npz"], "holds pickled Python objects"),
    (["partition", "model.onnx", "--inputs", "wrong.npz"], "'x' has size 31 on axis 1, expected 32"),
    (["partition", "model.onnx", "--provider", "gpu"], "provider 'gpu' is unknown. Allowed: cpu, cuda"),
    (["partition", "model.onnx", "--provider", "tensorrt"], "onnxsplit: provider 'tensorrt' is not in the installed"),
    (["partition", "model.onnx", "--tolerance", "2"], "--tolerance must be a number above 0 and at most 1, not 2.0"),
    (["advise", "model.onnx", "--keep", "letters"], "nothing was touched. Choose another place with --keep DIR"),
    (["advise", "model.onnx", "--keep", "nowhere/m.plan"], "create it or choose another with --keep DIR"),
    (["partition", "model.onnx", "--provider", "0=cpu,7=cpu"], "the stages are 0 to 1"),
    (["verify", "letters", "model.onnx"], "letters is not a plan directory: it has no plan.json"),
    (["run", "absent.plan"], "absent.plan is not a plan directory: it is missing"),
    (["run", "model.onnx"], "it is a model. Make a plan of it: onnxsplit partition model.onnx"),
    (["bench", "good.plan", "--model", "good.plan"], "good.plan is a plan directory"),
    (["bench", "good.plan", "--model", "wrong.npz"], "wrong.npz is not an ONNX model: it is NumPy arrays"),
    (["verify", "model.onnx", "good.plan"], "Name the plan first: onnxsplit verify good.plan model.onnx"),
    (["deploy", "kubernetes", "model.onnx", "--image", "i", "-o", "d"], "onnxsplit partition model.onnx"),
    (["serve", "model.onnx"], "onnxsplit partition model.onnx"),
    (["serve", "good.plan", "--launcher", "none", "--bind", "h:1"], "'h:1' has no scheme; write tcp://h:1"),
    (["node", "--connect", "10.0.0.1:5555"], "'10.0.0.1:5555' has no scheme; write tcp://10.0.0.1:5555"),
    (["cluster", "agent", "--bind", "10.0.0.1:5555"], "write tcp://10.0.0.1:5555"),
    (["export", "good.plan", "-o", "m.onnx"], "Run it: onnxsplit run good.plan"),
    (["run", "good.plan", "--inputs", "model.onnx"], "cannot read model.onnx (a model)"),
    (["run", "changed.plan"], "stage1.onnx: its SHA-256 is not the plan's"),
    (["run", "newer.plan"], "the plan has format 99; this onnxsplit reads up to 1. Upgrade onnxsplit"),
    (["run", "good.plan", "--inputs", "wrong.npz"], "the inputs do not fit the model"),
    (["run", "good.plan", "--outputs-only", "z"], "output 'z' is unknown; allowed: y"),
    (["run", "good.plan", "--provider", "tensorrt"], "provider 'tensorrt' is not in the installed ONNX Runtime"),
    (["run", "good.plan", "--outputs", "nowhere/out.npz"], "cannot write nowhere/out.npz"),
    (["run", "good.plan", "--trace", "nowhere/trace.json"], "cannot write nowhere/trace.json"),
    (["run", "good.plan", "--replicas", "7=2"], "replicas for stage 7; the plan has the stages 0 to 1"),
    (["merge", "letters", "-o", "m.onnx"], "letters is not a plan directory"),
    (["merge", "good.plan", "-o", "nowhere/m.onnx"], "cannot write nowhere/m.onnx"),
    (["node", "--connect", "tcp://10.0.0.1:5555"], "leaves this host"),
    (["export", "absent.py", "-o", "m.onnx"], "no such file: absent.py"),
    (["export", "model.pkl", "-o", "m.onnx"], "there is no 'model.pkl'; a source is: FILE.py"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, chain_plan):
    """A folder with wrong inputs of many kinds."""
    import shutil

    place = tmp_path_factory.mktemp("bad")
    build.save(build.chain(), place)
    (place / "junk.onnx").write_bytes(b"junk" * 99)
    (place / "empty.onnx").touch()
    os.mkfifo(place / "fifo")
    (place / "letters").mkdir()
    (place / "letters" / "dear.txt").write_text("dear")
    (place / "junk.npz").write_bytes(b"junk")
    np.savez(place / "pickled.npz", x=np.array([{}], dtype=object))
    np.savez(place / "wrong.npz", x=np.ones((1, 31), np.float32))
    for name in ("good", "changed", "newer"):
        shutil.copytree(chain_plan, place / f"{name}.plan")
    changed, newer = place / "changed.plan" / "stage1.onnx", place / "newer.plan" / "plan.json"
    changed.write_bytes(changed.read_bytes()[::-1])
    newer.write_bytes(newer.read_bytes().replace(b'"format_version": 1', b'"format_version": 99'))
    return place


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_bad_input_is_one_message_and_nothing_is_left(folder, python_environment, arguments, words):
    before = sorted(folder.rglob("*"))
    done = subprocess.run(
        [sys.executable, "-m", "onnxsplit", *arguments],
        capture_output=True, text=True, env=python_environment, cwd=folder, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(folder.rglob("*")) == before


def numeric_options() -> list[tuple[list[str], click.Option]]:
    """Return the options of all commands that take a number, each with the arguments of its command."""

    def walk(command: click.Command, way: list[str]):
        if isinstance(command, click.Group):
            for name in command.list_commands(click.Context(command)):
                yield from walk(command.get_command(click.Context(command), name), [*way, name])
        else:
            yield from ((command, way, parameter) for parameter in command.params)

    named = {"dims", "replicas", "timings", "grpc_port"}
    return [
        (command, way, parameter)
        for command, way, parameter in walk(cli, [])
        if isinstance(parameter, click.Option)
        and not parameter.is_flag
        and (parameter.name in named or not isinstance(parameter.type, click.Choice | click.Path | type(click.STRING)))
    ]


ABSURD = ["-1", "nan", "inf", "1e400", "1e30", "9" * 20, "9" * 5_000, "9" * 400 + "T", "", "²", "True", "0x10"]


def test_no_option_takes_an_absurd_number():
    """Also not ``nan``, which click's ranges accept, or numbers that are too long for Python to parse."""
    found = numeric_options()
    assert len(found) >= 50
    for command, way, parameter in found:
        prefixes = {"dims": ["batch="], "replicas": ["", "0="], "timings": ["stall_s="]}.get(parameter.name, [""])
        signed = (getattr(parameter.type, "min", None) or 0) < 0
        for value in (prefix + text for prefix in prefixes for text in ABSURD if not (signed and text == "-1")):
            option = max(parameter.opts, key=len)
            with pytest.raises(click.BadParameter) as refused:
                command.make_context(way[-1], [f"{option}={value}"])
            assert option in refused.value.format_message(), (way, option, value[:30])


def test_wrong_usage_is_an_object_with_json(onnxsplit):
    error = json.loads(onnxsplit("partition", "--stages", "x", "m", "--json", code=2).stdout)["error"]
    assert error["type"] == "UsageError"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rebalance", "sometimes"], "is not one of 'off', 'advise', 'auto'"),
        (["--rebalance", "auto", "--rebalance-gain", "0"], "0.0 is not in the range"),
        (
            ["--rebalance", "auto", "--launcher", "none", "--bind", "tcp://127.0.0.1:*", "--ports", "5556,5557"],
            "it does not go with --ports: leave --ports out, or choose --rebalance advise",
        ),
        (["--rebalance-gain", "20"], "--rebalance is off: add --rebalance advise or --rebalance auto"),
    ],
)
def test_changes_of_the_plan_that_cannot_work_are_wrong_usage(onnxsplit, options, words):
    assert words in onnxsplit("serve", "m.plan", *options, code=2).stderr
    assert "--rebalance" not in onnxsplit("run", "--help").stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--replicas", "x"], "'x' is neither N nor STAGE=N"),
        *((["--replicas", text], f"'{text}' is neither N nor STAGE=N") for text in ("0:4", "4:1", "1:", ":4", "1:2:3")),
        (["--replicas", "1=0:4"], "or a range of such numbers, as 1:4"),
        (["--replicas", "2", "--replicas", "1=3"], "'2' is for all stages; give it alone"),
        (["--trace-ops"], "name its file with --trace FILE.json"),
        (["--inflight-bytes", "many"], "'many' is not a size"),
        (["--inflight", "0"], "0 is not in the range"),
    ],
)
def test_running_options_that_make_no_sense_are_wrong_usage(onnxsplit, options, words):
    assert words in onnxsplit("run", "any.plan", *options, code=2).stderr


def test_a_time_that_may_be_meant_in_milliseconds_needs_its_unit(onnxsplit):
    assert "'50' has no unit; write 50ms or 50s" in onnxsplit("advise", "any.onnx", "--p99", "50", code=2).stderr


def test_repeatable_options_take_several_values_at_once(onnxsplit, tmp_path):
    build.save(build.chain(), tmp_path)
    for arguments in (
        ["partition", "model.onnx", "--costs", "analytic", "--cut-at", "h1", "h3"],
        ["partition", "--cut-at", "h1", "h3", "model.onnx", "--costs", "analytic"],
        ["partition", "--costs", "analytic", "--cut-at", "h1", "--cut-at", "h3", "model.onnx"],
    ):
        made = json.loads(onnxsplit(*arguments, "--json").stdout)
        assert [cut["tensor"] for cut in made["summary"]["cuts"]] == ["h1", "h3"]


def test_quiet_says_nothing_and_verbose_says_each_step(onnxsplit, tmp_path):
    build.save(build.chain(), tmp_path)
    quiet = onnxsplit("partition", "model.onnx", "--costs", "analytic", "-q")
    assert quiet.stdout + quiet.stderr == ""
    assert "reading the model\n" in onnxsplit("partition", "model.onnx", "--costs", "analytic", "-v").stderr


def test_doctor_tells_what_is_here(onnxsplit):
    found = json.loads(onnxsplit("doctor", "--json").stdout)["doctor"]
    assert found["cores"] >= 1
    assert {"name": "CPUExecutionProvider", "problem": None} in found["providers"]


def test_doctor_ends_with_its_problems_or_with_the_next_step(onnxsplit):
    problems = json.loads(onnxsplit("doctor", "--json").stdout)["doctor"]["problems"]
    expected = [f"Problem: {problem}" for problem in problems] or [
        "No problems found. Next: onnxsplit partition model.onnx"
    ]
    assert onnxsplit("doctor").stdout.splitlines()[-len(expected) :] == expected


def test_merge_says_what_it_wrote(onnxsplit, tmp_path, chain_plan):
    assert "from 2 stages" in onnxsplit("merge", chain_plan, "-o", "merged.onnx").stdout
    assert [p.name for p in tmp_path.iterdir()] == ["merged.onnx"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_and_completes_without_heavy_imports(onnxsplit, python_environment, shell):
    assert "_ONNXSPLIT_COMPLETE" in onnxsplit("completion", shell).stdout
    code = (
        "import sys, onnxsplit.cli as c\n"
        "try:\n    c.cli(prog_name='onnxsplit', complete_var='_ONNXSPLIT_COMPLETE')\n"
        "except SystemExit: pass\n"
        "print(sorted({'onnx', 'onnxruntime', 'networkx', 'numpy', 'torch'} & set(sys.modules)))"
    )
    words = {"COMP_WORDS": "onnxsplit partition --sta", "COMP_CWORD": "2", "_ONNXSPLIT_COMPLETE": "bash_complete"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**python_environment, **words}, check=False
    )
    assert done.stdout.splitlines() == ["plain,--stages", "[]"], done.stderr


@pytest.mark.parametrize(
    "words",
    [
        "run no.plan --outputs fifo",
        "run no.plan --trace fifo",
        "bench no.plan --trace fifo",
        "merge no.plan -o fifo",
        "partition no.onnx --html fifo",
        "partition no.onnx --annotate fifo",
        "partition no.onnx -o fifo",
        "inspect no.onnx --html fifo",
        "export no.onnx -o fifo",
        "cluster init --force -c fifo",
        "node --connect ipc://none --health fifo",
    ],
)
def test_results_are_not_written_to_special_files(onnxsplit, tmp_path, words):
    """``--outputs`` once replaced a device or a FIFO by a file."""
    os.mkfifo(tmp_path / "fifo")
    before = (tmp_path / "fifo").stat().st_ino
    said = onnxsplit(*words.split(), code=1).stderr
    assert "it is a FIFO; only a regular file can be replaced" in said or "exists and is not a folder" in said
    assert (tmp_path / "fifo").is_fifo()
    assert (tmp_path / "fifo").stat().st_ino == before


def test_models_are_written_through_links_with_their_data_beside_the_real_file(onnxsplit, tmp_path):
    build.save(build.chain(), tmp_path)
    onnxsplit("partition", "model.onnx", "--costs", "analytic")
    (tmp_path / "there").mkdir()
    for command in (("merge", "model.plan"), ("export", "model.onnx")):
        (tmp_path / "link").symlink_to("there/real.onnx")
        onnxsplit(*command, "-o", "link")
        assert (tmp_path / "link").is_symlink()
        onnxsplit("inspect", "there/real.onnx", "--costs", "analytic")
        (tmp_path / "link").unlink()


@pytest.mark.parametrize(
    "words",
    [
        ("partition", "model.onnx", "-o", "", "--dry-run"),
        ("partition", "model.onnx", "--out=", "--dry-run"),
        ("partition", "", "--dry-run"),
        ("run", "model.plan", "--outputs", "", "--repeat", "2"),
        ("merge", "model.plan", "-o", ""),
        ("node", "--connect", "ipc://none", "--health", ""),
    ],
)
def test_an_empty_name_of_a_file_is_refused_and_swallows_no_option(onnxsplit, tmp_path, words):
    """An empty value once vanished, so ``-o "" --dry-run`` wrote a plan named ``--dry-run``."""
    assert "the name is empty; name a file or a folder" in onnxsplit(*words, code=2).stderr
    assert not list(tmp_path.iterdir())


def test_an_empty_value_is_the_value_of_its_option(onnxsplit, tmp_path):
    build.save(build.chain(), tmp_path)
    made = ("partition", "model.onnx", "--costs", "analytic", "--dry-run")
    assert "provider '' is unknown" in onnxsplit(*made, "--provider", "", code=1).stderr
    assert "Got unexpected extra argument" not in onnxsplit(*made, "--cut-at", "", "h1", code=1).stderr


def test_the_examples_of_the_documentation_on_what_is_cut_run(onnxsplit, python_environment, tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    text = text[text.index("## Models in memory") :]
    lines = [line.removeprefix("$ onnxsplit ") for line in text.splitlines() if line.startswith("$ onnxsplit ")]
    assert [line.split()[1] for line in lines] == ["tasks.onnx"] * 3 + ["scaled.onnx", "decoder.onnx"]
    build.save(build.chain(), tmp_path)
    names = ("label", "score", "boxes")
    nodes = [helper.make_node("Relu", ["x"], ["h"]), *(helper.make_node("Sin", ["h"], [name]) for name in names)]
    tasks = build.model(nodes, [build.value("x", [1, 4])], [build.value(name, [1, 4]) for name in names])
    build.save(tasks, tmp_path, "tasks.onnx")
    scaled = build.model(
        [helper.make_node("Mul", ["x", "scale"], ["h"]), helper.make_node("Relu", ["h"], ["y"])],
        [build.value("x", [1, 4]), build.value("scale", [1])],
        [build.value("y", [1, 4])],
        [build.constant("scale", np.array([2.0], np.float32))],
    )
    build.save(scaled, tmp_path, "scaled.onnx")
    decoder = build.model(
        [helper.make_node("Concat", ["past", "new"], ["all"], axis=1), helper.make_node("Add", ["all", "mask"], ["y"])],
        [
            build.value("new", [1, "sequence_length"]),
            build.value("past", [1, "past_sequence_length"]),
            build.value("mask", [1, "past_sequence_length + sequence_length"]),
        ],
        [build.value("y", None)],
    )
    build.save(decoder, tmp_path, "decoder.onnx")
    said = [onnxsplit(*line.split()).stdout for line in lines]
    assert "Left out: the output boxes" in said[0]
    assert "Left out: the output boxes" in said[1]
    assert "boxes" not in said[2]
    assert "Input scale stays an input" in said[3]
    assert "past_sequence_length + sequence_length=5" in said[4]
    code = text.split("```python\n")[1].split("```")[0]
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=python_environment, check=True, timeout=120)
    assert (tmp_path / "memory.plan" / "plan.json").exists()


def test_of_many_outputs_that_agree_the_first_are_listed(tmp_path, monkeypatch):
    """A decoder has two outputs a layer, and those of interest are the first and the different ones."""
    names = [f"y{place}" for place in range(12)]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in ["x", *names]]
    ops = [helper.make_node("Neg", [before], [name]) for before, name in zip(["x", *names], names, strict=False)]
    monkeypatch.chdir(tmp_path)
    onnx.save(helper.make_model(helper.make_graph(ops, "g", values[:1], values[1:]), ir_version=10), "many.onnx")

    def said(*words):
        done = click.testing.CliRunner().invoke(cli, [*words])
        assert done.exit_code == 0, done.output
        return done.output

    exported = said("export", "many.onnx", "-o", "m.onnx")
    assert exported.count("differs from") == 4
    assert "8 more outputs: differ by 0.0e+00 of their scale at most" in exported
    said("partition", "m.onnx", "--stages", "2", "--costs", "analytic")
    rows = [line.split() for line in said("verify", "m.plan", "m.onnx").splitlines()]
    assert [row[0] for row in rows if "bit-equal" in row] == ["y0", "y1", "y2", "y3", "8"]
