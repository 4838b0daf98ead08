"""The command ``load`` against real servers, as a user runs it."""

from __future__ import annotations

import base64
import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import build
import numpy as np
import pytest
from served import Served
from text_plans import text_plan
from waiting import wait_until

from onnxsplit.planning.planner import partition

pytest.importorskip("uvicorn", reason="needs the extra serve")

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
QUICK = ("--warmup", "0.1", "--measurement-interval", "200", "--max-trials", "3")
COMMAND = [sys.executable, "-P", "-m", "onnxsplit", "load"]


@pytest.fixture(scope="module")
def plans(tmp_path_factory, chain_plan):
    folder = tmp_path_factory.mktemp("loaded")
    partition(build.save(build.chain(), folder), stages=2, out=folder / "chain.plan", costs="analytic")
    return folder / "chain.plan", text_plan(folder / "tiny.plan")


@pytest.fixture(scope="module")
def server(plans):
    with Served(*plans, "--threads", "1", environment=ENVIRONMENT) as found:
        yield found


def load(*words: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    ran = subprocess.run([*COMMAND, *map(str, words)], env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert ran.returncode == code, ran.stdout + ran.stderr
    return ran


def rows(*words: object) -> list[dict]:
    return json.loads(load(*words, "--json").stdout)["load"]["rows"]


def url(server: Served, scheme: str) -> str:
    return f"grpc://{server.grpc}" if scheme == "grpc" else server.http


def statistics(server: Served) -> int:
    return server.json("/v2/models/chain/stats")["model_stats"][0]["inference_stats"]["success"]["count"]


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_a_server_counts_the_same_requests(server, scheme):
    before = statistics(server)
    (row,) = rows(
        url(server, scheme), "-m", "chain", "--rate", 80, "--request-count", 60, "--warmup", 0, "--shape", "x:3,32"
    )
    point = row["point"]
    assert point["latency"]["count"] == statistics(server) - before == 60
    assert point["failures"] == {}
    whole, *stages = row["parts"]
    assert [part["name"] for part in row["parts"]] == ["chain", "chain.stage0", "chain.stage1"]
    assert whole["count"] == 60
    assert sum(part["queue_ns"] + part["compute_ns"] for part in stages) < whole["total_ns"]
    assert whole["total_ns"] + row["elsewhere_ns"] == point["mean_of_all_ns"]
    assert row["elsewhere_ns"] > 0


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_concurrency_doubles_and_a_file_has_perf_analyzers_columns(server, scheme, tmp_path):
    shown = load(
        url(server, scheme), "-m", "chain", "--concurrency-range", "1:5", *QUICK, "-b", 2, "-f", tmp_path / "o.csv"
    )
    with (tmp_path / "o.csv").open() as stream:
        found = list(csv.DictReader(stream))
    assert [row["Concurrency"] for row in found] == ["1", "2", "4", "5"]
    assert all(float(row["Inferences/Second"]) > 0 for row in found)
    assert all(int(row["p50 latency"]) <= int(row["p90 latency"]) <= int(row["p99 latency"]) for row in found)
    assert "chain.stage1" in shown.stdout


def test_texts_have_times_of_their_tokens(server):
    (row,) = rows(
        f"{server.http}/v1", "--concurrency", 3, "--request-count", 6, "--warmup", 0, "--max-tokens", 8,
        "--extra-inputs", "ignore_eos:true", "--prompt-words", 5,
    )  # fmt: skip
    point = row["point"]
    assert point["latency"]["count"] == 6
    assert point["counts_per_s"]["tokens"] * point["seconds"] == pytest.approx(48)
    assert 0 < point["times"]["first_token"]["p50_ns"] <= point["latency"]["p50_ns"]
    assert point["times"]["between_tokens"]["count"] == 6


def test_texts_of_a_file_are_sent_as_they_are(server, tmp_path):
    entries = [{"text_input": ["The quick"]}, {"payload": [{"prompt": "The", "max_tokens": 3, "ignore_eos": True}]}]
    (tmp_path / "texts.json").write_text(json.dumps({"data": entries}))
    (row,) = rows(
        f"{server.http}/v1", "--endpoint", "completions", "--input-data", tmp_path / "texts.json", "--max-tokens", 1,
        "--request-count", 4, "--warmup", 0,
    )  # fmt: skip
    tokens = row["point"]["counts_per_s"]["tokens"] * row["point"]["seconds"]
    assert tokens == pytest.approx(2 * 1 + 2 * 3)


def test_the_output_has_the_tables(server):
    shown = load(f"{server.http}/v1", "--request-count", 1, "--warmup", 0, "--max-tokens", 2, "--prompt-words", 3)
    assert "first p50" in shown.stdout
    assert "tokens/s" in shown.stdout


def test_inputs_of_files_are_sent_in_turn(server, tmp_path):
    x = np.arange(32, dtype=np.float32)
    entries = [
        {"x": {"content": x.tolist(), "shape": [1, 32]}},
        {"x": {"b64": base64.b64encode(x.tobytes()).decode(), "shape": [32]}},
        {"x": [x.tolist(), x.tolist()]},
    ]
    (tmp_path / "in.json").write_text(json.dumps({"data": [entries[0], entries[1:2]]}))
    np.savez(tmp_path / "in.npz", x=np.stack([x, x]))
    (row,) = rows(
        server.http, "-m", "chain", "--input-data", tmp_path / "in.json", tmp_path / "in.npz", "--request-count", 6,
        "--warmup", 0,
    )  # fmt: skip
    assert row["point"]["latency"]["count"] == 6
    assert row["point"]["failures"] == {}


def test_a_plan_is_driven_in_this_process(plans):
    (row,) = rows(plans[0], "--rate", 100, "--request-count", 30, "--warmup", 0, "--threads", 1)
    assert row["point"]["latency"]["count"] == 30
    assert [part["count"] for part in row["parts"]] == [30, 30]


def test_the_strongest_load_that_keeps_a_latency_is_searched(server):
    ran = load(
        server.http, "-m", "chain", "--shape", "x:1,32", "--concurrency", "1:8", "--latency-threshold", 60_000, *QUICK,
        "--json",
    )  # fmt: skip
    found = json.loads(ran.stdout)["load"]
    assert found["highest"] == 8
    assert found["percentile"] == 99
    never = load(
        server.http, "-m", "chain", "--shape", "x:1,32", "--concurrency", "1:8", "--latency-threshold", 0.001, *QUICK
    )
    assert "No load of this range" in never.stdout


def test_refusals_are_failures(plans):
    with Served(plans[0], "--threads", "1", "--max-queue", 1, "--inflight", 1, environment=ENVIRONMENT) as small:
        (row,) = rows(small.http, "--shape", "x:1,32", "--concurrency", 32, *QUICK)
        (texts,) = rows(small.http, "--shape", "x:1,32", "--concurrency", 1, "--request-count", 3, "--warmup", 0)
    point = row["point"]
    assert point["failures"]["HTTP 503"] > 0
    assert "queue" in point["messages"]["HTTP 503"] or "wait" in point["messages"]["HTTP 503"]
    assert point["latency"]["count"] > 0
    assert texts["point"]["failures"] == {}


def test_texts_above_the_queue_are_refused_with_429(plans):
    with Served(plans[1], "--threads", "1", "--max-queue", 1, "--max-rows", 1, environment=ENVIRONMENT) as small:
        (row,) = rows(
            f"{small.http}/v1", "--concurrency", 8, "--prompt-words", 4, "--max-tokens", 64, *QUICK,
            "--measurement-interval", "3000", "--extra-inputs", "ignore_eos:true",
        )  # fmt: skip
    assert row["point"]["failures"]["HTTP 429"] > 0
    assert row["point"]["latency"]["count"] > 0


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_a_server_that_dies_ends_the_load_with_its_failures(plans, scheme):
    small = Served(plans[0], "--threads", "1", environment=ENVIRONMENT)
    words = ["--shape", "x:1,32", "--rate", "100", "--warmup", "0", "--measurement-interval", "300"]
    running = subprocess.Popen(
        [*COMMAND, url(small, scheme), *words, "--stability-percentage", "0.001", "--json"],
        env=ENVIRONMENT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_until(lambda: statistics(small) > 20)
    small.process.send_signal(signal.SIGKILL)
    small.wait()
    told, _ = running.communicate(timeout=120)
    (row,) = json.loads(told.splitlines()[0])["load"]["rows"]
    assert row["point"]["failures"]
    assert not row["point"]["stable"]


def test_ctrl_c_shows_what_was_measured(server):
    before = statistics(server)
    running = subprocess.Popen(
        [*COMMAND, server.http, "-m", "chain", "--shape", "x:1,32", "--rate", "50:100:50", "-r", "1000", "-s", "0.001"],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_until(lambda: statistics(server) > before + 100)
    running.send_signal(signal.SIGINT)
    told, said = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "p99.9" in told
    assert "interrupted" in said


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--rate", "0"], 2, "above 0"),
        (["--rate", "200:10:10"], 2, "ends below its beginning"),
        (["--rate", "1:2:0"], 2, "above 0"),
        (["--rate", "5", "--concurrency", "2"], 2, "give one of them"),
        (["--concurrency", "1.5"], 2, "whole numbers"),
        (["-m", "chain", "--concurrency", "1:9000:1", "--shape", "x:1,32"], 1, "more than 1000 loads"),
        ([], 1, "name the model"),
        (["-m", "other"], 1, "no model 'other'. It has chain"),
        (["-m", "chain"], 1, "--shape x:1,32"),
        (["-m", "chain", "--shape", "x:1,33"], 1, "does not fit input 'x'"),
        (["-m", "chain", "--shape", "z:1"], 1, "inputs of chain are 'x'"),
        (["-m", "chain", "--shape", "x"], 2, "NAME:SIZE"),
        (["-m", "chain", "--input-data", "none.npz"], 1, "no such file: none.npz"),
        (["-m", "chain", "--input-data", "none.json"], 1, "cannot read none.json"),
        (["-m", "chain", "-b", "2147483647"], 1, "MiB of memory"),
        (["-m", "chain", "--header", "x"], 2, "NAME:VALUE"),
    ],
)
def test_a_wrong_option_is_one_message(server, words, code, message):
    said = load(server.http, *words, code=code).stderr
    assert message in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("http://127.0.0.1:9", "does not answer"),
        ("http://127.0.0.1:9/v1", "does not answer"),
        ("grpc://127.0.0.1:9", "does not answer"),
        ("grpc://[::1]:9", "grpc://[::1]:9 does not answer"),
        ("http://user:word@127.0.0.1:9", "without a user"),
        ("http://127.0.0.1:9?x=1", "without a user"),
        ("ftp://127.0.0.1", "not the address of a server"),
        ("http://127.0.0.1/v3", "not the address of a server"),
        ("http://127.0.0.1:none", "not a URL"),
        ("no-such-folder", "no-such-folder"),
    ],
)
def test_an_address_where_nothing_answers_is_one_message(where, message):
    said = load(where, "-m", "chain", code=1).stderr if "://" in where else load(where, code=1).stderr
    assert message in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "not valid JSON"),
        ("{}", "must be"),
        ('{"data": [1]}', "must be"),
        ('{"data": []}', "holds no request"),
        ('{"data": [{"y": [1]}]}', "has 'y'"),
        ('{"data": [{}]}', "lacks 'x'"),
        ('{"data": [{"x": {"content": [1], "shape": [1, 32]}}]}', "1 elements"),
        ('{"data": [{"x": {"content": [1], "shape": [true, 32]}}]}', "not a list of sizes"),
        ('{"data": [{"x": {"content": [1], "shape": [900000000000, 32]}}]}', "MiB of memory"),
        ('{"data": [{"x": {"content": [1], "shape": "a"}}]}', "not a list of sizes"),
        ('{"data": [{"x": {"b64": "?", "shape": [1, 32]}}]}', "base64"),
        ('{"data": [{"x": {"shape": [1, 32]}}]}', "x"),
    ],
)
def test_a_file_of_inputs_that_does_not_fit_is_one_message(server, tmp_path, text, message):
    (tmp_path / "in.json").write_text(text)
    said = load(server.http, "-m", "chain", "--input-data", tmp_path / "in.json", code=1).stderr
    assert message in said
    assert "in.json" in said
    assert "Traceback" not in said


