"""What ``llmprobe.pth`` calls at the start of every interpreter that has ``LLMPROBE`` set.

Waits for transformers' generation code to be imported by the program itself; standard library only.
"""

from __future__ import annotations

from types import ModuleType

GENERATION = "transformers.generation.utils"


def arm() -> None:
    """Have the transformers hooks installed right after `GENERATION` is imported. Never raises."""
    try:
        from llmprobe.hooks.on_import import when_imported

        when_imported(GENERATION, _install)
    except Exception as error:  # noqa: BLE001 - an exception here would show in every interpreter
        _say(error)


def _install(module: ModuleType) -> None:
    try:
        from llmprobe.hooks import session

        session.install_transformers()
    except Exception as error:  # noqa: BLE001 - runs inside the program's own import
        _say(error)


def _say(error: Exception) -> None:
    import sys

    print(f"llmprobe: the probe stays off: {error!r}", file=sys.stderr)  # noqa: T201 - logging may not be up
