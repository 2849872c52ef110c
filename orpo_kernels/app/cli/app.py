"""The commands of `orpo-kernels`."""

from __future__ import annotations

import typer

from .compare import compare
from .doctor import doctor
from .evaluate import evaluate
from .inspect import inspect
from .plan import plan
from .sweep import sweep
from .train import train

app = typer.Typer(
    name="orpo-kernels",
    help="Fine-tune language models on preferences with ORPO, find out whether it helped, and what lambda to use.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _several_commands() -> None:
    """Typer makes an app of a single command that command; with a callback it stays an app of commands."""


for command in (inspect, train, evaluate, sweep, compare, plan, doctor):
    app.command()(command)
