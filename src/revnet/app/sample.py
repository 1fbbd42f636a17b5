"""Drawing from a trained model, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from revnet.app.data import Array, Patches, Words, image_codecs
from revnet.app.errors import UserError
from revnet.app.model import Shape, Transformer
from revnet.app.plots import sample_grid
from revnet.app.run import Run


@dataclass
class Sampling:
    """How tokens are drawn.

    Args:
        temperature: Below 1 sharpens, above 1 flattens; 0 takes the likeliest token.
        top_k: Only the k likeliest tokens; 0 is all.
        top_p: Only the likeliest tokens that together reach this probability.
        seed: The same seed draws the same tokens.
        cache: Keep the keys and values of earlier tokens instead of computing them again.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    cache: bool = True


@torch.no_grad()
def generate(model: Transformer, prefix: Tensor, tokens: Tensor, length: int, how: Sampling) -> Tensor:
    """Continues `tokens` (batch, n), int64, to (batch, length)."""
    training = model.training
    model.eval()
    cache: dict[Any, Any] | None = {} if how.cache else None
    generator = torch.Generator().manual_seed(how.seed)
    while tokens.shape[1] < length:
        logits = model(prefix, tokens, cache=cache)[:, -1].float()
        tokens = torch.cat([tokens, draw(logits, how, generator)[:, None]], dim=1)
    model.train(training)
    return tokens


def draw(logits: Tensor, how: Sampling, generator: torch.Generator) -> Tensor:
    """One token (batch,) for each row of logits (batch, vocab)."""
    if how.temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = (logits / how.temperature).softmax(dim=-1)
    ordered, order = probabilities.sort(dim=-1, descending=True)
    if how.top_k:
        ordered[:, how.top_k :] = 0
    # A token stays if those before it do not reach top_p: the likeliest always stays.
    ordered[ordered.cumsum(dim=-1) - ordered >= how.top_p] = 0
    # The largest of p / Exp(1) is a draw from p. The noise comes from the CPU: alike on every device.
    noise = torch.empty(ordered.shape).exponential_(generator=generator).to(ordered.device)
    return order.gather(1, (ordered / noise).argmax(dim=-1, keepdim=True))[:, 0]


def images_of(
    model: Transformer, words: Words, patches: Patches, captions: Sequence[str], each: int, how: Sampling
) -> Array:
    """`each` images for every caption: (captions, each, height, width, channels), uint8."""
    device = model.rotary.device
    prefix = torch.from_numpy(np.repeat(words.encode(captions), each, axis=0)).to(device)
    nothing = torch.empty(len(prefix), 0, dtype=torch.int64, device=device)
    tokens = generate(model, prefix, nothing, model.shape.length, how)
    images = patches.decode(tokens.cpu().numpy())
    return images.reshape(len(captions), each, *images.shape[1:])


def load_model(run: Run, device: torch.device) -> Transformer:
    """The model of a run with its saved weights."""
    from safetensors.torch import load_file

    model = Transformer(Shape(**run.read_json("config.json")["shape"])).to(device)
    path = run.path / "weights.safetensors"
    try:
        model.load_state_dict(load_file(path, device=str(device)))
    except FileNotFoundError:
        raise UserError(f"{run.path} has no weights yet: they are saved with the first checkpoint") from None
    except Exception as error:
        raise UserError(f"{path} is damaged: {error}") from error
    return model


def sample(run_path: str, captions: Sequence[str], out: str | None, each: int, device: str, how: Sampling) -> Path:
    """Draws `each` images for every caption and saves them as a grid."""
    from revnet.app.train import find_device

    run = Run.open(run_path)
    spec = run.read_json("data.json")
    words, patches = image_codecs(spec)
    captions = captions or spec["show"]
    model = load_model(run, find_device(device))
    path = Path(out) if out else run.path / "sample.png"
    sample_grid(path, captions, images_of(model, words, patches, captions, each, how))
    return path
