"""The README's examples run as they stand, in order, in one namespace."""

import re
from pathlib import Path

import pytest
import torch

from tests.pages.examples import blocks, pretrained, rows

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.filterwarnings("ignore")
def test_python_examples(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    space: dict = {"__name__": "readme", "sentences": rows()}
    pretrained().save_pretrained("pretrained")
    for number, block in enumerate(blocks(README, "python")):
        exec(compile(block, f"README.md, example {number}", "exec"), space)
    assert "Verdict: healthy." in capsys.readouterr().out
    module = space["trainer"].lightning_module
    for net in (module.net, space["net"]):
        right = net(space["images"]).argmax(1) == space["labels"]
        assert right.float().mean() > 0.9
    assert space["tuner"].report.nodes == ["bert.pooler"]
    assert space["tuner"].state.global_step == 5


def test_it_is_short():
    text = README.read_text()
    assert len(text.split()) <= 700
    prose = re.sub(r"(?s)```.*?```", ".", text)
    prose = re.sub(r"(?m)^[|#!].*$", ".", re.sub(r"\]\([^)]*\)", "]", prose))
    for sentence in re.split(r"[.:?]\s|·", prose):
        assert len(sentence.split()) <= 30, sentence


def test_named_files_exist():
    text = README.read_text()
    paths = re.findall(r"\]\(([^)#:]+\.[a-z]+)[)#]", text)
    assert len(paths) > 10
    for path in paths:
        assert (README.parent / path).exists(), path
