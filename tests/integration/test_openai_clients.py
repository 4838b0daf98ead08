"""Clients of the endpoint that leave, stall, crowd or stay while the server stops or loses a node."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import signal
import socket

import pytest
from gateways import gateway, until
from msgspec.structs import replace
from text_plans import text_plan

from onnxsplit.plan_files import load_plan

pytest.importorskip("uvicorn", reason="needs the extra serve")
openai = pytest.importorskip("openai", reason="needs the extra test")

MESSAGES = [{"role": "user", "content": "Hello"}]
LENGTH = 2048
ENDLESS = {"prompt": "Hello", "max_tokens": LENGTH - 100, "ignore_eos": True, "seed": 1}


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return text_plan(tmp_path_factory.mktemp("text") / "tiny.plan", length=LENGTH)


def request_bytes(body: dict) -> bytes:
    raw = json.dumps(body).encode()
    return b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n%b" % (len(raw), raw)


async def ask(url: str, body: dict) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Send a request, and read nothing."""
    host, port = url.removeprefix("http://").split(":")
    link = socket.socket()
    link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 12)  # the kernel keeps little for it
    link.setblocking(False)
    await asyncio.get_running_loop().sock_connect(link, (host, int(port)))
    reader, writer = await asyncio.open_connection(sock=link, limit=1 << 12)
    writer.write(request_bytes(body))
    await writer.drain()
    return reader, writer


