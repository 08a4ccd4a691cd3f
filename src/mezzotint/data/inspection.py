"""What a data set holds, before anything is trained on it: sizes, captions, classes, faults."""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from mezzotint.data.base import Fault
from mezzotint.data.captioned import Entry
from mezzotint.data.packing import OpenedImage, open_images

__all__ = ["DataReport", "inspect_images"]

_SIDES = (32, 64, 128, 256, 384, 512, 768, 1024, 2048)  # bounds of the histogram, in pixels
_RATIOS = ((1, 2), (2, 3), (3, 4), (4, 5), (1, 1), (5, 4), (4, 3), (3, 2), (2, 1))
_FREQUENT = 10  # captions that are quoted
_NO_TEXT = re.compile(r"no text\b")


@dataclass
class DataReport:
    """What was found; every count is of whole images unless said otherwise.

    Attributes:
        images: How many are whole.
        size_bytes: Of their files together.
        kinds: Formats of the files.
        short_sides: How many by the shorter side: ``"64-127"``, in pixels.
        ratios: How many by the nearest of nine ratios of width to height.
        smallest: Width and height of the image with the shortest side.
        largest: Width and height of that with the longest.
        captioned: How many have a caption.
        without_caption: How many were left out because a caption is missing.
        words: Fewest, mean and most words in a caption.
        distinct_captions: How many different ones there are.
        frequent_captions: The most frequent, and how often each stands there.
        classes: How many there are of each.
        duplicates: Images whose files are equal to an earlier one, byte for byte.
        faults: What cannot be used, and why.
    """

    images: int = 0
    size_bytes: int = 0
    kinds: Counter[str] = field(default_factory=Counter[str])
    short_sides: Counter[str] = field(default_factory=Counter[str])
    ratios: Counter[str] = field(default_factory=Counter[str])
    smallest: tuple[int, int] | None = None
    largest: tuple[int, int] | None = None
    captioned: int = 0
    without_caption: int = 0
    words: tuple[int, float, int] | None = None
    distinct_captions: int = 0
    frequent_captions: list[tuple[str, int]] = field(default_factory=list[tuple[str, int]])
    classes: Counter[str] = field(default_factory=Counter[str])
    duplicates: int = 0
    faults: list[Fault] = field(default_factory=list[Fault])

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, fit for JSON."""
        told = {name: getattr(self, name) for name in self.__dataclass_fields__}
        for name in ("kinds", "short_sides", "ratios", "classes"):
            told[name] = dict(told[name])
        told["faults"] = [{"name": fault.name, "reason": fault.reason} for fault in self.faults]
        return told

    def lines(self) -> list[tuple[str, str]]:
        """Return what is to be said, each under a label."""
        found = [("images", f"{self.images:,}, {self.size_bytes / 2**20:,.1f} MiB")]
        found.append(("formats", _counts(self.kinds)))
        if self.smallest and self.largest:
            small, large = ("{} x {}".format(*size) for size in (self.smallest, self.largest))
            found.append(("sizes", f"from {small} to {large}"))
        found.append(("short side", _counts(_ordered(self.short_sides, _side_names()))))
        found.append(("ratio", _counts(_ordered(self.ratios, [_ratio_name(r) for r in _RATIOS]))))
        found += self._of_captions()
        if self.classes:
            share = max(self.classes.values()) / min(self.classes.values())
            found.append(("classes", f"{len(self.classes):,}; {_counts(self.classes, 20)}"))
            if share > 2:
                found.append(
                    ("", f"the largest has {share:.1f} times the smallest; see data.balance: class")
                )
        if self.duplicates:
            found.append(("duplicates", f"{self.duplicates:,} files stand there more than once"))
        found.append(("faults", f"{len(self.faults):,}"))
        return found

    def _of_captions(self) -> list[tuple[str, str]]:
        if not self.captioned and not self.without_caption:
            return [("captions", "none")]
        total = self.captioned + self.without_caption
        found = [
            ("captions", f"{self.captioned:,}; {self.without_caption / total:.1%} are missing")
        ]
        if self.words is not None:
            low, mean, high = self.words
            found.append(("", f"{low} to {high} words, {mean:.1f} on average"))
            found.append(("", f"{self.distinct_captions:,} different"))
        found += [("", f"{count:,} times {text!r}") for text, count in self.frequent_captions]
        return found


def inspect_images(
    entries: Iterable[Entry | Fault], on_image: Callable[[int], None] | None = None
) -> DataReport:
    """Decode every image of a data set and say what is there.

    Args:
        entries: As `mezzotint.data.sources.open_source` lists them.
        on_image: Called with the number of images done.
    """
    report = DataReport()
    seen: set[bytes] = set()
    captions: Counter[str] = Counter()
    words: list[int] = []
    for number, image in enumerate(open_images(entries), start=1):
        if isinstance(image, Fault):
            report.faults.append(image)
            report.without_caption += bool(_NO_TEXT.match(image.reason))
        else:
            _count(report, image, seen)
            for caption in image.entry.captions:
                captions[caption] += 1
                words.append(len(caption.split()))
        if on_image is not None:
            on_image(number)
    if words:
        report.words = min(words), sum(words) / len(words), max(words)
    report.distinct_captions = len(captions)
    report.frequent_captions = [pair for pair in captions.most_common(_FREQUENT) if pair[1] > 1]
    return report


def _count(report: DataReport, image: OpenedImage, seen: set[bytes]) -> None:
    size = image.width, image.height
    report.images += 1
    report.size_bytes += len(image.content)
    report.kinds[image.kind] += 1
    report.short_sides[_side_name(min(size))] += 1
    ratio = size[0] / size[1]
    nearest = min(_RATIOS, key=lambda r: abs(ratio * r[1] / r[0] - 1) / max(1, ratio * r[1] / r[0]))
    report.ratios[_ratio_name(nearest)] += 1
    report.smallest = min(report.smallest or size, size, key=min)
    report.largest = max(report.largest or size, size, key=max)
    report.captioned += bool(image.entry.captions)
    if image.entry.class_name is not None:
        report.classes[image.entry.class_name] += 1
    digest = hashlib.sha256(image.content).digest()[:16]
    report.duplicates += digest in seen
    seen.add(digest)


def _side_names() -> list[str]:
    inner = [f"{low}-{high - 1}" for low, high in zip(_SIDES, _SIDES[1:], strict=False)]
    return [f"under {_SIDES[0]}", *inner, f"{_SIDES[-1]} and more"]


def _side_name(side: int) -> str:
    return _side_names()[sum(side >= bound for bound in _SIDES)]


def _ratio_name(ratio: tuple[int, int]) -> str:
    return f"{ratio[0]}:{ratio[1]}"


def _ordered(counts: Counter[str], names: Iterable[str]) -> dict[str, int]:
    return {name: counts[name] for name in names if counts[name]}


def _counts(counts: dict[str, int], most: int = 100) -> str:
    if not counts:
        return "none"
    shown = [f"{name} {count:,}" for name, count in list(counts.items())[:most]]
    more = f" and {len(counts) - most:,} more" if len(counts) > most else ""
    return ", ".join(shown) + more
