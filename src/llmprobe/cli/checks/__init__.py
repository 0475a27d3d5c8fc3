"""What ``llmprobe doctor`` looks at: one small function a check, each looking at the real thing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "not ok", "absent"]


@dataclass(frozen=True)
class Check:
    """One line of the doctor's report.

    ``absent`` is for what need not be there. ``needed`` says that llmprobe cannot do its job while the state
    is ``not ok``; ``why`` says what it matters for and ``fix`` what to do, both empty where all is well.
    """

    name: str
    state: State
    found: str
    why: str = ""
    fix: str = ""
    needed: bool = False

    @property
    def broken(self) -> bool:
        """Whether something needed does not work."""
        return self.needed and self.state == "not ok"
