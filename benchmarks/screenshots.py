"""Pictures of the report page as a browser shows it: on a desktop, on a phone, in the dark.

Results become a page (`edge-mmllm report --html`), headless Chromium opens it and takes
`report-desktop.png`, `report-phone.png` and `report-dark.png`, each down to the last chart.
Whatever the page writes to the browser's console fails the run.

    python benchmarks/screenshots.py results.jsonl... [--out docs/images] [--chromium PROGRAM]
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageChops

from edge_mmllm.profiling.report import TITLE, report

HERE = Path(__file__).resolve().parent
#: Name -> width of the window, and the colours preferred (Chromium's blink setting).
PICTURES = {"desktop": (1280, "1"), "phone": (390, "1"), "dark": (1280, "0")}
#: Higher than any page of charts.
_HEIGHT = 12_000
_MARGIN = 24
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--enable-logging=stderr",
)  # fmt: skip
#: Where the pictures end: what follows are long tables.
_STOP = "<h2>All figures</h2>"


def shoot(program: str, page: Path, out: Path, width: int, colours: str) -> None:
    """Takes a picture of a page. Raises: RuntimeError: it said something, or shows nothing."""
    with tempfile.TemporaryDirectory() as profile:
        done = subprocess.run(
            [program, *_FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{_HEIGHT}",
             f"--blink-settings=preferredColorScheme={colours}", f"--screenshot={out}",
             page.as_uri()],
            capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
    said = re.findall(r".*CONSOLE.*", done.stderr)
    if said or not out.is_file():
        raise RuntimeError(f"{page.name}: " + ("\n".join(said) or done.stderr[-2000:]))
    picture = Image.open(out).convert("RGB")
    empty = Image.new("RGB", picture.size, picture.getpixel((0, picture.height - 1)))
    box = ImageChops.difference(picture, empty).getbbox()
    if box is None:
        raise RuntimeError(f"{page.name}: the picture is empty")
    picture = picture.crop((0, 0, picture.width, min(box[3] + _MARGIN, picture.height)))
    picture.quantize(128).save(out, optimize=True)
    print(f"{out}: {picture.width} x {picture.height}, {out.stat().st_size / 1e3:.0f} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "images")
    parser.add_argument("--chromium", default="chromium")
    parser.add_argument("--title", default=TITLE)
    parser.add_argument("--whole", action="store_true", help="with the tables at the end")
    arguments = parser.parse_args()
    program = shutil.which(arguments.chromium)
    if program is None:
        sys.exit(f"there is no {arguments.chromium}: install it, or name it with --chromium")
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        report(arguments.results, html=page, title=arguments.title)
        if not arguments.whole:
            content = page.read_text(encoding="utf-8")
            page.write_text(content.partition(_STOP)[0] + "</main></body></html>", "utf-8")
        for name, (width, colours) in PICTURES.items():
            shoot(program, page, arguments.out / f"report-{name}.png", width, colours)


if __name__ == "__main__":
    main()
