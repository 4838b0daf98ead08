"""The help of commands, the variables of options, and what is said about unknown commands and options."""

from __future__ import annotations

import re

import click
import pytest
from click.testing import CliRunner

import onnxsplit
from onnxsplit.cli import cli
from onnxsplit.cli.running import serving_options
from onnxsplit.cli.settings import different

GROUPS = ["keys", "cluster", "deploy"]
SERVE = [
    "Network",
    "Nodes",
    "Requests and batches",
    "Models",
    "Language models",
    "Security",
    "Nodes on other hosts",
    "Options",
]
RUNNING = ["Nodes", "Requests and batches", "Models", "Language models"]
MODES = {"--json", "-q", "--quiet", "-v", "--verbose", "-h", "--help"}


def commands() -> dict[tuple[str, ...], click.Command]:
    """Return all commands that are no groups, by their words."""
    context, found = click.Context(cli), {}
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        found |= {(name, sub): one for sub, one in getattr(command, "commands", {"": command}).items()}
    return {tuple(filter(None, words)): command for words, command in found.items()}


COMMANDS = commands()


def said(*words: str, code: int = 0, **environment: str) -> str:
    done = CliRunner().invoke(cli, words, prog_name="onnxsplit", env=environment, terminal_width=80)
    assert done.exit_code == code, done.output
    return done.output


def sections(*words: str) -> dict[str, set[str]]:
    """Return the names of the options under each heading of a command's help."""
    found: dict[str, set[str]] = {}
    for line in said(*words, "--help").splitlines():
        if re.fullmatch(r"\S.*:", line):
            names = found.setdefault(line[:-1], set())
        elif line.startswith("  -"):
            names |= set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", line.strip().split("  ")[0]))
    return found


def written(option: click.Option) -> str:
    return next(name for name in option.opts if name.startswith("--"))


def test_the_options_of_serve_stand_under_headings():
    assert list(sections("serve")) == SERVE
    assert sections("serve")["Options"] == MODES | {"--otel"}


@pytest.mark.parametrize(
    ("command", "own", "rest"),
    [
        ("run", ["Inputs and outputs"], set()),
        ("bench", ["Measuring"], set()),
        ("load", ["The load", "The requests", "Texts, for URLs that end with /v1", "Measuring"], set()),
        ("generate", ["The text"], set()),
    ],
)
def test_commands_that_run_a_plan_share_headings(command, own, rest):
    assert list(sections(command)) == [*own, *RUNNING, "Results", "Options"]
    assert sections(command)["Options"] == MODES | rest
    for heading in RUNNING:
        assert sections(command)[heading] >= sections("chat")[heading]


@pytest.mark.parametrize(
    ("command", "headings"),
    [
        ("chat", ["The text", *RUNNING, "Options"]),
        ("node", ["Network", "Nodes", "Models", "Security", "Options"]),
        ("advise", ["What is asked for", "Devices", "The model and its costs", "The search", "Results", "Options"]),
        (
            "partition",
            ["Stages and devices", "Where to cut", "The model and its costs", "The search", "Results", "Options"],
        ),
    ],
)
def test_other_commands_with_many_options_have_headings(command, headings):
    assert list(sections(command)) == headings


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_one_sentence_says_how_variables_are_named(words):
    text = said(*words, "--help")
    assert "env var" not in text
    told = re.findall(r"by variables, e\.g\. (--\S+) as\s+(ONNXSPLIT_\w+)", " ".join(text.split()))
    if words == ("completion",):
        assert not told
        return
    ((option, variable),) = told
    first = next(one for one in COMMANDS[words].params if isinstance(one, click.Option) and not one.hidden)
    assert option == written(first) or not first.allow_from_autoenv
    assert variable == "_".join(["ONNXSPLIT", *words, option[2:].replace("-", "_")]).upper()
    assert ("onnxsplit.toml" in text) == (len(words) == 1)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_an_option_that_no_variable_sets_says_so(words):
    told = " ".join(said(*words, "--help").split()).count("Only the command line can set it.")
    assert told == sum(isinstance(one, click.Option) and not one.allow_from_autoenv for one in COMMANDS[words].params)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_no_variable_stands_for_two_options(words):
    options = [one for one in COMMANDS[words].params if isinstance(one, click.Option)]
    for one in options:
        others = {str(other.name) for other in options if other is not one}
        assert written(one)[2:].replace("-", "_") not in others


