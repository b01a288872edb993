"""Writes one page with the paper's tables and ours beside them, of whatever has been run.

    python -m recipes.report

Reads the results files of the studies and writes ``docs/results/report.md``. What was not run
says so.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from recipes.common.queue import Row
from recipes.image_classification import calibration, study
from recipes.image_classification.study import spread
from recipes.language_modeling import study as language
from recipes.stability import learning_rates

PAGE = Path(__file__).parent.parent / "docs" / "results" / "report.md"
#: YAML of a row -> its column.
ALGORITHMS = {
    "bp": "BP",
    "pc": "PC",
    "ipc": "iPC",
    "ipc_spiking": "iPC, spiking",
    "iepc": "iePC",
}
NOT_RUN = "not run"

#: The paper's Table 1: row of the study -> title, and accuracy of backprop, PC and iPC.
TABLE_1 = {
    "mnist": ("MLP on MNIST", "98.26 ± 0.12", "98.55 ± 0.14", "98.54 ± 0.86"),
    "fashion_mnist": ("MLP on FashionMNIST", "88.54 ± 0.64", "85.12 ± 0.75", "89.13 ± 0.86"),
    "svhn": ("CNN on SVHN", "95.35 ± 1.53", "94.53 ± 1.54", "96.45 ± 1.04"),
    "cnn": ("CNN on CIFAR-10", "69.34 ± 0.54", "70.84 ± 0.64", "72.54 ± 0.93"),
    "alexnet": ("AlexNet on CIFAR-10", "75.64 ± 0.64", "64.63 ± 1.55", "72.42 ± 0.53"),
    "alexnet*": ("AlexNet on CIFAR-10*", "83.12 ± 0.97", "71.99 ± 2.43", "80.11 ± 0.44"),
}
#: Best published numbers of others: row -> title, backprop, other PC methods, pure iPC.
OTHERS = {
    "vgg5": ("VGG-5 on CIFAR-10", "92.0", "92.2", "85.51"),
    "vgg7": ("VGG-7 on CIFAR-10", "89.60", "88.84", "-"),
    "resnet18": ("ResNet-18 on CIFAR-10", "91.85", "91.73", "-"),
}
#: The paper's Table 3: perplexity of backprop, PC and iPC, and how many converged.
TABLE_3 = {
    "masked": ("120.02 ± 13.19 (7)", "523.08 ± 12.3 (3)", "106.19 ± 10.54 (10)"),
    "conditional": ("113.32 ± 0.36 (10)", "206.34 ± 6.46 (10)", "142.54 ± 4.23 (7)"),
}

Lines = list[str]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Lines:
    """A Markdown table."""
    cells = [head, ["---"] * len(head), *rows]
    return [*("| " + " | ".join(row) + " |" for row in cells), ""]


def read(path: Path) -> tuple[list[Row], list[dict[str, Any]]]:
    """Jobs with their figures and their sitting's number, and the sittings; nothing of no file."""
    if not path.exists():
        return [], []
    written = json.loads(path.read_text())
    rows = [j["settings"] | j["figures"] | {"sitting": j["sitting"]} for j in written["jobs"]]
    return rows, written["sittings"]


def largest(rows: Sequence[Row], name: str) -> list[Row]:
    """Those of a row of the study at the largest size that has been run."""
    mine = [row for row in rows if row["row"] == name]
    size = max((row["size"] for row in mine), default=0)
    return [row for row in mine if row["size"] == size]


def link(path: Path) -> str:
    """A file as the page names it."""
    return Path(os.path.relpath(path, PAGE.parent)).as_posix()


def machine(sitting: dict[str, Any]) -> str:
    """Device and number of threads."""
    threads = sitting["torch_threads"]
    return (
        f"{sitting.get('gpu') or sitting['machine']}, {threads} thread{'s' if threads > 1 else ''}"
    )


def provenance(rows: Sequence[Row], sittings: Sequence[dict[str, Any]], results: Path) -> Lines:
    """Commands of these rows by machine, their results file and their picture."""
    commands: dict[str, Lines] = {}
    for number in sorted({row["sitting"] for row in rows}):
        sitting = sittings[number]
        where = f"{machine(sitting)}, torch {sitting['versions']['torch']}"
        commands.setdefault(where, []).append(f"- `{sitting['command']}`")
    lines: Lines = []
    for where, those in commands.items():
        lines += [f"On {where}:", "", *those, ""]
    if rows and results.exists():
        lines += [f"All figures: [{results.name}]({link(results)}).", ""]
    picture = results.with_suffix(".png")
    if rows and picture.exists():
        lines += [f"![{picture.stem.replace('_', ' ')}]({link(picture)})", ""]
    return lines


