"""Will an adapter load in PEFT, vLLM and SGLang? If not, this script prints the reason and the remedy.

    python scripts/lint_adapter.py outputs
    python scripts/lint_adapter.py outputs --model mistralai/Mistral-7B-v0.1

The adapter and the base model are directories or hub ids. With --model, names and shapes are compared with
the base model's. None of the three programs is installed or started: `minilora/adapters/lint.py` knows their
rules. The weights are read once, to find a NaN. Exits with 0 if all three load the adapter as it was trained,
1 if some do not or nobody can tell, 2 if the directory holds no adapter. A command that is advised takes this
adapter.
"""

if __name__ == "__main__":
    import minilora.system.interrupts  # noqa: F401  first, for Ctrl-C during the other imports
    from minilora.system.early_help import answer_help

    answer_help(__doc__)

import sys

from minilora.adapters.lint import findings_text, lint_adapter, loads
from minilora.formats.weights import read_config
from minilora.system.errors import ArgumentParser, run_script
from minilora.system.hub import resolve_model


def main() -> None:
    parser = ArgumentParser(help_text=__doc__)
    parser.add_argument("adapter")
    parser.add_argument("--model")
    options = parser.parse_args()
    base_config = read_config(resolve_model(options.model)) if options.model else None
    findings = lint_adapter(resolve_model(options.adapter), base_config)
    print(findings_text(findings))
    sys.exit(0 if loads(findings) else 1)


if __name__ == "__main__":
    run_script(main)
