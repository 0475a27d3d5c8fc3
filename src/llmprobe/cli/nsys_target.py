"""Becomes the command that `llmprobe run --nsys` runs. Started by path, so nothing of llmprobe is imported.

Between nsys and the command it undoes what was meant for nsys alone: TMPDIR, umask, and above all the pipes
that nsys puts before standard output and error. Behind those, everything printed would be kept in a file and
in every capture, and a server whose nsys dies would write into a closed pipe.

``nsys_target.py PIDFILE OUT ERR UMASK TMPDIR COMMAND…``: descriptors and umask as numbers, TMPDIR ``-`` if it
was unset.
"""

import os
import sys


def main(arguments: "list[str]") -> int:
    """Never returns if the command can be run; else says why, and gives the status of a shell."""
    pid_file, out, err, umask, temporary, *command = arguments
    os.dup2(int(out), 1)
    os.dup2(int(err), 2)
    for descriptor in {int(out), int(err)} - {1, 2}:
        os.close(descriptor)
    if temporary == "-":
        os.environ.pop("TMPDIR", None)
    else:
        os.environ["TMPDIR"] = temporary
    whole = f"{pid_file}.new"
    with open(whole, "w") as file:  # noqa: PTH123 - no import that is not needed
        file.write(str(os.getpid()))
    os.replace(whole, pid_file)  # noqa: PTH105
    os.umask(int(umask))
    try:
        os.execvp(command[0], command)
    except OSError as error:
        os.write(2, f"llmprobe: cannot run {command[0]!r}: {os.strerror(error.errno or 0)}\n".encode())
    return 127


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
