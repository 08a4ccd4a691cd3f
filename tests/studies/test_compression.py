"""The compression study: fair models, sound verdicts, and runs that go on where they stood."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from mezzotint.errors import ConfigError
from mezzotint.evaluation.card import DrawnWith, EvaluationCard, Number, PictureRecord
from mezzotint.evaluation.protocol import PROTOCOLS
from mezzotint.evaluation.reconstruction import band_shares
from mezzotint.models.autoencoder import AutoencoderKL, VQModel
from mezzotint.models.unet import UNet
from mezzotint.studies.compression import (
    STAGES,
    CompressionStudy,
    find_stage,
    read_results,
    run_compression_study,
    write_report,
)
from mezzotint.studies.compression.claims import final_kid, judge, spread_of_seeds
from mezzotint.studies.compression.recipes import autoencoder_recipe, diffusion_recipe
from mezzotint.studies.compression.results import (
    DiffusionResult,
    FirstStageResult,
    Point,
)
from mezzotint.studies.machine import Machine

QUIET = Console(quiet=True)
MACHINE = Machine(processor="a processor", threads=2, device="cpu", precision="float32")


def card(kid: float, error: float) -> EvaluationCard:
    pictures = PictureRecord(
        description="x", fingerprint="0", count=8, available=8, height=32, width=32
    )
    return EvaluationCard(
        protocol=PROTOCOLS["small"],
        numbers={
            "kid_mobilenet_v2": Number(value=kid, standard_error=error),
            "precision_mobilenet_v2": Number(value=0.5),
            "recall_mobilenet_v2": Number(value=0.25),
        },
        networks=(),
        evaluated=pictures,
        reference=pictures,
        versions={},
    )


def diffusion(stage: str, *kids: float, seed: int = 0, error: float = 0.001) -> DiffusionResult:
    points = [
        Point(step=10 * (k + 1), minutes=k + 1.0, card=card(kid, error))
        for k, kid in enumerate(kids)
    ]
    return DiffusionResult(
        stage=stage,
        seed=seed,
        first_stage_weights="0",
        parameters=1,
        gflops=1.0,
        images_per_second=10.0,
        sampling_seconds=0.5,
        points=tuple(points),
        machine=MACHINE,
    )


def first_stage(stage: str, psnr: float, low: float = 0.01, high: float = 0.5) -> FirstStageResult:
    # the mean brightness alone is in the first band
    spectrum = {
        "frequencies": [0.0625, 0.1875, 0.3125, 0.4375],
        "error": [0.0, low, high, high],
        "original": [100.0, 1.0, 1.0, 1.0],
    }
    scores: dict[str, Any] = {
        "images": 160,
        "rate": 1.0,
        "psnr": psnr,
        "ssim": 0.9,
        "lpips_mobilenet_v2": 0.1,
        "rkid_mobilenet_v2": {"value": 0.01, "standard_error": 0.001},
        "rfid_mobilenet_v2": 1.0,
        "codes_used": None,
        "spectrum": spectrum,
    }
    return FirstStageResult(
        stage=stage,
        parameters=1,
        steps=1,
        minutes=1.0,
        images_per_second=None,
        weights="0",
        scores=scores,
        machine=MACHINE,
    )


def test_the_unets_have_the_same_number_of_parameters() -> None:
    counts = []
    for stage in STAGES:
        recipe = diffusion_recipe(
            stage, first_stage="x", resolution=128, minutes=1, points=2, seed=0
        )
        with torch.device("meta"):
            counts.append(sum(p.numel() for p in UNet(recipe.unet).parameters()))
        assert recipe.unet.in_channels == stage.channels
    assert max(counts) / min(counts) < 1.03


@pytest.mark.parametrize("stage", STAGES[1:], ids=lambda stage: stage.name)
def test_each_first_stage_has_its_factor_and_channels(stage: Any) -> None:
    recipe = autoencoder_recipe(stage, resolution=128, minutes=1, seed=0)
    with torch.device("meta"):
        model = (AutoencoderKL if stage.kind == "kl" else VQModel)(recipe.model)  # type: ignore
    assert model.factor == stage.factor
    assert model.latent_channels == stage.channels


def test_an_unknown_first_stage_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'kl-f8'"):
        find_stage("klf8")


def verdicts(results: list[DiffusionResult], **psnr: float) -> dict[str, bool | None]:
    scores = [first_stage(name.replace("_", "-"), value) for name, value in psnr.items()]
    return {claim.text.partition(" ")[0]: claim.holds for claim in judge(scores, results)}


def test_what_the_paper_found_is_recognised() -> None:
    """Its figure 6: pixels and f = 2 behind, f = 32 ahead at first and stalled at the end."""
    results = [
        diffusion("identity", 0.30, 0.20),
        diffusion("kl-f2", 0.28, 0.15),
        diffusion("kl-f4", 0.20, 0.06),
        diffusion("kl-f8", 0.18, 0.05),
        diffusion("kl-f16", 0.16, 0.07),
        diffusion("kl-f32", 0.12, 0.11),
    ]
    found = verdicts(results)
    assert found["LDM-1"] and found["LDM-2"] and found["LDM-4,"] and found["LDM-32"]


def test_the_opposite_is_recognised_too() -> None:
    results = [
        diffusion("identity", 0.30, 0.01),
        diffusion("kl-f2", 0.28, 0.02),
        diffusion("kl-f4", 0.20, 0.06),
        diffusion("kl-f8", 0.18, 0.05),
        diffusion("kl-f16", 0.16, 0.07),
        diffusion("kl-f32", 0.30, 0.03),
    ]
    found = verdicts(results)
    assert found["LDM-1"] is False and found["LDM-4,"] is False and found["LDM-32"] is False


def test_differences_within_two_standard_errors_say_nothing() -> None:
    results = [diffusion("identity", 0.052, error=0.002), diffusion("kl-f8", 0.050, error=0.002)]
    middle = [diffusion(f"kl-f{f}", 0.030, error=0.002) for f in (4, 16)]
    assert verdicts(results + middle)["LDM-1"] is None
    apart = [diffusion("identity", 0.060, error=0.002), *results[1:], *middle]
    assert verdicts(apart)["LDM-1"] is True
    assert verdicts(apart[:3])["LDM-1"] is None  # one of those it speaks of is not measured


def test_the_spread_over_seeds_counts() -> None:
    """Tiny errors of measurement do not hide that two seeds differ by far more."""
    results = [
        diffusion("identity", 0.061, error=1e-5),
        diffusion("kl-f8", 0.04, seed=0, error=1e-5),
        diffusion("kl-f8", 0.08, seed=1, error=1e-5),
        diffusion("kl-f4", 0.02, error=1e-5),
        diffusion("kl-f16", 0.02, error=1e-5),
    ]
    # 0.04 and 0.08 deviate by a third of their mean, one degree of freedom
    spread = (2 / 9) ** 0.5
    assert spread_of_seeds(results) == pytest.approx(spread)
    kid = final_kid(results)
    assert kid["kl-f8"].value == pytest.approx(0.06)
    assert kid["kl-f8"].standard_error == pytest.approx(0.02)
    # what has one seed would have deviated likewise
    assert kid["identity"].standard_error == pytest.approx(0.061 * spread)
    assert verdicts(results)["LDM-1"] is None
    assert spread_of_seeds(results[2:]) is None


def test_power_is_weighted_by_the_frequencies_of_a_band() -> None:
    """A ring has more of them the larger it is, so its error counts for more."""
    stage = first_stage("kl-f4", 30.0)
    stage.scores["spectrum"]["error"] = [0.0, 0.01, 0.2, 0.6]
    (claim,) = (c for c in judge([stage], []) if c.text.startswith("What a first stage"))
    shares = band_shares(256, 256, 4)
    high = float((0.2 * shares[2] + 0.6 * shares[3]) / (shares[2] + shares[3]))
    assert high > 0.45 and f"{high:.0%}" in claim.finding


def test_claims_about_reconstruction() -> None:
    scores = [first_stage("kl-f4", 30.0), first_stage("kl-f8", 25.0), first_stage("vq-f8", 24.0)]
    results = [diffusion("kl-f8", 0.1), diffusion("vq-f8", 0.05)]
    found = {claim.text: claim for claim in judge(scores, results)}
    (falls,) = (c for text, c in found.items() if text.startswith("The stronger"))
    (high,) = (c for text, c in found.items() if text.startswith("What a first stage"))
    (vq,) = (c for text, c in found.items() if text.startswith("At f = 8"))
    assert falls.holds and high.holds and vq.holds
    undecided = [diffusion("kl-f8", 0.1, error=0.05), diffusion("vq-f8", 0.05, error=0.05)]
    (vq_again,) = (c for c in judge(scores, undecided) if c.text.startswith("At f = 8"))
    assert vq_again.holds is None
    assert "1.00% / 50%" in high.finding and "24.00 against 25.00" in vq.finding
    flat = [first_stage("kl-f4", 25.0, low=0.5, high=0.1), first_stage("kl-f8", 26.0)]
    found = {claim.text.partition(" ")[2]: claim.holds for claim in judge(flat, [])}
    assert found["stronger the compression, the worse the reconstruction (table 8)."] is False


def test_scaling_multiplies_training_and_pictures() -> None:
    study = CompressionStudy().scaled(2.5)
    assert (study.diffusion_minutes, study.samples) == (6.25, 480)
    with pytest.raises(ConfigError, match="resolution"):
        CompressionStudy.from_dict({"resolution": 100})


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEZZOTINT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def study() -> CompressionStudy:
    return CompressionStudy(
        resolution=32,
        first_stage_minutes=0.02,
        diffusion_minutes=0.06,
        points=2,
        samples=8,
        reference_samples=32,
        steps=2,
    )


@pytest.fixture(scope="module")
def output(study: CompressionStudy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    output = folder / "output"
    run_compression_study(
        study, output, folder / "work", stages=["kl-f4", "identity"], console=QUIET
    )
    return output


def test_a_small_study_trains_measures_and_reports(output: Path) -> None:
    first_stages, diffusions = read_results(output)
    assert [r.stage for r in first_stages] == ["identity", "kl-f4"]
    assert first_stages[0].scores["rate"] == 24.0 and first_stages[1].scores["rate"] < 24.0
    assert [r.stage for r in diffusions] == ["identity", "kl-f4"]
    for result in diffusions:
        assert len(result.points) == 2
        assert result.points[0].step < result.points[1].step
        drawn = result.points[-1].card.drawn_with
        assert isinstance(drawn, DrawnWith) and drawn.guidance_scale == 1.0
    # one call on 8 x 8 latents of 3 channels against 32 x 32 pixels
    assert diffusions[1].gflops < diffusions[0].gflops
    page = write_report(output).read_text(encoding="utf-8")
    assert "4 of 18 runs are done" in page and "cannot be told" in page
    assert "http://" not in page and "https://" not in page
    for name in ("rate-distortion.webp", "frequency.webp", "quality-minutes.webp", "points.csv"):
        assert (output / name).stat().st_size > 0


def test_what_is_done_is_not_done_again(
    study: CompressionStudy, output: Path, tmp_path: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in (output / "runs").iterdir()}
    run_compression_study(study, output, tmp_path, stages=["kl-f4"], console=QUIET)
    assert {path: path.stat().st_mtime_ns for path in (output / "runs").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["study.yaml"]


def test_results_of_another_study_are_not_mixed_in(
    study: CompressionStudy, output: Path, tmp_path: Path
) -> None:
    other = study.model_copy(update={"steps": 3})
    with pytest.raises(ConfigError, match="other values of steps"):
        run_compression_study(other, output, tmp_path / "work", console=QUIET)
    # nor are first stages that were trained for another one
    with pytest.raises(ConfigError, match="work: belongs to a study with other values of steps"):
        run_compression_study(other, tmp_path / "new", output.parent / "work", console=QUIET)


def test_a_first_stage_that_is_gone_is_trained_anew_and_told_apart(
    study: CompressionStudy, output: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "output"
    shutil.copytree(output, copy)
    more = study.model_copy(update={"seeds": (1,)})
    run_compression_study(more, copy, tmp_path / "work", stages=["kl-f4"], console=QUIET)
    first_stages, diffusions = read_results(copy)
    assert [r.stage for r in first_stages] == ["identity", "kl-f4", "kl-f4"]
    assert [(r.stage, r.seed) for r in diffusions] == [
        ("identity", 0),
        ("kl-f4", 0),
        ("kl-f4", 1),
    ]
    assert diffusions[1].first_stage_weights != diffusions[2].first_stage_weights
    page = write_report(copy).read_text(encoding="utf-8")
    assert "trained anew for some of them (kl-f4)" in page and "seeds 0, 1" in page


def test_a_damaged_result_is_named(output: Path, tmp_path: Path) -> None:
    from mezzotint.errors import CheckpointError

    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / "kl-f4.json").write_text(json.dumps({"kind": "first_stage"})[:-3])
    with pytest.raises(CheckpointError, match="kl-f4.json: damaged"):
        read_results(tmp_path)


def test_a_report_needs_a_study(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no compression study"):
        write_report(tmp_path)
