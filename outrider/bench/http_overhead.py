"""What the HTTP front door adds to the time per output token, beside gRPC at the same coordinator.

``python -m outrider.bench.http_overhead`` starts the local stack on the demo pair and sends the same batches of
requests through both doors in turn, ``--concurrency`` at a time. A client of either kind does what it must and no more:
one decodes a protobuf message for each event, the other a JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from outrider.client import Client, Speculation, Tokens
from outrider.demo import PROMPT
from outrider.launcher import COORDINATOR, LocalStack, StackOptions, demo_pair

WARM_UP_ROUNDS = 2


@dataclass(frozen=True, slots=True)
class Answer:
    """One completion. Times are in seconds on one clock."""

    text: str
    first_s: float
    last_s: float
    num_later_tokens: int
    """All but those that came with the first."""

    @property
    def token_s(self) -> float:
        return (self.last_s - self.first_s) / self.num_later_tokens


@dataclass(frozen=True, slots=True)
class Round:
    """One batch through one door."""

    token_s: float
    """Median over its requests of the time per output token."""
    coordinator_s: float
    """The coordinator's processor time per output token."""
    texts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Work:
    """What every round asks for."""

    concurrency: int
    max_tokens: int
    speculates: bool


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--concurrency", type=int, default=8, help="requests at a time")
    parser.add_argument("--max-tokens", type=int, default=96, help="tokens of each completion")
    parser.add_argument("--pairs", type=int, default=10, help="rounds through either door, interleaved")
    parser.add_argument("--plain", action="store_true", help="plain decoding, without the draft worker's part")
    arguments = parser.parse_args()
    work = Work(arguments.concurrency, arguments.max_tokens, not arguments.plain)
    print(asyncio.run(_measure(work, arguments.pairs)))  # noqa: T201


async def _measure(work: Work, num_pairs: int) -> str:
    target, draft = demo_pair()
    async with (
        LocalStack(StackOptions(target=target, draft=draft, http_port=0)) as stack,
        Client(stack.address) as client,
    ):
        pid = stack.pids[COORDINATOR]
        pairs = []
        for index in range(WARM_UP_ROUNDS + num_pairs):
            http_first = bool(index % 2)
            first = await _round(work, pid, index, client, stack.http_address if http_first else None)
            second = await _round(work, pid, index, client, None if http_first else stack.http_address)
            grpc, http = (second, first) if http_first else (first, second)
            assert grpc.texts == http.texts, "the two doors gave different texts"
            pairs.append((grpc, http))
    return _report(work, pairs[WARM_UP_ROUNDS:])


async def _round(work: Work, pid: int, index: int, client: Client, http_address: str | None) -> Round:
    """A batch through HTTP, or gRPC if ``http_address`` is None; with the index's seeds, so both say the same."""
    before_s = _processor_s(pid)
    seeds = [index * work.concurrency + number for number in range(work.concurrency)]
    if http_address is None:
        answers = await asyncio.gather(*(_ask_grpc(client, work, seed) for seed in seeds))
    else:
        answers = await asyncio.gather(*(_ask_http(http_address, work, seed) for seed in seeds))
    num_tokens = work.concurrency * work.max_tokens
    return Round(
        token_s=statistics.median(answer.token_s for answer in answers),
        coordinator_s=(_processor_s(pid) - before_s) / num_tokens,
        texts=tuple(answer.text for answer in answers),
    )


async def _ask_grpc(client: Client, work: Work, seed: int) -> Answer:
    stream = client.generate(
        PROMPT,
        max_tokens=work.max_tokens,
        temperature=0.8,
        seed=seed,
        ignore_eos=True,
        speculation=Speculation(disabled=not work.speculates),
    )
    arrivals: list[tuple[float, str, int]] = []
    async with aclosing(stream):
        async for event in stream:
            if isinstance(event, Tokens):
                arrivals.append((time.perf_counter(), event.text, len(event.tokens)))
    return _answer(arrivals, work, num_first=arrivals[0][2])


async def _ask_http(address: str, work: Work, seed: int) -> Answer:
    body = {
        "prompt": PROMPT,
        "max_tokens": work.max_tokens,
        "temperature": 0.8,
        "seed": seed,
        "ignore_eos": True,
        "stream": True,
        "speculation": {"enabled": work.speculates},
    }
    arrivals: list[tuple[float, str, int]] = []
    async for chunk in _post(address, body):
        arrivals.append((time.perf_counter(), chunk["choices"][0]["text"], 0))
    return _answer(arrivals, work, num_first=1)  # the first step has a prompt in it and no draft yet


async def _post(address: str, body: object) -> AsyncIterator[dict[str, list[dict[str, str]]]]:
    """The JSON of every event of a streamed completion."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\n"
    writer.write(f"{head}content-length: {len(content)}\r\nconnection: close\r\n\r\n".encode() + content)
    try:
        async for line in reader:
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])
    finally:
        writer.close()
        await writer.wait_closed()


def _answer(arrivals: Sequence[tuple[float, str, int]], work: Work, num_first: int) -> Answer:
    with_text = [arrival for arrival in arrivals if arrival[1]]
    text = "".join(part for _, part, _ in arrivals)
    return Answer(text, with_text[0][0], with_text[-1][0], work.max_tokens - num_first)


def _processor_s(pid: int) -> float:
    """Seconds of processor time that the process has used; 0 where the system does not say."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as stat:
            fields = stat.read().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _report(work: Work, pairs: Sequence[tuple[Round, Round]]) -> str:
    ratios = [http.token_s / grpc.token_s for grpc, http in pairs]
    grpc_s, http_s = (statistics.median(pair[door].token_s for pair in pairs) for door in (0, 1))
    grpc_cpu_s, http_cpu_s = (statistics.fmean(pair[door].coordinator_s for pair in pairs) for door in (0, 1))
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    kind = "speculative" if work.speculates else "plain"
    return (
        f"{work.concurrency} requests at a time, {work.max_tokens} tokens each, {kind}, {len(pairs)} pairs of rounds\n"
        f"time per output token  gRPC {grpc_s * 1e3:.2f} ms, HTTP {http_s * 1e3:.2f} ms\n"
        f"HTTP / gRPC            {statistics.median(ratios):.3f} (quartiles {quartiles[0]:.3f} to {quartiles[2]:.3f})\n"
        f"coordinator's processor time per token  gRPC {grpc_cpu_s * 1e6:.0f} us, HTTP {http_cpu_s * 1e6:.0f} us"
    )


if __name__ == "__main__":
    main()
