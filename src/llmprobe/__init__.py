"""llmprobe tells operators, live and with evidence, what their LLM server is bound by.

Importing this package does nothing; ``LLMPROBE=1`` in the environment, or `enable`, does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "disable", "enable", "measure"]

if TYPE_CHECKING:
    from llmprobe.hooks.session import disable, enable
    from llmprobe.measuring import measure


def __getattr__(name: str) -> Any:
    # Looked up when used: importing the package must cost and do nothing.
    if name in ("enable", "disable"):
        from llmprobe.hooks import session

        return getattr(session, name)
    if name == "measure":
        from llmprobe.measuring import measure

        return measure
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
