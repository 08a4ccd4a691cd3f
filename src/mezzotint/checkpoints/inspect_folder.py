"""Whether a model's folder can be loaded, and if not why, from configurations and headers alone.

It is held against the same as when it is loaded, but to the end: what is wrong with one part does
not hide what is wrong with another. Networks are built without weights, and a text encoder of
CLIP's not at all, as its names and shapes are known.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mezzotint.checkpoints.changes import BASE, Base, changed_infos, find_base
from mezzotint.checkpoints.conditioners import (
    clip_weights,
    expected_weights,
    read_concat_channels,
    read_token_width,
)
from mezzotint.checkpoints.first_stages import as_first_stage, read_normalization
from mezzotint.checkpoints.folder import (
    CONFIG,
    STEM,
    build_component,
    compare,
    modern_name,
    read_component_config,
    read_json,
)
from mezzotint.checkpoints.layouts import LAYOUTS
from mezzotint.checkpoints.model import (
    CLASS,
    as_unet,
    check_channels,
    check_kind,
    check_width,
    conditioner_of,
    read_defaults,
    read_index,
    vae_of,
)
from mezzotint.checkpoints.pipeline_table import (
    SAMPLING,
    PipelineLayout,
    class_of,
    find_pipeline,
    require_folder,
    unused_components,
)
from mezzotint.checkpoints.pipelines import (
    channels_beside,
    default_scale,
    trained_size,
)
from mezzotint.checkpoints.registry import INDEX
from mezzotint.checkpoints.schedulers import FILE, read_scheduler
from mezzotint.checkpoints.text_encoders import (
    build_bert,
    clip_name,
    encoder_weights,
    read_clip_config,
)
from mezzotint.conditioning.base import Unconditional
from mezzotint.diffusion.flow import FlowScheduleConfig
from mezzotint.diffusion.schedule import ScheduleConfig
from mezzotint.errors import CheckpointError, ConfigError
from mezzotint.latent_diffusion import FirstStage, LatentDiffusion, LatentNormalization
from mezzotint.models.autoencoder import VQModel
from mezzotint.models.unet import UNet
from mezzotint.storage.tensors import TensorInfo, find_weights, open_tensors

__all__ = ["FolderReport", "check_folder"]


@dataclass
class FolderReport:
    """What was found of a folder.

    Attributes:
        folder: The folder.
        missing: Tensors that should be there, each with the sub-folder before it.
        unexpected: Tensors that should not.
        problems: Sentences on why it cannot be loaded.
        notes: Sentences on what else a user should know.
        schedule: What its scheduler says, if it can be read.
        image_size: Height and width in pixels that it was trained at, if that is told.
        normalization: The statistics of its latents, if they can be read.
        base: The model that it is a change of, if it is.
    """

    folder: Path
    missing: list[str] = field(default_factory=list[str])
    unexpected: list[str] = field(default_factory=list[str])
    problems: list[str] = field(default_factory=list[str])
    notes: list[str] = field(default_factory=list[str])
    schedule: ScheduleConfig | FlowScheduleConfig | None = None
    image_size: tuple[int, int] | None = None
    normalization: LatentNormalization | None = None
    base: Base | None = None

    def noting(self) -> "_Noting":
        """Note a mistake of the folder's, and go on behind the block."""
        return _Noting(self.problems)

    def compare(
        self,
        kind: str,
        path: Path,
        wanted: Mapping[str, Tensor | TensorInfo],
        found: Mapping[str, TensorInfo],
    ) -> None:
        """Hold the tensors of a file against those that a part wants."""
        fit = compare(wanted, found)
        inside = path.is_relative_to(self.folder)
        part = path.parent.relative_to(self.folder if inside else path.parents[1]).as_posix()
        self.missing += [f"{part}/{name}" for name in fit.missing]
        self.unexpected += [f"{part}/{name}" for name in fit.unexpected]
        if (told := fit.told(kind)) is not None:
            self.problems.append(f"{path}: {told}")


class _Noting:
    """A block whose errors become sentences."""

    def __init__(self, problems: list[str]) -> None:
        self._problems = problems

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> bool:
        if not isinstance(error, CheckpointError | ConfigError):
            return False
        # what lies in the way of two checks is told once
        if str(error) not in self._problems:
            self._problems.append(str(error))
        return True


def check_folder(folder: Path, index: Mapping[str, Any]) -> FolderReport:
    """Say what would keep a folder from being loaded.

    Args:
        folder: Holds ``model_index.json``.
        index: Its content.
    """
    report = FolderReport(folder)
    if index.get("_class_name") == CLASS:
        _check_ours(report)
        return report
    layout = None
    with report.noting():
        layout = find_pipeline(index, folder)
    if layout is None:
        _check_unknown(report, index)
    else:
        _check_pipeline(report, index, layout)
    return report


def _check_ours(report: FolderReport) -> None:
    folder, size, base = report.folder, None, None
    index: Mapping[str, Any] = {}
    with report.noting():
        index = read_json(folder / INDEX)
        index, size = read_index(folder)
        read_defaults(index, folder / INDEX)
    with report.noting():
        base = find_base(index, folder)
    if BASE in index and base is None:
        return  # whose parts it has is not known
    report.base = base
    if base is not None:
        report.notes.append(
            f"what is not here is of the model {base.folder}, of which this is a change"
        )
    conditioner, main = conditioner_of(folder, base)
    first_stage = _first_stage(report, vae_of(folder, base))
    unet = _unet(report) if base is None else _changed_unet(report, base)
    with report.noting():
        report.schedule = read_scheduler(folder / "scheduler" / FILE).schedule
    with report.noting():
        check_kind(folder, index, str(read_component_config(conditioner).get("_class_name")))
        for told in expected_weights(conditioner, main=main):
            with report.noting():
                report.compare(told.kind, told.path, told.tensors, open_tensors(told.path))
        if unet is not None:
            check_width(folder, unet.config, read_token_width(conditioner, main=main))
            check_channels(folder, unet.config, read_concat_channels(conditioner))
    report.image_size = size
    _check_whole(report, first_stage, unet)


