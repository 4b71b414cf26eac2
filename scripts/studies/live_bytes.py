"""When does a training step hold how many bytes, and what does each recompute policy pay for less?

Expected. Without recompute the bytes climb through the forward pass, layer by layer, and fall through the
backward pass. With `full` the climb is much flatter, and each layer's backward pass makes a tooth: the one
live layer. `selective` lies between. On a CPU, `offload` is `full`: inputs are in CPU memory already.

Chen et al. 2016 (arXiv:1604.06174) cut L layers into segments of sqrt(L), keep the inputs of segments alone,
and run a segment again with all its activations: O(sqrt(L)) memory. Here a layer's activations take a = 12.5
times its input (docs/memory.md), so segments of k layers hold L / k + a k inputs. That is least at
k = sqrt(L / a), about 1 for 16 layers: `full` should win. It should lose to segments whose layers are
checkpointed in turn: L / k + k + a, for one more forward pass.

The model is random, with 16 layers of Mistral's proportions and an adapter on q, k, v and o. The bytes come
from the events of PyTorch's allocator. The arithmetic is counted, too: the multiplications of matrix products
and of attention.
"""

from bisect import bisect
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from minilora.config import LoraConfig, ModelConfig
from minilora.lora import add_lora, trainable_parameters
from minilora.loss import causal_lm_loss
from minilora.model import CausalLM
from minilora.optim import make_optimizer
from minilora.recompute import checkpoint, set_recompute
from studies.drawing import BLUE, GREY, ORANGE

LAYERS, QUICK_LAYERS = 16, 4
BATCH, LENGTH, WIDTH = 2, 256, 128
PARTS = ("forward", "backward", "optimizer")  # of a step
POINTS = 400  # of a curve in the figures
SEGMENTS = "segments of {}", "segments of {}, layers checkpointed"
POLICIES = ("off", "selective", "full", "offload")


class Segment(nn.ModuleList):
    """Several layers that `recompute.checkpoint` takes for one; `inner`: each is checkpointed in its turn."""

    inner = False

    def forward(self, x: Tensor, *seen, cache=None, kept=None) -> Tensor:
        for layer in self:
            again = layer.rerun_for_backward
            x = checkpoint(layer, x, *seen, rerun=again) if self.inner else layer(x, *seen)
        return x

    rerun_for_backward = forward


def measure(quick: bool) -> dict:
    layers = QUICK_LAYERS if quick else LAYERS
    side = round(layers**0.5)
    rows = []
    for plan in (*POLICIES, *(name.format(side) for name in SEGMENTS)):
        model = make_model(layers, plan, side)
        optimizer = make_optimizer("adamw_torch", trainable_parameters(model), 1e-3, weight_decay=0.0)
        step(model, optimizer)  # the first step allocates the moments
        curve, ends = live_bytes(model, optimizer)
        with CountProducts() as products:
            step(model, optimizer)
        row = dict(plan=plan, peak=max(curve), products=products.count)
        rows.append(row | dict(events=len(curve), ends=ends, bytes=thinned(curve)))
        print(f"  {plan}: peak {max(curve):,} bytes, {products.count:,} multiplications", flush=True)
    layer_input = BATCH * LENGTH * WIDTH * 4
    settings = dict(layers=layers, batch=BATCH, length=LENGTH, hidden_size=WIDTH, layer_input=layer_input)
    return settings | dict(segment=side, rows=rows)


def make_model(layers: int, plan: str, side: int) -> CausalLM:
    """Return a random model of Mistral's proportions with an adapter, that follows a plan."""
    config = ModelConfig(
        model_type="mistral", vocab_size=1000, hidden_size=WIDTH, intermediate_size=WIDTH * 7 // 2,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=1, head_dim=WIDTH // 4,
        layer_windows=(None,) * layers, max_position_embeddings=LENGTH,
    )  # fmt: skip
    model = CausalLM(config)
    model.init_weights()
    torch.manual_seed(0)
    add_lora(model, LoraConfig(r=8))
    if plan in POLICIES:
        set_recompute(model, plan)
        return model.train()
    decoder = model.model
    decoder.layers = nn.ModuleList(Segment(decoder.layers[i : i + side]) for i in range(0, layers, side))
    for segment in decoder.layers:
        segment.inner = plan == SEGMENTS[1].format(side)
    decoder.config = replace(config, layer_windows=(None,) * len(decoder.layers))
    set_recompute(model, "full")
    return model.train()


