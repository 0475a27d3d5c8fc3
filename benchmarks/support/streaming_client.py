"""A closed-loop streaming client: so many requests at a time, the next as soon as one is over.

Runs as a process of its own, with the standard library alone, so that it takes little of the processor
from the server it times. Prints one line of JSON a request; times are CLOCK_MONOTONIC nanoseconds, which
all processes of a machine share.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time

_LOWEST_ID, _HIGHEST_ID = 10, 290  # in every tokenizer, and none of them special


async def main() -> None:
    """Send requests until the process is ended."""
    options = _options()
    await asyncio.gather(*(_stream(options, lane) for lane in range(options.concurrency)))


async def _stream(options: argparse.Namespace, lane: int) -> None:
    """One request after another over one connection."""
    generator = random.Random(lane)
    await asyncio.sleep(options.spread_seconds * lane / options.concurrency)
    reader, writer = await asyncio.open_connection("127.0.0.1", options.port, limit=1 << 20)
    while True:
        body = {
            "model": options.model,
            # Always another prompt, so that none is found in the prefix cache.
            "prompt": generator.choices(range(_LOWEST_ID, _HIGHEST_ID), k=options.prompt_tokens),
            "max_tokens": options.output_tokens,
            "ignore_eos": True,
            # A token without text makes the server decode the whole prompt again at each one that follows.
            "skip_special_tokens": False,
            "stream": True,
            "temperature": 0,
        }
        print(json.dumps(await _request(reader, writer, json.dumps(body).encode())), flush=True)
        if options.pause_seconds:
            await asyncio.sleep(options.pause_seconds)


async def _request(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes
) -> dict[str, int | bool]:
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    sent = time.monotonic_ns()
    longest = longest_until = 0
    writer.write(head.encode() + body)
    status = await reader.readline()
    while (await reader.readline()).strip():
        pass
    if b" 200 " not in status:
        raise SystemExit(f"the server answered {status!r}")
    first = last = 0
    full = False
    while size := int(await reader.readline(), 16):
        data = await reader.readexactly(size + 2)
        if b'"choices"' in data:
            now = time.monotonic_ns()
            if first and now - last > longest:
                longest, longest_until = now - last, now
            last = now
            first = first or last
            full = full or b'"finish_reason":"length"' in data
    await reader.readline()
    return {
        "sent": sent,
        "first": first,
        "last": last,
        "longest": longest,  # between two tokens
        "longest_until": longest_until,
        "full": full,
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--concurrency", type=int, default=1)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--pause-seconds", type=float, default=0.0)
    parser.add_argument("--spread-seconds", type=float, default=0.0)  # over which the first requests are sent
    return parser.parse_args()


if __name__ == "__main__":
    asyncio.run(main())
