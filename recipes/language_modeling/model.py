"""BERT that learns to say masked or next tokens: an ordinary LightningModule around transformers'.

Nothing in it knows of predictive coding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.text import Perplexity
from transformers import BertConfig, BertForMaskedLM, BertLMHeadModel

from recipes.language_modeling.batches import IGNORED, Batch, Task
from recipes.language_modeling.data import TextData
from recipes.language_modeling.tokens import BOS, EOS, PAD


class LanguageModel(L.LightningModule):
    """Masked BERT, or with a triangular attention mask the conditional one.

    The defaults are the paper's (section 5): two blocks, one head, hidden size 128, 8001 tokens.
    Input and output embeddings are two matrices. The optimizer is named in the YAML.

    Args:
        task: "masked" or "conditional".
        vocabulary: Tokens.
        layer_norm: False takes every LayerNorm out (appendix D.3: masked PC and iPC, conditional
            PC).
        hidden: Hidden size.
        blocks: Transformer blocks.
        heads: Attention heads.
        intermediate: Units of the feed-forward layers; BERT's four times the hidden size.
        positions: Longest input, special tokens included.
        activation: Of the feed-forward layers and the head, a name of transformers'.
        dropout: Of embeddings, attention weights and block outputs.
        linear: How linear layers are drawn: "torch", uniform within 1/sqrt(inputs) as PyTorch
            does, or "bert", normal of deviation 0.02, which was meant for BERT's 768 units.
        embeddings: Standard deviation of embeddings at first (BERT: 0.02; without LayerNorm,
            which would scale them, more).

    Raises:
        ValueError: ``task`` or ``linear`` is neither, or ``embeddings`` not above 0.
    """

    def __init__(
        self,
        task: Task = "masked",
        vocabulary: int = 8001,
        layer_norm: bool = True,
        hidden: int = 128,
        blocks: int = 2,
        heads: int = 1,
        intermediate: int = 512,
        positions: int = 64,
        activation: str = "gelu",
        dropout: float = 0.1,
        linear: Literal["torch", "bert"] = "torch",
        embeddings: float = 0.02,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if task not in get_args(Task):
            raise ValueError(f"task={task!r}: expected 'masked' or 'conditional'.")
        if linear not in ("torch", "bert"):
            raise ValueError(f"linear={linear!r}: expected 'torch' or 'bert'.")
        if not embeddings > 0:
            raise ValueError(f"embeddings={embeddings}: expected a deviation above 0.")
        self.task, self.vocabulary = task, vocabulary
        config = BertConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            num_hidden_layers=blocks,
            num_attention_heads=heads,
            intermediate_size=intermediate,
            max_position_embeddings=positions,
            hidden_act=activation,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            tie_word_embeddings=False,
            is_decoder=task == "conditional",
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
        )
        self.net = {"masked": BertForMaskedLM, "conditional": BertLMHeadModel}[task](config)
        for module in self.net.modules():
            if isinstance(module, nn.Linear) and linear == "torch":
                module.reset_parameters()
            if isinstance(module, nn.Embedding):
                with torch.no_grad():
                    module.weight *= embeddings / config.initializer_range
        if not layer_norm:
            _take_out(self.net, nn.LayerNorm)
        #: Of the sentences' own tokens, as in the paper; and with their ends, as usual elsewhere.
        self.metrics = nn.ModuleDict(
            {f"{s}{end}": Perplexity() for s in ("dev", "test") for end in ("", "_with_end")}
        )
        self.tokenizer: bytes | None = None

    def forward(self, ids: Tensor, where: Tensor | None = None) -> Tensor:
        """Logits of tokens.

        Args:
            ids: Tokens, [B, S], all B sentences of one length.
            where: Positions to say something about, [B, S]; None is all of them.

        Returns:
            Logits, [N, V] of the N positions, or [B, S, V].
        """
        hidden = self.net.bert(ids, use_cache=False).last_hidden_state
        return self.net.cls(hidden if where is None else hidden[where])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross-entropy at the targets."""
        logits, targets = self._asked(batch)
        loss = F.cross_entropy(logits, targets)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(targets))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Logs ``dev_perplexity``, of the sentences' own tokens, each of the same weight.

        The conditional model is asked for the end of a sentence, too: ``dev_perplexity_with_end``.
        """
        self._measure(batch, "dev")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Logs ``test_perplexity`` and ``test_perplexity_with_end``."""
        self._measure(batch, "test")

    def setup(self, stage: str) -> None:
        """Takes over the tokenizer.

        Raises:
            ValueError: Data and model differ in task, vocabulary, length or tokenizer.
        """
        data: Any = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, TextData):
            return
        assert data.corpus is not None
        longest = self.net.config.max_position_embeddings + (self.task == "conditional")
        if data.task != self.task:
            raise ValueError(f"The data asks for {data.task!r} tokens, the model is {self.task!r}.")
        if data.vocabulary != self.vocabulary:
            raise ValueError(
                f"The tokenizer has {data.vocabulary} tokens, the model {self.vocabulary}: pass "
                "the same vocabulary to data and model."
            )
        if data.max_tokens > longest:
            raise ValueError(
                f"max_tokens={data.max_tokens}: the model takes {longest}; raise its positions."
            )
        if self.tokenizer not in (None, data.corpus.model):
            raise ValueError(
                "The checkpoint was trained with another tokenizer than the data is cut with: use "
                "the file of tokens (cache_dir) that it was trained on."
            )
        self.tokenizer = data.corpus.model

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint is all that generation needs."""
        checkpoint["tokenizer"] = self.tokenizer

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The checkpoint's tokenizer must be that of the data.

        Raises:
            ValueError: It is not.
        """
        found = checkpoint.get("tokenizer")
        if self.tokenizer is not None and found != self.tokenizer:
            raise ValueError(
                "The checkpoint was trained with another tokenizer than the data is cut with: use "
                "the file of tokens (cache_dir) that it was trained on."
            )
        self.tokenizer = found

    def _asked(self, batch: Batch) -> tuple[Tensor, Tensor]:
        where = batch.targets != IGNORED
        return self(batch.ids, where), batch.targets[where]

    def _measure(self, batch: Batch, split: str) -> None:
        logits, targets = self._asked(batch)
        own = targets != EOS
        for end, chosen in (("", own), ("_with_end", torch.ones_like(own))):
            if end and self.task == "masked":
                continue
            metric = self.metrics[f"{split}{end}"]
            # in float32 a target's probability may round to 0
            metric.update(logits[chosen][None].double(), targets[chosen][None])
            self.log(f"{split}_perplexity{end}", metric, prog_bar=not end, batch_size=len(targets))


def _take_out(module: nn.Module, kind: type[nn.Module]) -> None:
    for name, child in module.named_children():
        if isinstance(child, kind):
            setattr(module, name, nn.Identity())
        else:
            _take_out(child, kind)


def load(checkpoint: str | Path) -> LanguageModel:
    """A trained model from its checkpoint, in evaluation mode, with its tokenizer.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It is no checkpoint of a `LanguageModel`.
    """
    path = Path(checkpoint)
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: pass a checkpoint that training has written.")
    try:
        model = LanguageModel.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, torch and Lightning all have their own
        raise ValueError(f"{path} is no checkpoint of a LanguageModel ({error}).") from error
    if model.tokenizer is None:
        raise ValueError(f"{path} holds no tokenizer: it was not trained on a TextData.")
    return model.eval()
