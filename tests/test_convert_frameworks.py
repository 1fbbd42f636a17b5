"""Converted models in training frameworks: the weights of stored execution in every bit."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import FlopCounterMode

import revnet
from distributed import run_ranks
from ecosystem import _SIZES, VOCABULARY, Encoder, _decoder, weighted
from test_convert_ecosystem import assert_same, llama, needs, quietly, results, trained

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.ecosystem]

EXECUTIONS = ("store", "invert")
State = dict[str, Tensor]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with quietly():
        yield


def whole(state: dict[str, Any]) -> State:
    """A state of full tensors, from shards."""
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in state.items()
    }


def assert_equal_training(states: list[State], before: State) -> None:
    """The runs ended with the same weights, under the first names, and none is as it began."""
    for state in states:
        assert list(state) == list(before)
        assert_same(list(state.values()), list(states[0].values()))
    assert not any(map(torch.equal, states[0].values(), before.values()))


def assert_unconverts(model: Any, batch: dict[str, Any]) -> None:
    """A trained model is an ordinary one with its weights, in every bit."""
    ordinary, _ = llama()
    ordinary.load_state_dict(model.state_dict())
    revnet.unconvert(model)
    assert_same(results(model, batch), results(ordinary, batch))


def accelerate_on_cpus(rank: int, world_size: int) -> None:
    """Let accelerate take FSDP on gloo ranks, which it offers for accelerators alone."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    os.environ.update(
        ACCELERATE_TORCH_DEVICE="cpu",
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
    )
    PartialState._prepare_backend = lambda *args: ("gloo", DistributedType.MULTI_GPU)


def accelerated(execution: str, folder: str, first: int, last: int) -> tuple[Any, State]:
    """Train from one step to another under FSDP2, and save; later steps resume from the folder."""
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin

    model, batch = llama()
    revnet.convert(model, execution=execution, calibrate=batch)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(fsdp_plugin=plugin, gradient_accumulation_steps=2)
    assert accelerator.is_fsdp2
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    if first:
        accelerator.load_state(folder)
    for micro in range(2 * first, 2 * last):
        torch.manual_seed(100 * micro + accelerator.process_index)
        tokens = torch.randint(3, VOCABULARY, (2, 10))
        with accelerator.accumulate(model):
            accelerator.backward(model(input_ids=tokens, labels=tokens).loss)
            accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    accelerator.save_state(folder)
    return model, whole(model.state_dict())


def check_accelerate(rank: int, world_size: int, folder: str) -> None:
    with quietly():
        accelerate_on_cpus(rank, world_size)
        states = [accelerated(execution, folder, 0, 4)[1] for execution in EXECUTIONS]
        accelerated("invert", folder, 0, 2)
        model, resumed = accelerated("invert", folder, 2, 4)
        assert all(isinstance(p, DTensor) for p in model.parameters())
        assert_equal_training([*states, resumed], llama()[0].state_dict())


def check_trainer(rank: int, world_size: int, folder: str) -> None:
    with quietly():
        accelerate_on_cpus(rank, world_size)
        states = []
        for execution in ("store", "invert", "resumed"):
            chosen = "store" if execution == "store" else "invert"
            for steps in (2, 4) if execution == "resumed" else (4,):
                model, batch = llama()
                revnet.convert(model, execution=chosen, calibrate=batch)
                state = trained(
                    model,
                    Path(folder) / execution,
                    steps,
                    bf16=True,
                    fsdp=True,
                    fsdp_config={
                        "version": 2,
                        "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
                    },
                )
            assert isinstance(model.model.layers[0].mlp.up_proj.weight, DTensor)
            states.append(whole(state))
        assert_equal_training(states, llama()[0].state_dict())


def check_tensor_parallel(rank: int, world_size: int, folder: str) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    with quietly():
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
        _, batch = llama()
        found = []
        for execution in EXECUTIONS:
            model = AutoModelForCausalLM.from_pretrained(
                folder, distributed_config=DistributedConfig(tp_plan="auto", tp_size=world_size)
            ).train()
            model.config.use_cache = False
            assert isinstance(model.model.layers[0].mlp.up_proj.weight, DTensor)
            keys, first = list(model.state_dict()), parallel_results(model, batch)
            revnet.convert(model, execution=execution, calibrate=batch)
            assert list(model.state_dict()) == keys
            found.append(parallel_results(model, batch))
            assert not torch.equal(found[-1][0], first[0])
            revnet.unconvert(model)
            assert_same(parallel_results(model, batch), first)
        assert_same(*found)


def parallel_results(model: nn.Module, batch: dict[str, Any]) -> list[Tensor]:
    return list(whole(dict(enumerate(results(model, batch)))).values())


@pytest.mark.parametrize("check", [check_accelerate, check_trainer], ids=["accelerate", "Trainer"])
def test_fsdp2(check: Any, tmp_path: Path) -> None:
    """Accumulation, clipping and resuming on two ranks, each layer sharded by the framework."""
    needs("transformers", "accelerate")
    run_ranks(check, 2, str(tmp_path))


def test_tensor_parallelism(tmp_path: Path) -> None:
    """By the plan of the model: what layers read is whole, their weights are sharded."""
    needs("transformers")
    llama()[0].save_pretrained(tmp_path)
    run_ranks(check_tensor_parallel, 2, str(tmp_path))


