"""Time a LoRA training step, beside transformers + PEFT doing the same work.

    python scripts/bench.py                       a 50-million-parameter Llama, 1 x 256 tokens
    python scripts/bench.py --peer                transformers + PEFT as well, and the ratio
    python scripts/bench.py --width 2048 --layers 22 --tokens 512 --peer

Both sides hold the same random weights. Before anything is timed, their losses and gradients are compared. Steps alternate between
the sides, so that a machine that slows down slows both, and medians are reported.
"""

import argparse
import statistics
import time

import torch

from minilora import CausalLM, LoraConfig, ModelConfig, UserError, add_lora, trainable_parameters
from minilora.device import choose_placement, memory_used
from minilora.errors import run_script
from minilora.loss import causal_lm_loss
from minilora.optim import make_optimizer

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("width", 512), ("layers", 8), ("vocab", 32000), ("batch", 1), ("tokens", 256), ("steps", 7)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--peer", action="store_true", help="time transformers + PEFT beside it")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    options = parser.parse_args()
    if min(options.width, options.layers, options.vocab, options.batch, options.tokens, options.steps) < 1 or options.width % 64:
        raise UserError("sizes must be at least 1 and --width a multiple of 64")
    placement = choose_placement(bf16=options.bf16)
    print(f"{placement}, {torch.get_num_threads()} threads, torch {torch.__version__}")

    config = ModelConfig.from_dict(
        dict(model_type="llama", vocab_size=options.vocab, hidden_size=options.width, intermediate_size=11 * options.width // 4,
             num_hidden_layers=options.layers, num_attention_heads=options.width // 64, max_position_embeddings=options.tokens)
    )  # fmt: skip
    model = CausalLM(config)
    model.init_weights()
    model.to(placement.device, placement.dtype)
    sides = {"minilora": our_side(model)}
    if options.peer:
        sides["transformers + PEFT"] = peer_side(model)
    count = sum(p.numel() for p in model.parameters())
    print(f"{count / 1e6:.0f}M parameters, {options.batch} x {options.tokens} tokens, LoRA r 8 on q k v o")

    generator = torch.Generator().manual_seed(0)
    batches = torch.randint(0, options.vocab, (options.steps + 2, options.batch, options.tokens), generator=generator)
    compare(sides, batches[0].to(placement.device), tolerance=1e-4 if placement.dtype == torch.float32 else 5e-2)
    seconds = {name: [] for name in sides}
    for i, batch in enumerate(batches[1:]):
        for name, (loss_of, _, optimizer) in sides.items():
            ids = batch.to(placement.device)
            start = now(placement.device)
            loss_of(ids).backward()
            optimizer.step()
            optimizer.zero_grad()
            if i:  # the first one warms up
                seconds[name].append(now(placement.device) - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, median in medians.items():
        print(f"{name:<20} {1000 * median:9.1f} ms a step {options.batch * options.tokens / median:12,.0f} tok/s")
    if options.peer:
        print(f"{'ratio':<20} {medians['transformers + PEFT'] / medians['minilora']:9.2f} times as fast")
    print(f"peak memory of the process so far: {memory_used(placement.device) / 2**30:.2f} GiB")


def our_side(model: CausalLM):
    """(loss of a batch, trainable parameters by name, optimizer). B starts random, so that A has gradients too."""
    add_lora(model, LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS))
    trainable = trainable_parameters(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainable.values():
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    optimizer = make_optimizer("adamw_torch", trainable.values(), lr=2e-4, weight_decay=0.0)
    tokens = lambda ids: ids.shape[0] * (ids.shape[1] - 1)  # noqa: E731
    return (lambda ids: causal_lm_loss(model, ids, ids) / tokens(ids)), trainable, optimizer


def peer_side(model: CausalLM):
    """The same weights and the same adapter in transformers + PEFT."""
    import peft
    import transformers

    raw = model.config.to_dict()
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{k: v for k, v in raw.items() if k != "architectures"}))
    weight = next(model.parameters())
    theirs.load_state_dict({k.replace(".base_layer", ""): v for k, v in model.state_dict().items() if ".lora_" not in k})
    theirs.to(weight.device, weight.dtype)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM"))
    ours = trainable_parameters(model)
    trainable = {}
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                key = name.removeprefix("base_model.model.").removesuffix(".weight")
                parameter.copy_(ours[key])
                trainable[key] = parameter
    optimizer = torch.optim.AdamW(trainable.values(), lr=2e-4, weight_decay=0.0, fused=True)
    return (lambda ids: theirs(input_ids=ids, labels=ids).loss), trainable, optimizer


def compare(sides: dict, batch: torch.Tensor, tolerance: float) -> None:
    """Stop unless all sides have the same loss and the same gradients."""
    results = {}
    for name, (loss_of, trainable, optimizer) in sides.items():
        loss = loss_of(batch)
        loss.backward()
        results[name] = loss.item(), {key: p.grad.clone() for key, p in trainable.items()}
        optimizer.zero_grad()
    (first, (loss, gradients)), *others = results.items()
    for name, (other_loss, other_gradients) in others:
        worst = max(((gradients[k] - g).norm() / g.norm()).item() for k, g in other_gradients.items())
        print(f"{first} and {name}: loss {loss:.6f} and {other_loss:.6f}, gradients differ by at most {worst:.1e} relative")
        if worst > tolerance or abs(loss - other_loss) > tolerance * abs(loss):
            raise UserError(f"the two sides do not compute the same (allowed: {tolerance:g}); nothing was timed")


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    run_script(main)
