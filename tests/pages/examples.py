"""The examples of a page, and what they take for given: sentences, and a model of them."""

import re
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def pretrained():
    return BertForSequenceClassification(
        BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    )


def rows():
    """The same, sentence by sentence."""
    return [{k: v[i] for k, v in batch.items()} for batch in batches() for i in range(8)]


def batches():
    """Which of two tokens a sentence holds."""
    labels = torch.randint(2, (40, 8), generator=torch.Generator().manual_seed(0))
    ids = [torch.where(torch.arange(6) == 3, 20 + row[:, None], 7) for row in labels]
    return [{"input_ids": i, "labels": row} for i, row in zip(ids, labels, strict=True)]
