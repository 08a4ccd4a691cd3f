"""What is wrong with a run, in words that name the remedy; only where the signs are certain.

The measure of both stages is ``unexplained``: the squared error as a share of that of predicting
nothing, which is a grey picture or no noise at all. An untrained network starts near 1 whatever
the data, and one that learns comes down from there.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mezzotint.conditioning.build import main_config
from mezzotint.data import ImageData, ShardStream
from mezzotint.training.any_recipe import Recipe
from mezzotint.training.decoder_recipe import DecoderRecipe
from mezzotint.training.ema import ConstantEMAConfig
from mezzotint.training.orders import TrainingData
from mezzotint.training.recipe import AutoencoderRecipe, DiffusionRecipe

__all__ = ["READ", "Facts", "Symptom", "Window", "before_training", "needed", "symptoms_of"]

_ASKED = 256  # samples whose captions are looked at
# what the signs are read from, of all that the log tells
READ = frozenset(
    {
        "adversarial",
        "codes_used",
        "discriminator_loss",
        "ema_distance",
        "gradient_norm",
        "latent_mean",
        "latent_std",
        "learning_rate",
        "unexplained",
        "vectors_per_code",
        "worse_than_nothing",
    }
)


@dataclass(frozen=True)
class Symptom:
    """Something that is wrong.

    Attributes:
        name: One word or two for ``metrics.jsonl``; each is told once.
        text: What, by which signs, and what to do.
        remedy: What to do, if it diverged.
        diverged: Whether going on is of no use.
        since: The last step at which all was well, if it diverged.
    """

    name: str
    text: str
    remedy: str = ""
    diverged: bool = False
    since: int = 0


@dataclass(frozen=True)
class Window:
    """Averages over some steps.

    Attributes:
        first: Steps done before them.
        last: Steps done after them.
        values: As the log tells them.
    """

    first: int
    last: int
    values: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the signs are read by.

    Attributes:
        latents: Whether the latents that a step sees are normalised ones of a trained first stage.
        adversary: From which step on the discriminator speaks; None if there is none.
        epoch_steps: Steps of an epoch.
        max_steps: Of the budget.
        learning_rate: The recipe's.
    """

    latents: bool = False
    adversary: int | None = None
    epoch_steps: float
    max_steps: int | None
    learning_rate: float
    diffusion: bool

    @classmethod
    def of(cls, recipe: Recipe, images: int, *, pixels: bool = False) -> "Facts":
        """Read them off a recipe, the number of images, and whether a model is one of pixels."""
        epoch = images / (recipe.batch_size * recipe.accumulate)
        adversary, diffusion = None, True
        if isinstance(recipe, AutoencoderRecipe | DecoderRecipe):
            adversarial = recipe.loss.adversarial
            adversary = None if adversarial is None else adversarial.start_step
            diffusion = False
        return cls(
            latents=diffusion and not pixels,
            adversary=adversary,
            epoch_steps=epoch,
            max_steps=recipe.budget.max_steps,
            learning_rate=recipe.optimizer.learning_rate,
            diffusion=diffusion,
        )


def before_training(recipe: Recipe, data: TrainingData) -> Iterator[Symptom]:
    """Yield what a recipe and its data show before the first step."""
    steps, optimizer = recipe.budget.max_steps, recipe.optimizer
    if steps is not None:
        if optimizer.warmup_steps >= steps:
            yield Symptom(
                "warm-up",
                f"optimizer.warmup_steps {optimizer.warmup_steps:,} is not over when training ends"
                f" after {steps:,} steps: the learning rate never reaches its peak; lower it",
            )
        average = recipe.average
        if isinstance(average, ConstantEMAConfig) and average.decay**steps > 0.5:
            yield Symptom(
                "average",
                f"after {steps:,} steps of ema.decay {average.decay:g},"
                f" {average.decay**steps:.0%} of the averaged weights are the untrained ones; lower"
                " ema.decay, or set ema.kind to warmup",
            )
        judged = isinstance(recipe, AutoencoderRecipe | DecoderRecipe)
        adversarial = recipe.loss.adversarial if judged else None
        if adversarial is not None and adversarial.start_step >= steps:
            yield Symptom(
                "discriminator",
                f"the discriminator never takes part: training ends after {steps:,} steps, before"
                f" loss.adversarial.start_step {adversarial.start_step:,}; lower it, or set"
                " loss.adversarial to null",
            )
    if isinstance(recipe, DiffusionRecipe) and not isinstance(data, ShardStream):
        yield from _captions(recipe, data)


