"""Tiny models of other libraries at random weights, by name: what conversion is tested on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY, TOKENS = 97, 10


@cache
def admit_torchvision() -> None:
    """Make torchvision import beside a torch that its operators were not built for.

    The wheels of the index are for CUDA: beside a torch for CPUs their library does not load. An
    import then fails at two operators that no model here calls, so this defines their signatures.
    """
    found = find_spec("torchvision")
    if found is None or found.origin is None:
        return
    try:
        torch.ops.load_library(str(Path(found.origin).with_name("_C.so")))
    except OSError:
        for name in ("nms", "qnms"):
            torch.library.define(
                f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou) -> Tensor"
            )


admit_torchvision()

# What transformers calls the sizes of a text model, in its two families of names.
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_OLD = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "hidden_size": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_PAIR = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
_IMAGE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}


@dataclass
class Case:
    """A model, its batch, and what of its output counts.

    Attributes:
        name: of the row.
        library: where it is from.
        make: builds the model.
        batch: makes its keywords.
        generates: whether it has `generate`.
        options: of `revnet.convert`.
        calls: how many calls a step opens, where that is not one for each stack.
    """

    name: str
    library: str
    make: Callable[[], nn.Module]
    batch: Callable[[], dict[str, Any]]
    generates: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    calls: int | None = None


def ids() -> dict[str, Any]:
    tokens = torch.randint(3, VOCABULARY, (2, TOKENS))
    mask = torch.ones_like(tokens)
    mask[0, 7:] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def pair() -> dict[str, Any]:
    return {**ids(), "decoder_input_ids": torch.randint(3, VOCABULARY, (2, 6))}


def causal() -> dict[str, Any]:
    tokens = torch.randint(3, VOCABULARY, (2, TOKENS))
    return {"input_ids": tokens, "labels": tokens}


def image(key: str = "pixel_values", size: int = 16) -> Callable[[], dict[str, Any]]:
    return lambda: {key: torch.randn(2, 3, size, size)}


def _hugging(
    kind: str, head: str, batch: Callable[[], dict[str, Any]], sizes: dict[str, Any], **more: Any
) -> Case:
    options = more.pop("options", {})
    label = more.pop("label", kind)

    def make() -> nn.Module:
        import transformers

        config = transformers.AutoConfig.for_model(kind, **{**sizes, **more})
        model: nn.Module = getattr(transformers, head).from_config(config)
        return model

    generates = head == "AutoModelForCausalLM"
    return Case(label, "transformers", make, batch, generates, options)


def _decoder(kind: str, sizes: dict[str, Any] = _SIZES, **more: Any) -> Case:
    return _hugging(kind, "AutoModelForCausalLM", causal, sizes, **more)


def _encoder(kind: str, sizes: dict[str, Any] = _SIZES, **more: Any) -> Case:
    return _hugging(kind, "AutoModel", ids, sizes, **more)


def _vision(kind: str, **more: Any) -> Case:
    return _hugging(kind, "AutoModel", image(), _IMAGE, **more)


_EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
_SLIDING = {"sliding_window": 4}

TRANSFORMERS = [
    _decoder("llama"),
    _decoder("mistral", **_SLIDING),
    _decoder("qwen2"),
    _decoder("qwen3"),
    _decoder("gemma2", **_SLIDING),
    _decoder("gemma3_text", **_SLIDING, sliding_window_pattern=2),
    _decoder("phi3"),
    _decoder("olmo2"),
    _decoder("smollm3"),
    _decoder("cohere"),
    _decoder("stablelm"),
    _decoder("starcoder2"),
    _decoder("gpt2", _OLD),
    _decoder("gpt_neox"),
    _decoder("opt", _SIZES, ffn_dim=64, word_embed_proj_dim=32),
    _decoder("bloom", _OLD),
    _decoder("falcon", {k: v for k, v in _SIZES.items() if k != "head_dim"}),
    _decoder("mixtral", **_EXPERTS),
    _decoder("qwen3_moe", **_EXPERTS, moe_intermediate_size=32),
    _decoder("mamba", state_size=4, time_step_rank=4),
    _decoder("mamba2", state_size=4, num_heads=8, n_groups=2, chunk_size=4),
    _decoder(
        "jamba", **_EXPERTS, attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False
    ),
    _encoder("bert"),
    _encoder("roberta"),
    _encoder("electra", embedding_size=32),
    _encoder(
        "distilbert",
        {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 64, "n_layers": 3, "n_heads": 4},
    ),
    _encoder("deberta-v2", relative_attention=True, pos_att_type=["p2c", "c2p"]),
    _encoder("albert", embedding_size=16),
    _encoder("modernbert"),
    _vision("vit"),
    _vision("dinov2"),
    _hugging(
        "swin",
        "AutoModel",
        image(),
        {
            "image_size": 16,
            "patch_size": 2,
            "embed_dim": 8,
            "depths": [2, 2],
            "num_heads": [2, 4],
            "window_size": 2,
        },
    ),
    _hugging(
        "convnext",
        "AutoModel",
        image(size=32),
        {"hidden_sizes": [8, 16, 16, 32], "depths": [2, 2, 2, 2]},
    ),
    _hugging(
        "wav2vec2",
        "AutoModel",
        lambda: {"input_values": torch.randn(2, 400)},
        _SIZES,
        conv_dim=(16, 16),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_conv_pos_embedding_groups=2,
        num_conv_pos_embeddings=4,
        mask_time_prob=0.0,
        num_feat_extract_layers=2,
    ),
    _hugging(
        "whisper",
        "AutoModel",
        lambda: {
            "input_features": torch.randn(2, 8, 40),
            "decoder_input_ids": torch.randint(3, VOCABULARY, (2, 6)),
        },
        _PAIR,
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=16,
    ),
    _hugging(
        "t5",
        "AutoModel",
        pair,
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 3,
            "num_heads": 4,
            "pad_token_id": 0,
            "decoder_start_token_id": 0,
        },
    ),
    _hugging("bart", "AutoModel", pair, _PAIR),
    _hugging("marian", "AutoModel", pair, _PAIR),
]


def _timm(name: str, size: int = 32, **more: Any) -> Case:
    def make() -> nn.Module:
        import timm

        model: nn.Module = timm.create_model(name, num_classes=7, **more)
        return model

    return Case(name, "timm", make, image("x", size))


TIMM = [
    _timm("vit_tiny_patch16_224", img_size=32, depth=3, embed_dim=48, drop_path_rate=0.3),
    _timm("deit3_small_patch16_224", img_size=32, depth=3, embed_dim=48, num_heads=4),
    _timm("eva02_tiny_patch14_224", 28, img_size=28, depth=3, embed_dim=48, num_heads=4),
    _timm(
        "swin_tiny_patch4_window7_224",
        img_size=32,
        window_size=4,
        depths=(2, 2),
        embed_dim=16,
        num_heads=(2, 4),
    ),
    _timm("convnext_atto", depths=(2, 2, 3, 2), dims=(8, 16, 24, 32)),
    _timm("resnet18"),
    _timm("gmlp_s16_224", 32, img_size=32),
]


def _torchvision(name: str, **more: Any) -> Case:
    def make() -> nn.Module:
        import torchvision

        model: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=7, **more)
        return model

    return Case(f"torchvision {name}", "torchvision", make, image("x", 32))


def _diffusers(
    name: str,
    batch: Callable[[], dict[str, Any]],
    label: str = "",
    calls: int | None = None,
    **sizes: Any,
) -> Case:
    def make() -> nn.Module:
        import diffusers

        model: nn.Module = getattr(diffusers, name)(**sizes)
        return model

    return Case(label or name, "diffusers", make, batch, calls=calls)


# Sizes that the transformers of diffusers share.
_HEADS = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 3, "in_channels": 4}
_LATENT = {**_HEADS, "sample_size": 8, "patch_size": 2}
_PAIRED = {"joint_attention_dim": 24, "pooled_projection_dim": 12}


def latents() -> dict[str, Any]:
    labels = torch.tensor([1, 4])
    return {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": labels, "class_labels": labels}


def captioned() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([1, 4]),
        "encoder_hidden_states": torch.randn(2, 5, 24),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def paired(tokens: int, image: Tensor) -> dict[str, Any]:
    return {
        "hidden_states": image,
        "timestep": torch.tensor([1.0, 4.0]),
        "encoder_hidden_states": torch.randn(2, tokens, 24),
        "pooled_projections": torch.randn(2, 12),
    }


def positioned(tokens: int) -> dict[str, Any]:
    batch = paired(tokens, torch.randn(2, 16, 4))
    return {**batch, "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(tokens, 3)}


_FLUX = {**_HEADS, **_PAIRED, "num_single_layers": 2, "axes_dims_rope": (2, 2, 4)}

DIFFUSERS = [
    _diffusers("DiTTransformer2DModel", latents, norm_num_groups=2, **_LATENT),
    _diffusers(
        "PixArtTransformer2DModel",
        captioned,
        norm_num_groups=2,
        cross_attention_dim=16,
        caption_channels=24,
        **_LATENT,
    ),
    # Their blocks hand on two streams, the text first: they stay as they are, or all begin anew.
    _diffusers(
        "SD3Transformer2DModel",
        lambda: paired(5, torch.randn(2, 4, 8, 8)),
        calls=0,
        caption_projection_dim=16,
        pos_embed_max_size=8,
        out_channels=4,
        **_LATENT,
        **_PAIRED,
    ),
    _diffusers("FluxTransformer2DModel", lambda: positioned(5), calls=0, **_FLUX),
    _diffusers(
        "FluxTransformer2DModel",
        lambda: positioned(16),
        "FluxTransformer2DModel, as many text tokens as image tokens",
        calls=5,
        **_FLUX,
    ),
]


class Encoder(nn.Module):
    """`nn.TransformerEncoder` behind an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        return self.encoder(self.embed(tokens), mask)


def tokens() -> dict[str, Any]:
    return {"tokens": torch.randint(3, VOCABULARY, (2, TOKENS))}


OTHERS = [
    _torchvision("resnet18"),
    Case("nn.TransformerEncoder", "torch", Encoder, tokens),
]

CASES = [*TRANSFORMERS, *TIMM, *DIFFUSERS, *OTHERS]


def leaves(out: Any) -> list[Tensor]:
    """The floating-point tensors of a model's output."""
    if isinstance(out, Tensor):
        return [out]
    values = out.to_tuple() if hasattr(out, "to_tuple") else out
    return [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]


def weighted(y: Tensor) -> Tensor:
    """A scalar in which every element counts differently."""
    return (torch.linspace(0.5, 2.0, y.numel()).view_as(y) * y.float()).square().mean()
