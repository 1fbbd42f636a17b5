"""Draw from a trained model, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from revnet.app.checks import shorten
from revnet.app.data import START, Array, Patches, Words, image_codecs
from revnet.app.device import find_device
from revnet.app.errors import UserError, check_least
from revnet.app.model import Shape, Transformer
from revnet.app.plots import sample_grid
from revnet.app.run import Run
from revnet.app.terminal import complain
from revnet.app.writing import new_file

# Images for a caption.
EACH = 8


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

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and self.top_k >= 0 and 0 < self.top_p <= 1):
            raise UserError(
                "--temperature and --top-k are at least 0, and --top-p is above 0 and at most 1"
            )
        if not -(2**63) <= self.seed < 2**63:
            raise UserError(f"--seed is {self.seed}, which is not an integer of 64 bits")


@torch.no_grad()
def generate(
    model: Transformer, prefix: Tensor, tokens: Tensor, length: int, how: Sampling
) -> Tensor:
    """Continue `tokens` (batch, n), int64, to (batch, length)."""
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
    """Draw one token (batch,) for each row of logits (batch, vocab)."""
    if how.temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = (logits / how.temperature).softmax(dim=-1)
    ordered, order = probabilities.sort(dim=-1, descending=True)
    if how.top_k:
        ordered[:, how.top_k :] = 0
    # A token stays if those before it do not reach top_p: the likeliest always stays.
    ordered[ordered.cumsum(dim=-1) - ordered >= how.top_p] = 0
    # The largest of p / Exp(1) is a draw from p. The noise comes from the CPU: alike on every
    # device.
    noise = torch.empty(ordered.shape).exponential_(generator=generator).to(ordered.device)
    return order.gather(1, (ordered / noise).argmax(dim=-1, keepdim=True))[:, 0]


def images_of(
    model: Transformer,
    words: Words,
    patches: Patches,
    captions: Sequence[str],
    each: int,
    how: Sampling,
) -> Array:
    """Draw `each` images for every caption: (captions, each, height, width, channels), uint8."""
    device = model.rotary.device
    prefix = torch.from_numpy(np.repeat(words.encode(captions), each, axis=0)).to(device)
    nothing = torch.empty(len(prefix), 0, dtype=torch.int64, device=device)
    tokens = generate(model, prefix, nothing, model.shape.length, how)
    images = patches.decode(tokens.cpu().numpy())
    return images.reshape(len(captions), each, *images.shape[1:])


def texts_of(model: Transformer, prompts: Sequence[str], length: int, how: Sampling) -> list[str]:
    """Continue each prompt to `length` bytes."""
    device = model.rotary.device
    texts = []
    for prompt in prompts:
        given = torch.tensor([list(prompt.encode())], dtype=torch.int64, device=device)
        tokens = generate(model, torch.full((1, 1), START, device=device), given, length, how)
        texts.append(bytes(tokens[0].tolist()).decode(errors="replace"))
    return texts


def load_model(run: Run, shape: Shape, streams: str, device: torch.device) -> Transformer:
    """Return the model of a run with its saved weights."""
    run.check_weights(shape)
    with torch.device("meta"):
        expected = Transformer(shape).state_dict()
    weights = run.read_weights(device, expected)
    model = Transformer(shape, streams=streams).to(device)
    model.load_state_dict(weights)
    return model


def sample(
    run_path: str,
    captions: Sequence[str],
    out: str | None,
    each: int | None,
    length: int | None,
    device: str,
    how: Sampling,
) -> str:
    """Draw images for every caption as a grid, or continue every prompt; return what to print."""
    for name, value in (("each", each), ("length", length)):
        if value is not None:
            check_least(name, value, 1)
    # What is not UTF-8 on the command line comes as half of a surrogate pair.
    captions = [
        caption.encode(errors="surrogateescape").decode(errors="replace") for caption in captions
    ]
    run = Run.open(run_path)
    config, shape = run.read_config()
    spec = run.read_data(shape)
    if spec["kind"] == "text" and each is not None:
        raise UserError("--each is for images, and this run continues texts")
    if spec["kind"] == "images" and length is not None:
        raise UserError("--length is for texts, and this run draws images")
    model = load_model(run, shape, config.streams, find_device(device))
    if spec["kind"] == "text":
        length = _checked_length(model.shape.length, length, captions)
        shown = [prompt.encode()[: length // 2].decode(errors="ignore") for prompt in spec["show"]]
        text = "\n\n".join(texts_of(model, captions or shown, length, how))
        if out is None:
            return text
        with new_file(Path(out)) as file:
            file.write(text.encode())
        return out
    words, patches = image_codecs(spec)
    path = Path(out) if out else run.path / "sample.png"
    if path.suffix not in ("", ".png"):
        raise UserError(f"--out {path}: give a file that ends in .png")
    captions = captions or spec["show"]
    for caption in captions:
        _warn(words, caption)
    images = images_of(model, words, patches, captions, each or EACH, how)
    with new_file(path) as file:
        sample_grid(file, captions, [("", images)])
    return str(path)


def _warn(words: Words, caption: str) -> None:
    """Say what of a caption the network does not see."""
    _, unknown, cut = words.read(caption)
    for left_out, why in ((unknown, "not known to this run"), (cut, "more than captions hold")):
        if left_out:
            quoted = ", ".join(dict.fromkeys(left_out))
            complain(f"left out of {shorten(repr(caption))}, because {why}: {shorten(quoted, 200)}")


def _checked_length(context: int, length: int | None, prompts: Sequence[str]) -> int:
    """Return how long texts become, or raise where that adds nothing or does not fit."""
    if length is None:
        length = context
    if length > context:
        raise UserError(
            f"--length {length} is more than the run's context of {context} bytes, beyond which "
            f"the network has learned nothing: train with a larger --context"
        )
    for prompt in prompts:
        if len(prompt.encode()) >= length:
            size = f"--length {length}"
            if length == context:
                size = f"the run's context of {context} bytes"
            raise UserError(
                f"there is nothing to add to {shorten(repr(prompt))}, which is as long as {size}"
            )
    return length
