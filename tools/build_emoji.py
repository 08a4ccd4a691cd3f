"""Make the embedded emoji set: ``python -m tools.build_emoji`` (``--check`` compares instead).

The pictures come from the npm packages ``@iconify-json/fluent-emoji`` (Microsoft's Fluent Emoji,
MIT) and ``@iconify-json/noto`` (Google's Noto Emoji, Apache-2.0), the captions, tags and groups
from ``emojibase-data`` (MIT). A concept is an emoji without skin tone that stands in every set.

Written are ``index.json.gz`` and one ``<style>.bin`` per style: WebP pictures of 128 x 128 RGBA,
one after the other, whose offsets the index holds. Equal versions of the tools give equal content.
Needs npm and the package ``resvg_py``; takes a few minutes.
"""

import argparse
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import resvg_py
from PIL import Image

PACKAGES = {
    "fluent": ("@iconify-json/fluent-emoji", "1.2.7", "MIT"),
    "flat": ("@iconify-json/fluent-emoji-flat", "1.2.6", "MIT"),  # its chars.json, no picture
    "noto": ("@iconify-json/noto", "1.2.9", "Apache-2.0"),
    "emojibase": ("emojibase-data", "17.0.0", "MIT"),
}
STYLES = ("fluent", "noto")
SIZE = 128  # pixels of a side
QUALITY = 92  # of lossy WebP; a lossless picture that is smaller is taken instead
VALIDATION = 10  # one concept in so many
DESTINATION = Path("src/mezzotint/assets/emoji")


class Icon(NamedTuple):
    """The inside of an SVG and the size of its view box."""

    body: str
    width: int
    height: int


def fetch(folder: Path) -> dict[str, Path]:
    """Download and unpack the npm packages; returns where each lies."""
    places: dict[str, Path] = {}
    for name, (package, version, _) in PACKAGES.items():
        place = folder / name
        place.mkdir()
        packed = subprocess.run(
            ["npm", "pack", f"{package}@{version}", "--silent"],
            cwd=place, check=True, capture_output=True, text=True,
        )  # fmt: skip
        with tarfile.open(place / packed.stdout.split()[-1]) as archive:
            archive.extractall(place, filter="data")
        places[name] = place / "package"
    return places


def read_json(path: Path) -> Any:
    """Read one JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def code_points(hexcode: str) -> str:
    """Code points in lower case without the variation selector, which the sources set unevenly."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def split_of(points: str) -> str:
    """``validation`` for one concept in ten, by a hash of its code points alone."""
    digest = hashlib.sha256(points.encode()).digest()
    return "train" if int.from_bytes(digest[:8], "big") % VALIDATION else "validation"


def typewriter(text: str) -> str:
    """Quotes as people type them, so that a prompt meets the words it was trained on."""
    return text.translate(str.maketrans("’‘“”", "''\"\""))


def visible_icons(icons: dict[str, Any], chars: dict[str, str]) -> dict[str, str]:
    """Names of the icons that their set still shows, by code points."""
    return {
        code_points(points): name
        for points, name in chars.items()
        if name in icons["icons"] and not icons["icons"][name].get("hidden")
    }


def read_concepts(places: dict[str, Path]) -> tuple[list[dict[str, Any]], dict[str, list[Icon]]]:
    """Concepts in emoji order, and per style the icon of each."""
    icons = {style: read_json(places[style] / "icons.json") for style in STYLES}
    names = {
        # fluent-emoji has no chars.json, but the names of fluent-emoji-flat
        "fluent": visible_icons(icons["fluent"], read_json(places["flat"] / "chars.json")),
        "noto": visible_icons(icons["noto"], read_json(places["noto"] / "chars.json")),
    }
    messages = read_json(places["emojibase"] / "en/messages.json")
    groups, subgroups = (
        {item["order"]: item["key"] for item in messages[kind]} for kind in ("groups", "subgroups")
    )
    concepts: list[dict[str, Any]] = []
    pictures: dict[str, list[Icon]] = {style: [] for style in STYLES}
    entries = read_json(places["emojibase"] / "en/data.json")
    for entry in sorted((e for e in entries if "group" in e), key=lambda e: e["order"]):
        points = code_points(entry["hexcode"])
        group = groups[entry["group"]]
        if group == "component" or any(points not in names[style] for style in STYLES):
            continue
        concepts.append(
            {
                "name": names["fluent"][points],
                "code_points": points,
                "character": entry["emoji"],
                "caption": typewriter(entry["label"]),
                "tags": [typewriter(tag) for tag in entry.get("tags", [])],
                "group": group,
                "subgroup": subgroups[entry["subgroup"]],
                "split": split_of(points),
            }
        )
        for style in STYLES:
            pictures[style].append(icon_of(icons[style], names[style][points]))
    return concepts, pictures


