import inspect

import pytest

from mezzotint import errors
from mezzotint.errors import MezzotintError, MissingExtraError, nearest


def test_every_error_is_one_that_a_user_can_mend() -> None:
    classes = [c for _, c in inspect.getmembers(errors, inspect.isclass)]
    own = [c for c in classes if c.__module__ == errors.__name__]
    assert len(own) == 7
    assert all(issubclass(c, MezzotintError) for c in own)


def test_the_docstring_draws_the_whole_tree() -> None:
    assert errors.__doc__ is not None
    names = [n for n in errors.__all__ if n[0].isupper()]
    assert all(name in errors.__doc__ for name in names)


def test_a_missing_extra_says_how_to_install_it() -> None:
    message = str(MissingExtraError("datasets", "train", "a folder of images"))
    assert message == (
        "a folder of images needs the package 'datasets': install it with"
        " pip install 'mezzotint[train]'"
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ddin", "did you mean 'ddim'? Choose from: ddim, ddpm, euler"),
        ("zzzz", "Choose from: ddim, ddpm, euler"),
    ],
)
def test_nearest_names_the_nearest_and_all(name: str, expected: str) -> None:
    assert nearest(name, ["euler", "ddpm", "ddim"]) == expected
