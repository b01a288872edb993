"""Tiny Hugging Face models, as they come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf

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

#: No dropout in a BERT.
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def bert(kind=hf.BertForSequenceClassification, **config):
    """Of ``V`` words, two layers and three labels, but for what ``config`` says."""
    return kind(hf.BertConfig(**_ENCODER | config))


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
