"""So many calls a second to an agent's captures, for some seconds, in a process of its own.

Prints one line of JSON: how many calls were sent, and how many got each status.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections import Counter
from pathlib import Path

_CONNECTIONS = 16


async def main() -> None:
    """Send them, evenly spread over time and connections."""
    options = _options()
    token = options.token_file.read_text().strip()
    head = f"GET /api/captures HTTP/1.1\r\nHost: 127.0.0.1:{options.port}\r\n"
    head += f"Authorization: Bearer {token}\r\n\r\n"
    seen: Counter[str] = Counter()
    begin = time.monotonic()
    lanes = (_call(options, head.encode(), lane, begin, seen) for lane in range(_CONNECTIONS))
    await asyncio.gather(*lanes)
    print(json.dumps({"calls": seen.total(), "seconds": time.monotonic() - begin, "statuses": dict(seen)}))


async def _call(
    options: argparse.Namespace, head: bytes, lane: int, begin: float, seen: Counter[str]
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", options.port, limit=1 << 24)
    apart = _CONNECTIONS / options.rate
    at = begin + lane / options.rate
    while at < begin + options.seconds:
        await asyncio.sleep(max(0.0, at - time.monotonic()))
        at += apart
        writer.write(head)
        status = (await reader.readline()).split()[1].decode()
        length = 0
        while line := (await reader.readline()).strip().lower():
            if line.startswith(b"content-length:"):
                length = int(line.partition(b":")[2])
        await reader.readexactly(length)
        seen[status] += 1
        if time.monotonic() > begin + 2 * options.seconds:
            break  # the agent cannot keep up
    writer.close()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--token-file", type=Path, required=True)
    parser.add_argument("--rate", type=float, default=1000.0)
    parser.add_argument("--seconds", type=float, default=4.0)
    return parser.parse_args()


if __name__ == "__main__":
    asyncio.run(main())
