"""The transformer of the command, against plain definitions of its parts."""

from __future__ import annotations

import copy
import math
import tracemalloc
from dataclasses import replace
from functools import partial
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from revnet.app.data import PAD, START, Patches, Words, step_batch
from revnet.app.data.digits import load, share_read
from revnet.app.measure import step_memory
from revnet.app.model import (
    BUCKETS,
    NGrams,
    Shape,
    Transformer,
    bits_per_token,
    rotary_table,
    rotate,
)
from revnet.app.sample import Sampling, draw, generate

IMAGE = Shape(
    depth=2, width=32, heads=2, prefix_vocab=9, prefix_length=4, vocab=7, rows=3, columns=5
)
TEXT = Shape(
    depth=2,
    width=32,
    heads=2,
    prefix_vocab=2,
    prefix_length=1,
    vocab=7,
    rows=15,
    columns=1,
    ngrams=3,
)


def network(shape: Shape) -> Transformer:
    model = Transformer(shape).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def example(shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    prefix = torch.randint(1, shape.prefix_vocab, (3, shape.prefix_length))
    if shape.prefix_length > 1:
        prefix[0, :2] = PAD
    return prefix, torch.randint(shape.vocab, (3, shape.length))


@pytest.mark.parametrize("shape", [IMAGE, TEXT], ids=["image", "text"])
def test_a_token_sees_only_those_before_it(shape: Shape) -> None:
    model = network(shape)
    prefix, tokens = example(shape)
    before = model(prefix, tokens[:, :-1])
    tokens[:, 6] = (tokens[:, 6] + 1) % shape.vocab
    after = model(prefix, tokens[:, :-1])
    assert torch.equal(before[:, :7], after[:, :7])
    assert (before[:, 7:] != after[:, 7:]).any(dim=-1).all()


def test_padding_changes_nothing_but_the_places() -> None:
    model = network(IMAGE)
    prefix, tokens = example(IMAGE)
    before = model(prefix, tokens)
    with torch.no_grad():
        model.prefix_embedding.weight[PAD] += 1
    after = model(prefix, tokens)
    assert torch.equal(before, after)
    assert before.isfinite().all()


@pytest.mark.parametrize("shape", [IMAGE, TEXT], ids=["image", "text"])
def test_the_cache_changes_nothing(shape: Shape) -> None:
    model = network(shape)
    prefix, tokens = example(shape)
    whole = model(prefix, tokens[:, :-1])
    cache: dict = {}
    with torch.no_grad():
        steps = [model(prefix, tokens[:, :n], cache=cache) for n in (0, 4, *range(5, shape.length))]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-12, atol=1e-12)
    assert len(cache) == shape.depth + 1


def test_a_cached_token_costs_the_same_products_wherever_it_stands() -> None:
    model = Transformer(Shape(4, 32, 2, 2, 1, 7, 400, 1))
    prefix, tokens = torch.ones(1, 1, dtype=torch.int64), torch.randint(7, (1, 400))
    flops: dict[bool, list[int]] = {True: [], False: []}
    for cached, found in flops.items():
        for n in (100, 200, 300):
            cache: dict | None = {} if cached else None
            with torch.no_grad():
                if cached:
                    model(prefix, tokens[:, : n - 1], cache=cache)
                with FlopCounterMode(display=False) as counter:
                    model(prefix, tokens[:, :n], cache=cache)
            found.append(counter.get_total_flops())
    first, second, third = flops[True]
    # Nothing but the attention of one query, which grows with the keys that it sees; not all
    # devices count it.
    assert third - second == second - first <= 4 * 100 * 32 * 4
    assert flops[False][0] > 90 * first
    assert flops[False][2] >= 2.9 * flops[False][0]


def test_ngrams_are_embedded_by_the_tokens_that_they_hold() -> None:
    embedding = NGrams(vocab=256, width=3, most=4).double()
    for table in embedding.longer:
        torch.nn.init.normal_(table.weight)
    tokens = torch.tensor([list(b"abcde-bcde")])
    with torch.no_grad():
        x = embedding(tokens)
        expected = embedding.weight[tokens[0, 0]]
        # The first has no token before it: its longer n-grams are the same in every text.
        assert not torch.allclose(x[0, 0], expected)
        assert torch.equal(embedding(torch.tensor([[97, 1]]))[0, 0], x[0, 0])
    same = [i for i in range(5) if torch.equal(x[0, i], x[0, i + 5])]
    assert same == [4]  # of "-bcde" only the e has the same four tokens as in "abcde"
    assert embedding(torch.empty(2, 0, dtype=torch.int64)).shape == (2, 0, 3)


