from __future__ import annotations

import functools
from typing import Any

import pytest

from llmprobe.hooks.guard import ERROR_LIMIT, Guard
from llmprobe.hooks.patch import Patch


class Host:
    def work(self, value: int) -> str:
        return f"work {value}"

    @staticmethod
    def still(value: int) -> str:
        return f"still {value}"


def layer(name: str) -> Any:
    def make(original: Any, patch: Patch) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if not patch.active:
                return original(*args, **kwargs)
            return f"{name}({original(*args, **kwargs)})"

        return wrapper

    return make


def other_tool(owner: Any, name: str, label: str) -> None:
    original = vars(owner)[name]

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return f"{label}({original(*args, **kwargs)})"

    setattr(owner, name, wrapper)


@pytest.fixture
def host() -> type:
    return type("Mine", (Host,), {"work": Host.work, "still": vars(Host)["still"]})


def test_a_patch_wraps_keeps_the_name_and_restores_the_very_original(host: type) -> None:
    original = vars(host)["work"]
    patch = Patch(host, "work", layer("ours"))
    patch.apply()
    assert host().work(1) == "ours(work 1)"
    assert host.work.__name__ == "work"
    assert patch.remove()
    assert vars(host)["work"] is original


def test_a_layer_under_another_tools_falls_silent_and_leaves_theirs_alone(host: type) -> None:
    patch = Patch(host, "work", layer("ours"))
    patch.apply()
    other_tool(host, "work", "theirs")
    assert host().work(1) == "theirs(ours(work 1))"
    assert not patch.remove()
    assert host().work(1) == "theirs(work 1)"
    patch.apply()
    assert host().work(1) == "theirs(ours(work 1))"


def test_a_layer_over_another_tools_comes_out_and_leaves_theirs_in(host: type) -> None:
    other_tool(host, "work", "theirs")
    theirs = vars(host)["work"]
    patch = Patch(host, "work", layer("ours"))
    patch.apply()
    assert host().work(1) == "ours(theirs(work 1))"
    assert patch.remove()
    assert vars(host)["work"] is theirs


def test_static_methods_stay_static(host: type) -> None:
    patch = Patch(host, "still", layer("ours"))
    patch.apply()
    assert host.still(1) == host().still(1) == "ours(still 1)"
    patch.remove()
    assert isinstance(vars(host)["still"], staticmethod)


def test_an_inherited_method_is_not_ours_to_wrap() -> None:
    class Child(Host):
        pass

    with pytest.raises(AttributeError, match="work"):
        Patch(Child, "work", layer("ours")).apply()


@pytest.mark.swallows
def test_ten_errors_make_the_probe_inert_and_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    guard = Guard()

    def broken() -> None:
        raise ValueError("on purpose")

    caplog.set_level("WARNING", logger="llmprobe")
    for _ in range(ERROR_LIMIT):
        assert not guard.inert
        guard.call("here", broken)
    assert guard.inert
    calls: list[int] = []
    for _ in range(5):
        guard.call("here", lambda: calls.append(1))
    assert not calls
    assert guard.errors["here"] == ERROR_LIMIT


@pytest.mark.swallows
def test_the_guard_lets_through_what_the_host_must_see() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Guard().call("here", interrupted)