def icon_of(icons: dict[str, Any], name: str) -> Icon:
    """One icon of a set; a size that it lacks is the set's."""
    icon = icons["icons"][name]
    return Icon(icon["body"], *(icon.get(key, icons[key]) for key in ("width", "height")))


def rasterise(icon: Icon) -> bytes:
    """Draw an icon at 128 x 128 RGBA, padded to a square, as WebP."""
    body, width, height = icon
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        f' width="{width}" height="{height}" viewBox="0 0 {width} {height}">{body}</svg>'
    )
    scale = SIZE / max(width, height)
    png = resvg_py.svg_to_bytes(
        svg_string=svg,
        width=round(width * scale),
        height=round(height * scale),
        skip_system_fonts=True,
    )
    drawn = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    square = Image.new("RGBA", (SIZE, SIZE))
    square.paste(drawn, ((SIZE - drawn.width) // 2, (SIZE - drawn.height) // 2))
    lossy, lossless = io.BytesIO(), io.BytesIO()
    # lossy method 6 takes sixty times as long as 4 and saves two per cent
    square.save(lossy, "webp", quality=QUALITY, method=4)
    square.save(lossless, "webp", lossless=True, quality=90, method=6)
    return min(lossless.getvalue(), lossy.getvalue(), key=len)


def build(places: dict[str, Path], workers: int) -> dict[str, bytes]:
    """Make every file of the set: its name and its bytes."""
    concepts, pictures = read_concepts(places)
    files: dict[str, bytes] = {}
    styles: dict[str, dict[str, str]] = {}
    for style in STYLES:
        with multiprocessing.Pool(workers) as pool:
            encoded = pool.map(rasterise, pictures[style], chunksize=16)
        packed, name = b"".join(encoded), f"{style}.bin"
        files[name] = packed
        styles[style] = {"file": name, "sha256": hashlib.sha256(packed).hexdigest()}
        offset = 0
        for concept, picture in zip(concepts, encoded, strict=True):
            concept.setdefault("pictures", {})[style] = [offset, len(picture)]
            offset += len(picture)
    head = {
        "format_version": 1,
        "size": SIZE,
        "sources": [
            {"package": package, "version": version, "license": licence}
            for package, version, licence in PACKAGES.values()
        ],
        "styles": styles,
    }
    text = "".join(index_lines(head, concepts)).encode()
    files["index.json.gz"] = gzip.compress(text, mtime=0)
    return files


def index_lines(head: dict[str, Any], concepts: list[dict[str, Any]]) -> Iterator[str]:
    """The index as JSON with one concept a line."""
    yield json.dumps(head, indent=1)[:-2] + ',\n "concepts": [\n'
    lines = [json.dumps(c, ensure_ascii=False, separators=(",", ":")) for c in concepts]
    yield ",\n".join(lines) + "\n ]\n}\n"


def differences(files: dict[str, bytes], folder: Path) -> list[str]:
    """Which files of a folder are not what was built, and those that should not stand there."""
    stand = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    both = [n for n in files if n in stand and _plain(n, files[n]) == _plain(n, stand[n])]
    return sorted((files.keys() | stand.keys()) - {*both})


def _plain(name: str, content: bytes) -> bytes:
    """A file's content; versions of zlib compress the same into other bytes."""
    return gzip.decompress(content) if name.endswith(".gz") else content


def main() -> int:
    """Build, or check with ``--check``; exit code 1 if the files that stand differ."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the files that stand")
    parser.add_argument("--output", type=Path, default=DESTINATION, metavar="FOLDER")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = build(fetch(Path(folder)), arguments.workers)
    if arguments.check:
        wrong = differences(files, arguments.output)
        print(f"differ: {', '.join(wrong)}" if wrong else f"{arguments.output}: as built")
        return 1 if wrong else 0
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (arguments.output / name).write_bytes(content)
        print(f"{arguments.output / name}: {len(content) / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
