"""Fine-tune an ordinary network in reversible form, and get the ordinary network back.

A small transformer learns digits. Then `revnet.convert` puts it in reversible form with its
weights, it is fine-tuned on digits that lie on their side, and `revnet.unconvert` makes it the
ordinary network again. With --lora a tiny Llama of transformers takes the same path with adapters
of peft.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import digits, fit, options
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import revnet
from revnet.testing import check_conversion


class Classifier(nn.Module):
    """A transformer over the patches of an image, as anyone would write it."""

    def __init__(self, width: int, depth: int, patch: int = 2, size: int = 8) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, width, patch, patch)
        self.positions = nn.Parameter(0.02 * torch.randn((size // patch) ** 2, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 10))

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images).flatten(2).mT + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


def lora(args: Any) -> None:
    """Convert a model of transformers that has adapters of peft, and train these."""
    import peft
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=8,
        num_attention_heads=4,
        pad_token_id=0,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config).to(args.device)
    adapters = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=8)
    model = peft.get_peft_model(model, adapters)
    print(revnet.convert(model))
    tokens = torch.arange(32, device=args.device).remainder(7)[None] + 1
    batch = {"input_ids": tokens, "labels": tokens}
    print(check_conversion(model, batch))
    fit(model, lambda: model(**batch).loss, 30, 1e-2)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    args = options(__doc__, argv, lora=0)
    if args.lora:
        lora(args)
    width, depth = (256, 24) if args.full else (32, 8)
    images, classes = digits(args.device)
    model = Classifier(width, depth).to(args.device)

    def loss_on(images: Tensor) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            chosen = torch.randint(len(images), (64,), device=args.device)
            return cross_entropy(model(images[chosen]), classes[chosen])

        return loss

    print("An ordinary network learns digits.")
    fit(model, loss_on(images), 150, 1e-3)

    conversion = revnet.convert(model, calibrate=images[:64])
    print(f"\n{conversion}")
    report = check_conversion(
        model, images[:256], lambda out: cross_entropy(out, classes[: len(out)])
    )
    print(f"loss {report.ordinary_loss:.4f} as ordinary network, {report.loss:.4f} converted")
    print(
        f"kept for backward: {report.saved_bytes / 2**20:.2f} MiB, "
        f"stored {report.stored_bytes / 2**20:.2f} MiB; gradients equal in every bit\n"
    )

    print("Converted, it learns digits that lie on their side.")
    sideways = images.rot90(dims=(2, 3))
    first, last = fit(model, loss_on(sideways), 80, 1e-3)

    revnet.unconvert(model)
    with torch.no_grad():
        exported = cross_entropy(model(sideways), classes).item()
    print(f"the same weights as the ordinary network: {exported:.4f}")
    return {
        "saved": report.saved_bytes / report.stored_bytes,
        "stored_bytes": report.stored_bytes,
        "inverted_bytes": report.saved_bytes,
        "error": 0.0,
        "first": first,
        "last": last,
        "exported": exported,
    }


if __name__ == "__main__":
    main()