def _check_unknown(report: FolderReport, index: Mapping[str, Any]) -> None:
    """Check what can be checked of a pipeline that nothing else is known of."""
    for part, entry in index.items():
        if Path(part).name == part and isinstance(entry, list) and entry[-1:] != [None]:
            with report.noting():
                require_folder(report.folder / part)
                if entry[-1] in LAYOUTS:
                    _component(report, report.folder / part)


def _check_pipeline(report: FolderReport, index: Mapping[str, Any], layout: PipelineLayout) -> None:
    folder = report.folder
    with report.noting():
        read_defaults(index, folder / INDEX, SAMPLING)
    with report.noting():
        kind = class_of(index, "scheduler", folder)
        path = folder / "scheduler" / FILE
        scheduler = read_scheduler(path, kind, standard=layout.standard)
        report.schedule = scheduler.schedule
        report.notes += scheduler.notes
    first_stage = _first_stage(report, folder / layout.first_stage, index)
    unet = _unet(report, index)
    width = None
    with report.noting():
        width = _encoder(report, index, layout)
    if first_stage is not None and unet is not None:
        with report.noting():
            channels_beside(folder, layout, unet.config, first_stage.latent_channels)
    if unet is not None and width is not None:
        with report.noting():
            check_width(folder, unet.config, width)
    if first_stage is not None and unet is not None:
        with report.noting():
            report.image_size = trained_size(folder, layout, first_stage.factor)
    if layout.condition == "low_res":
        report.normalization = None  # this pipeline decodes latents as they are
    _check_whole(report, first_stage, unet)
    if unused := unused_components(index, layout):
        absent = [name for name in unused if not (folder / name).is_dir()]
        rest = f"; {', '.join(absent)} is not even there" if absent else ""
        report.notes.append(f"{', '.join(unused)}: named in {INDEX}, but not used{rest}")


def _first_stage(
    report: FolderReport, path: Path, index: Mapping[str, Any] | None = None
) -> FirstStage | None:
    """Check a first stage; of a pipeline, also what its index says of it."""
    with report.noting():
        if index is not None:
            class_of(index, path.name, report.folder, [*LAYOUTS])
        first_stage = as_first_stage(_component(report, path), path)
        with report.noting():
            quantised = index is None or isinstance(first_stage, VQModel)
            scale = default_scale(quantised=quantised)
            report.normalization = read_normalization(path, scale)
        return first_stage
    return None


def _unet(report: FolderReport, index: Mapping[str, Any] | None = None) -> UNet | None:
    """Check a UNet; see `_first_stage`."""
    path = report.folder / "unet"
    with report.noting():
        if index is not None:
            class_of(index, path.name, report.folder, [*LAYOUTS])
        return as_unet(_component(report, path), path)
    return None


def _changed_unet(report: FolderReport, base: Base) -> UNet | None:
    """Check a UNet that is a change of another's."""
    path = report.folder / "unet"
    with report.noting():
        unet = as_unet(build_component(path), path)
        with report.noting():
            wanted, infos = unet.state_dict(), changed_infos(report.folder, base)
            found = {name: info for name, info in infos.items() if name in wanted}
            report.compare(type(unet).__name__, path / CONFIG, wanted, found)
        return unet
    return None


def _component(report: FolderReport, path: Path) -> nn.Module:
    """The module of a component, without weights; those of the file are compared with it."""
    module = build_component(path)
    with report.noting():
        file = find_weights(path, STEM)
        stored = open_tensors(file)
        infos = {modern_name(name): info for name, info in stored.items()}
        report.compare(type(module).__name__, file, module.state_dict(), infos)
    return module


def _encoder(report: FolderReport, index: Mapping[str, Any], layout: PipelineLayout) -> int | None:
    """Check a text encoder; the width of its tokens, if there is one."""
    if layout.encoder is None:
        return None
    class_of(index, layout.encoder, report.folder, layout.encoder_classes)
    class_of(index, "tokenizer", report.folder)
    path, words = report.folder / layout.encoder, report.folder / "tokenizer"
    wanted: Mapping[str, Tensor | TensorInfo]
    if layout.condition == "clip":
        config, _ = read_clip_config(path, words)
        kind, width, wanted = "ClipConditioner", config.hidden_size, clip_weights(config, path)
    else:
        conditioner = build_bert(path, words)
        kind, width = type(conditioner).__name__, conditioner.config.width
        wanted = conditioner.state_dict()
    with report.noting():
        file = encoder_weights(path)
        rename = clip_name if layout.condition == "clip" else str
        named = [(rename(name), info) for name, info in open_tensors(file).items()]
        report.compare(kind, file, wanted, {name: info for name, info in named if name is not None})
    return width


def _check_whole(report: FolderReport, first_stage: FirstStage | None, unet: UNet | None) -> None:
    """Check what only parts together can have wrong."""
    size, schedule = report.image_size, report.schedule
    if first_stage is None or unet is None or schedule is None:
        return
    normalization = report.normalization or LatentNormalization.from_scale_factor(1.0)
    try:
        LatentDiffusion(first_stage, unet, Unconditional(), schedule, normalization, size or (1, 1))
    except ConfigError as error:
        report.problems.append(f"{report.folder}: {error}")
