"""What the linter says of an adapter: a server, a verdict, the reason and the remedy."""

from dataclasses import dataclass

from minilora.adapters.peft_format import ADAPTER_CONFIG_FILE
from minilora.system.errors import summarize

SERVERS = ("PEFT", "vLLM", "SGLang")
WILL_NOT_LOAD, LOADS_WRONGLY, NEEDS_OPTION = "will not load", "loads wrongly", "loads, if"
CANNOT_TELL = "cannot tell"  # The adapter asks for something that only the server itself can judge.

EXPORT = "python scripts/merge.py --adapter DIRECTORY --export_adapter NEW"
MERGE = "python scripts/merge.py --adapter DIRECTORY --output NEW"
UNMERGED = "use it unmerged, in PEFT or with scripts/chat.py"
SAVE_AGAIN = "save or fetch the adapter again"
TRAIN_AGAIN = "the file is damaged or its training diverged: take an earlier checkpoint"
CORRECT = f"correct {ADAPTER_CONFIG_FILE}"
CONVERT = "convert it to plain LoRA, with PEFT's path_initial_model_for_weight_conversion"
TRY_IT = "load it in PEFT, and compare its answers with those of training"
RESIZE = "call resize_token_embeddings on the base model first, with the adapter's number of tokens"


@dataclass(frozen=True)
class Finding:
    """The reason why a server does not load an adapter as it was trained, and the remedy."""

    server: str  # one of SERVERS
    verdict: str  # WILL_NOT_LOAD | LOADS_WRONGLY | NEEDS_OPTION | CANNOT_TELL
    why: str
    mend: str = ""


def found(server: str, verdict: str, problems: list[str] | str, mend: str = MERGE) -> Finding:
    """Return a finding whose reason names the first of the problems and counts the others."""
    return Finding(server, verdict, problems if isinstance(problems, str) else summarize(problems, 2), mend)
