"""Evaluation, generation, chat and the benchmark on a pretended GPU."""

import itertools
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.pretended_gpu import PretendedGpu
from support.recorded_training import recorded_training
from support.tiny import randomize, small_model

from minilora import LoraConfig, add_lora, remove_lora, save_adapter
from minilora.data.examples import Example
from minilora.inference.evaluation import evaluate_loss, evaluate_losses
from minilora.inference.generation import generate, generate_stream
from minilora.inference.store import AdapterStore
from minilora.lora import lora_layers, set_adapter
from minilora.model import KVCache
from minilora.recompute import POLICIES
from minilora.system.device import choose_placement

pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux only)")


@pytest.mark.parametrize(
    "sampling", [dict(), dict(temperature=0.8, top_k=20, top_p=0.9, repetition_penalty=1.1)]
)
@pytest.mark.parametrize("padded", [False, True])
def test_generation_waits_once_for_eight_tokens_and_says_what_the_cpu_says(padded, sampling):
    prompts = torch.arange(2 * 9).view(2, 9) % 97
    mask = torch.tensor([[0, 0] + [1] * 7, [1] * 9]) if padded else None
    settings = dict(max_new_tokens=18, eos_token_ids=(), **sampling)
    model = small_model(layers=2, quantized=True).eval()
    expected = generate(model, prompts, mask, generator=torch.Generator().manual_seed(1), **settings)
    with PretendedGpu() as gpu:
        model.cuda()
        settings["generator"] = torch.Generator("cuda").manual_seed(1)
        found = generate(model, prompts.cuda(), mask, **settings).cpu()
        with gpu.during() as record:
            tokens = list(
                generate_stream(model, prompts.pin_memory().to("cuda", non_blocking=True), mask, **settings)
            )
    assert torch.equal(found, expected)
    assert len(tokens) == 18 and sum(record.waits.values()) == 4, record.waits  # for 1 + 8 + 8 + 1 tokens
    assert not gpu.faults


def stream_of(model, prompts, taken: int | None, generator, **settings):
    """The tokens of a stream that is left after some of them; how much its cache holds, and the next draw."""
    cache = KVCache(model.config, len(prompts), 9 + 20, torch.float32, prompts.device)
    settings |= dict(max_new_tokens=20, cache=cache, generator=generator, pad_token_id=5)
    stream = generate_stream(model, prompts, **settings)
    tokens = [token.tolist() for token in itertools.islice(stream, taken)]
    stream.close()
    return tokens, cache.length, torch.rand(3, generator=generator, device=generator.device).tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("taken", [1, 2, 9, 12, 17, 20, None])
def test_wherever_a_stream_ends_nothing_tells_that_more_was_computed(temperature, taken):
    model, prompts = small_model(layers=2, quantized=True).eval(), torch.arange(2 * 9).view(2, 9) % 97
    settings = dict(temperature=temperature, eos_token_ids=())
    if taken is None:  # both rows end by themselves, within a group
        free, *_ = stream_of(model, prompts, None, torch.Generator().manual_seed(1), **settings)
        settings["eos_token_ids"] = (free[4][0], free[11][1])
    expected = stream_of(model, prompts, taken, torch.Generator().manual_seed(1), **settings)
    with PretendedGpu() as gpu:
        model.cuda()
        generator = torch.Generator("cuda").manual_seed(1)
        found = stream_of(model, prompts.cuda(), taken, generator, **settings)
    assert found == expected and not gpu.faults
    assert taken is not None or 5 in found[0][-1] or len(found[0]) < 20


def test_decoding_one_row_takes_the_matrix_vector_kernel_in_two_variants():
    model = small_model(layers=2, quantized=True).eval()
    with PretendedGpu() as gpu:
        model.cuda()
        prompt = torch.arange(7).view(1, 7).cuda()
        generate(model, prompt, max_new_tokens=5, eos_token_ids=())
        assert gpu.launches["triton gemv_kernel"] == 4 * 2 * 7  # 4 tokens through 7 layers of each of 2
        assert len(gpu.signatures["gemv_kernel"]) == 1
        set_adapter(model, None)
        generate(model, prompt, max_new_tokens=5, eos_token_ids=())
    assert not gpu.faults and len(gpu.signatures["gemv_kernel"]) == 2  # with an adapter and without


