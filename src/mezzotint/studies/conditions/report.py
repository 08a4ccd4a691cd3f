"""The table of the study of conditions, from the results that are there."""

from pathlib import Path

from mezzotint.errors import DataError
from mezzotint.studies.conditions.results import (
    PICTURE,
    ConditionResult,
    GuidedResult,
    read_guided,
    read_result,
)
from mezzotint.studies.conditions.runs import CONDITIONS, GUIDED

__all__ = ["write_report"]

_HALF = 0.5


def write_report(output: Path) -> Path:
    """Write ``conditions.md`` beside the results.

    Args:
        output: Folder of the results.

    Returns:
        The report.

    Raises:
        DataError: If there is no result.
    """
    results = [
        read_result(output / f"{name}.json")
        for name in CONDITIONS
        if (output / f"{name}.json").is_file()
    ]
    guided = output / f"{GUIDED}.json"
    if not results and not guided.is_file():
        raise DataError(f"{output}: holds no results; run the study first")
    lines = [
        "# Every condition, on held-out scenes",
        "",
        "Printed by `mezzotint study conditions`. Each model was trained from its recipe on scenes"
        " of 16 or 32 emoji, in the latent space of an autoencoder of the recipe"
        " `emoji-autoencoder`, and asked for compositions that no training scene has."
        " *Null*: the same model, same noise, its condition taken away. *Real*: the pictures that"
        " the conditions were taken from, as the judges see them. Judges are a linear classifier on"
        " MobileNetV2 and a small U-Net, trained on real scenes.",
        "",
        "| condition | measure | null | drawn | real | gap closed | minutes | steps |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        begun = f" (begun from the model of {result.initial})" if result.initial else ""
        for gap in result.gaps:
            mark = "" if gap.closed >= _HALF else " (less than half)"
            lines.append(
                f"| {result.condition}{begun} | {gap.name} | {gap.null:.3f} | {gap.drawn:.3f} |"
                f" {gap.real:.3f} | {gap.closed:.0%}{mark} | {result.minutes:.1f} |"
                f" {result.steps:,} |"
            )
    lines += ["", *_further(results), *_machines(results)]
    lines += _pictures([result.condition for result in results], output)
    if guided.is_file():
        lines += [*_guided(read_guided(guided)), *_pictures([GUIDED], output)]
    path = output / "conditions.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _further(results: list[ConditionResult]) -> list[str]:
    lines = ["| condition | further number | |", "|---|---|---|"]
    for result in results:
        lines += [f"| {result.condition} | {k} | {v:.3f} |" for k, v in result.further.items()]
    return [*lines, ""] if len(lines) > 2 else []


def _machines(results: list[ConditionResult]) -> list[str]:
    told = dict.fromkeys(
        f"{r.machine.processor}, {_counted(r.machine.threads, 'thread')}, {r.machine.precision},"
        f" {_counted(r.pictures, 'scene')} asked of the model"
        for r in results
    )
    return [f"Trained and measured on: {'; '.join(told)}.", ""]


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _guided(result: GuidedResult) -> list[str]:
    return [
        "## Guidance without retraining",
        "",
        f"The unconditional model `emoji-unconditional`, led to {result.targets} pictures of"
        f" {result.side} x {result.side} pixels, {result.each} times each ({result.sampler},"
        f" {result.steps} steps). The targets are made of pictures that it drew by itself, each of"
        " which is therefore one draw from all that agree with its target: pictures that were led"
        " there without losing diversity are as far from one another as from it.",
        "",
        "| | |",
        "|---|---|",
        f"| agreement with the target, by chance | {result.chance_psnr:.1f} dB |",
        f"| led | {result.guided_psnr:.1f} dB (least {result.least_guided_psnr:.1f}) |",
        f"| led to held-out real pictures | {result.real_psnr:.1f} dB |",
        f"| perceptual distance between two that were led | {result.between_guided:.3f} |",
        f"| to the picture that the target came from | {result.to_true_draw:.3f} |",
        f"| between two that nothing led | {result.between_plain:.3f} |",
        f"| diversity left of what the target allows | {result.diversity_left:.0%} |",
        "",
    ]


def _pictures(names: list[str], output: Path) -> list[str]:
    lines: list[str] = []
    for name in names:
        if (output / f"{name}{PICTURE}").is_file():
            lines += [f"## {name}", "", f"![{name}]({name}{PICTURE})", ""]
    return lines
