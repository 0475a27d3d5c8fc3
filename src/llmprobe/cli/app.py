"""The ``llmprobe`` command: every verb by name, imported when it is used.

``llmprobe --help`` must be quick, and each verb must only need what it uses.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

import llmprobe
from llmprobe.cli.standard_output import any_output


@dataclass(frozen=True)
class Verb:
    """One verb: the module that holds the function of its name, and its line in the list of verbs."""

    module: str
    line: str

    def load(self, name: str) -> Any:
        """Import the module and make the verb's command.

        The module may define ``EPILOG``, shown below its help, and ``COMMAND``, the class that parses it.
        """
        module = importlib.import_module(f"llmprobe.cli.{self.module}")
        function = getattr(module, name)
        about = _flowing(inspect.getdoc(function) or "")
        epilog = _flowing(getattr(module, "EPILOG", ""))
        app = typer.Typer(add_completion=False)
        app.command(name, help=about, epilog=epilog, cls=getattr(module, "COMMAND", None))(function)
        # A single command alone would be taken for the program itself; its name is given when it runs.
        return typer.main.get_command(app)


def _flowing(text: str) -> str:
    """Paragraphs of one line each, which the terminal's width breaks: it would keep the source's breaks."""
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


VERBS = {
    "run": Verb("run", "Run a command with the probe on; report at its end what it was bound by."),
    "status": Verb("status", "Show what is measured right now."),
    "top": Verb("top", "Watch every server live: what each phase is bound by."),
    "snapshot": Verb("snapshot", "Save the last ten minutes of every server in one file."),
    "capture": Verb("capture", "Look deeper into a running server for some seconds, without stopping it."),
    "analyze": Verb("analyze", "Tell from a profiler's file how busy each GPU was, with what, and why not."),
    "scrub": Verb("scrub", "Copy a profiler's file without environment, paths and names."),
    "on": Verb("switch", "Switch the probe of running servers on again."),
    "off": Verb("switch", "Switch the probe of running servers off, without a restart."),
    "gate": Verb("gate", "Compare runs; fail if one is worse than is allowed."),
    "calibrate": Verb("calibrate", "Measure this machine's memory bandwidth and FLOP/s, once."),
    "doctor": Verb("doctor", "Check this machine and environment; say what is missing and how to mend it."),
    "agent": Verb("agent", "Serve the metrics by hand, for LLMPROBE_AGENT=external."),
    "demo": Verb("demo", "Serve a tiny model with vLLM, drive it, and watch it being measured."),
}

EPILOG = """Examples:

LLMPROBE=1 vllm serve MODEL (and then, in another terminal:) llmprobe status

llmprobe run -- python generate.py

llmprobe doctor"""


class _Verbs(TyperGroup):
    """Lists verbs from `VERBS` alone; imports the one that runs."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        verb = VERBS.get(cmd_name)
        return None if verb is None else TyperCommand(cmd_name, help=verb.line)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name, VERBS[name].load(name) if name in VERBS else command, rest


app = typer.Typer(
    cls=_Verbs,
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    # Plain tracebacks: pretty ones print local variables, tokens among them.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"llmprobe {llmprobe.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Tell what an LLM server is bound by: compute, memory bandwidth, or synchronisation and host overhead.

    LLMPROBE=1 in the environment of `vllm serve`, or of a program that uses transformers, turns the probe on.
    """


def main() -> None:
    """The console script."""
    with any_output():
        app(prog_name="llmprobe")