def _captions(recipe: DiffusionRecipe, data: ImageData) -> Iterator[Symptom]:
    main = main_config(recipe.conditioning)
    count = min(_ASKED, len(data))
    if main is None or count < 8 or main.kind not in ("text", "bert", "class"):
        return
    described = [data.describe(k * len(data) // count) for k in range(count)]
    words = "labels" if main.kind == "class" else "captions"
    told = Counter(d.label if main.kind == "class" else d.caption or "" for d in described)
    said, often = told.most_common(1)[0]
    # from such a set a condition cannot be learned: at most one sample in 20 is told anything else
    if often >= 0.95 * count:
        shown = repr(said) if said else "empty"
        yield Symptom(
            "captions",
            f"{often} of {count} {words} looked at are the same, {shown}: the model cannot learn to"
            f" follow {words}; check data.caption_column or where the {words} come from, or set"
            " conditioning.kind to none",
        )


def symptoms_of(windows: Sequence[Window], facts: Facts) -> Iterator[Symptom]:
    """Yield what the last of some windows shows, seen with those before it."""
    yield from _divergence(windows, facts)
    yield from _adversary(windows, facts)
    yield from _codes(windows, facts)
    yield from _latents(windows, facts)
    yield from _stillness(windows, facts)


def needed(windows: Sequence[Window]) -> list[Window]:
    """Return the windows that later ones are seen with: the first, the best and the last three."""
    best = min(windows[:-2], key=_unexplained, default=None)
    return [w for k, w in enumerate(windows) if w is best or k == 0 or k >= len(windows) - 3]


def _unexplained(window: Window) -> float:
    return window.values["unexplained"]


def _speaks(window: Window) -> bool:
    return "adversarial" in window.values


def _divergence(windows: Sequence[Window], facts: Facts) -> Iterator[Symptom]:
    now, before = windows[-1], windows[:-1]
    lost = now.values["unexplained"]
    good = max((w.last for w in before), default=now.first)
    # no network that learns errs twice as much as one that says nothing, least of all in several
    # steps; the start of a healthy run stands near 1
    much = lost > (1.5 if facts.diffusion else 3.0)
    often = now.values.get("worse_than_nothing", 0.0) * (now.last - now.first) >= 2.5
    why = ""
    if often and not much:
        steps = now.last - now.first
        why = (
            f"in {now.values['worse_than_nothing'] * steps:.0f} of {steps} steps the error was more"
            " than twice that of predicting nothing"
        )
    elif much:
        why = f"the error was {lost:.2g} times that of predicting nothing on average"
    elif len(windows) > 2:
        # a window's average moves by a tenth or a third from one to the next, not fourfold twice
        # in a row; and what still explains nine tenths has not collapsed
        best = min(windows[:-2], key=_unexplained)
        least = best.values["unexplained"]
        if all(w.values["unexplained"] > max(4 * least, 0.1) for w in windows[-2:]):
            good = max(w.last for w in windows[:-2])
            why = (
                f"the unexplained share of the error rose from {least:.2g} at step"
                f" {best.last:,} to {lost:.2g}"
            )
    if not why:
        return
    if _speaks(now):
        name, remedy = "discriminator", _MILDER
        text = f"{why} since the discriminator speaks; {remedy}"
    else:
        rate = now.values.get("learning_rate", facts.learning_rate)
        name, remedy = "learning rate", _SLOWER
        text = f"{why}: training diverges. The learning rate {rate:.2g} is too high; {remedy}"
    text = f"steps {now.first + 1:,} to {now.last:,}: {text}"
    yield Symptom(name, text, remedy, diverged=True, since=good)


_SLOWER = "lower optimizer.learning_rate ten times, or give it optimizer.warmup_steps"
_MILDER = (
    "raise loss.adversarial.start_step until reconstructions are good, and lower"
    " loss.adversarial.weight (the paper's is 0.5) and loss.adversarial.learning_rate"
)


def _adversary(windows: Sequence[Window], facts: Facts) -> Iterator[Symptom]:
    last = windows[-3:]
    if len(last) < 3 or not all(_speaks(w) for w in last):
        return
    lost = [w.values["unexplained"] for w in last]
    least = min(w.values["unexplained"] for w in windows)
    losses = [w.values.get("discriminator_loss", 1.0) for w in last]
    steps = f"steps {last[0].first + 1:,} to {last[-1].last:,}"
    if min(lost) > 0.6:
        # without an opponent a first stage is past this within some tens of steps
        yield Symptom(
            "discriminator",
            f"{steps}: the discriminator speaks, and reconstructions still miss {min(lost):.0%} of"
            f" what there is to see: it is too early and too strong; {_MILDER}",
        )
    elif min(lost) > 2 * least:
        # that costs 3 dB; what an adversarial loss costs a healthy run is about 1
        yield Symptom(
            "discriminator",
            f"{steps}: the error of reconstructions is {min(lost) / least:.1f} times what it was"
            f" at its best, under a discriminator that is too strong; {_MILDER}",
        )
    elif max(losses) < 0.05:
        # 1 is guessing; a loss of 0 is a margin of 1 on every patch, and gives no direction
        yield Symptom(
            "discriminator",
            f"{steps}: the discriminator tells every reconstruction from a picture (its loss is"
            f" {max(losses):.2g}): it is too strong to teach anything; {_MILDER}",
        )


def _codes(windows: Sequence[Window], facts: Facts) -> Iterator[Symptom]:
    now = windows[-1]
    used = now.values.get("codes_used")
    # 50 choices for each code: one that is worth an equal share is missed once in e^50 times
    if used is None or used >= 0.1 or now.values["vectors_per_code"] < 50:
        return
    # unchosen codes are moved at the end of an epoch, so that a first, short one says little
    end = facts.epoch_steps
    never = facts.max_steps is not None and end >= facts.max_steps
    if not (never or now.last > end or now.last >= 1000):
        return
    yield Symptom(
        "codebook",
        f"step {now.last:,}: only {used:.1%} of the codes are ever chosen, the rest of the codebook"
        f" is dead. Unchosen codes are moved at the end of an epoch, of {end:,.0f} steps here:"
        " lower model.codebook_size, raise loss.codebook, or train for more epochs",
    )


def _latents(windows: Sequence[Window], facts: Facts) -> Iterator[Symptom]:
    now = windows[-1].values
    if not facts.latents or "latent_std" not in now:
        return
    std, mean = now["latent_std"], now["latent_mean"]
    # the scale is measured over the data, so that it is 1 within some hundredths; a crop or a
    # colour may move it by a tenth
    if not 0.5 < std < 2.0 or abs(mean) > 2.0:
        yield Symptom(
            "latents",
            f"the normalised latents have mean {mean:.2g} and standard deviation {std:.2g} in place"
            " of 0 and 1: the autoencoder's scaling_factor (or latents_mean and latents_std) does"
            f" not fit these data. A scaling_factor {1 / max(std, 1e-9):.3g} times as large would:"
            " correct vae/config.json, or train the first stage anew on them",
        )


def _stillness(windows: Sequence[Window], facts: Facts) -> Iterator[Symptom]:
    now = windows[-1]
    rate, norm = now.values.get("learning_rate", 0.0), now.values.get("gradient_norm", 0.0)
    if rate > 0 and now.values.get("ema_distance") == 0.0 and now.last >= 10:
        why = "no gradient reaches them" if not norm else f"the learning rate {rate:.2g} is too low"
        yield Symptom("weights", f"step {now.last:,}: the weights do not move at all: {why}")
    least = min(w.values["unexplained"] for w in windows)
    # a thousand steps take every network of every recipe well below
    if now.last >= 1000 and windows[0].first == 0 and least > 0.97:
        yield Symptom(
            "loss",
            f"the loss has not fallen in {now.last:,} steps: the best {1 - least:.1%} explained."
            " Try another optimizer.learning_rate, ten times lower and ten times higher; and look"
            " at the sheets in samples/ for what the data are",
        )
