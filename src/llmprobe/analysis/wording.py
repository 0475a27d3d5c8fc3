"""How durations and names of kernels are written for people."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable

_NAME_CHARS = 68
_CLOSING = {")": "(", "]": "[", "}": "{", ">": "<"}
_UNNAMED = re.compile(r"(?:<unnamed>|\(anonymous namespace\))::")
_CALLED = re.compile(r"::operator ?\(\)\([^()]*\)(?: const)?")
_LAMBDA = re.compile(r"\[lambda\([^()]*\) \(instance (\d+)\)\]")
_CAST = re.compile(r"\((?:int|bool|long|unsigned int|unsigned long)\)(?=-?\d)")
_QUALIFIER = re.compile(r"(?:\w+::)+(?=\w)")
_INNERMOST = re.compile(r"<[^<>]*>|\([^()]*\)")


def duration(seconds: float) -> str:
    """``1.23 ms``."""
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "µs")):
        amount = seconds * factor
        if amount >= 0.9995:  # what rounds to 1000 of a unit is 1 of the next: never 1e+03
            return f"{amount:.3g} {unit}" if amount < 999.5 else f"{amount:.0f} {unit}"
    return f"{seconds * 1e9:.0f} ns"


def short(name: str, limit: int = _NAME_CHARS) -> str:
    """A kernel's name in at most ``limit`` characters.

    What tells least goes first: parameters and return type, then namespaces in template arguments, those of
    the function itself, the arguments of template arguments, at last its middle.
    """
    name = name.removeprefix("void ")
    if len(name) <= limit:
        return name
    name = _without_signature(name)
    if len(name) > limit:
        name = _LAMBDA.sub(r"[\1]", _CALLED.sub("", _UNNAMED.sub("", _CAST.sub("", name))))
    function, bracket, arguments = name.partition("<")
    if len(name) > limit:
        name = f"{function}{bracket}{_QUALIFIER.sub('', arguments)}"
    function, bracket, arguments = name.partition("<")
    if len(name) > limit and bracket:
        function = _QUALIFIER.sub("", function)
        name = f"{function}{bracket}{arguments}"
        while len(name) > limit and arguments != (
            fewer := _INNERMOST.sub("", arguments[:-1]) + arguments[-1:]
        ):
            arguments = fewer
            name = f"{function}{bracket}{arguments}"
    if len(name) > limit:
        name = f"{name[: limit * 2 // 3 - 1]}…{name[-(limit // 3) :]}"
    return name


def told_apart(names: Iterable[str], limit: int = _NAME_CHARS) -> dict[str, str]:
    """Each name's `short` one; those that would be alike end in a mark, the same in every report."""
    shown = {name: short(name, limit) for name in names}
    often = Counter(shown.values())
    for name, text in shown.items():
        if often[text] > 1:
            mark = hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=2).hexdigest()
            shown[name] = f"{short(name, limit - 6)} #{mark}"
    return shown


def _without_signature(name: str) -> str:
    """Without parameters and return type, looked for from the end: a return type's brackets may not match."""
    end = name.removesuffix(" const")
    if not end.endswith(")"):
        return name
    at, depth = len(end), 0
    while at:
        at -= 1
        depth += (end[at] == ")") - (end[at] == "(")
        if not depth:
            break
    head = end[:at]
    if not head or head.endswith((" ", "::")):
        return name  # no parameters but a remark
    inside: list[str] = []
    for at in range(len(head) - 1, -1, -1):
        char = head[at]
        if char in _CLOSING and head[at - 1 : at + 1] != "->":
            inside.append(_CLOSING[char])
        elif char in "([{<":
            while inside and inside.pop() != char:
                pass
        elif char == " " and not inside and not head[:at].endswith("operator"):
            return head[at + 1 :]
    return head
