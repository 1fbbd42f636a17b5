"""Conversion of tiny models of other libraries at random weights; skipped without them."""

from __future__ import annotations

import copy
import importlib
import json
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revnet
from ecosystem import CASES, TRANSFORMERS, Case, leaves, weighted
from revnet import ReversibleError
from revnet._conversion import _diffusers, _dynamo, _timm, _transformers
from revnet._conversion import layer as conversion_layer
from revnet.testing import check_conversion

# What other libraries warn about is theirs.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.ecosystem]

FOUND: dict[str, str] = {}


@contextmanager
def quietly() -> Iterator[None]:
    """Log and warn of nothing that is not an error: what other libraries say is theirs."""
    logging.disable(logging.WARNING)
    torch.use_deterministic_algorithms(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with quietly():
        yield


def needs(*libraries: str) -> None:
    for library in libraries:
        if library != "torch":
            pytest.importorskip(library, reason=f"{library} is not installed", exc_type=ImportError)


def made(case: Case) -> tuple[nn.Module, dict[str, Any]]:
    needs(case.library)
    torch.manual_seed(0)
    model = case.make().train()
    if hasattr(model, "config"):
        model.config.use_cache = False
    return model, case.batch()


def results(model: nn.Module, batch: dict[str, Any], autocast: bool = False) -> list[Any]:
    torch.manual_seed(3)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = [leaf for leaf in leaves(model(**batch)) if leaf.requires_grad]
        loss = torch.stack([weighted(leaf) for leaf in outputs]).sum()
    loss.backward()
    return [*(leaf.detach() for leaf in outputs), *(p.grad for p in model.parameters())]


def assert_same(actual: list[Any], expected: list[Any]) -> None:
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (torch.equal(a, b) and not a.isnan().any())


def by_name(cases: list[Case]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def cast(batch: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        key: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in batch.items()
    }


@pytest.mark.parametrize("precision", ["float32", "autocast", "bfloat16"])
@by_name(CASES)
def test_a_model(case: Case, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same keys; inverted equals stored in every bit; unconverted as it was, in every bit."""
    model, batch = made(case)
    if precision == "bfloat16":
        model, batch = model.bfloat16(), cast(batch, torch.bfloat16)
    autocast, keys = precision == "autocast", list(model.state_dict())
    first = results(model, batch, autocast)
    found = []
    for execution in ("store", "invert"):
        own = copy.deepcopy(model)
        conversion = revnet.convert(own, execution=execution)
        assert list(own.state_dict()) == keys
        results(own, batch, autocast)  # This batch chooses the range.
        calls = 0
        new = conversion_layer._new_call

        def counted(*args: Any, new: Any = new) -> Any:
            nonlocal calls
            calls += 1
            return new(*args)

        with monkeypatch.context() as patch:
            patch.setattr(conversion_layer, "_new_call", counted)
            found.append(results(own, batch, autocast))
        # Layers of a stack share one call; where each begins anew, that is said.
        assert calls == (len(conversion.stacks) if case.calls is None else case.calls)
        alone = ["alone" in stack.warned for stack in conversion.stacks]
        assert alone == [calls > len(conversion.stacks)] * len(alone)
        revnet.unconvert(own)
        if not any(buffer.is_floating_point() for buffer in own.buffers()):
            assert_same(results(own, batch, autocast), first)
    assert_same(*found)


@by_name([case for case in TRANSFORMERS if case.generates])
def test_generation_with_a_cache(case: Case) -> None:
    model, _ = made(case)
    model.eval()
    prompt = torch.randint(3, 97, (2, 5))
    revnet.convert(model, calibrate={"input_ids": prompt})
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = model.generate(prompt, use_cache=True, **options)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **options))


@by_name([case for case in TRANSFORMERS if case.name in ("llama", "gpt2", "mamba")])
def test_a_cache_in_training_is_ignored_with_one_warning(case: Case) -> None:
    model, batch = made(case)
    revnet.convert(model)
    results(model, batch)
    expected = results(model, batch)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        name = "cache_params" if case.name == "mamba" else "past_key_values"
        import transformers

        for _ in range(2):
            cache = transformers.DynamicCache(config=model.config)
            assert_same(results(model, {**batch, "use_cache": True, name: cache}), expected)
    ours = [str(warning.message) for warning in seen if "key-value cache" in str(warning.message)]
    assert len(ours) == 1
    assert "use_cache=False" in ours[0]


def llama() -> tuple[Any, dict[str, Any]]:
    return made(next(case for case in TRANSFORMERS if case.name == "llama"))


def test_a_filled_cache_in_training_gives_the_gradient_of_what_is_evaluated() -> None:
    transformers = pytest.importorskip("transformers")

    model, batch = llama()

    def filled() -> tuple[Tensor, Any]:
        torch.manual_seed(5)
        prefix = torch.randn(3, 2, 2, 2, 4, 8, requires_grad=True)
        cache = transformers.DynamicCache()
        for i, (key, value) in enumerate(prefix):
            cache.update(key, value, i)
        return prefix, cache

    found = {}
    for name, options in {
        "ordinary": None,
        "invert": {},
        "store": {"execution": "store"},
        "8 bits": {"bits": 8},
    }.items():
        own = copy.deepcopy(model)
        if options is not None:
            revnet.convert(own, **options)
            own(**batch)
        prefix, cache = filled()
        out = own(input_ids=batch["input_ids"], past_key_values=cache).logits
        with torch.no_grad():
            again = own(input_ids=batch["input_ids"], past_key_values=filled()[1]).logits
        assert torch.equal(out, again)
        found[name] = [out, *torch.autograd.grad(weighted(out), [prefix, *own.parameters()])]
    assert_same(found["invert"], found["store"])
    for a, b in zip(found["8 bits"], found["ordinary"], strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02 * b.abs().max().item())


def test_hidden_states_are_those_of_the_layers() -> None:
    model, batch = llama()
    revnet.convert(model, calibrate=batch)
    seen: list[Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, out: seen.append(out))
    out = model(**batch, output_hidden_states=True)
    assert all(a is b for a, b in zip(out.hidden_states[1:-1], seen[:-1], strict=True))


def test_checkpointing_switches_between_invert_and_store() -> None:
    model, _ = llama()
    conversion = revnet.convert(model)
    model.gradient_checkpointing_disable()
    assert conversion.execution == "store"
    model.gradient_checkpointing_enable()
    assert conversion.execution == "invert"
    assert not any(layer.gradient_checkpointing for layer in model.model.layers)


def test_checkpointing_of_timm_switches_between_invert_and_store() -> None:
    model, batch = made(next(case for case in CASES if case.name.startswith("swin_tiny")))
    conversion = revnet.convert(model)
    model.set_grad_checkpointing(False)
    assert conversion.execution == "store"
    model.set_grad_checkpointing(True)
    assert conversion.execution == "invert"
    results(model, batch)
    found = results(copy.deepcopy(model), batch)
    assert_same(results(model, batch), found)
    revnet.unconvert(model)
    assert type(model.layers[0]).__name__ == "SwinTransformerStage"


def test_saving_and_loading(tmp_path: Path) -> None:
    model, batch = llama()
    first = results(model, batch)
    conversion = revnet.convert(model)
    converted = results(model, batch)
    model.save_pretrained(tmp_path)
    (tmp_path / "conversion.json").write_text(json.dumps(conversion.state_dict()))
    loaded = type(model).from_pretrained(tmp_path).train()
    loaded.config.use_cache = False
    assert_same(results(loaded, batch), first)
    with pytest.warns(UserWarning, match="two-stream.*training from scratch"):
        revnet.convert(loaded, rule="two-stream")
    revnet.unconvert(loaded)
    revnet.convert(loaded).load_state_dict(json.loads((tmp_path / "conversion.json").read_text()))
    assert_same(results(loaded, batch), converted)


def trained(model: Any, folder: Path, steps: int, **more: Any) -> dict[str, Tensor]:
    import transformers

    torch.manual_seed(0)
    tokens = torch.randint(3, 97, (16, 10))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_grad_norm=0.5,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        save_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=1,
        **more,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=data)
    saved = folder / "checkpoint-2"
    trainer.train(resume_from_checkpoint=str(saved) if saved.exists() else None)
    return model.state_dict()


@pytest.mark.parametrize("bf16", [False, True])
def test_trainer(bf16: bool, tmp_path: Path) -> None:
    """Accumulation, clipping, bf16, resuming: the weights of stored execution in every bit."""
    needs("accelerate")
    model, batch = llama()
    states = []
    for execution in ("store", "invert", "resumed"):
        own = copy.deepcopy(model)
        chosen = "store" if execution == "store" else "invert"
        revnet.convert(own, execution=chosen, calibrate=batch)
        folder = tmp_path / execution
        if execution == "resumed":
            trained(own, folder, 2, bf16=bf16)
            own = copy.deepcopy(model)
            revnet.convert(own, calibrate=batch)
        states.append(trained(own, folder, 4, bf16=bf16))
    for state in states[1:]:
        assert_same(list(state.values()), list(states[0].values()))
    assert not all(map(torch.equal, states[0].values(), model.state_dict().values()))


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("when", ["before", "after"])
def test_peft(when: str, base: torch.dtype) -> None:
    """LoRA on a frozen base, converted before and after: gradients of adapters alone."""
    needs("peft")
    import peft

    found = []
    for execution in ("store", "invert"):
        model, batch = llama()
        model = model.to(base)
        if when == "before":
            revnet.convert(model, execution=execution)
        torch.manual_seed(1)
        config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], lora_dropout=0.2)
        adapted = peft.get_peft_model(model, config)
        if when == "after":
            revnet.convert(adapted, execution=execution)
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.1)
        results(adapted, batch)
        found.append(results(adapted, batch))
        names = [name for name, p in adapted.named_parameters() if p.grad is not None]
        assert names
        assert all("lora" in name for name in names)
    assert_same(*found)


FILES = {"diffusers": _diffusers, "timm": _timm, "torch": _dynamo, "transformers": _transformers}


def assert_known(file: Any, installed: str) -> None:
    """A file of names of another library was written for this version of it."""
    oldest, newest = (tuple(map(int, each.split("."))) for each in file.VERSIONS)
    release = tuple(map(int, re.findall(r"\d+", installed)[: len(newest)]))
    path = Path(file.__file__).name
    assert oldest <= release <= newest, (
        f"{path} is written for {' to '.join(file.VERSIONS)}, and {installed} is installed. Look "
        f"for what {path} names in the new version, then change VERSIONS there."
    )


@pytest.mark.parametrize("library", FILES)
def test_the_names_are_those_of_the_installed_version(library: str) -> None:
    needs(library)
    assert_known(FILES[library], version(library))


@pytest.mark.parametrize("library", FILES)
def test_an_unknown_version_fails_with_the_name_of_the_file(library: str) -> None:
    path = Path(FILES[library].__file__).name
    for unknown in ("0.1.0", "99.0.0rc1", "99.0+cu130"):
        with pytest.raises(AssertionError, match=f"{path} is written for"):
            assert_known(FILES[library], unknown)


def test_a_unet_of_diffusers_is_refused_with_a_way_out() -> None:
    needs("diffusers")
    import diffusers

    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=2,
        add_attention=False,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    with pytest.raises(ReversibleError, match=r"UNet2DModel.*Convert a transformer of diffusers"):
        revnet.convert(unet)


def test_check_conversion_takes_a_model_with_a_loss() -> None:
    model, batch = llama()
    revnet.convert(model)
    report = check_conversion(model, batch)
    assert abs(report.shift) < 0.05
    assert report.saved_bytes < report.stored_bytes


def test_the_table_is_that_of_the_docs() -> None:
    """The table of docs/ecosystem.md names every model that is tested here."""
    needs("transformers", "timm", "diffusers", "torchvision")
    table = importlib.import_module("conversion_table")
    docs = Path(__file__).parent.parent / "docs" / "ecosystem.md"
    assert table.table() in docs.read_text()