@pytest.mark.parametrize("variable", ["ONNXSPLIT_PARTITION_DIM", "ONNXSPLIT_PARTITION_DIMS"])
def test_a_variable_is_named_as_its_option_is_written_and_the_former_name_is_taken(monkeypatch, variable):
    monkeypatch.setenv(variable, "batch=7")
    context = COMMANDS["partition",].make_context("partition", ["m.onnx"], auto_envvar_prefix="ONNXSPLIT_PARTITION")
    assert context.params["dims"] == {"batch": 7}


def test_the_written_name_of_a_variable_wins_over_the_former_one(monkeypatch):
    monkeypatch.setenv("ONNXSPLIT_PARTITION_DIM", "batch=7")
    monkeypatch.setenv("ONNXSPLIT_PARTITION_DIMS", "batch=8")
    context = COMMANDS["partition",].make_context("partition", ["m.onnx"], auto_envvar_prefix="ONNXSPLIT_PARTITION")
    assert context.params["dims"] == {"batch": 7}


@pytest.mark.parametrize("group", [(), *((name,) for name in GROUPS)], ids=lambda words: " ".join(words) or "all")
def test_what_a_command_does_fits_into_one_line(group):
    lines = said(*group, "--help").splitlines()
    names = [words[len(group)] for words in COMMANDS if words[: len(group)] == group]
    told = {line.split()[0]: line for line in lines if re.match(r"  [a-z]", line) and line.split()[0] in names}
    assert told.keys() == set(names)
    for line in told.values():
        assert line.endswith(".")
        assert not line.endswith("...")
        following = lines[lines.index(line) + 1] if lines.index(line) + 1 < len(lines) else ""
        assert not following.startswith("   "), following
        assert len(line) < 80


def test_the_version_has_a_short_option():
    assert said("-V") == said("--version") == f"onnxsplit, version {onnxsplit.__version__}\n"


@pytest.mark.parametrize(
    ("words", "nearest"),
    [
        (["partiton", "m.onnx"], "partition"),
        (["stats"], "status"),
        (["keys", "revok", "k", "n"], "revoke"),
        (["cluster", "mesure"], "measure"),
        (["deploy", "kubernets"], "kubernetes"),
    ],
)
def test_an_unknown_command_is_answered_with_the_nearest(words, nearest):
    (error,) = [line for line in said(*words, code=2).splitlines() if line.startswith("Error: ")]
    assert error.endswith(f"Did you mean {nearest!r}?")


@pytest.mark.parametrize(("words", "allowed"), [(["xyz"], "export, inspect"), (["keys", "xyz"], "allow, new, revoke")])
def test_an_unknown_command_that_is_near_to_none_is_answered_with_all(words, allowed):
    assert f"No such command 'xyz'. Allowed: {allowed}" in " ".join(said(*words, code=2).split())


@pytest.mark.parametrize(
    ("words", "nearest"),
    [
        (["partition", "m.onnx", "--stagse", "2"], "--stages"),
        (["partition", "m.onnx", "--dims", "a=1"], "--dim"),
        (["keys", "new", "k", "--nod", "a"], "--node"),
        (["cluster", "init", "--forc"], "--force"),
        (["--verson"], "--version"),
    ],
)
def test_an_unknown_option_is_answered_with_the_nearest(words, nearest):
    (error,) = [line for line in said(*words, code=2).splitlines() if line.startswith("Error: ")]
    assert re.search(rf"Did you mean.* '?{nearest}\b|Did you mean {nearest}\b|options:.*{nearest}\b", error), error


def test_an_unknown_option_is_not_answered_with_a_former_name():
    error = said("partition", "m.onnx", "--cuts", "h0", code=2)
    assert "--also-cut" in error or "--cut-at" in error or "--no-cut" in error
    assert not re.search(r"--cut\b(?!-at)(?!s)", error)


@pytest.mark.parametrize("option", ["--json", "-q", "-v"])
def test_completion_always_prints_its_script(option):
    assert "No such option" in said("completion", "bash", option, code=2)
    assert "_ONNXSPLIT_COMPLETE" in said("completion", "bash", ONNXSPLIT_QUIET="1", ONNXSPLIT_JSON="1")


def test_settings_that_differ_are_shown_as_they_are_given():
    shown = []
    command = serving_options(click.command()(lambda **_: shown.extend(different(click.get_current_context()))))
    command.main(["--replicas", "0=2", "--replicas", "1=1:4"], standalone_mode=False)
    assert shown == ["replicas = 0=2 1=1:4 (command line)"]
    with pytest.raises(click.BadParameter, match="'0=3' is the second number for stage 0; give one"):
        command.main(["--replicas", "0=1:4", "--replicas", "0=3"], standalone_mode=False)
