"""A server as far as captures can tell, for ``llmprobe run --nsys``; it ends with status 7 on SIGTERM.

It writes the journal of a pretended worker and keeps an agent, as an engine does, and prints what must not
leave a capture's folder. On SIGUSR1 it stays in the step that runs, until SIGUSR2.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

from journal_feeder import Orders, facts, feed_worker

from llmprobe.record.agent_launch import ensure_agent
from llmprobe.record.recorder import Recorder
from llmprobe.settings import Settings


def main() -> None:
    """Serve until told to stop."""
    settings = Settings.from_env()
    stop, orders = threading.Event(), Orders()
    signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    signal.signal(signal.SIGUSR1, lambda number, frame: orders.going.clear())
    signal.signal(signal.SIGUSR2, lambda number, frame: orders.going.set())
    recorder = Recorder.open(settings.directory, "worker", facts("worker", os.environ["LLMPROBE_GROUP"]))
    print(f"serving as {os.getpid()} {os.environ.get('PLANTED_SECRET', '')}", flush=True)
    feeding = threading.Thread(target=feed_worker, args=(recorder, stop, orders))
    feeding.start()
    while not stop.wait(0.3):
        ensure_agent(settings)
    orders.going.set()
    feeding.join()
    recorder.close(remove=True)
    sys.exit(7)


if __name__ == "__main__":
    main()
