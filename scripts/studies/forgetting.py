"""What does a model forget while it learns to answer, and does LoRA forget less than full training?

Expected. LoRA learns less and forgets less (Biderman et al. 2024, arXiv:2405.09673): on new domains it stays
behind full training, and keeps more of what the model could do before. The perplexity of texts like those of
pretraining should rise with the steps, more so with all weights than with LoRA, and more with a high rank
than with a low one. Training that goes on after the answers are right should make it worse.

The learning rate is constant, so that every step is as long as the others. It is near the best one of
rank_and_rate, for each kind of training. LoRA of rank 16 and all weights are also trained at a quarter of
it, for the question whether the method forgets or its step size.
"""

from collections.abc import Sequence
from functools import partial

from minilora.config import LoraConfig
from minilora.model import CausalLM
from studies.drawing import BLUE, GREY, ORANGE
from studies.small_world import held_out_loss, load, load_to_train_all, perplexity, right_answers, train

PALE_BLUE = "#a9c6e3"
RUNS = {  # name: rank, or None for all weights; learning rate; colour and style
    "LoRA, r = 1": (1, 4e-3, PALE_BLUE, "o-"),
    "LoRA, r = 16": (16, 4e-3, BLUE, "o-"),
    "all weights": (None, 1e-3, ORANGE, "o-"),
    "LoRA, r = 16, a quarter of the rate": (16, 1e-3, BLUE, "o--"),
    "all weights, a quarter of the rate": (None, 2.5e-4, ORANGE, "o--"),
}
MEASURED_AT = (10, 20, 40, 80, 160, 320)
SEEDS = (0, 1)


def measure(quick: bool) -> dict:
    steps, seeds, count, texts = MEASURED_AT, SEEDS, None, 200
    if quick:
        steps, seeds, count, texts = (2, 4), SEEDS[:1], 32, 16
    runs = []
    for name, (r, rate, *_) in RUNS.items():
        for seed in seeds:
            run = dict(name=name, r=r, rate=rate, seed=seed, steps=[], losses=[], right=[], perplexity=[])
            model = start(r, seed)
            look_at = partial(look, model, run, (0, *steps), count, texts)
            look_at(0)
            train(model, rate, steps[-1], seed, schedule="constant", after=look_at)
            runs.append(run)
    return dict(schedule="constant", texts=texts, seeds=list(seeds), runs=runs)


def start(r: int | None, seed: int) -> CausalLM:
    if r is None:
        return load_to_train_all()
    return load(LoraConfig(r=r, lora_alpha=16, target_modules="all-linear"), seed)


def look(model: CausalLM, run: dict, steps: Sequence[int], count: int | None, texts: int, step: int) -> None:
    """Append the figures of a model to those of its run, if the step is one of `steps`."""
    if step not in steps:
        return
    run["steps"].append(step)
    run["losses"].append(held_out_loss(model, count))
    run["right"].append(right_answers(model, count))
    run["perplexity"].append(perplexity(model, texts))
    last = {key: run[key][-1] for key in ("losses", "right", "perplexity")}
    print(f"  {run['name']}, seed {run['seed']}, step {step}: {last}", flush=True)


def mean_of(figures: dict, name: str, key: str) -> list[float]:
    """Return the mean over seeds of a figure, at each step that was measured."""
    runs = [run[key] for run in figures["runs"] if run["name"] == name]
    return [sum(values) / len(values) for values in zip(*runs, strict=True)]


def draw(figure, figures: dict) -> None:
    figure.set_size_inches(9, 4.4)
    by_step, by_answers = figure.subplots(1, 2, sharey=True)
    for name, (_, _, colour, style) in RUNS.items():
        filling = "white" if "--" in style else colour
        look = dict(color=colour, linewidth=1.4, markersize=4.5, markerfacecolor=filling)
        text = mean_of(figures, name, "perplexity")
        steps = [max(step, 5) for step in figures["runs"][0]["steps"]]  # 0 has no place on a logarithmic axis
        by_step.plot(steps, text, style, **look, label=name)
        by_answers.plot(mean_of(figures, name, "right"), text, style, **look)
    base = figures["runs"][0]["perplexity"][0]
    for axes in (by_step, by_answers):
        axes.axhline(base, color=GREY, linewidth=0.8)
        axes.set(yscale="log")
        axes.grid(alpha=0.25)
        axes.set_yticks([2.5, 3, 4, 5, 6, 7], ["2.5", "3", "4", "5", "6", "7"])
        axes.minorticks_off()
    by_step.set(xscale="log", xlabel="steps", ylabel="perplexity of texts that it has not read")
    by_step.set_xticks([5, 10, 20, 40, 80, 160, 320], ["0", "10", "20", "40", "80", "160", "320"])
    by_step.minorticks_off()
    figure.legend(*by_step.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    by_answers.set(xlabel="right answers to held-out questions")
    by_answers.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
    by_answers.text(1, base, "the base model", color=GREY, va="bottom", ha="right")


def table(figures: dict) -> str:
    steps = figures["runs"][0]["steps"]
    shown = [step for step in steps if step in (0, 20, 40, 80, 160, 320)] or steps
    head = " | ".join(f"step {step}" for step in shown)
    lines = [f"| trained | rate | {head} |", "|---|---:|" + "---:|" * len(shown)]
    for name, (_, rate, *_) in RUNS.items():
        text, right = mean_of(figures, name, "perplexity"), mean_of(figures, name, "right")
        cells = [f"{text[i]:.2f}, {right[i]:.0%}" for i in map(steps.index, shown)]
        lines.append(f"| {name} | {rate:.2g} | {' | '.join(cells)} |")
    return "\n".join(lines)
