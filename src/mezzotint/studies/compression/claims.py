"""Which of the paper's claims about compression hold here, judged by numbers and their spread."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mezzotint.evaluation.distributions import Estimate
from mezzotint.evaluation.reconstruction import band_shares
from mezzotint.studies.compression.recipes import RESOLUTION
from mezzotint.studies.compression.results import DiffusionResult, FirstStageResult

__all__ = ["Claim", "final_kid", "judge", "kid_at", "spread_of_seeds"]

_KID = "kid_mobilenet_v2"
_MIDDLE = ("kl-f4", "kl-f8", "kl-f16")


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper's and what was found.

    Attributes:
        text: The claim.
        holds: Whether it holds here; None where it cannot be told.
        finding: The numbers.
    """

    text: str
    holds: bool | None
    finding: str

    @property
    def verdict(self) -> str:
        """In a few words."""
        return {True: "holds here", False: "does not hold here", None: "cannot be told"}[self.holds]


def kid_at(
    results: Sequence[DiffusionResult], index: int, seed_spread: float | None = None
) -> Estimate:
    """Return the mean KID over seeds at one point of the training.

    Its standard error is the larger of two: what the pictures leave open, and what the seeds do.

    Args:
        results: Of one first stage, a seed each.
        index: Which point.
        seed_spread: What `spread_of_seeds` found; None counts the pictures alone.
    """
    numbers = [result.points[index].card.numbers[_KID] for result in results]
    value = statistics.fmean(n.value for n in numbers)
    pictures = math.sqrt(sum((n.standard_error or 0.0) ** 2 for n in numbers)) / len(numbers)
    seeds = (seed_spread or 0.0) * abs(value) / math.sqrt(len(numbers))
    return Estimate(value, max(pictures, seeds))


def spread_of_seeds(diffusions: Sequence[DiffusionResult]) -> float | None:
    """Return the deviation of KID between seeds over its mean, pooled over the first stages.

    Two seeds alone say little of a spread; that it is about the same share of KID everywhere lets
    the first stages lend one another degrees of freedom.

    Returns:
        None if no first stage has two seeds.
    """
    squares, degrees = 0.0, 0
    for name in dict.fromkeys(result.stage for result in diffusions):
        values = [r.points[-1].card.numbers[_KID].value for r in _of(diffusions, name)]
        mean = statistics.fmean(values)
        squares += sum((value / mean - 1.0) ** 2 for value in values)
        degrees += len(values) - 1
    return math.sqrt(squares / degrees) if degrees else None


def final_kid(diffusions: Sequence[DiffusionResult]) -> dict[str, Estimate]:
    """Return KID at the end of training by first stage."""
    names = dict.fromkeys(result.stage for result in diffusions)
    spread = spread_of_seeds(diffusions)
    return {name: kid_at(_of(diffusions, name), -1, spread) for name in names}


def judge(
    first_stages: Sequence[FirstStageResult], diffusions: Sequence[DiffusionResult]
) -> list[Claim]:
    """Judge the claims of section 4.1 and of the discussion of VQ against KL."""
    kid = final_kid(diffusions)
    scores = {result.stage: result.scores for result in reversed(first_stages)}
    return [
        *_slow(kid, diffusions),
        _middle_is_best(kid),
        *_stalls(kid, diffusions),
        _more_compression_costs_fidelity(scores),
        _high_frequencies_go_first(scores),
        *_vq_against_kl(kid, scores),
    ]


def _of(diffusions: Sequence[DiffusionResult], name: str) -> list[DiffusionResult]:
    return [result for result in diffusions if result.stage == name]


def _worse(a: Estimate, b: Estimate) -> bool | None:
    """Whether a is above b by more than two standard errors; None if neither is."""
    margin = 2.0 * math.hypot(a.standard_error, b.standard_error)
    if abs(a.value - b.value) <= margin:
        return None
    return a.value > b.value


def _told(name: str, kid: Estimate) -> str:
    """A name, its KID and its standard error."""
    return f"{name} {kid.value:.4f} ± {kid.standard_error:.4f}"


def _missing(kid: Mapping[str, Estimate], names: Sequence[str]) -> str | None:
    """In words, which of the first stages that a claim speaks of are not measured."""
    missing = [name for name in names if name not in kid]
    return f"not measured yet: {', '.join(missing)}" if missing else None


def _slow(kid: dict[str, Estimate], diffusions: Sequence[DiffusionResult]) -> list[Claim]:
    claims: list[Claim] = []
    for name, called in (("identity", "LDM-1 (pixels)"), ("kl-f2", "LDM-2")):
        text = f"{called} trains slowly: after the same minutes it is behind LDM-4, -8 and -16."
        if missing := _missing(kid, (name, *_MIDDLE)):
            claims.append(Claim(text, None, missing))
            continue
        behind = [_worse(kid[name], kid[other]) for other in _MIDDLE]
        holds = True if all(behind) else False if False in behind else None
        speeds = {n: _of(diffusions, n)[0].images_per_second for n in (name, *_MIDDLE)}
        finding = (
            f"KID {_told(name, kid[name])} against"
            f" {', '.join(_told(other, kid[other]) for other in _MIDDLE)}; images/s of training: "
            + ", ".join(f"{n} {speed:.1f}" for n, speed in speeds.items())
        )
        claims.append(Claim(text, holds, finding))
    return claims


