"""What the vLLM entry point calls. Does nothing unless ``LLMPROBE`` asks for it."""

from __future__ import annotations

import os


def vllm_plugin() -> None:
    """Entry point ``vllm.general_plugins``; runs in every vLLM process. Never raises."""
    if os.environ.get("LLMPROBE", "") in ("", "0"):
        return
    try:
        from llmprobe.hooks import session

        session.install_vllm()
    except Exception as error:  # noqa: BLE001 - vLLM calls plugins unguarded
        import logging

        logging.getLogger("llmprobe").error("the probe stays off: %r", error)
