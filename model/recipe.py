"""Recipes: every hyperparameter of a training, in one frozen place. Flags are for operations only."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace

from model.errors import RecipeError
from model.schedule import OneCycle, Plateau

LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")


def _of(default, meaning: str):
    return field(default=default, metadata={"meaning": meaning})


@dataclass(frozen=True)
class Recipe:
    """One way to train AlexNet. Checked on construction; RecipeError says what does not fit.

    Sections are of Krizhevsky, Sutskever and Hinton (2012). Defaults are those of `notes`, a set of notes on the paper.
    """

    name: str = "notes"
    kernels: tuple[int, ...] = _of((96, 256, 384, 384, 256), "of conv1 to conv5, both towers together")
    neurons: tuple[int, ...] = _of((4096, 4096), "of fc6 and fc7, both towers together")
    weight_std: float | None = _of(0.01, "of Gaussian weights around 0; none: sqrt(2 / fan-in), He et al. 2015, eq. 10")
    ones: tuple[str, ...] = _of(("conv2", "conv3", "conv5", "fc6", "fc7", "fc8"), "where biases start at 1, not 0")
    lrn_k: float = _of(2.0, "section 3.3: a / (k + alpha * sum over n maps of a^2)^beta")
    lrn_n: int = _of(5, "maps, the own one in the middle")
    lrn_alpha: float = _of(1e-4, "not divided by n")
    lrn_beta: float = _of(0.75, "the exponent")
    dropout: float = _of(0.5, "chance to drop an output of fc6, fc7; at test outputs are times 1 - dropout")
    pixel_scale: float = _of(1.0, "the network sees (pixel 0-255 - mean + colour shift) * pixel_scale")
    colour_std: float = _of(0.1, "of alpha in section 4.1's p_i alpha_i lambda_i, lambda of pixels in 0-1")
    batch: int = _of(128, "images a step")
    epochs: int = _of(90, "at most")
    learning_rate: float = _of(0.01, "the first (Plateau) or the highest (OneCycle)")
    momentum: float = _of(0.9, "share of the velocity kept each step (section 5)")
    weight_decay: float = _of(0.0005, "of every parameter, times the rate (section 5)")
    schedule: Plateau | OneCycle = _of(Plateau(), "of the learning rate")

    def __post_init__(self):
        widths = self.kernels + self.neurons
        if len(self.kernels) != 5 or len(self.neurons) != 2 or any(n < 2 or n % 2 for n in widths):
            raise RecipeError(f"recipe {self.name}: wants 5 numbers of kernels and 2 of neurons, each even")
        if unknown := set(self.ones) - set(LAYERS):
            raise RecipeError(f"recipe {self.name}: no layer named {', '.join(sorted(unknown))}")
        if self.lrn_n < 1 or self.lrn_n % 2 == 0:
            raise RecipeError(f"recipe {self.name}: lrn_n must be odd, not {self.lrn_n}")
        if not 0 <= self.dropout < 1 or not 0 <= self.momentum < 1:
            raise RecipeError(f"recipe {self.name}: dropout and momentum lie in [0, 1)")
        if self.batch < 1 or self.epochs < 1 or self.learning_rate <= 0 or self.pixel_scale <= 0:
            raise RecipeError(f"recipe {self.name}: batch, epochs, learning_rate and pixel_scale must be positive")
        if self.lrn_k <= 0 or min(self.lrn_alpha, self.lrn_beta, self.colour_std, self.weight_decay) < 0 or (
            self.weight_std is not None and self.weight_std < 0
        ):
            raise RecipeError(f"recipe {self.name}: lrn_k must be positive, the other factors not negative")

    def to_dict(self) -> dict:
        """Return the recipe as JSON values; `from_dict` takes it back."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {**values, "schedule": {"kind": type(self.schedule).__name__, **asdict(self.schedule)}}

    @staticmethod
    def from_dict(values: dict) -> Recipe:
        """Raises RecipeError where fields are missing, unknown or out of range."""
        try:
            schedule = dict(values["schedule"])
            kind = {"Plateau": Plateau, "OneCycle": OneCycle}[schedule.pop("kind")]
            tuples = {key: tuple(values[key]) for key in ("kernels", "neurons", "ones")}
            return Recipe(**{**values, **tuples, "schedule": kind(**schedule)})
        except (KeyError, TypeError) as error:
            raise RecipeError(f"not a recipe of this version ({type(error).__name__}: {error})") from None


NOTES = Recipe()

# Section 5. The notes have conv3's biases at 1 in place of conv4's, and fc8's too, which changes nothing: the softmax
# does not see what is added to every logit.
PAPER = replace(NOTES, name="paper", ones=("conv2", "conv4", "conv5", "fc6", "fc7"))

# The same topology at a quarter of the width, for two CPU cores and small data sets. Ours, not the
# paper's: He initialisation, inputs of about unit variance and a one-cycle rate learn in a dozen
# epochs what the paper's own settings need many more for.
TINY = replace(
    NOTES,
    name="tiny",
    kernels=tuple(n // 4 for n in NOTES.kernels),
    neurons=tuple(n // 4 for n in NOTES.neurons),
    weight_std=None,
    ones=(),
    pixel_scale=1 / 64,
    batch=32,
    epochs=12,
    learning_rate=0.02,
    schedule=OneCycle(),
)

RECIPES = {recipe.name: recipe for recipe in (NOTES, PAPER, TINY)}


def recipe_named(name: str) -> Recipe:
    """Raises RecipeError for a name that is none."""
    if name not in RECIPES:
        raise RecipeError(f"no recipe named {name!r}; there are {', '.join(RECIPES)}")
    return RECIPES[name]


def meanings() -> dict[str, str]:
    """Say of each field what it is, with its unit or source."""
    return {field.name: field.metadata["meaning"] for field in fields(Recipe) if field.metadata}
