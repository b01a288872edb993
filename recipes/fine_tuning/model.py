"""Any pretrained classifier or masked language model, whole, in part, or through LoRA adapters."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import lightning as L
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

HEADS: dict[str, Any] = {
    "classification": AutoModelForSequenceClassification,
    "masked": AutoModelForMaskedLM,
}


class FineTuned(L.LightningModule):
    """A model of transformers that goes on learning.

    Args:
        checkpoint: Folder or name that ``from_pretrained`` takes.
        task: "classification" or "masked".
        trained: "all"; the last so many blocks and what comes after them (0: that alone); or
            "lora", adapters in every linear layer, for which `peft` is needed.
        labels: Classes, for classification.
        pretrained: False draws all weights anew: the same model from scratch.
        save_to: Folder for ``save_pretrained`` at the end of the fit; LoRA adapters are merged.

    Raises:
        OSError: There is no such model (transformers says where it looked).
        ValueError: The folder holds no model; ``task`` or ``trained`` is none of these; or the
            model has fewer blocks.
        ImportError: LoRA without `peft`.
    """

    def __init__(
        self,
        checkpoint: str,
        task: Literal["classification", "masked"] = "classification",
        trained: Literal["all", "lora"] | int = "all",
        labels: int = 2,
        pretrained: bool = True,
        save_to: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if task not in HEADS:
            raise ValueError(f"task={task!r}: expected one of {', '.join(map(repr, HEADS))}.")
        options: dict[str, Any] = {"num_labels": labels} if task == "classification" else {}
        if pretrained:
            net = HEADS[task].from_pretrained(checkpoint, **options)
        else:
            net = HEADS[task].from_config(AutoConfig.from_pretrained(checkpoint, **options))
        if task == "classification" and net.config.model_type == "bert" and net.config.is_decoder:
            raise ValueError(
                f"{checkpoint} reads from left to right, and BERT's classifier looks at the first "
                "token alone: take a masked model."
            )
        self.save_to = None if save_to is None else Path(save_to)
        self.net: Any = _with_adapters(net, task) if trained == "lora" else net
        if trained not in ("all", "lora"):
            freeze(net, trained)
        self.net.train()  # from_pretrained leaves it in evaluation mode

    def setup(self, stage: str) -> None:
        """Compares the model with what the data was cut by.

        Raises:
            ValueError: The data's tokenizer has other tokens, or its sentences are too long.
        """
        data: Any = getattr(self.trainer, "datamodule", None)
        cutter, config = getattr(data, "tokenizer", None), self.net.config
        if cutter is None:
            return
        if len(cutter) > config.vocab_size:
            raise ValueError(
                f"The data's tokenizer has {len(cutter)} tokens, the model knows "
                f"{config.vocab_size}: give both the same checkpoint."
            )
        longest = getattr(config, "max_position_embeddings", None)
        if longest is not None and data.max_tokens > longest:
            raise ValueError(f"max_tokens={data.max_tokens}: the model takes {longest}.")

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The model's own loss."""
        loss: Tensor = self.net(**batch).loss
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch["labels"]))
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Logs ``dev_loss`` and for classifiers ``dev_accuracy``."""
        self._measure(batch, "dev")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Logs ``test_loss`` and for classifiers ``test_accuracy``."""
        self._measure(batch, "test")

    def _measure(self, batch: dict[str, Tensor], split: str) -> None:
        output, size = self.net(**batch), len(batch["labels"])
        self.log(f"{split}_loss", output.loss, batch_size=size)
        if batch["labels"].dim() == 1:
            correct = (output.logits.argmax(-1) == batch["labels"]).float().mean()
            self.log(f"{split}_accuracy", correct, prog_bar=True, batch_size=size)

    def on_fit_end(self) -> None:
        """Saves, for plain transformers to load."""
        if self.save_to is None or not self.trainer.is_global_zero:
            return
        net = self.net
        if hasattr(net, "merge_and_unload"):
            net = copy.deepcopy(net).merge_and_unload()
        net.save_pretrained(self.save_to)
        tokenizer = getattr(getattr(self.trainer, "datamodule", None), "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(self.save_to)


def blocks(net: PreTrainedModel) -> nn.ModuleList:
    """The one list of blocks that is in no other.

    Raises:
        ValueError: There is none, or several (an encoder and a decoder), or they share weights.
    """
    found = [m for m in net.modules() if isinstance(m, nn.ModuleList)]
    inner = {m for stack in found for block in stack for m in block.modules()}
    outer = [stack for stack in found if stack not in inner]
    if len(outer) != 1 or len(outer[0]) < 2:
        raise ValueError(
            f"{type(net).__name__} has no single list of two or more blocks: pass trained='all' "
            "or 'lora'."
        )
    return outer[0]


def freeze(net: PreTrainedModel, last: int) -> None:
    """Leaves the last blocks trainable, and what is registered after them.

    Raises:
        ValueError: There are not so many blocks.
    """
    stack = blocks(net)
    if isinstance(last, bool) or not isinstance(last, int) or not 0 <= last <= len(stack):
        raise ValueError(
            f"trained={last!r}: expected 'all', 'lora' or a number of last blocks, 0 to "
            f"{len(stack)}."
        )
    before, inside = True, {p for block in stack for p in block.parameters()}
    kept = {p for block in stack[len(stack) - last :] for p in block.parameters()}
    for parameter in net.parameters():
        before = before and parameter not in inside
        after = not before and parameter not in inside
        parameter.requires_grad_(parameter in kept or after)


def _with_adapters(net: PreTrainedModel, task: str) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("trained='lora' needs `pip install peft`.") from error
    kinds = {"classification": "SEQ_CLS"}
    adapted: nn.Module = get_peft_model(
        net, LoraConfig(task_type=kinds.get(task), target_modules="all-linear")
    )
    return adapted
