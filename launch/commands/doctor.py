"""The command that says whether a machine is fit to train."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from launch.commands.options import FOLDER, PLACE
from launch.doctor.finding import NOTE, OK, WRONG
from launch.errors import RunFailed

COLOURS = {OK: "green", NOTE: "yellow", WRONG: "red"}


@click.command()
@click.option("--run", type=FOLDER, help="Where a run is to go: can it be written, is there room for checkpoints.")
@click.option("--shards", type=PLACE, help="What is to be trained on: is it all there.")
@click.option("--quick", is_flag=True, help="Only what starts no process and takes less than a second.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def doctor(run: Path | None, shards: str | None, quick: bool, as_json: bool) -> None:
    """Say whether this machine is fit to train, and how to mend what is wrong.

    A line for each thing looked at: `ok`, `note` (training works all the same) or `wrong` (it does not, or not as it is
    meant to), what was found, and below it what to do. Exit code 1 where something is wrong. Changes nothing.
    """
    from launch.doctor.examination import examine

    findings = []
    for name, finding in examine(quick, run, shards):
        findings.append((name, finding))
        if not as_json:  # at once: some take seconds
            click.echo(f"{click.style(f'{finding.state:5}', COLOURS[finding.state])}  {name:13}  {finding.found}")
            if finding.mend:
                click.echo(" " * 22 + finding.mend)
    if as_json:
        click.echo(json.dumps({"checks": [{"name": name, **asdict(finding)} for name, finding in findings]}))
    wrong = [name for name, finding in findings if finding.state == WRONG]
    if wrong:
        raise RunFailed(f"not fit to train: {', '.join(wrong)}")
    if not as_json:
        click.echo(f"Fit to train{', by a quick look' if quick else ''}.")
