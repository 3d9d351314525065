"""Recipes: every hyperparameter of a training, in one frozen place. Flags are for operations only."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import get_args, get_origin, get_type_hints

from model.errors import RecipeError
from model.schedule import ByHand, OneCycle, Plateau

CONVOLUTIONS = ("conv1", "conv2", "conv3", "conv4", "conv5")
LAYERS = (*CONVOLUTIONS, "fc6", "fc7", "fc8")


def _of(default, meaning: str):
    return field(default=default, metadata={"meaning": meaning})


@dataclass(frozen=True)
class SameMapNorm:
    """A second normalisation of layer 2: a / (k + alpha * sum of a^2 over n x n places of the same map)^beta."""

    k: float = 1.0
    n: int = 5  # places, in both directions
    alpha: float = 1e-3 / 25
    beta: float = 0.75


@dataclass(frozen=True)
class Recipe:
    """One way to train AlexNet. Checked on construction; RecipeError says what does not fit.

    Sections are of Krizhevsky, Sutskever and Hinton (2012). Defaults are those of `notes`, a set of notes on the paper.
    """

    name: str = "notes"
    kernels: tuple[int, ...] = _of((96, 256, 384, 384, 256), "of conv1 to conv5, both towers together")
    neurons: tuple[int, ...] = _of((4096, 4096), "of fc6 and fc7, both towers together")
    towers: int = _of(2, "each with half of the kernels and neurons; 1: a network that is not cut")
    joined: tuple[str, ...] = _of(("conv3",), "convolutions that read the maps of both towers, not those of their own")
    left_out: tuple[str, ...] = _of((), "layers that are not there, of conv3, conv4 and conv5")
    activation: str = _of("relu", "of every layer but fc8: relu, or tanh")
    pool_size: int = _of(3, "places, windows 2 apart (section 3.4); 2: windows do not overlap")
    weight_std: tuple[float, ...] = _of((0.01,) * 8, "of Gaussian weights around 0, conv1 to fc8; none: "
                                        "sqrt(2 / fan-in), He et al. 2015, eq. 10")
    ones: tuple[str, ...] = _of(("conv2", "conv3", "conv5", "fc6", "fc7", "fc8"), "where biases start at 1, not 0")
    lrn_k: float = _of(2.0, "section 3.3: a / (k + alpha * sum over n maps of a^2)^beta")
    lrn_n: int = _of(5, "maps, the own one in the middle; 0: no normalisation")
    lrn_alpha: float = _of(1e-4, "not divided by n")
    lrn_beta: float = _of(0.75, "the exponent")
    lrn_across_towers: bool = _of(False, "windows do not end where a tower's maps do")
    lrn_before_relu: bool = _of(False, "layer 1: LRN, pool, ReLU in place of ReLU, LRN, pool")
    map_norm: SameMapNorm | None = _of(None, "layer 2, after LRN: a / (k + alpha * sum over n x n places of a^2)^beta")
    dropout: float = _of(0.5, "chance to drop an output of fc6, fc7; at test outputs are times 1 - dropout")
    crop: int = _of(224, "pixels, both ways, of 256; conv1 sees 227, with zeros at the right and at the bottom")
    pixel_scale: float = _of(1.0, "the network sees (pixel 0-255 - mean + colour shift) * pixel_scale")
    mean_at: str = _of("crop", "where in the mean image the crop's mean lies: at the crop's place, or in the centre")
    crops_and_flips: bool = _of(True, "section 4.1's first form of augmentation; False: the centre, never mirrored")
    crops_shared_by: int = _of(1, "images next to each other in a batch that share crop and flip")
    colour_std: float = _of(0.1, "of alpha in section 4.1's p_i alpha_i lambda_i")
    colour_by: str = _of("variance", "lambda: variance of pixels in 0-1, times 255; or deviation, of pixels in 0-255")
    colour_shrink: float = _of(1.0, "mean-free pixels with their colour shift are divided by it while there is noise")
    colour_epochs: int | None = _of(None, "with colour noise; none: all")
    batch: int = _of(128, "images a step")
    epochs: int = _of(90, "at most")
    learning_rate: float = _of(0.01, "the first one, or the highest (OneCycle)")
    bias_rate: float | None = _of(None, "of biases, which the schedule never lowers; none: as of weights")
    warmup_epochs: float = _of(0.0, "in which all rates rise linearly to what they would be (model.batch_rule)")
    warmup_from: float = _of(1.0, "share of the rates with which they begin then")
    momentum: float = _of(0.9, "share of the velocity kept each step (section 5)")
    weight_decay: float = _of(0.0005, "of weights, times the rate (section 5)")
    bias_decay: float = _of(0.0005, "of biases, the same")
    schedule: Plateau | OneCycle | ByHand = _of(Plateau(), "of the learning rate")

    def __post_init__(self):
        if odd := [name for name, kind in get_type_hints(Recipe).items() if not _is(getattr(self, name), kind)]:
            raise RecipeError(f"recipe {self.name}: {odd[0]} cannot be {getattr(self, odd[0])!r}")
        widths = self.kernels + self.neurons
        if len(self.kernels) != 5 or len(self.neurons) != 2 or any(n < 2 or n % 2 or n > 1 << 20 for n in widths):
            raise RecipeError(f"recipe {self.name}: wants 5 numbers of kernels and 2 of neurons, each even")
        if unknown := set(self.ones) - set(LAYERS):
            raise RecipeError(f"recipe {self.name}: no layer named {', '.join(sorted(unknown))}")
        if self.towers not in (1, 2) or self.activation not in ("relu", "tanh") or self.pool_size not in (2, 3):
            raise RecipeError(f"recipe {self.name}: towers is 1 or 2, activation relu or tanh, pool_size 2 or 3")
        if set(self.joined) - set(CONVOLUTIONS[1:]) or set(self.left_out) - set(CONVOLUTIONS[2:]):
            raise RecipeError(f"recipe {self.name}: joined names some of conv2 to conv5, left_out of conv3 to conv5")
        if not 224 <= self.crop <= 227:
            raise RecipeError(f"recipe {self.name}: crop is 224 to 227 pixels, not {self.crop}")
        if self.lrn_n != 0 and (self.lrn_n < 1 or self.lrn_n % 2 == 0):
            raise RecipeError(f"recipe {self.name}: lrn_n must be odd, or 0 for no normalisation, not {self.lrn_n}")
        if not 0 <= self.dropout < 1 or not 0 <= self.momentum < 1:
            raise RecipeError(f"recipe {self.name}: dropout and momentum lie in [0, 1)")
        if self.batch < 1 or self.epochs < 1 or self.learning_rate <= 0 or self.pixel_scale <= 0:
            raise RecipeError(f"recipe {self.name}: batch, epochs, learning_rate and pixel_scale must be positive")
        if not 0 <= self.warmup_epochs <= self.epochs or not 0 < self.warmup_from <= 1:
            raise RecipeError(f"recipe {self.name}: warmup_epochs is not negative and not above epochs, warmup_from "
                              "lies in (0, 1]")
        if self.lrn_k <= 0 or min(self.lrn_alpha, self.lrn_beta, self.colour_std, self.weight_decay, self.bias_decay,
                                  *self.weight_std) < 0 or len(self.weight_std) not in (0, len(LAYERS)):
            raise RecipeError(f"recipe {self.name}: lrn_k must be positive, the other factors not negative, and "
                              f"weight_std has {len(LAYERS)} numbers or none")
        if self.mean_at not in ("crop", "centre") or self.colour_by not in ("variance", "deviation"):
            raise RecipeError(f"recipe {self.name}: mean_at is crop or centre, colour_by variance or deviation")
        if self.crops_shared_by < 1 or self.colour_shrink <= 0 or (self.bias_rate or 0) < 0 or (
            self.colour_epochs or 0
        ) < 0 or self.map_norm and (self.map_norm.n % 2 == 0 or self.map_norm.k <= 0):
            raise RecipeError(f"recipe {self.name}: crops_shared_by and colour_shrink must be positive, bias_rate and "
                              "colour_epochs not negative, map_norm's n odd and its k positive")

    def to_dict(self) -> dict:
        """Return the recipe as JSON values; `from_dict` takes it back."""
        schedule = {"kind": type(self.schedule).__name__, **_lists(asdict(self.schedule))}
        return {**_lists(asdict(self)), "schedule": schedule}

    @staticmethod
    def from_dict(values: dict) -> Recipe:
        """Raises RecipeError where fields are missing, unknown or out of range."""
        try:
            schedule = _tuples(values["schedule"])
            kind = {"Plateau": Plateau, "OneCycle": OneCycle, "ByHand": ByHand}[schedule.pop("kind")]
            map_norm = values["map_norm"] and SameMapNorm(**values["map_norm"])
            return Recipe(**{**_tuples(values), "schedule": kind(**schedule), "map_norm": map_norm})
        except (KeyError, TypeError, AttributeError) as error:
            raise RecipeError(f"not a recipe of this version ({type(error).__name__}: {error})") from None


def _is(value: object, kind: object) -> bool:
    """Whether a value is of an annotation's kind; numbers are finite, and whole ones will do for others."""
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    if get_origin(kind) is tuple:
        return type(value) is tuple and all(_is(one, get_args(kind)[0]) for one in value)
    if get_args(kind):  # a union
        return any(_is(value, one) for one in get_args(kind))
    fields_of = get_type_hints(kind).items() if is_dataclass(kind) else ()
    return type(value) is kind and all(_is(getattr(value, name), field_kind) for name, field_kind in fields_of)


