"""Whether a run's processes divide the model, and what they refuse then, before a weight is read."""

from minilora.config import LoraConfig, ModelConfig
from minilora.system.distributed import Processes
from minilora.system.errors import UserError
from minilora.targets import EMBEDDING, OUTPUT_HEAD, chosen_targets

PARALLEL = ("ddp", "fsdp")  # every process holds the model, or a part of it


def choose_parallel(parallel: str, processes: Processes) -> bool:
    """Return whether the processes divide the model. One process has nobody to divide it with."""
    return parallel == "fsdp" and processes.count > 1


def check_sharded(lora: LoraConfig, base: ModelConfig, model: ModelConfig) -> None:
    """Raise UserError for an adapter that a divided model cannot have.

    base: the model in its files; model: under the adapter, with as many tokens as that needs.
    """
    updated = chosen_targets([EMBEDDING, OUTPUT_HEAD], lora, linear=[])
    if updated:
        raise UserError(
            f"lora_target names {updated[0]}, whose weight an adapter's file repeats, and with parallel = "
            "'fsdp' no process has it whole: leave it out, or set additional_target to train it whole"
        )
    if model.vocab_size > base.vocab_size:
        raise UserError(
            f"the tokens need {model.vocab_size:,} rows of embedding, and the model has "
            f"{base.vocab_size:,}: parallel = 'fsdp' adds no rows; set parallel to ddp"
        )


def least(processes: Processes, *numbers: int) -> tuple[int, ...]:
    """Return the smallest value of each number among the ranks: what free memory decides must be alike."""
    import torch

    gathered = processes.gather({"numbers": torch.tensor(numbers)})
    return tuple(torch.stack([rank["numbers"] for rank in gathered]).amin(0).tolist())
