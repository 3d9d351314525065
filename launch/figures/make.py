"""All figures of a run: what the network and the data say goes into them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from launch.errors import UserError
from launch.figures.curves import draw_curves
from launch.figures.drawing import save
from launch.figures.kernels import draw_kernels
from launch.figures.pictures import draw_guesses, draw_neighbours, stored_picture
from launch.predict import ranked
from launch.runlog import NOT_OURS, odd_line, read_log
from launch.similar import open_index
from launch.trained import open_trained
from launch.world import World
from model.softmax import joined, probabilities
from pipeline.files import write_durably
from pipeline.manifest import check_files, load_manifest
from pipeline.progress import Progress
from pipeline.shards import ShardImages

QUERIES, NEIGHBOURS = 5, 6  # figure 4 has as many


def make_figures(world: World, run_path: Path, shards: Path, pictures: int, seed: int, progress: Progress) -> Path:
    """Write kernels, guesses, neighbours and curves (PNG and SVG) and figures.json, their numbers, to RUN/figures.

    `pictures` validation images are drawn by `seed`; the first few are queries for neighbours. Return the folder.
    """
    world.await_leader()
    manifest, data = load_manifest(shards)
    images = ShardImages(shards, manifest, "val")
    if not len(images):
        raise UserError(f"{shards}: has no validation images to be shown")
    if world.leads:
        check_files(shards, manifest.splits["val"].files)
    trained = open_trained(world, run_path, {"pictures": pictures, "seed": seed}, (shards, manifest, data))
    try:
        curves = draw_curves(read_log(trained.folder.log_path))
    except NOT_OURS as error:
        raise UserError(odd_line(trained.folder.log_path, error)) from None
    chosen = np.random.default_rng(seed).permutation(len(images))[:pictures]
    towers, kernels = trained.run.recipe.towers, trained.network.conv1.weight.detach().float()
    if world.exchange is not None:
        kernels = joined(kernels.flatten(1).t().contiguous(), 2 * len(kernels), world.exchange).t().reshape(
            -1, *kernels.shape[1:])
    kernel_drawing, selectivity = draw_kernels(kernels.cpu().numpy(), towers)
    shown = [stored_picture(images, i) for i in chosen]
    pixels = trained.pixels(np.stack(shown), 1)
    with torch.no_grad():
        scores = probabilities(trained.network(pixels), world.exchange)
        guesses = ranked(trained.run, joined(scores, len(trained.run.wnids), world.exchange), 5)
    index, training = open_index(trained, shards, manifest, data, progress)
    found = [index.nearest(query, NEIGHBOURS, world.threads)
             for query in trained.last_hidden(pixels[:QUERIES]).float().cpu().numpy()]
    folder = trained.folder.path / "figures"
    if not world.leads:
        return folder
    folder.mkdir(exist_ok=True)
    words = [c.words or c.wnid for c in manifest.classes]
    truths = [manifest.classes[images.labels[i]] for i in chosen]
    right = [next((n for n, guess in enumerate(of_one) if guess.wnid == truth.wnid), -1)
             for of_one, truth in zip(guesses, truths)]
    save(kernel_drawing, folder / "kernels")
    save(draw_guesses(shown, [words[images.labels[i]] for i in chosen], guesses, right), folder / "guesses")
    save(draw_neighbours(
        shown[:QUERIES], [[stored_picture(training, row) for row in rows] for rows, _ in found],
        [words[images.labels[i]] for i in chosen[:QUERIES]],
        [[(words[training.labels[row]], float(distance), training.labels[row] == images.labels[i])
          for row, distance in zip(rows, distances)] for i, (rows, distances) in zip(chosen, found)],
    ), folder / "neighbours")
    save(curves, folder / "curves")
    write_durably(folder / "figures.json", (json.dumps({
        "checkpoint": trained.checkpoint.name, "colour_selectivity": selectivity,
        "pictures": [{"name": images.name(i), "wnid": truth.wnid, "guesses": [asdict(guess) for guess in of_one]}
                     for i, truth, of_one in zip(chosen, truths, guesses)],
        "neighbours": [{"name": images.name(i), "of": [[training.name(row), float(distance)]
                                                       for row, distance in zip(rows, distances)]}
                       for i, (rows, distances) in zip(chosen, found)],
    }, indent=1) + "\n").encode())
    return folder