def _lists(values: dict) -> dict:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def _tuples(values: dict) -> dict:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


NOTES = Recipe()

# Section 5. The notes have conv3's biases at 1 in place of conv4's, and fc8's too, which changes nothing: the softmax
# does not see what is added to every logit.
PAPER = replace(NOTES, name="paper", ones=("conv2", "conv4", "conv5", "fc6", "fc7"))

# Configuration 145 of Krizhevsky's own program (cuda-convnet), whose logs match the paper's table to rounding.
SOURCE = replace(
    PAPER,
    name="source",
    weight_std=(0.01, 0.01, 0.03, 0.03, 0.03, 0.01, 0.01, 0.01),
    lrn_alpha=1e-4 / 5,
    lrn_before_relu=True,
    map_norm=SameMapNorm(),
    mean_at="centre",
    crops_shared_by=32,
    colour_by="deviation",
    colour_shrink=1.1,
    colour_epochs=68,
    epochs=93,
    bias_rate=0.02,
    bias_decay=0.0,
    schedule=ByHand(),
)

# The same topology at a quarter of the width, for two CPU cores and small data sets. Ours, not the
# paper's: He initialisation, inputs of about unit variance and a one-cycle rate learn in a dozen
# epochs what the paper's own settings need many more for.
TINY = replace(
    NOTES,
    name="tiny",
    kernels=tuple(n // 4 for n in NOTES.kernels),
    neurons=tuple(n // 4 for n in NOTES.neurons),
    weight_std=(),
    ones=(),
    pixel_scale=1 / 64,
    batch=32,
    epochs=12,
    learning_rate=0.02,
    schedule=OneCycle(),
)

RECIPES = {recipe.name: recipe for recipe in (NOTES, PAPER, SOURCE, TINY)}


def recipe_named(name: str) -> Recipe:
    """Raises RecipeError for a name that is none."""
    if name not in RECIPES:
        raise RecipeError(f"no recipe named {name!r}; there are {', '.join(RECIPES)}")
    return RECIPES[name]


def meanings() -> dict[str, str]:
    """Say of each field what it is, with its unit or source."""
    return {field.name: field.metadata["meaning"] for field in fields(Recipe) if field.metadata}
