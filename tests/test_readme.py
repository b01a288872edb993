"""The README's examples run as they stand, in order, in one namespace."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parent.parent / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.filterwarnings("ignore")
def test_python_examples(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    space: dict = {"__name__": "readme"}
    for number, block in enumerate(blocks("python")):
        exec(compile(block, f"README.md, example {number}", "exec"), space)
    printed = capsys.readouterr().out
    assert "8 2 ['net.1', 'net.3']" in printed
    table = [line.split() for line in blocks("text")[0].splitlines() if "│" in line]
    for row in table:
        assert any(line.split() == row for line in printed.splitlines()), row
    report = space["trainer"].strategy.report
    assert all(energy > 0 for energy in report.peak_energy.values())
    accuracy = (
        space["model"].net(space["images"]).argmax(1).numpy() == space["digits"].target
    ).mean()
    assert accuracy > 0.9
    assert space["loss"] < 2.2


def test_named_files_exist():
    text = README.read_text()
    for name in re.findall(r"`lightning_pc/([a-z]+\.py)`|`([a-z]+\.py)`", text):
        assert (README.parent / "lightning_pc" / "".join(name)).exists()
    for path in re.findall(r"recipes/\S+\.(?:yaml|json|md)", text):
        assert (README.parent / path).exists(), path
