"""Where other reversible libraries go wrong on ordinary training code, and no other file here
looks.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cases import Attention, Linear, Mlp, build, every, randn, with_dropout
from oracle import assert_near, assert_same_gradients, gradients_of, stored_copy, weighted
from revnet import Deterministic, ReversibleSequence, SequentialSequence


class Classifier(nn.Module):
    """Token embedding, a body of blocks, a head: what feeds the body is an index lookup or data,
    never a leaf.
    """

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.embed = nn.Embedding(10, 8).double()
            self.head = nn.Linear(8, 10).double()
        self.body = body

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.embed(tokens)))


def models(**options: object) -> tuple[Classifier, Classifier]:
    pairs = build([(with_dropout(Attention), with_dropout(Mlp))] * 3, 8)
    return Classifier(ReversibleSequence(pairs, **options)), Classifier(
        stored_copy(pairs, **options)
    )


@pytest.mark.parametrize("frozen", ["nothing", "embedding", "body", "embedding and body", "head"])
def test_a_trainable_head_after_an_input_that_may_need_no_gradient(frozen: str):
    found = []
    for model in models():
        model.embed.requires_grad_("embedding" not in frozen)
        model.body.requires_grad_("body" not in frozen)
        model.head.requires_grad_("head" not in frozen)
        tokens = torch.arange(12).view(2, 6) % 10
        torch.manual_seed(0)
        nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        found.append(gradients_of(model))
    assert_same_gradients(*found)
    assert any(gradient is not None for gradient in found[0].values())


def test_training_takes_the_stored_loops_path():
    """Twenty steps of AdamW with clipping, dropout and weight decay end at the same weights."""
    losses = []
    ends = []
    for model in models():
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        torch.manual_seed(0)
        for step in range(20):
            tokens = (torch.arange(12).view(2, 6) * (step + 1)) % 10
            loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        losses.append(loss.item())
        ends.append({name: parameter.detach() for name, parameter in model.named_parameters()})
    assert losses[0] < 2.3
    # Rounding grows over twenty steps of an optimizer that divides by small numbers.
    assert_same_gradients(*ends, tolerance=1e-8)


def test_a_sequence_takes_the_place_of_the_plain_layers_in_any_container():
    layers = build([(Mlp, Mlp)] * 2, 8)
    first, last = build([(Linear, Linear)], 8, seed=4)[0]
    net, oracle = (
        nn.Sequential(first, body, last)
        for body in (ReversibleSequence(layers), stored_copy(layers))
    )
    x, expected = randn(2, 6, 8, requires_grad=True), randn(2, 6, 8, requires_grad=True)
    weighted(net(x)).backward()
    grads = gradients_of(net)
    net.zero_grad()
    weighted(oracle(expected)).backward()
    assert_near(x.grad, expected.grad)
    assert_near(grads["0.weight"], first.weight.grad)


def test_wrapped_branches_may_be_passed_as_they_are():
    """Code written for the classic classes wraps its branches in Deterministic."""
    pairs = build([(with_dropout(Mlp), Mlp)] * 3, 8)
    net = ReversibleSequence([(Deterministic(f), Deterministic(g)) for f, g in pairs])
    oracle = stored_copy(pairs)
    found = []
    for module in (net, oracle):
        x = randn(2, 6, 8, requires_grad=True)
        torch.manual_seed(0)
        weighted(module(x)).backward()
        found.append(
            {name.replace(".net.", "."): grad for name, grad in gradients_of(module).items()}
            | {"x": x.grad}
        )
    assert_same_gradients(*found)


class Cached(Linear):
    """Keeps what it saw, as attention with a key and value cache does."""

    key = 0

    def forward(self, x: Tensor, cache: dict | None = None) -> Tensor:
        seen = super().forward(x)
        if cache is not None:
            cache[self.key] = seen = (
                torch.cat((cache[self.key], seen), 1) if self.key in cache else seen
            )
        return seen[:, -x.shape[1] :] + seen.mean(1, keepdim=True).tanh()


@pytest.mark.parametrize("sequence", [ReversibleSequence, SequentialSequence])
def test_token_by_token_inference_with_a_cache_equals_one_pass_over_prefixes(sequence: type):
    pairs = build([(Cached, Mlp)] * 3, 8)
    for key, (f, _) in enumerate(pairs):
        f.key = key
    net = sequence(pairs, {"cache": every(3, True, False)}).eval()
    x = randn(2, 5, 8)
    cache: dict = {}
    with torch.inference_mode():
        for t in range(5):
            step = net(x[:, t : t + 1], cache=cache)
            assert all(entry.shape[1] == t + 1 for entry in cache.values())
            assert len(cache) == 3
        expected: dict = {}
        for t in range(5):
            plain = x[:, t : t + 1]
            streams = [plain, plain]
            for key, (f, g) in enumerate(pairs):
                update = f(streams[-1], cache=expected)
                if sequence is ReversibleSequence:
                    streams[0] = streams[0] + update
                    streams[1] = streams[1] + g(streams[0])
                else:
                    streams[1] = streams[1] + update
                    streams[1] = streams[1] + g(streams[1])
                assert torch.equal(cache[key][:, : t + 1], expected[key])
    assert_near(
        step, (streams[0] + streams[1]) / 2 if sequence is ReversibleSequence else streams[1]
    )
