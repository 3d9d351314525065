"""The command that follows a run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from launch.commands.options import FOLDER


@click.command()
@click.argument("run", type=FOLDER)
@click.option("--once", is_flag=True, help="Say how it is now, and end.")
@click.option("--json", "as_json", is_flag=True, help="With --once: one JSON object on stdout.")
def watch(run: Path, once: bool, as_json: bool) -> None:
    """Follow RUN until it ends: step, time left, loss, speed, errors, last checkpoint.

    By its log alone, so on any machine that sees the folder. A run is silent when it has written nothing for much
    longer than usual; at first, and with --once, the clocks of both machines tell for how long. Ctrl-C ends the
    watching, not the run.

    Exit code 1: it has failed or was stopped; with --once also: it is silent.
    """
    from launch.watch import Watch, follow

    if as_json and not once:
        raise click.UsageError("--json goes with --once.")
    seen = Watch(run)
    if not once:
        try:
            state = follow(seen, sys.stdout)
        except KeyboardInterrupt:
            if sys.stdout.isatty():
                click.echo()
            click.get_current_context().exit(130)
    else:
        state = seen.state()
        click.echo(json.dumps(seen.to_dict()) if as_json else seen.line())
    if state not in ("running", "ended"):
        click.get_current_context().exit(1)
