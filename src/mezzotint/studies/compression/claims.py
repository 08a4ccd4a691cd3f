"""Which of the paper's claims about compression hold here, judged by numbers and their spread."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from mezzotint.evaluation.distributions import Estimate
from mezzotint.studies.compression.results import DiffusionResult, FirstStageResult

__all__ = ["Claim", "final_kid", "judge", "kid_at"]

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


def kid_at(results: Sequence[DiffusionResult], index: int) -> Estimate:
    """Return the mean KID over seeds at one point of the training.

    Its standard error is the larger of two: what the pictures leave open, and what the seeds do.
    """
    numbers = [result.points[index].card.numbers[_KID] for result in results]
    values = [n.value for n in numbers]
    pictures = math.sqrt(sum((n.standard_error or 0.0) ** 2 for n in numbers)) / len(numbers)
    seeds = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return Estimate(statistics.fmean(values), max(pictures, seeds))


def final_kid(diffusions: Sequence[DiffusionResult]) -> dict[str, Estimate]:
    """Return KID at the end of training by first stage."""
    names = dict.fromkeys(result.stage for result in diffusions)
    return {name: kid_at(_of(diffusions, name), -1) for name in names}


def judge(
    first_stages: Sequence[FirstStageResult], diffusions: Sequence[DiffusionResult]
) -> list[Claim]:
    """Judge the claims of section 4.1 and of the discussion of VQ against KL."""
    kid = final_kid(diffusions)
    scores = {result.stage: result.scores for result in first_stages}
    return [
        *_slow(kid, diffusions),
        _middle_is_best(kid),
        _stalls(kid, diffusions),
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
    return f"{name} {kid.value:.4f} ± {kid.standard_error:.4f}"


def _best(kid: dict[str, Estimate], names: Sequence[str]) -> str | None:
    there = [name for name in names if name in kid]
    return min(there, key=lambda name: kid[name].value) if there else None


def _slow(kid: dict[str, Estimate], diffusions: Sequence[DiffusionResult]) -> list[Claim]:
    claims: list[Claim] = []
    best = _best(kid, _MIDDLE)
    for name, called in (("identity", "LDM-1 (pixels)"), ("kl-f2", "LDM-2")):
        text = f"{called} trains slowly: after the same minutes it is behind LDM-4 to LDM-16."
        if best is None or name not in kid:
            claims.append(Claim(text, None, "not measured yet"))
            continue
        speed = {n: _of(diffusions, n)[0].images_per_second for n in (name, best)}
        finding = (
            f"KID {_told(name, kid[name])} against {_told(best, kid[best])};"
            f" {speed[name]:.1f} against {speed[best]:.1f} images/s of training"
        )
        claims.append(Claim(text, _worse(kid[name], kid[best]), finding))
    return claims


def _middle_is_best(kid: dict[str, Estimate]) -> Claim:
    text = "LDM-4, -8 and -16 strike the best balance: the best KID of all is among them."
    names = ("identity", "kl-f2", *_MIDDLE, "kl-f32")
    missing = [name for name in names if name not in kid]
    if missing:
        return Claim(text, None, f"not measured yet: {', '.join(missing)}")
    order = sorted(names, key=lambda name: kid[name].value)
    inside = _best(kid, _MIDDLE)
    outside = _best(kid, [name for name in names if name not in _MIDDLE])
    assert inside is not None and outside is not None
    finding = "KID, best first: " + ", ".join(_told(name, kid[name]) for name in order)
    return Claim(text, _worse(kid[outside], kid[inside]), finding)


def _stalls(kid: dict[str, Estimate], diffusions: Sequence[DiffusionResult]) -> Claim:
    text = "LDM-32 stalls: it learns fast at first, and its quality then stays behind."
    best = _best(kid, _MIDDLE)
    results = _of(diffusions, "kl-f32")
    if best is None or not results:
        return Claim(text, None, "not measured yet")
    first, last = kid_at(results, 0), kid_at(results, -1)
    rival = kid_at(_of(diffusions, best), 0)
    finding = (
        f"first point: KID {_told('kl-f32', first)} against {_told(best, rival)}; end:"
        f" {_told('kl-f32', last)} against {_told(best, kid[best])}"
    )
    ahead, behind = _worse(rival, first), _worse(last, kid[best])
    if ahead is None or behind is None:
        return Claim(text, False if ahead is False or behind is False else None, finding)
    return Claim(text, ahead and behind, finding)


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
    finding = "share of the power lost below / above 1/4 cycle per pixel: " + ", ".join(
        f"{name} {low:.2%} / {high:.0%}" for name, (low, high) in shares.items()
    )
    return Claim(text, all(low < high for low, high in shares.values()), finding)


def _lost(score: dict[str, object]) -> tuple[float, float]:
    """Power of the error over that of the original, in the lower and the upper half."""
    spectrum = score["spectrum"]
    assert isinstance(spectrum, dict)
    error, original = list(spectrum["error"]), list(spectrum["original"])
    half = len(error) // 2
    low = sum(error[1:half]) / sum(original[1:half])  # without the mean brightness
    return low, sum(error[half:]) / sum(original[half:])


def _vq_against_kl(kid: dict[str, Estimate], scores: dict[str, dict[str, object]]) -> list[Claim]:
    claims: list[Claim] = []
    for factor in (4, 8, 16):
        vq, kl = f"vq-f{factor}", f"kl-f{factor}"
        text = (
            f"At f = {factor}, VQ reconstructs a little worse than KL, yet its latent space gives"
            " samples that are as good or better."
        )
        if not {vq, kl} <= kid.keys() or not {vq, kl} <= scores.keys():
            claims.append(Claim(text, None, "not measured yet"))
            continue
        psnr = {name: _number(scores[name], "psnr") for name in (vq, kl)}
        finding = (
            f"PSNR {psnr[vq]:.2f} against {psnr[kl]:.2f} dB; KID {_told(vq, kid[vq])} against"
            f" {_told(kl, kid[kl])}"
        )
        behind = _worse(kid[vq], kid[kl])
        claims.append(Claim(text, psnr[vq] < psnr[kl] and behind is not True, finding))
    return claims


def _number(score: dict[str, object], name: str) -> float:
    value = score[name]
    assert isinstance(value, int | float)
    return float(value)