def test_ngrams_share_buckets_evenly() -> None:
    embedding = NGrams(vocab=256, width=1, most=2)
    torch.nn.init.zeros_(embedding.weight)
    with torch.no_grad():
        embedding.longer[0].weight.copy_(torch.arange(BUCKETS)[:, None])
        pairs = torch.cartesian_prod(torch.arange(256), torch.arange(256))
        buckets = embedding(pairs)[:, 1, 0].long()
    counts = torch.bincount(buckets, minlength=BUCKETS)
    assert counts.max() <= 16  # four on average


def test_rotation_keeps_only_differences_of_places() -> None:
    table = rotary_table(TEXT).double()
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    scores = (
        rotate(q.expand(1, 1, 16, 16), table)[0, 0] @ rotate(k.expand(1, 1, 16, 16), table)[0, 0].T
    ).tolist()
    for i in range(1, 15):
        assert scores[i][i + 1] == pytest.approx(scores[0][1], abs=1e-5)
    table = rotary_table(IMAGE).double()[:, IMAGE.prefix_length :]
    turned = [rotate(x.expand(1, 1, 15, 16), table)[0, 0] for x in (q, k)]
    scores = (turned[0] @ turned[1].T).tolist()
    # One row down and one column right, from two places of the 3 × 5 grid.
    assert scores[0][6] == pytest.approx(scores[8][14], abs=1e-5)
    assert scores[0][5] != pytest.approx(scores[0][1], abs=1e-3)


@torch.no_grad()
def test_bits_are_minus_log2() -> None:
    model = network(IMAGE)
    prefix, tokens = example(IMAGE)
    probability = model(prefix, tokens[:, :-1]).softmax(-1).gather(2, tokens[:, :, None])
    assert float(bits_per_token(model, prefix, tokens)) == pytest.approx(
        float(-probability.log2().mean()), rel=1e-6
    )


def of_chunks(
    model: Transformer, prefix: torch.Tensor, tokens: torch.Tensor, dtype: torch.dtype | None = None
) -> list[torch.Tensor]:
    model.zero_grad()
    device = tokens.device.type
    with torch.autocast(device, dtype or torch.bfloat16, enabled=dtype is not None):
        loss = bits_per_token(model, prefix, tokens)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("shape", [IMAGE, TEXT], ids=["image", "text"])
