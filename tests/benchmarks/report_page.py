"""Looks at a report in headless Chromium: how soon it answers, what it complains of, and pictures to look at.

    python tests/benchmarks/report_page.py results/report/index.html [pictures/]

Prints a line of JSON a way of looking (desktop, dark, phone, print): bytes, milliseconds until the page's script has run,
the same with a first search in the list of latents, complaints of the console, and addresses asked for. Say with its
numbers what else the machine was doing.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from chromium import Page, chromium

LOOKS = {"desktop": {}, "dark": {"dark": True}, "phone": {"width": 390, "height": 844, "phone": True}}
SEARCH = """new Promise(done => {
  const start = performance.now(), seek = document.getElementById("seek");
  if (seek) { seek.elements.words.value = "1"; seek.dispatchEvent(new Event("input", { bubbles: true })); }
  requestAnimationFrame(() => setTimeout(() => done(performance.now() - start)));
})"""


def look(page: Page, path: Path, name: str, pictures: Path | None) -> dict[str, object]:
    """The numbers of one look; pictures of the top, and of each section's head, where a folder is given."""
    ready = page.ask('performance.getEntriesByName("ready")[0].startTime')
    first = ready + page.ask(SEARCH)
    for place in page.ask("[...document.querySelectorAll('main > section')].map(one => one.id)") if pictures else ():
        page.ask(f"document.documentElement.style.scrollBehavior = 'auto'; location.hash = {'#' + place!r}")
        time.sleep(1.5)  # charts are drawn as they come into view
        page.shot(pictures / f"{name}-{place or 'top'}.png")  # type: ignore[operator]
    own = path.absolute().as_uri()
    asked = [url for url in page.requests if url.split("#")[0] != own]
    return {"look": name, "bytes": path.stat().st_size, "ready_ms": round(ready), "first_search_ms": round(first),
            "complaints": page.problems, "requests": asked}  # fmt: skip


def main() -> None:
    path, pictures = Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None
    if pictures:
        pictures.mkdir(parents=True, exist_ok=True)
    with chromium() as browser:
        browser.open(path)  # the first page of a browser pays for its start
        for name, how in LOOKS.items():
            print(json.dumps(look(browser.open(path, **how), path, name, pictures)), flush=True)
        if pictures:
            browser.open(path).print(pictures / "print.pdf")


if __name__ == "__main__":
    main()
