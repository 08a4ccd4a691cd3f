"""``mezzotint inspect``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mezzotint.cli.loading import ConfigOption, FamilyOption, PredictionOption
from mezzotint.errors import printable

if TYPE_CHECKING:
    from mezzotint.checkpoints.inspect import Inspection

__all__ = ["inspect"]

_PICTURES = (".png", ".jpg", ".jpeg", ".webp")
_SHOWN = 8  # names of each list


def inspect(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="A single file, a model folder, a run, or a picture."),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False,
    hashed: Annotated[
        bool, typer.Option("--hash", help="Its sha256 too, which reads all of it.")
    ] = False,
    config: ConfigOption = None,
    family: FamilyOption = None,
    prediction: PredictionOption = None,
) -> None:
    """Say what a model is, from its headers alone; or how a picture was drawn."""
    import json

    if file.suffix.lower() in _PICTURES:
        _say_picture(file, as_json)
        return
    from mezzotint.checkpoints.inspect import inspect_model

    found = inspect_model(file, hashed=hashed, config=config, family=family, prediction=prediction)
    if as_json:
        print(json.dumps(found.to_dict(), indent=2, ensure_ascii=False))
    else:
        _say(found)


def _say(found: "Inspection") -> None:
    print(f"{found.path}: {found.layout}")
    print(f"family      {found.family}: {found.family_reason}")
    if found.prediction is not None:
        print(f"prediction  {found.prediction}: {found.prediction_reason}")
    if found.image_size is not None:
        print(f"image size  {found.image_size[1]} x {found.image_size[0]}")
    for part in found.parts:
        of = f" ({part.kind})" if part.kind else ""
        types = ", ".join(part.precisions) or "no weights"
        print(
            f"part        {part.name}{of}: {part.parameters:,} in {part.tensors} tensors, {types}"
        )
    print(f"EMA         {_of_averages(found)}")
    for label, names in (
        ("missing", found.missing),
        ("unexpected", found.unexpected),
    ):
        rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        told = ", ".join(printable(name) for name in names[:_SHOWN]) or "none"
        print(f"{label:11} {told}{rest}")
    for label, sentences in (("problem", found.problems), ("note", found.notes)):
        for sentence in sentences:
            print(f"{label:11} {printable(sentence)}")
    for name, value in found.metadata.items():
        short = value if len(value) <= 160 else f"{value[:157]}…"
        print(f"metadata    {printable(name)}: {printable(short)}")
    if found.sha256 is not None:
        print(f"sha256      {found.sha256}")
        print(f"short hash  {found.short_hash}")


def _of_averages(found: "Inspection") -> str:
    if found.averages_alone:
        return "averaged weights alone, which are taken for the UNet"
    return "averaged weights beside the own" if found.averaged else "none"


def _say_picture(path: Path, as_json: bool) -> None:
    import json

    from mezzotint.errors import RequestError
    from mezzotint.generation.infotext import parse_infotext
    from mezzotint.generation.infotext_request import ignored_fields
    from mezzotint.generation.metadata import read_infotext, read_request

    told: dict[str, object] = {}
    try:
        told["request"] = read_request(path).to_dict()
    except RequestError as error:
        try:
            read_infotext(path)
        except RequestError:
            raise error from None
    try:
        text = read_infotext(path)
    except RequestError:
        text = None
    if text is not None:
        told |= {"infotext": text, "ignored": ignored_fields(parse_infotext(text))}
    if as_json:
        print(json.dumps(told, indent=2, ensure_ascii=False))
        return
    if "request" in told:
        print(json.dumps(told["request"], indent=2, ensure_ascii=False))
    if text is not None:
        print(text)
