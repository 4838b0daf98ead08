"""The options of ``onnxsplit serve``, beside those for running a plan."""

from __future__ import annotations

from pathlib import Path

import click

from onnxsplit.cli.help import OptionTable
from onnxsplit.cli.values import NumberParam, SizeParam
from onnxsplit.numbers import MOST_SECONDS, MOST_SIZE, parse_whole

FILE = click.Path(path_type=Path)
_MOST_WARMUP = 100_000


def _port(context: click.Context, parameter: click.Parameter, text: str) -> int | None:
    if text.lower() == "off":
        return None
    port = parse_whole(text, 65535)
    if port is None:
        raise click.BadParameter(f"{text!r} is not a port; allowed: 0 to 65535, or off", context, parameter)
    return port


def _ports(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    numbers = [parse_whole(part.strip(), 65535) for part in text.split(",")]
    if len(numbers) != 2 or not all(numbers) or numbers[0] == numbers[1]:
        raise click.BadParameter(f"{text!r} is not two different ports, as 5556,5557", context, parameter)
    return numbers[0], numbers[1]  # type: ignore[return-value]  # neither is None


def _check_warmup(context: click.Context, parameter: click.Parameter, words: tuple[str, ...]) -> tuple[str, ...]:
    for word in words:
        if word.lstrip("-").isdecimal() and parse_whole(word, _MOST_WARMUP) is None:
            raise click.BadParameter(
                f"{word} requests are too many or too few; 0 to {_MOST_WARMUP}", context, parameter
            )
    return words


REBALANCE: OptionTable = [
    (
        ("--rebalance",),
        {
            "type": click.Choice(["off", "advise", "auto"]),
            "default": "off",
            "help": "Watch for devices that have become slower or faster: advise says what another cut of the model "
            "would gain, and auto changes to it while requests go on.",
        },
    ),
    (
        ("--rebalance-gain",),
        {
            "type": NumberParam(0.1, 1000),
            "default": 15.0,
            "metavar": "PERCENT",
            "help": "With --rebalance advise or auto: the predicted gain from which a new cut is worth it.",
        },
    ),
]
ADDRESSES: OptionTable = [
    (("--host",), {"default": "127.0.0.1", "help": "Name or address to listen on. The default serves this host only."}),
    (
        ("--http-port",),
        {
            "type": click.IntRange(0, 65535),
            "default": 8000,
            "help": "Port of HTTP, the metrics and the page. 0: any free port.",
        },
    ),
    (
        ("--grpc-port",),
        {
            "default": "8001",
            "callback": _port,
            "metavar": "N|off",
            "help": "Port of gRPC. 0: any free port; off: no gRPC.",
        },
    ),
]
QUEUE: OptionTable = [
    (
        ("--max-batch",),
        {
            "type": click.IntRange(1, MOST_SIZE),
            "default": 1,
            "help": "Largest batch, in rows, to join requests into.",
        },
    ),
    (
        ("--max-delay",),
        {"type": NumberParam(0, 60_000), "default": 0.0, "help": "Milliseconds a request waits for others to join."},
    ),
    (
        ("--max-queue",),
        {"type": click.IntRange(1, 1_000_000), "default": 256, "help": "Most requests that wait; more are refused."},
    ),
    (
        ("--priority-levels",),
        {
            "type": click.IntRange(1, 1000),
            "default": 1,
            "metavar": "N",
            "help": "Let waiting requests of priority 1 enter first, and those of N last. With 1, all are equal.",
        },
    ),
    (("--max-queue-bytes",), {"type": SizeParam(), "default": "1G", "help": "Most bytes of requests that wait."}),
    (("--max-body",), {"type": SizeParam(), "default": "256M", "help": "Most bytes of one request."}),
    (
        ("--drain",),
        {
            "type": NumberParam(0, MOST_SECONDS),
            "default": 30.0,
            "help": "Seconds to answer accepted requests after SIGTERM.",
        },
    ),
    (
        ("--ready-grace",),
        {
            "type": NumberParam(0, MOST_SECONDS),
            "default": 0.0,
            "metavar": "SECONDS",
            "help": "Time for which readiness probes still pass after a stage has lost its last node. Requests wait.",
        },
    ),
]
SEQUENCES: OptionTable = [
    (
        ("--state",),
        {
            "multiple": True,
            "metavar": "[MODEL:]INPUT=OUTPUT",
            "help": "A state of a model: the server keeps the output, and gives it to the next request with the same "
            "sequence_id as the input. Repeatable.",
        },
    ),
    (
        ("--max-sequences",),
        {"type": click.IntRange(1, 1_000_000), "default": 1024, "help": "Most sequences that run at once."},
    ),
    (
        ("--sequence-bytes",),
        {"type": SizeParam(), "default": "1G", "help": "Most bytes of the states of all sequences."},
    ),
    (
        ("--sequence-idle",),
        {
            "type": NumberParam(0.001, MOST_SECONDS),
            "default": 60.0,
            "metavar": "SECONDS",
            "help": "Drop a sequence after so long without a request.",
        },
    ),
]
VERSIONS: OptionTable = [
    (
        ("--versions",),
        {"type": click.IntRange(1, 1000), "default": 1, "help": "Number of the newest versions of a model to load."},
    ),
    (
        ("--poll",),
        {
            "type": NumberParam(0, MOST_SECONDS),
            "default": 0.0,
            "metavar": "SECONDS",
            "help": "Look so often for plans that were added, replaced or removed, and load or unload them. 0: never.",
        },
    ),
    (
        ("--response-cache",),
        {
            "type": SizeParam(0),
            "default": "0",
            "help": "Most bytes of outputs to keep, which answer requests with the same inputs without a run, as 256M. "
            "For models whose outputs depend on their inputs alone.",
        },
    ),
    (
        ("--warmup",),
        {
            "multiple": True,
            "metavar": "N|FILE.npz",
            "callback": _check_warmup,
            "help": "Requests that each model answers before it is ready: so many with the plan's example inputs, or "
            "those of a file. Repeatable.",
        },
    ),
]
TEXTS: OptionTable = [
    (
        ("--served-model-name",),
        {
            "multiple": True,
            "metavar": "NAME",
            "help": "Name of the only language model for clients of OpenAI's API; may be repeated.",
        },
    ),
    (
        ("--tool-parser",),
        {
            "type": click.Choice(["hermes", "json"]),
            "help": "How the models write calls of tools: in tags, as Hermes and Qwen, or as JSON, as Llama 3.",
        },
    ),
]
OTHER: OptionTable = [
    (("--otel",), {"is_flag": True, "help": "Send spans to OpenTelemetry; the OTEL_* variables configure it."}),
]
ACCESS: OptionTable = [
    (
        ("--tls-cert",),
        {"type": FILE, "metavar": "FILE.pem", "help": "Certificate chain. With it, only TLS is served."},
    ),
    (("--tls-key",), {"type": FILE, "metavar": "FILE.pem", "help": "Private key of the certificate."}),
    (
        ("--token-file",),
        {"type": FILE, "metavar": "FILE", "help": "File with one token on each line. Every request must carry one."},
    ),
    (
        ("--shared-memory",),
        {
            "is_flag": False,
            "flag_value": "",
            "metavar": "[PREFIX]",
            "help": "Let clients of this host register this user's shared memory, of names that begin with PREFIX if "
            "it is given.",
        },
    ),
]
NODE_SOURCE: OptionTable = [
    (
        ("--launcher",),
        {
            "type": click.Choice(["local", "ray", "none"]),
            "default": "local",
            "help": "Start nodes on this host or on a Ray cluster, or wait at --bind for nodes started by hand. A plan "
            "for several hosts starts here only if local is given.",
        },
    ),
    (
        ("--placement",),
        {
            "type": click.Choice(["spread", "strict-spread", "pack"]),
            "default": "spread",
            "help": "How Ray spreads nodes over hosts.",
        },
    ),
    (
        ("--elastic",),
        {
            "is_flag": True,
            "help": "With --launcher none: accept more nodes of a stage than the plan has, if they name it with "
            "--stage.",
        },
    ),
    (("--bind",), {"metavar": "ADDR", "help": "Address for nodes started by hand: tcp://HOST:PORT or ipc://PATH."}),
    (
        ("--ports",),
        {
            "metavar": "N,N",
            "callback": _ports,
            "help": "Ports for results and for stage files, beside that of --bind, for firewalls. Without it: any free "
            "ones.",
        },
    ),
    (("--keys",), {"type": FILE, "metavar": "DIR", "help": "Keys that encrypt tcp links to those nodes."}),
    (("--insecure",), {"is_flag": True, "help": "Allow unencrypted links to nodes on other hosts."}),
]
