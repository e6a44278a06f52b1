"""Draw clip art of common prompts, and put it on a sheet: a policy a row, a prompt a column.

    python examples/clipart_sheet.py --out prompts.png  # 20 prompts, the full cache
    python examples/clipart_sheet.py --policies full,linear2d,linear,streaming_llm \\
        --prompts "flags europe france,games cards,people smilies,plants flowers" --out policies.png
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import matplotlib
import torch
import typer
from matplotlib.figure import Figure

import kvpolicy
from kvpolicy.lab.draw.image_model import ModelSource, Sampler
from kvpolicy.lab.draw.items import Item
from kvpolicy.lab.run.subject import Setting
from kvpolicy.lab.show.pictures import contact_sheet
from kvpolicy_adapters.evaluation.drawing.clipart import ClipartImages

#: Of subjects of which there are many drawings.
PROMPTS = (
    "flags europe france",
    "flags europe spain",
    "flags america united states",
    "flags africa",
    "flags asia",
    "flags signalflag",
    "games cards white 5",
    "games cards",
    "people smilies",
    "people smiley",
    "transportation roadsigns",
    "aiga",
    "people stickmen",
    "food fruit apple",
    "food fruit orange",
    "food desserts glace",
    "computer buttons",
    "plants flowers",
    "tree",
    "clocks",
)
COLUMNS = 5


def main(
    out: Annotated[Path, typer.Option(help="The picture.")],
    folder: Annotated[
        str | None, typer.Option(help="Of clipart-ar, where another than ships is wanted.")
    ] = None,
    prompts: Annotated[str, typer.Option(help="Separated by commas.")] = ",".join(PROMPTS),
    policies: Annotated[str, typer.Option(help="Separated by commas.")] = "full",
    budget: Annotated[str, typer.Option(help="Of all policies but full.")] = "1/6",
    cfg: Annotated[float, typer.Option(min=1, help="Guidance; 1 is none.")] = 3.0,
    temperature: Annotated[
        float, typer.Option(help="Below 1 the likely codes come more often.")
    ] = 1.0,
    line_breaks: bool = False,
    seed: int = 0,
) -> None:
    """Draw, and write the sheet."""
    torch.set_num_threads(1)
    options = (("line_breaks", 1),) if line_breaks else ()
    model = ClipartImages(ModelSource("clipart-ar", folder, options=options))
    sampler = Sampler(cfg=cfg, temperature=temperature)
    items = [
        Item(path="", row=row, sample=0, prompt=prompt)
        for row, prompt in enumerate(prompts.split(","))
    ]
    for item in items:
        model.check(item, sampler)
    drawn = {}
    for name in policies.split(","):
        setting = Setting(kvpolicy.create(name), None if name == "full" else budget)
        drawn[name] = model.draw(items, setting, sampler, seed).images
        print(f"{name}: {len(items)} pictures", flush=True)
    said = [str(item.prompt) for item in items]
    if len(drawn) > 1:
        rows = [
            (name, "full cache" if name == "full" else f"{budget} of the cache", list(images))
            for name, images in drawn.items()
        ]
        figure = contact_sheet(rows, said, "clipart-ar: the same seeds")
    else:
        figure = Figure(figsize=(COLUMNS * 1.25, -(-len(said) // COLUMNS) * 1.4))
        with matplotlib.rc_context({"text.parse_math": False}):
            for place, (prompt, image) in enumerate(
                zip(said, next(iter(drawn.values())), strict=True)
            ):
                axes = figure.add_subplot(-(-len(said) // COLUMNS), COLUMNS, place + 1)
                axes.imshow(image)
                axes.set_title(prompt, size=6, pad=3)
                axes.set_axis_off()
        figure.tight_layout(pad=0.4)
    figure.savefig(out, dpi=200)
    print(f"wrote {out}")


if __name__ == "__main__":
    typer.run(main)
