"""The README's examples run as they stand, in order, in one namespace."""

import re
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
)

README = Path(__file__).parent.parent / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


def pretrained():
    return BertForSequenceClassification(
        BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    )


def batches():
    """Which of two tokens a sentence holds."""
    labels = torch.randint(2, (40, 8), generator=torch.Generator().manual_seed(0))
    ids = [torch.where(torch.arange(6) == 3, 20 + row[:, None], 7) for row in labels]
    return [{"input_ids": i, "labels": row} for i, row in zip(ids, labels, strict=True)]


@pytest.mark.filterwarnings("ignore")
def test_python_examples(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    rows = [{k: v[i] for k, v in batch.items()} for batch in batches() for i in range(8)]
    space: dict = {"__name__": "readme", "batches": batches(), "sentences": rows}
    pretrained().save_pretrained("pretrained")
    for number, block in enumerate(blocks("python")):
        exec(compile(block, f"README.md, example {number}", "exec"), space)
    printed = capsys.readouterr().out
    assert "2 2 ['net.1', 'net.3']" in printed
    table = [line.split() for line in blocks("text")[0].splitlines() if "│" in line]
    for row in table:
        assert any(line.split() == row for line in printed.splitlines()), row
    assert space["tuner"].report.nodes == ["bert.pooler"]
    assert space["tuner"].state.global_step == 5
    report = space["trainer"].strategy.report
    assert all(energy > 0 for energy in report.peak_energy.values())
    accuracy = (
        space["model"].net(space["images"]).argmax(1).numpy() == space["digits"].target
    ).mean()
    assert accuracy > 0.9
    tuned = AutoModelForSequenceClassification.from_pretrained("tuned").eval()
    assert torch.equal(tuned(**space["batch"]).logits, space["net"].eval()(**space["batch"]).logits)
    before = AutoModelForSequenceClassification.from_pretrained("pretrained").state_dict()
    still = [n for n, value in tuned.state_dict().items() if torch.equal(value, before[n])]
    assert not any("layer" in name and "weight" in name for name in still)
    assert space["loss"] < 2.2


def test_named_files_exist():
    text = README.read_text()
    for name in re.findall(r"`lightning_pc/([a-z]+\.py)`|`([a-z]+\.py)`", text):
        assert list((README.parent / "lightning_pc").rglob("".join(name))), name
    paths = re.findall(r"recipes/[\w/]+\.(?:yaml|json|md)", text)
    paths += re.findall(r"\]\(([^)#:]+\.[a-z]+)[)#]", text)
    assert paths
    for path in paths:
        assert (README.parent / path).exists(), path
