"""The command that makes a page of a run."""

from __future__ import annotations

from pathlib import Path

import click

from launch.commands.options import FOLDER


@click.command()
@click.argument("run", type=FOLDER)
@click.option("--out", type=FOLDER, help="The file, which ends in .html; default: RUN/report.html.")
def report(run: Path, out: Path | None) -> None:
    """Write one HTML page of RUN, to be read anywhere without a network.

    Results beside the paper's, recipe and what differs from it, data and hashes, curves, speed, environment; with the
    figures of `alexnet figures`, and the errors of every `alexnet evaluate`.
    """
    from launch.report.page import write_report

    out = out or run / "report.html"
    write_report(run, out)
    click.echo(f"{out}: {out.stat().st_size:,} bytes", err=True)