@pytest.mark.parametrize("tokens_at_once", [1, 8, 44])
@pytest.mark.parametrize("device", DEVICES)
def test_a_loss_in_chunks_is_the_loss(
    device: str, shape: Shape, tokens_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network(shape).to(device)
    prefix, tokens = (x.to(device) for x in example(shape))
    logits = model(prefix, tokens[:, :-1]).flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, tokens.flatten()) / math.log(2)
    expected = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    monkeypatch.setattr("revnet.app.model.LOGITS", tokens_at_once * shape.vocab)
    found = of_chunks(model, prefix, tokens)
    for a, b in zip(found, [loss, *filter(torch.is_tensor, expected)], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("device", DEVICES)
def test_chunks_add_up_gradients_in_float32(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast the head's gradient in 45 chunks is no further off than in one."""
    model = network(TEXT).float().to(device)
    prefix, tokens = (x.to(device) for x in example(TEXT))
    exact = of_chunks(copy.deepcopy(model).double(), prefix, tokens)[-1]
    errors = []
    for tokens_at_once in (45, 1):
        monkeypatch.setattr("revnet.app.model.LOGITS", tokens_at_once * TEXT.vocab)
        found = of_chunks(model, prefix, tokens, torch.bfloat16)[-1]
        errors.append(float((found - exact).norm()))
    assert errors[1] <= 1.2 * errors[0]


def test_memory_does_not_grow_with_tokens_times_vocabulary(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("revnet.app.model.LOGITS", 2**14)

    def grows(vocab: int) -> float:
        """Return by how many bytes one more token raises the peak."""
        peaks = []
        for length in (256, 768):
            shape = replace(TEXT, vocab=vocab, rows=length, ngrams=1)
            model = Transformer(shape)
            batch = torch.ones(1, 1, dtype=torch.long), torch.randint(vocab, (1, length))
            loss = partial(bits_per_token, model, *batch)
            peaks.append(step_memory(model, loss).peak_bytes)
        return (peaks[1] - peaks[0]) / 512

    few, many = grows(64), grows(2048)
    assert many < few + 64, (few, many)  # logits of a token alone take 4 · 2048 bytes


def test_draws_have_the_asked_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.tensor([0.1, 0.2, 0.3, 0.4])
    logits = p.log().expand(40_000, 4)

    def shares(**how: float) -> torch.Tensor:
        return draw(logits, Sampling(**how), generator).bincount(minlength=4) / len(logits)

    torch.testing.assert_close(shares(temperature=1.0), p, atol=0.01, rtol=0)
    torch.testing.assert_close(shares(temperature=0.5), p**2 / (p**2).sum(), atol=0.01, rtol=0)
    torch.testing.assert_close(
        shares(temperature=1.0, top_k=2), torch.tensor([0, 0, 3 / 7, 4 / 7]), atol=0.01, rtol=0
    )
    nucleus = torch.tensor([0, 2 / 9, 3 / 9, 4 / 9])
    torch.testing.assert_close(shares(temperature=1.0, top_p=0.75), nucleus, atol=0.01, rtol=0)
    assert shares(temperature=0).tolist() == [0, 0, 0, 1]


def test_generation_continues_what_it_is_given() -> None:
    model = network(TEXT)
    prefix, tokens = example(TEXT)
    out = generate(model, prefix, tokens[:, :5], TEXT.length, Sampling())
    assert torch.equal(out[:, :5], tokens[:, :5])
    assert out.shape == tokens.shape


def test_words_and_bytes() -> None:
    words = Words(["three", "a"], length=6)
    rows = words.encode(["A three", "é", "a a a a a a a a"]).tolist()
    assert rows[0] == [PAD, PAD, PAD, 259, 258, START]
    assert rows[1] == [PAD, PAD, PAD, PAD, PAD, START]  # unknown, and named by `sample`
    assert rows[2] == [259] * 5 + [START]
    learned = Words.learn(["blue book", "blue clock", "blue-ish"], most=2)
    assert learned.words == ["blue", "-"]
    assert learned.length == 1 + 1 + 5


def test_patches_are_lossless_where_they_can_be() -> None:
    images = np.random.default_rng(0).choice(np.array([0, 40, 255], dtype=np.uint8), (4, 6, 4, 1))
    patches = Patches.learn(images, patch=1, vocab=3)
    tokens = patches.encode(images)
    assert tokens.shape == (4, 24)
    assert np.array_equal(patches.decode(tokens), images)
    assert np.array_equal(patches.encode(images)[:, :4], tokens.reshape(4, 6, 4)[:, 0])
    blocks = np.kron(
        np.arange(6, dtype=np.uint8).reshape(1, 3, 2), np.ones((2, 2), dtype=np.uint8)
    )[..., None]
    patches = Patches.learn(blocks, patch=2, vocab=6)
    assert (patches.rows, patches.columns) == (3, 2)
    assert patches.encode(blocks).tolist() == [list(range(6))]
    assert np.array_equal(patches.decode(patches.encode(blocks)), blocks)


def test_the_memory_of_patches_is_that_of_one_image() -> None:
    rng = np.random.default_rng(0)
    patches = Patches(rng.integers(0, 255, (256, 2, 2, 1), dtype=np.uint8), 16, 16)
    images = rng.integers(0, 255, (64, 32, 32, 1), dtype=np.uint8)
    patches.encode(images[:1])
    tracemalloc.start()
    patches.encode(images)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * 256 * 256 * 4


def test_an_epoch_visits_every_example_once_however_many_ranks() -> None:
    data = load()
    one = [step_batch(data, step, 50, seed=3) for step in range(3)]
    two = [
        [step_batch(data, step, 50, seed=3, rank=rank, world=2) for rank in range(2)]
        for step in range(3)
    ]
    for whole, halves in zip(one, two, strict=True):
        for part in range(2):
            assert np.array_equal(whole[part][0::2], halves[0][part])
            assert np.array_equal(whole[part][1::2], halves[1][part])
    seen: list[int] = []

    class Recorder:
        spec: ClassVar = {}
        counts: ClassVar = {"train": 10}

        def batch(self, split: str, indices: np.ndarray, draws: np.ndarray) -> tuple:
            seen.extend(indices)
            return indices, draws

    for step in range(10):
        step_batch(Recorder(), step, 3, seed=0)
    assert [sorted(seen[i : i + 10]) for i in (0, 10, 20)] == [list(range(10))] * 3
    assert seen[:10] != seen[10:20]


def test_held_out_digits_are_not_trained_on() -> None:
    splits = load().splits
    assert not set(splits["train"]) & set(splits["held_out"])
    assert len(splits["train"]) + len(splits["held_out"]) == 1797


def test_the_reader_reads_real_digits_and_not_noise() -> None:
    data = load()
    numbers = data.splits["held_out"]
    images = np.stack([data.load(i) for i in numbers])
    labels = np.array([data.show.index(data.captions[i][0]) for i in numbers])
    share, accuracy = share_read(images, labels)
    assert share == accuracy > 0.97
    noise = np.random.default_rng(0).integers(0, 256, images.shape, dtype=np.uint8)
    assert share_read(noise, labels)[0] < 0.3
    assert math.isclose(share_read(images, (labels + 1) % 10)[0], 0, abs_tol=0.03)
