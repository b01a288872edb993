"""Writes a trained model as a folder that plain transformers loads, tokenizer included.

python -m recipes.language_modeling.export CHECKPOINT FOLDER
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers.models import BPE
from torch import nn
from transformers import PreTrainedTokenizerFast

from recipes.language_modeling.model import LanguageModel, load
from recipes.language_modeling.tokens import BOS, EOS, MASK, PAD, SPECIAL, UNK, tokenizer


def export(model: LanguageModel, folder: str | Path) -> None:
    """Writes weights, configuration and tokenizer.

    Args:
        model: With a tokenizer.
        folder: Made where it is missing.

    Raises:
        ValueError: Its LayerNorms were taken out, which transformers' BERT cannot say.
    """
    if any(isinstance(m, nn.Identity) for m in model.modules()):
        raise ValueError(
            "This model has no LayerNorm, and transformers' BERT always has: train it with "
            "layer_norm: true to export it."
        )
    model.net.save_pretrained(folder)
    fast_tokenizer(model).save_pretrained(folder)


def fast_tokenizer(model: LanguageModel) -> PreTrainedTokenizerFast:
    """The SentencePiece tokenizer as one of transformers', with ``<s> .. </s>`` around a text."""
    assert model.tokenizer is not None
    processor = tokenizer(model.tokenizer)
    pieces = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
    names = {piece: i for i, piece in enumerate(pieces)}
    # SentencePiece numbers pieces in the order it merged them: two that make a piece merge to it.
    merges = [
        (left, right)
        for piece in pieces[SPECIAL:]
        for left, right in sorted(
            ((piece[:i], piece[i:]) for i in range(1, len(piece))),
            key=lambda pair: (names.get(pair[0], 0), names.get(pair[1], 0)),
        )
        if left in names and right in names
    ]
    fast = Tokenizer(BPE(names, merges, unk_token=pieces[UNK], fuse_unk=True))
    # SentencePiece's own rules but for rare characters: the 6,075 test sentences come out alike.
    blank = normalizers.Replace(Regex("[\\s\u200b\ufeff\ufffd]+"), " ")
    fast.normalizer = normalizers.Sequence([normalizers.NFKC(), blank, normalizers.Strip()])
    fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    fast.decoder = decoders.Metaspace(prepend_scheme="always")
    begin, end, mask = pieces[BOS], pieces[EOS], pieces[MASK]
    fast.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}", special_tokens=[(begin, BOS), (end, EOS)]
    )
    fast.add_special_tokens([AddedToken(mask, lstrip=True, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        pad_token=pieces[PAD],
        unk_token=pieces[UNK],
        bos_token=begin,
        eos_token=end,
        cls_token=begin,
        sep_token=end,
        mask_token=mask,
        model_max_length=model.net.config.max_position_embeddings,
    )


def main(args: Sequence[str] | None = None) -> None:
    """Exports from the command line."""
    parser = argparse.ArgumentParser(prog="python -m recipes.language_modeling.export")
    parser.add_argument("checkpoint")
    parser.add_argument("folder", type=Path)
    options = parser.parse_args(args)
    try:
        export(load(options.checkpoint), options.folder)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    print(f"{options.folder} is ready for transformers' from_pretrained")


if __name__ == "__main__":
    main()
