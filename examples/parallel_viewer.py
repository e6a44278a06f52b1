"""The report's viewer on an image that comes in groups: docs/parallel-viewer.png.

Takes playwright and a Chromium: ``pip install playwright``, and ``playwright install chromium``
where no ``chromium`` is on the path.

    python examples/parallel_viewer.py parallel-viewer.png
"""

from __future__ import annotations

import shutil
import sys
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from playwright.sync_api import sync_playwright

import kvpolicy
from kvpolicy import Parallel
from kvpolicy.lab.show.report.page import report_on_trace
from kvpolicy_adapters import zoo

#: What has come when the picture is taken; passes are counted from 1.
BEFORE_PASS, PASSES = 36, 48


def main(out: str) -> None:
    box, decoder = zoo.load("fashion-lpd"), Parallel(passes=PASSES)
    layout = decoder.ordered(box.grid)
    policy = kvpolicy.create("near", anchors=28)
    with box.attached(policy, "1/4", layout) as cache, kvpolicy.trace(cache) as recording:
        pixels = box.draw(torch.tensor([5]), cache, decoder, seed=1)
    images = torch.as_tensor(np.array(box.fashion.images(pixels)))
    come = list(accumulate(layout.groups, initial=0))[BEFORE_PASS - 1]
    with TemporaryDirectory() as folder:
        trace, page = Path(folder) / "trace.safetensors", Path(folder) / "viewer.html"
        recording.finish(images).save(trace)
        report_on_trace(trace, page)
        picture(page, come, Path(out))


def picture(page: Path, moment: int, out: Path) -> None:
    """What a browser shows of the viewer when so many tokens of the image have come."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": 1000, "height": 820})
        opened.goto(page.as_uri())
        opened.evaluate(
            """moment => {
                const slider = document.getElementById("moment");
                slider.value = moment;
                slider.dispatchEvent(new Event("input"));
            }""",
            moment,
        )
        opened.locator("#viewer").screenshot(path=out)
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:2])