def test_an_adapter_costs_a_token_one_launch_a_layer_and_a_cast_of_each_input():
    model = small_model(layers=2, quantized=True).half().eval()
    for layer in lora_layers(model).values():  # as in training: the adapter stays in float32
        layer.lora_A.float(), layer.lora_B.float()
    launches = {}
    with PretendedGpu() as gpu:
        model.cuda()
        prompt = torch.arange(7).view(1, 7).cuda()
        for name in ("default", None):
            set_adapter(model, name)
            counts = []
            for new in (
                1,
                7,
                15,
            ):  # the last difference: eight tokens without the prompt, and without a graph
                with gpu.during() as record:
                    generate(model, prompt, max_new_tokens=new, eos_token_ids=())
                counts.append(record.launches)
            launches[name] = {key: (counts[2] - counts[1])[key] / 8 for key in counts[2]}
    more = {key: n - launches[None].get(key, 0) for key, n in launches["default"].items()}
    # A x of seven layers; x in float32 for q k v, o, gate up, and down
    assert {key: n for key, n in more.items() if n} == {"addmv": 2 * 7, "_to_copy": 2 * 4}


def test_evaluation_waits_once_and_has_the_loss_of_the_cpu(monkeypatch):
    monkeypatch.setenv(
        "MINILORA_BACKEND", "torch"
    )  # the definitions, which a pretended GPU's kernels compute
    model = small_model(layers=2, quantized=True)
    learned = torch.arange(20) >= 5
    examples = [Example((torch.arange(20) * k % 97).numpy(), learned.numpy(), (20,)) for k in (1, 2, 3, 5)]
    expected = evaluate_loss(model, examples, batch_size=2)
    monkeypatch.delenv("MINILORA_BACKEND")
    with PretendedGpu() as gpu:
        model.cuda()
        evaluate_loss(model, examples, batch_size=2)  # fills the caches of the device
        with gpu.during() as record:
            found = evaluate_loss(model, examples, batch_size=2)
    assert sum(record.waits.values()) == 1 and not gpu.faults and found == expected


def test_an_adapter_trained_on_the_gpu_is_evaluated_and_answers_there(
    train, trainer, monkeypatch, call, dataset
):
    keys = dict(max_steps=1, quantization_bit=4, val_size=2, exact_match_samples=2)
    run = recorded_training(train, trainer, monkeypatch, (7, 5), **keys)
    assert not run.gpu.faults and "exact answers to 2 held-out prompts" in run.printed
    common = "--adapter", run.directory
    with PretendedGpu((7, 5)) as gpu:
        code, out, error = call(
            "evaluate", *common, "--dataset", dataset, "--max_samples", 4, "--exact_match_samples", 2
        )
        assert code == 0, error
        code, answer, error = call("chat", *common, "--instruction", "say one two:", "--max_new_tokens", 4)
    assert code == 0, error
    assert not gpu.faults and "perplexity" in out


@pytest.mark.parametrize("policy", POLICIES)
def test_the_benchmark_runs_on_a_gpu(policy, tmp_path):
    import bench
    import bench_work
    from bench_sides import load_ours

    options = Namespace(
        width=64, layers=2, vocab=97, batch=2, tokens=16, steps=1, quantization_bit="4", optim="adamw_8bit",
        gradient_checkpointing=policy, model=str(tmp_path / "model"), peer=False,
        data=None,
    )  # fmt: skip
    bench.write_random_model(options)
    with PretendedGpu((9, 0)) as gpu:
        placement = choose_placement()
        side, config = load_ours(options, placement), bench.read_config(Path(options.model))
        (examples,) = steps = bench_work.steps_of(options, config)
        loss, gradients = side.gradients(examples)
        with gpu.during() as record:
            side.step(examples)
        bench_work.time_products(steps, config, policy, placement)
        bench_work.dequantized_bytes_per_second(config, placement)
        assert bench.describe(options, placement, config, steps)["machine"].startswith("a pretended GPU")
    assert not record.waits
    assert not gpu.faults and loss > 0 and len(gradients) == 2 * 4  # B's: A's are zero before the first step