def test_a_plan_with_a_decoder_says_how_texts_are_asked_for(plans):
    assert "/v1" in load(plans[1], code=1).stderr


def test_a_token_is_given_as_a_header(plans, tmp_path):
    (tmp_path / "tokens").write_text("secret-token-of-this-test-0123456789\n")
    (tmp_path / "tokens").chmod(0o600)
    with Served(plans[0], "--threads", "1", "--token-file", tmp_path / "tokens", environment=ENVIRONMENT) as closed:
        for where in (closed.http, f"grpc://{closed.grpc}"):
            words = (where, "--shape", "x:1,32", "--request-count", 3, "--warmup", 0)
            assert "--header" in load(*words, code=1).stderr
            token = "Authorization: Bearer secret-token-of-this-test-0123456789"
            (row,) = rows(*words, "--header", token)
            assert row["point"]["latency"]["count"] == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("http://127.0.0.1:9", "--threads", 2), "--threads says how to run a plan"),
        (("grpc://127.0.0.1:9", "--replicas", "0=2", "--trace", "t.json"), "says how to run a plan"),
        (("http://127.0.0.1:9/v1", "--shape", "x:1"), "--shape is for tensors"),
        (("http://127.0.0.1:9", "--max-tokens", 3), "--max-tokens is for texts"),
        (("http://127.0.0.1:9", "--concurrency", 3, "--seed", 3), "--seed is for loads with --rate"),
        (("localhost:8000", "-m", "x"), "write http://localhost:8000"),
        (("http://127.0.0.1:9", "-H", "bad name:x"), "NAME:VALUE"),
        (("http://127.0.0.1:9", "-H", "content-length:5"), "how long a request is"),
        (("some.plan", "-m", "x"), "--model is for servers"),
        (("some.plan", "-H", "a:b"), "--header is for servers"),
    ],
)
def test_an_option_that_would_change_nothing_is_refused(words, message):
    assert message in load(*words, code=2).stderr


def test_a_message_cannot_control_the_terminal():
    said = load("no\x07such\x9b31mfolder", code=1).stderr
    assert "no\ufffdsuch\ufffd31mfolder" in said
