"""The parity report: compare minilora with transformers, PEFT and bitsandbytes, number by number.

    python scripts/dev/verify.py                                       a random Llama, in seconds
    python scripts/dev/verify.py --family all --output docs/parity.md  all six families, and the report
    python scripts/dev/verify.py --model assets/base                   the same rows on weights of your own

    --family NAME    llama, mistral, qwen2, qwen3, ministral, smollm3, or all; default: llama
    --model DIR      a directory with unquantized weights, in place of a random model
    --output FILE    the report, in Markdown
    --steps N        of each optimizer; default: 20
    --seed N         of everything random; default: 0

Both sides load the same files and get the same tokens and the same random adapter (B too: B = 0 would hide
most of LoRA). Both compute in float32 on the CPU. Each row compares one thing, tensor by tensor, in one of
two ways, and shows the worst tensor and the median:

    relative   max|ours - theirs| / max|theirs|   sums in another order may differ by float32's rounding
    identical  the share of bytes that differ     copies, codes and sums in the same order may not differ

Each random model has the special features of its family. Llama: the RoPE of Llama 3. Mistral: a window
shorter than the text. Qwen2: biases, a tied head, windows in some layers. Qwen3: norms on queries and keys,
and heads wider than D / H. Ministral: windows in every second layer, as the file lists them. SmolLM3: a last
layer without RoPE.

bitsandbytes' 4-bit layers run in train() mode only. In eval() mode, on a CPU with AVX512_BF16, they would
multiply in bfloat16 and lose their gradient (docs/parity.md, which this script writes, has the figures).

Exit codes: 0 every row is ok, 1 a row failed, 2 the command line or the model is wrong.
"""

if __name__ == "__main__":
    import minilora.system.interrupts  # first, for Ctrl-C during the other imports
    from minilora.system.early_help import answer_help

    answer_help(__doc__)

import argparse
import math
import platform
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

import minilora
from minilora import LoraConfig, QuantConfig, UserError
from minilora.data.examples import count_supervised
from minilora.formats.weights import StoredTensors, read_config
from minilora.lora import lora_layers
from minilora.loss import IGNORE_INDEX, causal_lm_loss
from minilora.optim import AdamW8bit, Schedule, make_optimizer, set_learning_rate
from minilora.quantization import QUANT_TYPES, four_bit_code
from minilora.recompute import set_recompute
from minilora.system.errors import ArgumentParser, local_path, run_script
from minilora.system.files import check_writable, refuse_overwrite, write_whole
from minilora.targets import OUTPUT_HEAD

Pairs = Iterator[tuple[Tensor, Tensor]]  # (ours, theirs)

LORA = LoraConfig.preset("aggressive_r16_all", lora_dropout=0.0)
MOMENTS = dict(exp_avg="state1", exp_avg_absmax="absmax1", exp_avg_sq="state2", exp_avg_sq_absmax="absmax2")
ADAMW = dict(lr=1e-3, weight_decay=0.01)
TOKENS = 48  # in each of two rows
SIZES = dict(vocab_size=1024, hidden_size=256, intermediate_size=768, num_hidden_layers=4)
SIZES |= dict(num_attention_heads=8, num_key_value_heads=2, bos_token_id=None, eos_token_id=None)
LLAMA3_ROPE = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, rope_theta=500000.0
)
WINDOW_EVERY_SECOND = ["sliding_attention", "full_attention"] * 2
NO_ROPE_IN_THE_LAST = [1, 1, 1, 0]  # 1: the layer has RoPE
FAMILIES = {
    "llama": dict(rope_parameters=LLAMA3_ROPE | dict(original_max_position_embeddings=32)),
    "mistral": dict(sliding_window=16),
    "qwen2": dict(use_sliding_window=True, sliding_window=16, max_window_layers=1, tie_word_embeddings=True),
    "qwen3": dict(head_dim=64),
    "ministral": dict(head_dim=32, sliding_window=16, layer_types=WINDOW_EVERY_SECOND),
    "smollm3": dict(no_rope_layers=NO_ROPE_IN_THE_LAST, pad_token_id=None),
}


