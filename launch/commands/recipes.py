"""The command that shows the recipes."""

from __future__ import annotations

import json

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def recipes(as_json: bool) -> None:
    """Show the recipes side by side; what differs from `notes`, the default, is marked with *."""
    from launch.recipe_text import shown
    from model.recipe import RECIPES, meanings

    columns = {name: recipe.to_dict() for name, recipe in RECIPES.items()}
    if as_json:
        click.echo(json.dumps(columns))
        return
    default, *others = columns
    rows = [["", *columns]]
    for field in meanings():
        first = shown(columns[default][field])
        values = [shown(columns[name][field]) for name in others]
        rows.append([field, first, *(value if value == first else f"* {value}" for value in values)])
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    click.echo()
    for field, meaning in meanings().items():
        click.echo(f"{field.ljust(widths[0])}  {meaning}")