def _learned(rows: Sequence[Row]) -> str:
    """What a row has learned from, in words."""
    if not rows:
        return NOT_RUN
    epochs = [row["epochs"] for row in rows]
    most = f"{min(epochs)}-{max(epochs)}" if min(epochs) < max(epochs) else str(max(epochs))
    settings = rows[0]["settings"]
    images = settings.get("data.train_size")
    learned = f"{images:,} images" if images else "all images"
    reduced = "**reduced**: " if images or "trainer.max_epochs" in settings else ""
    return f"{reduced}{learned}, {most} epochs"


def _ours(rows: Sequence[Row], all_sizes: Sequence[Row]) -> list[str]:
    """Test accuracy and seeds of each algorithm, and which has been run at another size alone."""
    cells = []
    known = {(row["row"], row["algorithm"]) for row in all_sizes}
    for algorithm in ALGORITHMS:
        mine = [row for row in rows if row["algorithm"] == algorithm]
        lost = sum(row["test"] is None for row in mine)
        elsewhere = any((row["row"], algorithm) in known for row in rows)
        missing = f"{NOT_RUN} at this size" if elsewhere else NOT_RUN
        found = f"{spread(row['test'] for row in mine)} ({len(mine)})" if mine else missing
        cells.append(found + (f", {lost} diverged" if lost else ""))
    return cells


def classification() -> Iterator[str]:
    """Tables 1 and 2."""
    rows, sittings = read(study.STUDY.results)
    first, *others = ALGORITHMS.values()
    ours = [f"ours: {first}", *others, "ours learned from"]
    yield from (
        "## Table 1: test accuracy, %",
        "",
        "Mean ± standard deviation over seeds; their number is in brackets. The weights are those "
        "of the epoch with the best validation accuracy. \\* is with crop and flip.",
        "",
        "Our MNIST has images shifted by up to a pixel and scaled by 0.1; the paper's has not. "
        "iPC sees FashionMNIST scaled, iePC flipped. Spiking is iPC with `precisions: spiking`. "
        "Rows learned from fewer images or epochs are compared with each other alone, not with "
        "the paper's figures.",
        "",
    )
    used: list[Row] = []
    lines = []
    for name, paper in (TABLE_1 | OTHERS).items():
        mine = largest(rows, name)
        used += mine
        mark = " (others' best, PC: any kind)" if name in OTHERS else ""
        lines.append([paper[0] + mark, *paper[1:], *_ours(mine, rows), _learned(mine)])
    yield from table(["", "BP", "PC", "iPC", *ours], lines)
    yield from ("## Table 2: width C of the CNN with max-pooling, test accuracy, %", "")
    yield "The paper's figures for other widths are not legible in the copy at hand."
    yield ""
    lines = []
    for width in study.WIDTHS:
        mine = largest(rows, f"width {width}")
        used += mine
        paper = ("67.92", "70.61") if width == 1 else ("", "")
        lines.append([str(width), *paper, *_ours(mine, rows), _learned(mine)])
    yield from table(["C", "BP", "iPC", *ours], lines)
    yield from provenance(used, sittings, study.STUDY.results)


def convergence() -> Iterator[str]:
    """How many of the 96 combinations converge."""
    yield from ("## How many of 96 combinations converge", "")
    rows, sittings = read(learning_rates.STUDY.results)
    size = max((row["size"] for row in rows), default=0)
    rows = [row for row in rows if row["size"] == size]
    good, rows = (
        [row for row in part if row["gamma"] in learning_rates.FIXED]
        for part in (learning_rates.converged(rows), rows)
    )
    lines = [["paper, AlexNet", "26 of 96", "88 of 96"]]
    counts = []
    for algorithm in ("pc", "ipc"):
        won, all_ = (sum(r["algorithm"] == algorithm for r in part) for part in (good, rows))
        counts.append(f"{won} of {all_}" if all_ else NOT_RUN)
    what = f"ours, **reduced**: small CNN, {rows[0]['train']} images, one seed" if rows else "ours"
    yield from table(["", "PC", "iPC"], [*lines, [what, *counts]])
    yield from provenance(rows, sittings, learning_rates.STUDY.results)


def calibrated() -> Iterator[str]:
    """Fig. 3."""
    yield from ("## Calibration under distribution shift", "")
    yield "The paper: AlexNet on CIFAR-10, AdaECE on clean images 0.12 (BP) and 0.05 (iPC)."
    yield ""
    rows, sittings = read(calibration.STUDY.results)
    size = max((row["size"] for row in rows), default=0)
    rows = [row for row in rows if row["size"] == size]
    if not rows:
        yield from (f"Ours: {NOT_RUN}.", "")
        return
    images = rows[0]["settings"].get("data.train_size")
    reduced = "**Reduced**: " if images else ""
    network = f"{reduced}{rows[0]['task']}, {images or 45_000:,} images"
    count = len({row["seed"] for row in rows})
    seeds = f"{count} seeds" if count > 1 else "one seed"
    yield (
        f"{network}, {rows[0]['test']:,} test images, {seeds}. Figures are medians over six "
        "corruptions and the seeds, by intensity; 0 is clean."
    )
    yield ""
    for title, pair in calibration.compared(rows).items():
        lines = []
        for which, what in ((1, "AdaECE"), (0, "accuracy, %")):
            for name, found in zip(calibration.ALGORITHMS, pair, strict=True):
                if not found:
                    continue
                values = [calibration.figures(found, i, which) for i in range(6)]
                digits = ".3f" if which else ".1f"
                lines.append([f"{what}, {name}", *(f"{median(v):{digits}}" for v in values)])
        yield from table([f"models of {title}", *map(str, range(6))], lines)
    if calibration.matched(rows) is None:
        yield from ("No pair of epochs matches in test accuracy within half a point.", "")
    yield from provenance(rows, sittings, calibration.STUDY.results)


