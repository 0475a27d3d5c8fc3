"""A server as far as captures can tell, for ``llmprobe run --nsys``; it ends with status 7 on SIGTERM.

It writes the journal of a pretended worker and keeps an agent, as an engine does, and prints what must not
leave a capture's folder.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

from journal_feeder import facts, feed_worker

from llmprobe.record.agent_launch import ensure_agent
from llmprobe.record.recorder import Recorder
from llmprobe.settings import Settings


def main() -> None:
    """Serve until told to stop."""
    settings = Settings.from_env()
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    recorder = Recorder.open(settings.directory, "worker", facts("worker", os.environ["LLMPROBE_GROUP"]))
    print(f"serving as {os.getpid()} {os.environ.get('PLANTED_SECRET', '')}", flush=True)
    feeding = threading.Thread(target=feed_worker, args=(recorder, stop))
    feeding.start()
    while not stop.wait(0.3):
        ensure_agent(settings)
    feeding.join()
    recorder.close(remove=True)
    sys.exit(7)


if __name__ == "__main__":
    main()
