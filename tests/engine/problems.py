"""A table of modules, batches and losses that several test files try, and what compares them."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers as hf
from torch import nn

from lightning_pc.precisions import Precisions

ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}


def relative(a, b):
    """Relative distance of two tensors."""
    return float((a - b).norm() / b.norm().clamp_min(1e-300))


def far(model, other, entry=0.0):
    """Largest relative distance of two modules' parameters, with its name.

    `entry` is the least size of an entry to which a distance is compared: a bias that starts at
    zero and whose gradient is zero but for rounding (a key's, in attention) stays near zero.
    """
    distances = []
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        size = max(float(q.detach().norm()), entry * q.numel() ** 0.5, 1e-300)
        distances.append((float((p - q).detach().norm()) / size, name))
    return max(distances)


def twin(model):
    return copy.deepcopy(model)


@dataclass(frozen=True)
class ByDepth(Precisions):
    """``ratio ** (depth - 1)`` at every step, as a user writes weights that do not vary."""

    ratio: float
    name = "by depth"
    varies = False

    def weight(self, depth, t, steps):
        return self.ratio ** (depth - 1) if depth else 1.0


def MLP(sizes, f="tanh"):
    layers = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), ACTIVATIONS[f]()]
    return nn.Sequential(*layers[:-1])


def CNN():
    """BatchNorm in train mode, pooling, in-place activations."""
    return nn.Sequential(
        *(nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU(inplace=True)),
        *(nn.MaxPool2d(2), nn.Conv2d(3, 4, 2, bias=False), nn.BatchNorm2d(4)),
        *(nn.LeakyReLU(0.1, inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)),
    )


def Dropped():
    return nn.Sequential(
        *(nn.Dropout(0.2), nn.Linear(6, 9), nn.Tanh(), nn.Dropout(0.5)),
        *(nn.Linear(9, 7), nn.Dropout(0.3), nn.GELU(), nn.Linear(7, 4)),
    )


class ResidualBlock(nn.Module):
    """The skip is added in place and passes an in-place activation."""

    def __init__(self, width):
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        h = self.b(self.act(self.a(x)))
        h += x
        return self.act(h)


class Residual(nn.Module):
    def __init__(self, width=6, blocks=3):
        super().__init__()
        self.stem = nn.Linear(6, width)
        self.layers = nn.ModuleList(ResidualBlock(width) for _ in range(blocks))
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Skipping(nn.Module):
    """Residual, the loss reads every node: ``stem``, so many ``branches``, ``head``."""

    def __init__(self, branches=3, f=torch.tanh, width=8, outputs=4):
        super().__init__()
        self.stem, self.head, self.f = nn.Linear(6, width), nn.Linear(width, outputs), f
        self.branches = nn.ModuleList(nn.Linear(width, width) for _ in range(branches))

    def forward(self, x):
        h = self.stem(x)
        for branch in self.branches:
            h = h + branch(self.f(h)) / len(self.branches) ** 0.5
        return self.head(h)


class Thrice(nn.Module):
    """One Linear used three times, or as told, in a chain."""

    def __init__(self, times=3):
        super().__init__()
        self.shared, self.head, self.times = nn.Linear(6, 6), nn.Linear(6, 4), times

    def forward(self, x):
        for _ in range(self.times):
            x = torch.tanh(self.shared(x))
        return self.head(x)


class Tied(nn.Module):
    """The embedding is the head."""

    def __init__(self, vocabulary=11):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 6)
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 6)
        self.head = nn.Linear(6, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        h = self.b(F.gelu(self.a(self.embedding(ids))))
        return self.head(torch.tanh(h)).flatten(0, 1)


class Transformer(nn.Module):
    """torch's own encoder behind an embedding."""

    def __init__(self, vocabulary=11, width=8, layers=2, dropout=0.1, **kwargs):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        layer = nn.TransformerEncoderLayer(width, 2, 12, dropout, batch_first=True, **kwargs)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids):
        return self.head(self.encoder(self.embedding(ids))).flatten(0, 1)


class UNet(nn.Module):
    """Skips from the way down to the way up."""

    def __init__(self):
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.middle = nn.Conv2d(6, 6, 3, padding=1)
        self.up2, self.up1 = nn.Conv2d(12, 4, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.head = nn.Conv2d(4, 2, 1)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x):
        one = self.act(self.down1(x))
        two = self.act(self.down2(F.max_pool2d(one, 2)))
        h = self.act(self.middle(two))
        h = self.act(self.up2(torch.cat([h, two], 1)))
        h = F.interpolate(h, scale_factor=2)
        return self.head(self.act(self.up1(torch.cat([h, one], 1))))


