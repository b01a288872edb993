"""Samples sentences from a conditional model, fills the masks of a sentence with a masked one.

python -m recipes.language_modeling.generate CHECKPOINT
python -m recipes.language_modeling.generate CHECKPOINT "The [MASK] of the company rose ."
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from sentencepiece import SentencePieceProcessor
from torch import Tensor

from recipes.language_modeling.batches import Task
from recipes.language_modeling.model import LanguageModel, load
from recipes.language_modeling.tokens import BOS, EOS, MASK, SPECIAL, tokenizer

BLANK = "[MASK]"


@torch.no_grad()
def sample(model: LanguageModel, start: str = "", temperature: float = 1.0, seed: int = 0) -> str:
    """A sentence, token by token.

    Args:
        model: A conditional model.
        start: The sentence's first words.
        temperature: Of the softmax; small ones prefer what is likely.
        seed: Of the draws.

    Raises:
        ValueError: The model is masked, or has no room for more words than these.
    """
    _must_be(model, "conditional")
    processor, generator = _processor(model), torch.Generator().manual_seed(seed)
    ids = [BOS, *processor.encode(start)] if start else [BOS]
    longest = model.net.config.max_position_embeddings
    if len(ids) >= longest:
        raise ValueError(f"The start has {len(ids)} tokens, the model takes {longest}.")
    while len(ids) < longest:
        logits = model(torch.tensor([ids]))[0, -1] / temperature
        logits[[i for i in range(SPECIAL) if i != EOS]] = -torch.inf
        drawn = int(torch.multinomial(logits.softmax(0), 1, generator=generator))
        if drawn == EOS:
            break
        ids.append(drawn)
    return str(processor.decode(ids[1:]))


@torch.no_grad()
def fill(model: LanguageModel, sentence: str, best: int = 3) -> list[tuple[str, float]]:
    """The likeliest tokens for each mask, one mask after the other, the surest first.

    Args:
        model: A masked model.
        sentence: Words, ``[MASK]`` where a token is missing.
        best: How many fillings of the mask that is filled last to give.

    Returns:
        Sentences and the last filling's probability, the likeliest first.

    Raises:
        ValueError: The model is conditional; no mask, or more tokens than the model takes.
    """
    _must_be(model, "masked")
    processor = _processor(model)
    ids = [BOS]
    for number, part in enumerate(sentence.split(BLANK)):
        ids += [MASK] * (number > 0) + processor.encode(part.strip())
    ids.append(EOS)
    longest = model.net.config.max_position_embeddings
    if MASK not in ids:
        raise ValueError(f"{sentence!r} holds no {BLANK}.")
    if len(ids) > longest:
        raise ValueError(f"The sentence has {len(ids)} tokens, the model takes {longest}.")
    while True:
        blanks = [i for i, token in enumerate(ids) if token == MASK]
        chances: Tensor = model(torch.tensor([ids]))[0, blanks]
        chances[:, :SPECIAL] = -torch.inf
        chances = chances.softmax(1)
        surest = int(chances.amax(1).argmax())
        values, tokens = chances[surest].topk(min(best, chances.shape[1] - SPECIAL))
        if len(blanks) == 1:
            break
        ids[blanks[surest]] = int(tokens[0])
    found = []
    for value, token in zip(values.tolist(), tokens.tolist(), strict=True):
        ids[blanks[0]] = token
        found.append((str(processor.decode(ids[1:-1])), value))
    return found


def _must_be(model: LanguageModel, task: Task) -> None:
    if model.task != task:
        raise ValueError(f"The model is {model.task}: expected a {task} one.")


def _processor(model: LanguageModel) -> SentencePieceProcessor:
    assert model.tokenizer is not None
    return tokenizer(model.tokenizer)


def main(args: Sequence[str] | None = None) -> None:
    """Prints sentences."""
    parser = argparse.ArgumentParser(prog="python -m recipes.language_modeling.generate")
    parser.add_argument("checkpoint", help="of either model")
    parser.add_argument("text", nargs="?", default="", help=f"start, or a sentence with {BLANK}")
    parser.add_argument("--count", type=int, default=3, help="sentences (default 3)")
    parser.add_argument("--temperature", type=float, default=1.0, help="default 1")
    parser.add_argument("--seed", type=int, default=0, help="of the first sentence")
    options = parser.parse_args(args)
    if options.temperature <= 0:
        parser.error("--temperature must be above 0")
    if options.count < 1:
        parser.error("--count must be 1 or more")
    try:
        model = load(options.checkpoint)
        if model.task == "masked":
            for sentence, chance in fill(model, options.text, options.count):
                print(f"{chance:6.1%}  {sentence}")
            return
        if BLANK in options.text:
            parser.error(
                f"this model is conditional: it goes on with a text, {BLANK} is the other's"
            )
        for i in range(options.count):
            print(sample(model, options.text, options.temperature, options.seed + i))
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
