"""Runs a command that must not outlive who asked for it: ``python -m llmprobe.capture.tether COMMAND…``.

When its standard input closes, as it does when the agent is killed, it ends with all of its process group, of
which it has to be the leader. Else it ends as the command does.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading


def main() -> int:
    """Run the command on the command line."""
    try:
        child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    except OSError as error:
        sys.stderr.write(f"{sys.argv[1]} cannot be started: {os.strerror(error.errno or 0)}\n")
        return 127
    threading.Thread(target=_end_together, daemon=True).start()
    code = child.wait()
    if code < 0:  # by a signal, of which who asked reads in our status
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


def _end_together() -> None:
    os.read(0, 1)  # not sys.stdin, whose lock Python wants at its own end
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