class LSTM(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.lstm = nn.LSTM(6, 8, batch_first=True)
        self.fc, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, ids):
        h, _ = self.lstm(self.embedding(ids))
        return self.head(torch.relu(self.fc(h[:, -1])))


def vectors(n, classes=4):
    return torch.randn(n, 6), torch.randint(0, classes, (n,))


def images(n):
    return torch.randn(n, 1, 8, 8), torch.randint(0, 4, (n,))


def sequences(n):
    ids = torch.randint(0, 11, (n, 5))
    return ids, ids.roll(1, 1).flatten()


def labelled(n):
    return torch.randint(0, 11, (n, 5)), torch.randint(0, 4, (n,))


def sgd(model, lr=0.05):
    return torch.optim.SGD(model.parameters(), lr)


def classifier(model, x, y):
    return lambda: F.cross_entropy(model(x), y)


def double(value):
    return value.double() if value.is_floating_point() else value


# Tiny Hugging Face models, as they come. ---------------------------------------------------------
V, B, S = 50, 4, 7
_SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
_ENCODER = dict(vocab_size=V, max_position_embeddings=40, num_labels=3, pad_token_id=0, **_SMALL)
_DECODER = dict(
    _SMALL,
    vocab_size=V,
    max_position_embeddings=40,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_GROUPED = dict(_DECODER, num_key_value_heads=1)
_IMAGES = dict(image_size=32, patch_size=8, num_labels=3, **_SMALL)
_SPECIAL = {"vocab_size": V, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BART = dict(
    d_model=16,
    decoder_start_token_id=2,
    max_position_embeddings=40,
    **{f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers",)},
    **{f"{side}_attention_heads": 2 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 24 for side in ("encoder", "decoder")},
)


@dataclass
class Tiny:
    """A Hugging Face model: its class, its config, what its batch holds, its FFN activations."""

    model: str
    config: Any
    batch: str = "classify"
    ffn: str = ""  # regex of the names of the nodes at its FFN activations
    count: int = 2
    options: dict | None = None

    def make(self, dtype=torch.float32):
        torch.manual_seed(0)
        return getattr(hf, self.model)(self.config()).to(dtype).train()

    def draw(self, dtype=torch.float32):
        torch.manual_seed(1)
        ids, labels = torch.randint(3, V, (B, S)), torch.randint(0, 3, (B,))
        mask = torch.ones(B, S, dtype=torch.long)
        mask[1, 5:] = 0
        pixels = torch.randn(B, 3, 32, 32, dtype=dtype)
        text = {"input_ids": ids, "attention_mask": mask}
        return {
            "classify": dict(text, labels=labels),
            "language": dict(text, labels=ids),
            "image": {"pixel_values": pixels, "labels": labels},
            "both": dict(text, pixel_values=pixels, return_loss=True),
        }[self.batch]


TINY = {
    "bert": Tiny(
        "BertForSequenceClassification",
        lambda: hf.BertConfig(**_ENCODER),
        ffn=r"bert\.encoder\.layer\.\d\.intermediate\.intermediate_act_fn",
    ),
    "bert-mlm": Tiny(
        "BertForMaskedLM",
        lambda: hf.BertConfig(**_ENCODER),
        "language",
        ffn=r"bert\.encoder\.layer\.\d\.intermediate\.intermediate_act_fn",
    ),
    "roberta": Tiny(
        "RobertaForSequenceClassification",
        lambda: hf.RobertaConfig(**_ENCODER),
        ffn=r"roberta\.encoder\.layer\.\d\.intermediate\.intermediate_act_fn",
    ),
    "albert": Tiny(
        "AlbertForSequenceClassification",
        lambda: hf.AlbertConfig(embedding_size=8, **_ENCODER),
        ffn=r".*albert_layers\.0\.activation(#2)?",
    ),
    "distilbert": Tiny(
        "DistilBertForSequenceClassification",
        lambda: hf.DistilBertConfig(
            vocab_size=V, dim=16, n_layers=2, n_heads=2, hidden_dim=24, num_labels=3
        ),
        ffn=r".*ffn\.activation",
    ),
    "electra": Tiny(
        "ElectraForSequenceClassification",
        lambda: hf.ElectraConfig(embedding_size=8, **_ENCODER),
        ffn=r".*intermediate_act_fn",
    ),
    "deberta-v2": Tiny(
        "DebertaV2ForSequenceClassification",
        lambda: hf.DebertaV2Config(**_ENCODER),
        ffn=r".*intermediate_act_fn",
    ),
    "gpt2": Tiny(
        "GPT2LMHeadModel",
        lambda: hf.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=40, **_SPECIAL),
        "language",
        ffn=r"transformer\.h\.\d\.mlp\.act",
    ),
    "llama": Tiny(
        "LlamaForCausalLM", lambda: hf.LlamaConfig(**_GROUPED), "language", ffn=r".*mlp\.act_fn"
    ),
    "qwen2": Tiny(
        "Qwen2ForCausalLM", lambda: hf.Qwen2Config(**_GROUPED), "language", ffn=r".*mlp\.act_fn"
    ),
    "gemma": Tiny(
        "GemmaForCausalLM",
        lambda: hf.GemmaConfig(head_dim=8, **_GROUPED),
        "language",
        ffn=r".*mlp\.act_fn",
    ),
    "phi": Tiny(
        "PhiForCausalLM", lambda: hf.PhiConfig(**_DECODER), "language", ffn=r".*mlp\.activation_fn"
    ),
    "gpt-neox": Tiny(
        "GPTNeoXForCausalLM",
        lambda: hf.GPTNeoXConfig(**_DECODER),
        "language",
        ffn=r".*mlp\.act",
    ),
    "opt": Tiny(
        "OPTForCausalLM",
        lambda: hf.OPTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            ffn_dim=24,
            max_position_embeddings=40,
            word_embed_proj_dim=16,
            **_SPECIAL,
        ),
        "language",
        ffn=r".*layers\.\d\.activation_fn",
    ),
    "bloom": Tiny(
        "BloomForCausalLM",
        lambda: hf.BloomConfig(hidden_size=16, n_layer=2, n_head=2, **_SPECIAL),
        "language",
        ffn=r".*mlp\.gelu_impl",
    ),
    "mixtral": Tiny(
        "MixtralForCausalLM",
        lambda: hf.MixtralConfig(num_local_experts=2, num_experts_per_tok=1, **_GROUPED),
        "language",
        ffn=r".*experts\.act_fn",
    ),
    "mamba": Tiny(
        "MambaForCausalLM",
        lambda: hf.MambaConfig(hidden_size=16, num_hidden_layers=2, state_size=4, **_SPECIAL),
        "language",
        ffn="",
    ),
    "t5": Tiny(
        "T5ForConditionalGeneration",
        lambda: hf.T5Config(
            vocab_size=V,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
        ),
        "language",
        ffn=r".*DenseReluDense\.act",
        count=4,
    ),
    "bart": Tiny(
        "BartForConditionalGeneration",
        lambda: hf.BartConfig(**_BART, **_SPECIAL),
        "language",
        ffn=r".*layers\.\d\.activation_fn",
        count=4,
    ),
    "vit": Tiny(
        "ViTForImageClassification",
        lambda: hf.ViTConfig(**_IMAGES),
        "image",
        ffn=r".*(intermediate_act_fn|mlp\.activation_fn)",
    ),
    "swin": Tiny(
        "SwinForImageClassification",
        lambda: hf.SwinConfig(
            image_size=32,
            patch_size=4,
            embed_dim=8,
            depths=[1, 1],
            num_heads=[1, 2],
            window_size=4,
            num_labels=3,
        ),
        "image",
        ffn=r".*mlp\.activation_fn",
    ),
    "resnet": Tiny(
        "ResNetForImageClassification",
        lambda: hf.ResNetConfig(
            embedding_size=8,
            hidden_sizes=[8, 16],
            depths=[1, 2],
            layer_type="basic",
            num_labels=3,
        ),
        "image",
        ffn=r".*activation",
        count=7,
    ),
    "convnext": Tiny(
        "ConvNextForImageClassification",
        lambda: hf.ConvNextConfig(
            num_stages=2, hidden_sizes=[8, 16], depths=[1, 2], patch_size=4, num_labels=3
        ),
        "image",
        ffn=r".*\.act",
        count=3,
    ),
    "clip": Tiny(
        "CLIPModel",
        lambda: hf.CLIPConfig(
            text_config=dict(_DECODER),
            vision_config=dict(_SMALL, image_size=32, patch_size=8),
            projection_dim=8,
        ),
        "both",
        ffn=r".*mlp\.activation_fn",
        count=4,
    ),
}