def client_of(url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def at_rest(version) -> bool:
    """Nothing runs and nothing waits, neither here nor in the pipeline."""
    counts = version.pipeline.sequences
    return version.text_figures.unfinished == 0 and counts.running == 0 and counts.waiting == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_sequence(plan, stream):
    async def main():
        async with gateway(plan) as (url, version, _):
            reader, writer = await ask(url, {**ENDLESS, "stream": stream})
            await until(lambda: version.text_figures.requests_running == 1)
            if stream:
                await reader.read(100)
            writer.close()
            await until(lambda: at_rest(version))
            assert version.text_figures.finished == {"abort": 1}
            assert version.text_figures.generation_tokens < ENDLESS["max_tokens"]

    asyncio.run(main())


def test_a_client_that_leaves_ends_all_its_choices(plan):
    async def main():
        async with gateway(plan) as (url, version, _):
            reader, writer = await ask(url, {**ENDLESS, "stream": True, "n": 5})
            await reader.read(100)
            writer.transport.abort()
            await until(lambda: at_rest(version))
            assert version.text_figures.finished == {"abort": 5}

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("ahead", [1, 5])
def test_a_client_that_leaves_with_more_requests_behind_the_first_ends_it(plan, stream, ahead):
    async def leave() -> None:
        async with gateway(plan) as (url, version, _):
            _, writer = await ask(url, {**ENDLESS, "stream": stream})
            await until(lambda: version.pipeline.sequences.running == 1)
            writer.write(request_bytes(ENDLESS) * ahead)
            await asyncio.sleep(0.1)
            writer.close()
            await until(lambda: at_rest(version))
            assert version.text_figures.finished == {"abort": 1}

    asyncio.run(leave())


def test_streams_continue_beside_clients_that_stall_leave_and_come(plan):
    async def reads(url, seed):
        async with client_of(url) as client:
            stream = await client.completions.create(
                model="tiny", prompt="Hello", max_tokens=40, seed=seed, stream=True, extra_body={"ignore_eos": True}
            )
            return "".join([chunk.choices[0].text async for chunk in stream])

    async def leaves(url, seed):
        reader, writer = await ask(url, {**ENDLESS, "stream": True, "seed": seed})
        await reader.read(200)
        writer.transport.abort()

    async def main():
        async with gateway(plan, sent_ahead=1 << 12, running={"max_rows": 16}) as (url, version, _):
            expected = await reads(url, 1)
            stalled = [await ask(url, {**ENDLESS, "stream": True, "logprobs": 5}) for _ in range(16)]
            for _ in range(2):
                texts, *_ = await asyncio.gather(
                    asyncio.gather(*(reads(url, 1) for _ in range(16))),
                    *(leaves(url, seed) for seed in range(32)),
                )
                assert texts == [expected] * 16
            for _, writer in stalled:
                writer.transport.abort()
            await until(lambda: at_rest(version))
            finished = version.text_figures.finished
            assert finished["length"] >= 33
            assert sum(finished.values()) == 1 + 16 + 2 * (16 + 32)
            assert finished["error"] == 0

    asyncio.run(main())


def test_a_client_that_stalls_does_not_fill_the_memory_and_gets_every_token(plan):
    """Its tokens stay tokens until it reads; none is lost."""

    async def main():
        async with gateway(plan, sent_ahead=1 << 12) as (url, version, _):
            body = {**ENDLESS, "stream": True, "logprobs": 5}
            reader, writer = await ask(url, body)
            await until(lambda: version.pipeline.sequences.tokens == ENDLESS["max_tokens"])
            assert version.text_figures.requests_running == 1  # it has not been sent yet
            raw = b""
            while not raw.endswith(b"0\r\n\r\n"):
                raw += await reader.read(1 << 16)
            writer.close()
            events = [line for line in raw.split(b"\n") if line.startswith(b"data: {")]
            counts = [len(json.loads(event[6:])["choices"][0]["logprobs"]["tokens"]) for event in events]
            assert sum(counts) == ENDLESS["max_tokens"]
            assert len(counts) < ENDLESS["max_tokens"]  # those that waited came together
            await until(lambda: at_rest(version))

    asyncio.run(main())


def test_a_client_that_never_reads_is_given_up(plan, monkeypatch):
    monkeypatch.setattr("runtime.gateway.http.connections.UNREAD_S", 0.3)

    async def main():
        async with gateway(plan, sent_ahead=1 << 12) as (url, version, _):
            _, writer = await ask(url, {**ENDLESS, "stream": True, "logprobs": 5})
            await until(lambda: version.text_figures.finished == {"abort": 1})
            await until(lambda: at_rest(version))
            writer.close()

    asyncio.run(main())


def test_more_waiting_texts_than_allowed_are_refused_with_429(plan):
    async def main():
        async with gateway(plan, running={"max_rows": 2}, max_queue=3) as (url, version, _), client_of(url) as client:
            running = [await ask(url, {**ENDLESS, "stream": True}) for _ in range(2)]
            await until(lambda: version.text_figures.requests_running == 2)
            waiting = [await ask(url, {**ENDLESS, "stream": True}) for _ in range(3)]
            await until(lambda: version.text_figures.requests_waiting == 3)
            with pytest.raises(openai.RateLimitError) as caught:
                await client.completions.create(model="tiny", prompt="x")
            assert caught.value.response.headers["retry-after"] == "1"
            assert caught.value.body["code"] == "rate_limit_exceeded"
            for _, writer in running + waiting:
                writer.transport.abort()
            await until(lambda: at_rest(version))
            await client.completions.create(model="tiny", prompt="x", max_tokens=1)

    asyncio.run(main())


def test_a_stopping_server_ends_running_streams_first_and_takes_no_more(plan):
    async def main():
        async with gateway(plan, drain_s=60) as (url, version, stop), client_of(url) as client:
            stream = await client.completions.create(
                model="tiny", prompt="Hello", max_tokens=300, stream=True, extra_body={"ignore_eos": True}
            )
            chunks = aiter(stream)
            await anext(chunks)
            stop()
            with pytest.raises(openai.InternalServerError) as caught:
                await client.completions.create(model="tiny", prompt="x")
            assert caught.value.status_code == 503
            assert caught.value.body["code"] == "service_unavailable"
            *_, last = [chunk async for chunk in chunks]
            assert last.choices[0].finish_reason == "length"
            assert version.text_figures.finished == {"length": 1}

    asyncio.run(main())


def test_a_stream_that_a_stopping_server_cannot_finish_ends_with_an_error(plan):
    async def main():
        async with gateway(plan, drain_s=0.1) as (url, version, stop), client_of(url) as client:
            stream = await client.completions.create(
                model="tiny", prompt="Hello", max_tokens=LENGTH - 100, stream=True, extra_body={"ignore_eos": True}
            )
            chunks = aiter(stream)
            await anext(chunks)
            stop()
            with pytest.raises(openai.APIError, match="closed"):
                [chunk async for chunk in chunks]
            await until(lambda: version.text_figures.finished == {"error": 1})

    asyncio.run(main())


def test_a_killed_node_is_a_pause_and_every_token_comes_once(plan):
    async def main():
        async with gateway(plan) as (url, version, _), client_of(url) as client:

            async def text(kill):
                stream = await client.completions.create(
                    model="tiny", prompt="Hello", max_tokens=400, temperature=0, stream=True,
                    extra_body={"ignore_eos": True},
                )  # fmt: skip
                found, count = "", 0
                async for chunk in stream:
                    found, count = found + chunk.choices[0].text, count + 1
                    if kill and count == 20:
                        node = next(node for node in version.pipeline.nodes if node.stage == 1)
                        os.kill(node.pid, signal.SIGKILL)
                return found

            expected = await text(False)
            assert await text(True) == expected
            assert version.pipeline.sequences.replays >= 1
            assert version.text_figures.finished == {"length": 2}

    asyncio.run(main())


def test_a_plan_whose_tokenizer_is_broken_serves_tensors_and_says_why_not_texts(plan, tmp_path):
    folder = tmp_path / "broken.plan"
    shutil.copytree(plan, folder)
    (folder / "tokenizer.json").write_bytes(b"{}")
    found = load_plan(plan)
    entries = tuple(
        replace(entry, size_bytes=2, sha256=hashlib.sha256(b"{}").hexdigest())
        if entry.name == "tokenizer.json" else entry for entry in found.decoder.text
    )  # fmt: skip
    (folder / "plan.json").write_bytes(replace(found, decoder=replace(found.decoder, text=entries)).to_json())

    async def main():
        async with gateway(folder) as (url, version, _), client_of(url) as client:
            with pytest.raises(openai.InternalServerError, match="not a tokenizer") as caught:
                await client.completions.create(model="broken", prompt="x")
            assert caught.value.status_code == 503
            assert (await client.models.list()).data == []
            assert version.ready

    asyncio.run(main())
