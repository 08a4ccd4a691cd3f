import pytest

from mezzotint.data.wording import DEFAULT_TEMPLATES, check_template, fill_template, with_article


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("red apple", "a red apple"),
        ("apple", "an apple"),
        ("octopus", "an octopus"),
        ("unicorn", "a unicorn"),
        ("umbrella with rain drops", "an umbrella with rain drops"),
        ("unlocked", "an unlocked"),
        ("hourglass done", "an hourglass done"),
        ("euro banknote", "a euro banknote"),
        ("one o'clock", "a one o'clock"),
        ("x-ray", "an x-ray"),
        ("8 ball", "an 8 ball"),
        ("bus", "a bus"),
        ("dress", "a dress"),
        ("grapes", "grapes"),
        ("french fries", "french fries"),
        ("glass of milk", "a glass of milk"),
        ("cooked rice", "cooked rice"),
        ("man: beard", "a man: beard"),
        ("AB button (blood type)", "an AB button (blood type)"),
        ("SOS button", "an SOS button"),
        ("", ""),
    ],
)
def test_articles_fit(caption: str, expected: str) -> None:
    assert with_article(caption) == expected


def test_templates_choose_the_article_and_keep_braces_of_captions() -> None:
    assert fill_template("an emoji of a {caption}", "anchor") == "an emoji of an anchor"
    assert fill_template("an {caption}", "grapes") == "grapes"
    assert fill_template("{caption}, a {caption}", "key") == "key, a key"
    assert fill_template("a {caption}", "set {x}") == "a set {x}"


def test_default_templates_are_six_and_valid() -> None:
    assert len(set(DEFAULT_TEMPLATES)) == 6
    for template in DEFAULT_TEMPLATES:
        check_template(template)


@pytest.mark.parametrize("template", ["", "no field", "{other}", "{caption", "{caption}{}"])
def test_other_templates_are_refused(template: str) -> None:
    with pytest.raises(ValueError, match="template"):
        check_template(template)