def with_second_adapter(model):
    """The model with the adapters `default` and `other`, both of random values."""
    add_lora(model, LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"]), "other")
    randomize(model)
    return model.eval()


@pytest.mark.parametrize("adapter_ids", [["default", None, "other"], ["other", "default", "other"]])
def test_rows_with_adapters_of_their_own_wait_no_more_and_say_what_the_cpu_says(adapter_ids):
    prompts = torch.arange(3 * 9).view(3, 9) % 97
    settings = dict(max_new_tokens=18, eos_token_ids=(), adapter_ids=adapter_ids)
    model = with_second_adapter(small_model(layers=2, quantized=True))
    expected = generate(model, prompts, **settings)
    with PretendedGpu() as gpu:
        model.cuda()
        found, there, waits = generate(model, prompts.cuda(), **settings).cpu(), prompts.cuda(), []
        for chosen in (adapter_ids, None):
            with gpu.during() as record:
                generate(model, there, **settings | dict(adapter_ids=chosen))
            waits.append(record.waits)
    assert torch.equal(found, expected)
    assert waits[0] == waits[1] and not gpu.faults


@pytest.mark.parametrize("padding_free", [True, False])
def test_losses_of_several_adapters_wait_once_and_are_those_of_the_cpu(padding_free):
    rows = [np.arange(n, dtype=np.int32) * n % 97 for n in (9, 14, 11)]
    examples = [Example(ids, np.arange(len(ids)) > 3, (len(ids),)) for ids in rows]
    model, names = with_second_adapter(small_model(layers=2)), [None, "default", "other"]
    expected = evaluate_losses(model, examples, names, 6, padding_free=padding_free)
    with PretendedGpu() as gpu:
        model.cuda()
        evaluate_losses(
            model, examples, names, 6, padding_free=padding_free
        )  # fills the caches of the device
        with gpu.during() as record:
            found = evaluate_losses(model, examples, names, 6, padding_free=padding_free)
    assert found == pytest.approx(expected, rel=1e-6)  # float32 sums in another order; seen: 1e-7
    assert sum(record.waits.values()) == 1, record.waits
    assert not gpu.faults


def test_a_store_of_a_gpu_keeps_adapters_in_pinned_memory_and_waits_for_no_copy_from_it(tmp_path):
    model = with_second_adapter(small_model(layers=2))
    for name in ("default", "other"):
        save_adapter(model, tmp_path / name, name)
    set_adapter(model, "default")
    prompts = torch.arange(9).view(1, 9)
    expected = generate(model, prompts, max_new_tokens=5, eos_token_ids=())
    remove_lora(model)
    with PretendedGpu() as gpu:
        model.cuda()
        store = AdapterStore(model, on_device=1)
        for name in ("default", "other"):
            store.register(name, tmp_path / name)
        store.use(["other"])
        with gpu.during() as record:
            store.use(["default"])
        waits = [place for place in record.waits if "add_adapter" not in place]  # A is drawn on the host
        pinned = [t.is_pinned() for t in store_tensors(store)]
        found = generate(model, prompts.cuda(), max_new_tokens=5, eos_token_ids=(), adapter_ids=["default"])
    assert torch.equal(found.cpu(), expected)
    assert pinned and all(pinned) and not waits and not gpu.faults


def store_tensors(store):
    files = store._files.values()
    return [t for file in files for parts in file.modules.values() for t in parts.values()]