def test_lightning(tmp_path: Path) -> None:
    """Accumulation, clipping, bf16, dropout and resuming."""
    needs("lightning")
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def training_step(self, tokens: Tensor, index: int) -> Tensor:
            return weighted(self.net(tokens))

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), 1e-2)

    net, data = Encoder(), torch.randint(3, VOCABULARY, (16, 10))
    states = []
    for execution in EXECUTIONS:
        saved = None
        for steps in (2, 4):
            torch.manual_seed(0)
            own = Module(copy.deepcopy(net))
            keys = list(own.state_dict())
            revnet.convert(own, execution=execution)
            trainer = lightning.Trainer(
                accelerator="cpu",
                max_steps=steps,
                accumulate_grad_batches=2,
                gradient_clip_val=0.5,
                precision="bf16-mixed",
                logger=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                enable_checkpointing=False,
                default_root_dir=tmp_path,
            )
            trainer.fit(own, torch.utils.data.DataLoader(data, 2), ckpt_path=saved)
            saved = tmp_path / f"{execution}.ckpt"
            trainer.save_checkpoint(saved)
            assert list(own.state_dict()) == keys
        states.append(own.net.state_dict())
    assert_equal_training(states, net.state_dict())


def words() -> Any:
    """A tokenizer of a few words, and sentences of them."""
    import datasets
    import tokenizers
    import transformers

    sentences = [
        "in the beginning was the word",
        "the earth was without form and void",
        "darkness was upon the face of the deep",
    ]
    known = dict.fromkeys(["<pad>", "<eos>", *" ".join(sentences).split()])
    split = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<pad>")
    )
    split.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=split, pad_token="<pad>", eos_token="<eos>"
    )
    return tokenizer, datasets.Dataset.from_dict({"text": sentences * 4})


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "LoRA"])
def test_the_sft_trainer_of_trl(adapters: bool, tmp_path: Path) -> None:
    """Its checkpointing, on by default, is the inversion of the layers."""
    needs("trl", "peft")
    import peft
    import trl

    tokenizer, data = words()
    model, batch = llama()
    states = []
    for execution in EXECUTIONS:
        own = copy.deepcopy(model)
        conversion = revnet.convert(own, execution="store", calibrate=batch)
        torch.manual_seed(0)
        arguments = trl.SFTConfig(
            str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            gradient_checkpointing=execution == "invert",
            bf16=True,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], lora_dropout=0.1)
        trainer = trl.SFTTrainer(
            own,
            arguments,
            train_dataset=data,
            processing_class=tokenizer,
            peft_config=config if adapters else None,
        )
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.train()
        assert conversion.execution == execution
        changed = {
            name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad
        }
        states.append(changed)
        assert all("lora" in name for name in changed) is adapters
        assert_equal_training(states, {name: before[name] for name in changed})
    if not adapters:
        # Without the cast to bfloat16 that the trainer put around it.
        trainer.accelerator.unwrap_model(own, keep_fp32_wrapper=False)
        assert_unconverts(own, batch)


def test_four_bit_weights_of_bitsandbytes(tmp_path: Path) -> None:
    """A base of 4 bits with LoRA: the gradients of the adapters, the base as it was."""
    needs("bitsandbytes", "accelerate", "peft")
    import peft
    import transformers

    # Blocks of 64 weights share a scale, and rows must not be shorter.
    case = _decoder("llama", {**_SIZES, "hidden_size": 64, "intermediate_size": 128})
    case.make().save_pretrained(tmp_path)
    batch, found = case.batch(), []
    for execution in EXECUTIONS:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path,
            quantization_config=transformers.BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16
            ),
            dtype=torch.bfloat16,
            device_map="cpu",
        )
        torch.manual_seed(1)
        config = peft.LoraConfig(
            target_modules=["q_proj", "down_proj"], lora_dropout=0.2, init_lora_weights=False
        )
        model = peft.get_peft_model(model, config).train()
        model.config.use_cache = False
        assert model.base_model.model.model.layers[0].mlp.up_proj.weight.dtype is torch.uint8
        keys, first = list(model.state_dict()), results(model, batch)
        revnet.convert(model, execution=execution)
        results(model, batch)
        found.append(results(model, batch))
        assert list(model.state_dict()) == keys
        assert any(isinstance(grad, Tensor) for grad in found[-1][2:])
        revnet.unconvert(model)
        assert_same(results(model, batch), first)
    assert_same(*found)


def test_frozen_layers_without_adapters_cost_no_gradient_work() -> None:
    """Layers below the first adapter run once; above it, inversion evaluates each once more."""
    needs("peft")
    import peft

    work, found = {}, []
    for execution in EXECUTIONS:
        model, batch = llama()
        config = peft.LoraConfig(
            target_modules=["q_proj"], layers_to_transform=[2], init_lora_weights=False
        )
        torch.manual_seed(1)
        model = peft.get_peft_model(model.bfloat16(), config).train()
        revnet.convert(model, execution=execution, calibrate=batch)
        found.append(results(model, batch))
        counted = []
        with FlopCounterMode(display=False) as counter:

            def count(*_: Any, counter: Any = counter, counted: Any = counted) -> None:
                counted.append(counter.get_total_flops())

            last = model.base_model.model.model.layers[2]
            last.register_forward_pre_hook(count)
            last.register_forward_hook(count)
            loss = model(**batch).loss
            count()
            loss.backward()
            count()
        before, after, forward, total = counted
        work[execution] = total - forward
    assert work["invert"] - work["store"] == after - before > 0
    assert_same(*found)
