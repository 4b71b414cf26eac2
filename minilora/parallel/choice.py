"""What processes that divide a model refuse, before a weight is read, and what they must agree on."""

import torch

from minilora.adapters.checks import naming
from minilora.config import LoraConfig, ModelConfig
from minilora.system.distributed import Processes
from minilora.targets import EMBEDDING, OUTPUT_HEAD, chosen_targets


def refusal(finetuning_type: str, lora: LoraConfig, base: ModelConfig, model: ModelConfig) -> str:
    """Return why processes cannot divide the model of a training, with the mend; empty: they can.

    base: the model in its files; model: under the adapter, with as many tokens as that needs. Raises
    UserError for targets that are no pattern.
    """
    if finetuning_type == "full":
        return "finetuning_type = 'full' freezes no weights, and parallel = 'fsdp' divides those: set ddp"
    with naming(f"lora_target {lora.target_modules!r}"):
        updated = chosen_targets([EMBEDDING, OUTPUT_HEAD], lora, linear=[])
    if updated:
        return (
            f"lora_target names {updated[0]}, whose weight an adapter's file repeats, and with parallel = "
            "'fsdp' no process has it whole: leave it out, or set additional_target to train it whole"
        )
    if not torch.cuda.is_available() and not hasattr(torch.cpu.Stream, "record_event"):
        old = f"PyTorch {torch.__version__} divides models among GPUs alone"
        return f"{old}: install 2.7 or newer for parallel = 'fsdp' on a CPU, or set ddp"
    if model.vocab_size > base.vocab_size:
        return (
            f"the tokens need {model.vocab_size:,} rows of embedding, and the model has "
            f"{base.vocab_size:,}: parallel = 'fsdp' adds no rows; set parallel to ddp"
        )
    return ""


def least(processes: Processes, *numbers: int) -> tuple[int, ...]:
    """Return the smallest value of each number among the ranks: what free memory decides must be alike."""
    gathered = processes.gather({"numbers": torch.tensor(numbers)})
    return tuple(torch.stack([rank["numbers"] for rank in gathered]).amin(0).tolist())