def speed() -> Iterator[str]:
    """Throughput."""
    yield from ("## Speed of the CNN", "")
    path = study.HERE / "speed.json"
    if not path.exists():
        yield from (f"{NOT_RUN}.", "")
        return
    found = json.loads(path.read_text())
    lines = []
    for name, pace in found["images_per_second"].items():
        ms = found["milliseconds"]
        share = f"{found['data_share'][name]:.1%}"
        epoch = f"{45_000 / pace:.0f} s"
        lines.append([name, f"{ms[name]:.0f}", f"{ms['data']:.1f}", share, f"{pace:.0f}", epoch])
    head = ["", "step, ms", "data + augmentation, ms", "their share", "images / s", "an epoch"]
    yield from table(head, lines)
    yield from (
        f"On {machine(found)}, in batches of {found['batch']}; an epoch is 45,000 images:",
        "",
        f"- `{found['command']}`",
        "",
        f"All figures: [{path.name}]({link(path)}).",
        "",
    )


def compared(rows: Sequence[Row], task: str) -> list[Row]:
    """Without sizes above the largest that has both backprop and iPC, where any has."""
    bp, ipc = ({r["size"] for r in rows if r["row"] == f"{task}_{name}"} for name in ("bp", "ipc"))
    return [row for row in rows if row["size"] <= max(bp & ipc, default=row["size"])]


def language_models() -> Iterator[str]:
    """Table 3."""
    yield from (
        "## Table 3: test perplexity of language models",
        "",
        "In brackets is how many converged: in the paper of ten, here of how many. Rows learned "
        "from fewer batches are compared with each other alone.",
        "",
        "With all nodes iPC has F_KL at the logits of attention and Gaussian energies at the other "
        "activations, as in the paper. With the head only it has one Gaussian node, at the head's "
        "activation: below that gradients are backprop's. The learning rate of both falls.",
        "",
    )
    rows, sittings = read(language.STUDY.results)
    lines, used = [], []
    for task, paper in TABLE_3.items():
        theirs = dict(zip(("bp", "pc", "ipc, all nodes"), paper, strict=True))
        shared = [r for r in compared(rows, task) if r["row"].startswith(task)]
        for label in language.LABELS:
            found = [row for row in shared if language.label(row) == label]
            size = max((row["size"] for row in found), default=0)
            mine = [row for row in found if row["size"] == size]
            used += mine
            name = f"{task}: {label.replace('bp', 'BP').replace('pc', 'PC')}"
            lines.append([name, theirs.get(label, ""), *_perplexity(mine, size)])
    yield from table(["", "paper", "ours", "batches", "weight steps", "seconds a batch"], lines)
    yield from provenance(used, sittings, language.STUDY.results)


def _perplexity(rows: Sequence[Row], size: int) -> list[str]:
    """Of one row at one size: perplexity, batches, weight steps and seconds."""
    if not rows:
        return [NOT_RUN, "", "", ""]
    won, batches = sum(map(language.converged, rows)), rows[0]["batches"]
    perplexity = f"{spread((row['test'] for row in rows), '.1f')} ({won} of {len(rows)})"
    steps = batches * language.STEPS.get(rows[0]["row"], 1)
    reduced = "**reduced**: " if size < 3 else ""
    seconds = f"{median(row['seconds'] for row in rows):.2f}"
    return [perplexity, f"{reduced}{batches:,}", f"{steps:,}", seconds]


def page() -> str:
    """The whole page."""
    sections = (classification, convergence, calibrated, speed, language_models)
    lines = [
        "# Report",
        "",
        "The paper's tables and ours beside them. `python -m recipes.report` writes this page from "
        "the results files of the studies. What was not run says so.",
        "",
    ]
    return (
        "\n".join([*lines, *(line for section in sections for line in section())]).rstrip() + "\n"
    )


def main(args: Sequence[str] | None = None) -> None:
    """Writes the page from the command line."""
    parser = argparse.ArgumentParser(prog="python -m recipes.report", description=__doc__)
    parser.add_argument("--out", type=Path, default=PAGE)
    options = parser.parse_args(args)
    options.out.write_text(page())
    print(f"Written to {options.out}")


if __name__ == "__main__":
    main()
