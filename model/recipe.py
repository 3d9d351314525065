"""Recipes: every hyperparameter of a training, in one frozen place. Flags are for operations only."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from model.errors import RecipeError
from model.schedule import OneCycle, Plateau

LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")


@dataclass(frozen=True)
class Recipe:
    """One way to train AlexNet. Checked on construction; RecipeError says what does not fit.

    Defaults are those of `notes`, a set of notes on Krizhevsky, Sutskever and Hinton (2012). They follow the paper but
    for the biases: conv3's are 1 and conv4's 0, where the paper has it the other way round, and fc8's are 1 too,
    which changes nothing.
    """

    name: str = "notes"
    kernels: tuple[int, ...] = (96, 256, 384, 384, 256)  # conv1 .. conv5, both towers together
    neurons: tuple[int, ...] = (4096, 4096)  # fc6, fc7, both towers together
    weight_std: float | None = 0.01  # zero-mean Gaussian; None: sqrt(2 / fan-in), He et al. 2015, equation 10
    ones: tuple[str, ...] = ("conv2", "conv3", "conv5", "fc6", "fc7", "fc8")  # layers whose biases start at 1
    lrn_k: float = 2.0  # section 3.3: a / (k + alpha * sum over n maps of a^2)^beta
    lrn_n: int = 5
    lrn_alpha: float = 1e-4
    lrn_beta: float = 0.75
    dropout: float = 0.5  # chance to drop an output of fc6, fc7; at test outputs are times 1 - dropout
    pixel_scale: float = 1.0  # the network sees (pixel 0-255 - mean + colour shift) * pixel_scale
    colour_std: float = 0.1  # of alpha in section 4.1's p_i alpha_i lambda_i, lambda of pixels in 0-1
    batch: int = 128  # images a step
    epochs: int = 90  # at most
    learning_rate: float = 0.01  # the first (Plateau) or the highest (OneCycle)
    momentum: float = 0.9
    weight_decay: float = 0.0005
    schedule: Plateau | OneCycle = Plateau()

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
        fields = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {**fields, "schedule": {"kind": type(self.schedule).__name__, **asdict(self.schedule)}}

    @staticmethod
    def from_dict(fields: dict) -> Recipe:
        """Raises RecipeError where fields are missing, unknown or out of range."""
        try:
            schedule = dict(fields["schedule"])
            kind = {"Plateau": Plateau, "OneCycle": OneCycle}[schedule.pop("kind")]
            tuples = {key: tuple(fields[key]) for key in ("kernels", "neurons", "ones")}
            return Recipe(**{**fields, **tuples, "schedule": kind(**schedule)})
        except (KeyError, TypeError) as error:
            raise RecipeError(f"not a recipe of this version ({type(error).__name__}: {error})") from None


NOTES = Recipe()

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

RECIPES = {recipe.name: recipe for recipe in (NOTES, TINY)}


def recipe_named(name: str) -> Recipe:
    """Raises RecipeError for a name that is none."""
    if name not in RECIPES:
        raise RecipeError(f"no recipe named {name!r}; there are {', '.join(RECIPES)}")
    return RECIPES[name]
