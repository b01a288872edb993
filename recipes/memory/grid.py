"""A picture of originals, cues and what a memory of 50 pictures recalls.

python -m recipes.memory.grid --data_dir FOLDER
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib import pyplot as plt

from recipes.generation.data import as_picture, pictures
from recipes.memory.recall import BATCHES, CUES, DATA, recall, store


def main() -> None:
    """Stores, recalls and draws."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data_dir", help="folder of the data; without it they are downloaded")
    parser.add_argument("--count", type=int, default=50, help="pictures to store (default 50)")
    parser.add_argument("--width", type=int, default=128, help="units of a layer (default 128)")
    parser.add_argument("--shown", type=int, default=10, help="pictures to show (default 10)")
    parser.add_argument("--write", type=Path, default=Path(__file__).with_name("grid.png"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    x = pictures(DATA, given.count, given.data_dir)
    net = store(x, given.width, BATCHES, 0)
    recalls = [recall(net, x, cue, 0) for cue in CUES]
    lines = [("originals", x)]
    for cue, found in zip(CUES, recalls, strict=True):
        print(f"{cue}: error {found.error:.2g} of the variance, {found.steps} inference steps")
        lines += [(f"cues: {cue}", found.cue), ("recalled", found.found)]
    figure, axes = plt.subplots(len(lines), given.shown, figsize=(given.shown, 1.05 * len(lines)))
    for (name, rows), line in zip(lines, axes, strict=True):
        for row, axis in zip(rows, line, strict=False):
            axis.imshow(as_picture(row, DATA).numpy())
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, fontsize=6)
    figure.tight_layout(pad=0.2)
    figure.savefig(given.write, dpi=70)


if __name__ == "__main__":
    main()