def _middle_is_best(kid: dict[str, Estimate]) -> Claim:
    text = "LDM-4, -8 and -16 strike the best balance: the best KID of all KL is among them."
    outer = ("identity", "kl-f2", "kl-f32")
    if missing := _missing(kid, (*outer, *_MIDDLE)):
        return Claim(text, None, missing)
    order = sorted((*outer, *_MIDDLE), key=lambda name: kid[name].value)
    inside, outside = (min(names, key=lambda n: kid[n].value) for names in (_MIDDLE, outer))
    finding = "KID, best first: " + ", ".join(_told(name, kid[name]) for name in order)
    return Claim(text, _worse(kid[outside], kid[inside]), finding)


def _stalls(kid: dict[str, Estimate], diffusions: Sequence[DiffusionResult]) -> list[Claim]:
    fast = "At first LDM-32 learns fast: at the first point it is ahead of the best."
    stalls = "LDM-32 stalls: from there on it improves less than the best, and it ends behind it."
    if missing := _missing(kid, ("kl-f32", *_MIDDLE)):
        return [Claim(text, None, missing) for text in (fast, stalls)]
    best = min(_MIDDLE, key=lambda name: kid[name].value)
    spread = spread_of_seeds(diffusions)
    names = ("kl-f32", best)
    first = {name: kid_at(_of(diffusions, name), 0, spread) for name in names}
    gain = {
        name: Estimate(
            first[name].value - kid[name].value,
            math.hypot(first[name].standard_error, kid[name].standard_error),
        )
        for name in names
    }

    def against(numbers: Mapping[str, Estimate]) -> str:
        return " against ".join(_told(name, numbers[name]) for name in names)

    less, behind = _worse(gain[best], gain["kl-f32"]), _worse(kid["kl-f32"], kid[best])
    holds = True if less and behind else False if False in (less, behind) else None
    return [
        Claim(fast, _worse(first[best], first["kl-f32"]), f"first point: KID {against(first)}"),
        Claim(stalls, holds, f"KID fell by {against(gain)}, and ends at {against(kid)}"),
    ]


def _more_compression_costs_fidelity(scores: dict[str, dict[str, object]]) -> Claim:
    text = "The stronger the compression, the worse the reconstruction (table 8)."
    names = [f"kl-f{f}" for f in (2, 4, 8, 16, 32) if f"kl-f{f}" in scores]
    if len(names) < 2:
        return Claim(text, None, "not measured yet")
    psnr = [_number(scores[name], "psnr") for name in names]
    finding = "PSNR in dB: " + ", ".join(
        f"{name} {value:.2f}" for name, value in zip(names, psnr, strict=True)
    )
    falls = all(a > b for a, b in zip(psnr, psnr[1:], strict=False))
    return Claim(text, falls, finding)


def _high_frequencies_go_first(scores: dict[str, dict[str, object]]) -> Claim:
    text = "What a first stage drops is high frequency, the details that are hardly seen."
    shares: dict[str, tuple[float, float]] = {}
    for name, score in scores.items():
        if name != "identity":
            shares[name] = _lost(score)
    if not shares:
        return Claim(text, None, "not measured yet")
    finding = "share of the power lost from 1/32 to 1/4 cycle per pixel / above 1/4: " + ", ".join(
        f"{name} {low:.2%} / {high:.0%}" for name, (low, high) in shares.items()
    )
    return Claim(text, all(low < high for low, high in shares.values()), finding)


def _lost(score: dict[str, object]) -> tuple[float, float]:
    """Power of the error over that of the picture, in the lower and the upper half.

    The lowest band is left out: nearly all of its power is the mean brightness, which nothing
    loses.
    """
    spectrum = score["spectrum"]
    assert isinstance(spectrum, dict)
    bands = len(spectrum["error"])
    shares = band_shares(2 * RESOLUTION, 2 * RESOLUTION, bands).tolist()

    def power(name: str, part: slice) -> float:
        return sum(p * share for p, share in zip(spectrum[name][part], shares[part], strict=True))

    low, high = slice(1, bands // 2), slice(bands // 2, bands)
    return (
        power("error", low) / power("original", low),
        power("error", high) / power("original", high),
    )


def _vq_against_kl(kid: dict[str, Estimate], scores: dict[str, dict[str, object]]) -> list[Claim]:
    claims: list[Claim] = []
    for factor in (4, 8, 16):
        vq, kl = f"vq-f{factor}", f"kl-f{factor}"
        text = (
            f"At f = {factor}, VQ reconstructs worse than KL, yet its latent space gives better"
            " samples."
        )
        if not {vq, kl} <= kid.keys() or not {vq, kl} <= scores.keys():
            claims.append(Claim(text, None, "not measured yet"))
            continue
        psnr = {name: _number(scores[name], "psnr") for name in (vq, kl)}
        finding = (
            f"PSNR {psnr[vq]:.2f} against {psnr[kl]:.2f} dB; KID {_told(vq, kid[vq])} against"
            f" {_told(kl, kid[kl])}"
        )
        better = _worse(kid[kl], kid[vq])
        claims.append(Claim(text, better if psnr[vq] < psnr[kl] else False, finding))
    return claims


def _number(score: dict[str, object], name: str) -> float:
    value = score[name]
    assert isinstance(value, int | float)
    return float(value)
