"""What becomes of docstrings on the reference pages, seen by Griffe as the site sees them."""

import re
from pathlib import Path

import griffe
import pytest
from tools.docstrings import REFERENCE, HouseDocstrings

SOURCE = Path(__file__).parents[2] / "src"


@pytest.fixture(scope="module")
def package() -> griffe.Module:
    extensions = griffe.load_extensions(HouseDocstrings)
    loader = griffe.GriffeLoader(
        search_paths=[SOURCE], extensions=extensions, docstring_parser=griffe.Parser.google
    )
    package = loader.load("mezzotint")
    assert isinstance(package, griffe.Module)
    return package


def attributes(thing: griffe.Object) -> dict[str, str]:
    assert thing.docstring is not None
    (section,) = (
        s for s in thing.docstring.parsed if s.kind is griffe.DocstringSectionKind.attributes
    )
    return {field.name: field.description for field in section.value}


def test_fields_of_configurations_have_their_defaults(package: griffe.Module) -> None:
    told = attributes(package["training.recipe.OptimizerConfig"])
    assert told["betas"] == "Default: ``(0.9, 0.999)``."
    assert told["learning_rate"].startswith("The peak; never scaled")
    assert told["learning_rate"].endswith("Default: ``0.0001``; above 0.")
    told = attributes(package["training.recipe.RecipeBase"])
    assert told["budget"] == "Required."
    assert told["batch_size"].startswith("of all processes together Default: ``8``; at least 1.")


def test_names_that_are_shown_become_links(package: griffe.Module) -> None:
    text = package["diffusion.samplers.SamplerInfo"].docstring.value
    assert "`SAMPLERS`" in text  # has no docstring, and so no place on a page
    text = package["conditioning.build.build_conditioner"].docstring.value
    assert "`with_class_names`][mezzotint.conditioning.build.with_class_names]" in text


def test_examples_are_sections(package: griffe.Module) -> None:
    parsed = package["diffusion.schedule.NoiseSchedule"].docstring.parsed
    assert griffe.DocstringSectionKind.examples in {section.kind for section in parsed}


def test_the_pages_show_what_is_there(package: griffe.Module) -> None:
    shown = {
        path
        for page in REFERENCE.glob("*.md")
        for path in re.findall(r"^::: mezzotint\.(\S+)$", page.read_text(), flags=re.MULTILINE)
    }
    assert len(shown) > 40
    for path in shown:
        assert package[path].has_docstring, path