def main() -> None:
    options = parse_options()
    check(options)
    warnings.filterwarnings("ignore", module=r"(transformers|peft)\..*")  # about their own future
    import_module("transformers").utils.logging.disable_progress_bar()

    names = list(FAMILIES) if options.family == "all" else [options.model or options.family]
    sections, verdicts = [introduction(options)], []
    for name in names:
        title, table = compare_model(name, options)
        sections.append(
            f"## {title}\n\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in (HEADER, RULE, *table))
        )
        verdicts += [cells[-1] for cells in table]
    failed = verdicts.count("FAILED")
    print(f"\n{failed} of {len(verdicts)} rows FAILED" if failed else f"\nall {len(verdicts)} rows are ok")
    if options.output:
        write_whole(options.output, "\n\n".join(sections) + "\n")
    sys.exit(1 if failed else 0)


def parse_options() -> argparse.Namespace:
    parser = ArgumentParser(help_text=__doc__)
    subject = parser.add_mutually_exclusive_group()
    subject.add_argument("--family", choices=(*FAMILIES, "all"), default="llama")
    subject.add_argument("--model")
    parser.add_argument("--output", type=local_path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def check(options: argparse.Namespace) -> None:
    """Raise UserError for every mistake that can be seen before the first number."""
    if options.steps < 2 or options.seed < 0:
        raise UserError(f"--steps {options.steps} must be at least 2, --seed {options.seed} at least 0")
    if options.output:
        check_writable("--output", options.output)
    if options.model:
        read_config(Path(options.model))
        if options.output:
            refuse_overwrite("--output", options.output, Path(options.model).iterdir())
        stored, model = StoredTensors(Path(options.model)), options.model
        if stored.quantized:
            raise UserError(
                f"the weights in {model} are quantized already; give a directory with unquantized ones"
            )
        for name, shape in stored.shapes.items():
            # bitsandbytes gives a block that spans two rows a wrong scale: see minilora/quantization.py.
            if name.startswith("model.layers.") and len(shape) == 2 and shape[1] % 64:
                width = f"{shape[1]} wide, no multiple of 64"
                raise UserError(f"{name} in {model} is {width}: bitsandbytes would misread it")
    for oracle in ("transformers", "peft", "bitsandbytes"):
        try:
            import_module(oracle)
        except ImportError as error:
            fix = 'pip install -c constraints.txt -e ".[test]"'
            message = f"{oracle}, with which this script compares, cannot be imported ({error}): {fix}"
            raise UserError(message) from error


# ---- the two sides -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """The input of both sides: a model directory, and the seed of adapters, tokens and dropout."""

    directory: Path
    vocab_size: int
    steps: int
    seed: int

    def batch(self, step: int = 0) -> dict[str, Tensor]:
        """Return input_ids and labels of a step, (2, T) each. The first quarter of the labels is ignored."""
        generator = torch.Generator().manual_seed(1000 * self.seed + step)
        input_ids = torch.randint(self.vocab_size, (2, TOKENS), generator=generator)
        labels = input_ids.clone()
        labels[:, : TOKENS // 4] = IGNORE_INDEX
        return dict(input_ids=input_ids, labels=labels)


def write_random_model(directory: Path, family: str, seed: int) -> None:
    """Let transformers write a model directory in which every parameter is random, biases and norms too."""
    import transformers

    config = transformers.AutoConfig.for_model(family, **SIZES | FAMILIES[family])
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        spread = SIZES["hidden_size"] ** -0.5 if parameter.dim() == 2 else 0.1
        parameter.data = ("norm" in name) + spread * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(directory)


def load_ours(case: Case, quant: QuantConfig | None = None, lora: LoraConfig | None = None) -> nn.Module:
    """Return our model, bare or with a random adapter."""
    model = minilora.load_model(case.directory, quant, torch.float32)
    if lora is not None:
        minilora.add_lora(model, lora)
        generator = torch.Generator().manual_seed(case.seed)
        for parameter in trainable(model):
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def load_theirs(case: Case, quant: QuantConfig | None = None) -> nn.Module:
    """Return the bare model in transformers. With `quant` it is in train() mode, without dropout."""
    import transformers

    how = dict(dtype=torch.float32, attn_implementation="eager", device_map={"": "cpu"})
    if quant is not None:
        kind = dict(bnb_4bit_quant_type=quant.quant_type, bnb_4bit_use_double_quant=quant.double_quant)
        kind |= dict(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
        how |= dict(quantization_config=transformers.BitsAndBytesConfig(**kind), attention_dropout=0.0)
    model = transformers.AutoModelForCausalLM.from_pretrained(case.directory, **how)
    return (
        model.eval() if quant is None else model.train()
    )  # train() for bitsandbytes: see the top of this file


def load_both(case: Case) -> tuple[nn.Module, nn.Module]:
    return load_ours(case), load_theirs(case)


def adapt_both(case: Case, quant: QuantConfig | None = None) -> tuple[nn.Module, nn.Module]:
    """Return our model with a random adapter, and PEFT's model with the same adapter."""
    import peft

    config = dict(r=LORA.r, lora_alpha=LORA.lora_alpha, target_modules=list(LORA.target_modules))
    config = peft.LoraConfig(**config, lora_dropout=0.0, task_type="CAUSAL_LM")
    ours, theirs = load_ours(case, quant, LORA), peft.get_peft_model(load_theirs(case, quant), config)
    for mine, other in adapters(ours, theirs):
        other.data = mine.detach().clone()
    return ours, theirs


def adapters(ours: nn.Module, theirs: nn.Module) -> Pairs:
    """Yield every A and B of ours with its twin in PEFT."""
    for name, layer in lora_layers(ours).items():
        twin = theirs.base_model.model.get_submodule(name)
        yield layer.lora_A["default"], twin.lora_A["default"].weight
        yield layer.lora_B["default"], twin.lora_B["default"].weight


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return list(minilora.trainable_parameters(model).values())


def mean_loss(model: nn.Module, input_ids: Tensor, labels: Tensor) -> Tensor:
    """Return our loss as transformers defines it: the mean over the supervised tokens."""
    return causal_lm_loss(model, input_ids, labels) / count_supervised(labels)


# ---- rows: the model and LoRA --------------------------------------------------------------------------


def layer_states(case: Case) -> Pairs:
    outputs = []
    for side in load_both(case):
        for layer in side.model.layers:
            layer.register_forward_hook(lambda _layer, _inputs, output: outputs.append(output))
        side(input_ids=case.batch()["input_ids"])
    half = len(outputs) // 2
    for ours, theirs in zip(outputs[:half], outputs[half:], strict=True):
        yield ours.view_as(theirs), theirs  # our layers see a batch's tokens as rows


def final_states(case: Case) -> Pairs:
    (ours, theirs), ids = load_both(case), case.batch()["input_ids"]
    yield ours.model(ids), theirs.model(input_ids=ids).last_hidden_state


def logits(case: Case, both: Callable = load_both) -> Pairs:
    (ours, theirs), ids = both(case), case.batch()["input_ids"]
    yield ours(ids), theirs(input_ids=ids).logits


def loss(case: Case) -> Pairs:
    ours, theirs = adapt_both(case)
    yield mean_loss(ours, **case.batch()), theirs(**case.batch()).loss


def gradients(case: Case, quant: QuantConfig | None = None) -> Pairs:
    ours, theirs = adapt_both(case, quant)
    mean_loss(ours, **case.batch()).backward()
    theirs(**case.batch()).loss.backward()
    yield from ((mine.grad, other.grad) for mine, other in adapters(ours, theirs))


def adamw(case: Case) -> Pairs:
    """Train both sides with warm-up from 0 and cosine decay, and yield the adapters.

    AdamW's first step is lr * sign(gradient). Without the warm-up, rounding would decide this step wherever a
    gradient is nearly zero.
    """
    import transformers

    ours, theirs = adapt_both(case)
    optimizer = make_optimizer("adamw_torch", minilora.trainable_parameters(ours), **ADAMW)
    reference = torch.optim.AdamW([other for _, other in adapters(ours, theirs)], **ADAMW)
    warmup = math.ceil(case.steps / 10)
    rates = Schedule("cosine", ADAMW["lr"], case.steps, warmup)
    schedule = transformers.get_cosine_schedule_with_warmup(reference, warmup, case.steps)
    for step in range(case.steps):
        set_learning_rate(optimizer, rates.learning_rate(step))
        mean_loss(ours, **case.batch(step)).backward()
        theirs(**case.batch(step)).loss.backward()
        for each in (optimizer, reference):
            each.step()
            each.zero_grad()
        schedule.step()
    yield from adapters(ours, theirs)


def merged(case: Case) -> Pairs:
    ours, theirs = adapt_both(case)
    minilora.merge_lora(ours)
    plain = theirs.merge_and_unload()
    yield from (
        (layer.base_layer.weight, plain.get_submodule(name).weight)
        for name, layer in lora_layers(ours).items()
    )


def saved_here(case: Case) -> tuple[nn.Module, nn.Module]:
    import peft

    ours = load_ours(case, lora=LORA)
    with TemporaryDirectory() as directory:
        minilora.save_adapter(ours, directory)
        return ours, peft.PeftModel.from_pretrained(load_theirs(case), directory)


def saved_there(case: Case) -> tuple[nn.Module, nn.Module]:
    ours, (_, theirs) = load_ours(case), adapt_both(case)
    with TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        minilora.load_adapter(ours, directory)
    return ours, theirs


# ---- rows: AdamW in 8 bits, weights in 4 bits, recomputing ---------------------------------------------


def adamw_8bit(case: Case, states: bool) -> Pairs:
    """Train both sides on our gradients; yield codes and scales of the two moments, or the adapter."""
    import bitsandbytes

    model = load_ours(case, lora=LORA)
    ours = trainable(model)
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    optimizer, reference = AdamW8bit(ours, **ADAMW), bitsandbytes.optim.AdamW8bit(theirs, **ADAMW)
    for step in range(case.steps):
        optimizer.zero_grad()
        mean_loss(model, **case.batch(step)).backward()
        for mine, other in zip(ours, theirs, strict=True):
            other.grad = mine.grad.clone()
        optimizer.step()
        reference.step()
    for mine, other in zip(ours, theirs, strict=True):
        if not states:
            yield mine, other
            continue
        for key, twin in MOMENTS.items():
            if twin in reference.state[other]:  # the moments of small tensors are float32 and have no scales
                yield optimizer.state[mine][key], reference.state[other][twin]


def weights_in_4_bits(case: Case, part: str) -> Pairs:
    """Yield a part of every decoder weight as NF4 and as FP4: its codebook, bytes, scales or values."""
    from bitsandbytes import functional

    for name, layer in load_ours(case).named_modules():
        for quant_type in QUANT_TYPES if isinstance(layer, nn.Linear) and name != OUTPUT_HEAD else ():
            ours = minilora.quantize_4bit(layer.weight, quant_type)
            packed, state = functional.quantize_4bit(
                layer.weight, quant_type=quant_type, compress_statistics=True
            )
            parts = {
                "codebooks": [(four_bit_code(quant_type), state.code)],
                "bytes": [(ours.packed, packed.view(-1))],
                "scales": [
                    (ours.absmax, state.absmax),
                    (ours.nested_absmax, state.state2.absmax),
                    (ours.offset, state.offset),
                ],
                # FP4 has two zeros. In bitsandbytes the CPU decides the sign of one of them: + 0.0 drops it.
                "values": [(ours.dequantize() + 0.0, functional.dequantize_4bit(packed, state) + 0.0)],
            }
            yield from parts[part]


def recomputed(case: Case, policy: str) -> Pairs:
    gradients = []
    for each in (policy, "off"):
        model = load_ours(case, lora=replace(LORA, lora_dropout=0.1)).train()
        set_recompute(model, each)
        torch.manual_seed(case.seed)
        mean_loss(model, **case.batch()).backward()
        gradients.append([parameter.grad for parameter in trainable(model)])
    yield from zip(*gradients, strict=True)


# ---- all rows, and what each is allowed ----------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One row of the report, and the function that yields its pairs of tensors."""

    what: str
    against: str
    allowed: float  # 0: identical
    pairs: Callable[[Case], Pairs]


SUMS, AFTER_STEPS, IDENTICAL, NF4 = 1e-5, 1e-4, 0.0, QuantConfig()
BOTH_IN_NF4 = partial(adapt_both, quant=NF4)
IN_4_BITS = {
    part: partial(weights_in_4_bits, part=part) for part in ("codebooks", "bytes", "scales", "values")
}
RECOMPUTED = {policy: partial(recomputed, policy=policy) for policy in ("full", "selective", "offload")}
ROWS = (
    Row("hidden states after every layer", "transformers", SUMS, layer_states),
    Row("final hidden states", "transformers", SUMS, final_states),
    Row("logits", "transformers", SUMS, logits),
    Row("loss with an adapter", "PEFT", SUMS, loss),
    Row("every LoRA gradient", "PEFT", SUMS, gradients),
    Row("adapter after AdamW steps", "PEFT", AFTER_STEPS, adamw),
    Row("merged weights", "PEFT", SUMS, merged),
    Row("adapter saved here, loaded there: logits", "PEFT", SUMS, partial(logits, both=saved_here)),
    Row("adapter saved there, loaded here: logits", "PEFT", SUMS, partial(logits, both=saved_there)),
    Row("adapter after 8-bit AdamW steps", "bitsandbytes", 1e-6, partial(adamw_8bit, states=False)),
    Row("8-bit AdamW: codes and scales", "bitsandbytes", IDENTICAL, partial(adamw_8bit, states=True)),
    Row("NF4, FP4: codebooks", "bitsandbytes", IDENTICAL, IN_4_BITS["codebooks"]),
    Row("NF4, FP4: packed bytes", "bitsandbytes", IDENTICAL, IN_4_BITS["bytes"]),
    Row("NF4, FP4: scales, doubly quantized", "bitsandbytes", IDENTICAL, IN_4_BITS["scales"]),
    Row("NF4, FP4: dequantized weights", "bitsandbytes", IDENTICAL, IN_4_BITS["values"]),
    Row("NF4 model with an adapter: logits", "all three", SUMS, partial(logits, both=BOTH_IN_NF4)),
    Row("NF4 model: every LoRA gradient", "all three", SUMS, partial(gradients, quant=NF4)),
    Row("gradients, recompute full", "recompute off", IDENTICAL, RECOMPUTED["full"]),
    Row("gradients, recompute selective", "recompute off", IDENTICAL, RECOMPUTED["selective"]),
    Row("gradients, recompute offload (CPU: full)", "recompute off", IDENTICAL, RECOMPUTED["offload"]),
)


def compare_model(name: str, options: argparse.Namespace) -> tuple[str, list[tuple[str, ...]]]:
    """Return the title of a model (a family or a directory) and the cells of its rows; print both."""
    with TemporaryDirectory() as scratch:
        directory = Path(options.model or scratch)
        if not options.model:
            write_random_model(directory, name, options.seed)
        case = Case(directory, read_config(directory).vocab_size, options.steps, options.seed)
        title, table = f"{name}: {describe(directory)}", []
        print(f"\n{title}\n{LINE.format(*HEADER)}")
        for row in ROWS:
            table.append(compare(row, case))
            print(LINE.format(*table[-1]), flush=True)
    return title, table


def compare(row: Row, case: Case) -> tuple[str, ...]:
    """Return the cells of a row. The last cell is the verdict; NaN is never ok."""
    differences = torch.tensor(
        [difference(ours, theirs, row.allowed == IDENTICAL) for ours, theirs in row.pairs(case)]
    )
    worst, median = differences.max().item(), differences.quantile(0.5).item()
    count, *numbers = str(len(differences)), *(f"{x:.1e}" if x else "0" for x in (worst, median))
    allowed = "identical" if row.allowed == IDENTICAL else f"{row.allowed:.0e}"
    verdict = "ok" if worst <= row.allowed else "FAILED"
    return row.what, row.against, count, *numbers, allowed, verdict


def difference(ours: Tensor, theirs: Tensor, identical: bool) -> float:
    """Return the share of bytes that differ, or the largest difference relative to max|theirs|."""
    if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
        return math.inf
    if identical:
        mine, other = (side.detach().reshape(-1).view(torch.uint8) for side in (ours, theirs))
        return (mine != other).float().mean().item()
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


# ---- the report ----------------------------------------------------------------------------------------

HEADER = ("what", "against", "tensors", "worst", "median", "allowed", "")
RULE = ("---", "---", "---:", "---:", "---:", "---:", "---")  # below it in Markdown
LINE = "  {:<42}{:<14}{:>7}{:>10}{:>10}{:>11}{:>8}"  # in the terminal
PACKED_WEIGHTS = """bitsandbytes' 4-bit layers run in `train()` mode here, without dropout. On a CPU with
AVX512_BF16, bitsandbytes 0.50.2 packs a 4-bit weight anew at its first forward in `eval()` mode. From then on
it multiplies in bfloat16, whatever `bnb_4bit_compute_dtype` says, by an operator without a gradient. Measured
on the Llama below: before that forward its logits differ from ours by 1.5e-06 and its LoRA gradients by
3.4e-06. After it its logits differ by 1.9e-02, and the norm of all its LoRA gradients is 5.0 times too small,
also when it is back in `train()` mode."""
PACKAGES = ("minilora", "torch", "transformers", "peft", "bitsandbytes", "safetensors", "numpy")


def describe(directory: Path) -> str:
    config, size = read_config(directory), sum(map(math.prod, StoredTensors(directory).shapes.values()))
    layers = f"{config.num_hidden_layers} layers of width {config.hidden_size}"
    heads = f"{config.num_attention_heads} heads over {config.num_key_value_heads}"
    return f"{layers}, {heads}, {size / 1e6:.1f}M parameters"


def introduction(options: argparse.Namespace) -> str:
    """Return the head of the report: the command, the method, the versions."""
    command = shlex.join(["python", "scripts/dev/verify.py", *sys.argv[1:]])
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    adapter = f"r {LORA.r}, alpha {LORA.lora_alpha}, all seven projections"
    return f"""# Parity report

    {command}

minilora beside transformers, PEFT and bitsandbytes: both sides have the same files, the same tokens and the
same random adapter ({adapter}). The difference of
two tensors is max|ours - theirs| / max|theirs|, or, where only *identical* is allowed, the share of bytes
that differ. *Worst* and *median* are over the tensors of a row.

{date.today()}, seed {options.seed}, {options.steps} optimizer steps, 2 x {TOKENS} tokens, float32 on a CPU
({torch.backends.cpu.get_cpu_capability()}, threads: {torch.get_num_threads()}).
Python {platform.python_version()}, {versions}.

{PACKED_WEIGHTS}"""


if __name__ == "__main__":
    run_script(main)