def step(model: CausalLM, optimizer: torch.optim.Optimizer) -> None:
    ids = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH) % 1000
    with record_function(PARTS[0]):
        loss = causal_lm_loss(model, ids, ids) / ids.numel()
    with record_function(PARTS[1]):
        loss.backward()
    with record_function(PARTS[2]):
        optimizer.step()
        optimizer.zero_grad()


def live_bytes(model: CausalLM, optimizer: torch.optim.Optimizer) -> tuple[list[int], list[int]]:
    """Return the bytes that a step holds beyond those before it, after each event of the allocator, and how
    many events each part has ended with.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(model, optimizer)
    events = profiler.profiler.kineto_results.events()
    memory = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    ended = {e.name(): e.start_ns() + e.duration_ns() for e in events if e.name() in PARTS}
    times = [time for time, _ in memory]
    return list(accumulate(n for _, n in memory)), [bisect(times, ended[part]) for part in PARTS]


class CountProducts(TorchDispatchMode):
    """Counts the multiplications of the matrix products and the attention that PyTorch runs."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name == "mm" or name.startswith("addmm"):
            a, b = args[:2] if name == "mm" else args[1:3]
            self.count += a.shape[0] * a.shape[1] * b.shape[1]
        elif "attention" in name:  # causal: half of 2 products of (T, K, T) a head, 5 in backward
            q = args[1] if "backward" in name else args[0]  # (B, H, T, K)
            self.count += q.numel() * q.shape[2] * (5 if "backward" in name else 2) // 2
        return function(*args, **(kwargs or {}))


def thinned(curve: list[int]) -> list[int]:
    """Return at most POINTS values of a curve, each the largest of those it stands for."""
    width = -(-len(curve) // POINTS)
    return [max(curve[i : i + width]) for i in range(0, len(curve), width)]


# ---- picture and table -------------------------------------------------------------------------------------


def draw(figure, figures: dict) -> None:
    figure.set_size_inches(9.6, 5.2)
    shown = [row for row in figures["rows"] if row["plan"] != "offload"]  # on a CPU it is `full`
    most = max(row["events"] for row in shown)
    panels = list(figure.subplots(2, 3, sharex=True, sharey=True).flat)
    for axes, row in zip(panels, shown, strict=False):
        mb = [n / 1e6 for n in row["bytes"]]
        x = [i * row["events"] / len(mb) for i in range(len(mb))]
        forward, backward, _ = row["ends"]
        for start, end, colour in ((0, forward, BLUE), (forward, backward, ORANGE), (backward, most, GREY)):
            part = [start <= at <= end for at in x]
            axes.fill_between(x, mb, where=part, color=colour, alpha=0.85, linewidth=0)
        axes.axhline(row["peak"] / 1e6, color=GREY, linewidth=0.7, linestyle="--")
        axes.text(0.98, 0.95, f"peak {row['peak'] / 1e6:.1f} MB", color=GREY, ha="right", va="top",
                  transform=axes.transAxes)  # fmt: skip
        axes.set_title(row["plan"], fontsize=10)
        axes.set(ylim=(0, 1.18 * max(r["peak"] for r in shown) / 1e6), xlim=(0, most))
        axes.grid(axis="y", alpha=0.25)
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    panels[2].tick_params(labelbottom=True)
    figure.supxlabel("events of the allocator, in a step", fontsize=10)
    figure.supylabel("bytes beyond weights and optimizer (MB)", fontsize=10)
    for y, colour, text in ((0.30, BLUE, "forward"), (0.25, ORANGE, "backward"), (0.20, GREY, "optimizer")):
        figure.text(0.74, y, text, color=colour, fontsize=11, fontweight="bold")


def table(figures: dict) -> str:
    first = figures["rows"][0]
    lines = ["| plan | peak, MB | in layer inputs | multiplications, millions | more than `off` |"]
    lines.append("|---|---:|---:|---:|---:|")
    for row in figures["rows"]:
        more = row["products"] / first["products"] - 1
        cells = row["plan"], f"{row['peak'] / 1e6:.1f}", f"{row['peak'] / figures['layer_input']:.0f}"
        lines.append(f"| {' | '.join(cells)} | {row['products'] / 1e6:,.0f} | {more:.0%} |")
    return "\n".join(lines)
