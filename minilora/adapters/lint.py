"""Will an adapter load, and where? The rules of PEFT 0.21, vLLM 0.33 and SGLang 0.5.23, without any of them.

A directory that loads in one program need not load in another. Worse, some load and silently give wrong
answers:

                           PEFT              vLLM                SGLang
    rsLoRA                 alpha / sqrt(r)   alpha / sqrt(r)     alpha / r: wrong by a factor of sqrt(r)
    DoRA                   yes               refused             refused
    ranks                  any, by layer     to --max-lora-rank  one for all layers
    alphas by layer        yes               yes                 ignored
    targets                names or regex    as the tensors say  names; q needs v; k, v need q; up needs gate
    copies, rows, biases   yes               refused             refused or left out
    another vocabulary     resize it first   refused             left out
    PiSSA, OLoRA           repeated          refused             loaded without their change of the base model
    pissa_niter, LoRA-GA   drawn otherwise   refused             the same
    missing tensors        stay untrained    refused             refused
    no tensors at all      nothing applied   nothing applied     nothing applied
    names of wrapped models  not read        not read            read: by number and leaf
    NaN, an infinite alpha computes NaN      computes NaN        computes NaN
    other *.safetensors    not read          not read            read as if they belonged to the adapter

The files are read once, one tensor at a time, to find a NaN; a few hundred megabytes take about a second.
With the configuration of the base model, names and shapes are compared with its layers. No finding means
"loads"; of a feature that the linter does not know, it says "cannot tell". A remedy is a command that takes
this adapter, or none.

PEFT's rules are in lint_peft.py, those of the servers in lint_servers.py, the comparison of the two files in
checks.py.
"""

from dataclasses import replace
from pathlib import Path

import torch

from minilora.adapters.export import is_exportable
from minilora.adapters.findings import (
    EXPORT,
    LOADS_WRONGLY,
    MERGE,
    NEEDS_OPTION,
    SAVE_AGAIN,
    SERVERS,
    TRAIN_AGAIN,
    UNMERGED,
    WILL_NOT_LOAD,
    Finding,
    found,
)
from minilora.adapters.header import AdapterHeader
from minilora.adapters.lint_peft import verdicts_of_peft
from minilora.adapters.lint_servers import verdicts_of_sglang, verdicts_of_vllm
from minilora.adapters.peft_format import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE
from minilora.adapters.save_load import load_adapter, read_adapter
from minilora.adapters.vera_files import VERA
from minilora.config import ModelConfig
from minilora.model import CausalLM
from minilora.system.errors import UserError
from minilora.system.schema import read_object
from minilora.system.terminal import printable


def lint_adapter(directory: str | Path, base_config: ModelConfig | None = None) -> list[Finding]:
    """All reasons that keep a server from loading an adapter directory as it was trained.

    A server without a finding loads it. base_config: of the base model, to compare names and shapes with.
    Raises UserError for a directory that is no adapter at all.
    """
    directory = Path(directory)
    if not (directory / ADAPTER_CONFIG_FILE).is_file():
        raise UserError(f"{directory} is not an adapter: it has no {ADAPTER_CONFIG_FILE}")
    try:
        if read_object(directory / ADAPTER_CONFIG_FILE).get("peft_type") == VERA:
            return _vera(directory, base_config)
        adapter = AdapterHeader.read(directory, base_config)
    except UserError as problem:
        return [Finding(server, WILL_NOT_LOAD, str(problem), SAVE_AGAIN) for server in SERVERS]
    files = sorted(path.name for path in directory.glob("*.safetensors"))
    other_files = [name for name in files if name != ADAPTER_WEIGHTS_FILE]
    findings = [
        *verdicts_of_peft(adapter),
        *verdicts_of_vllm(adapter),
        *verdicts_of_sglang(adapter, other_files),
    ]
    if wrong := adapter.wrong_numbers:
        findings += [found(server, LOADS_WRONGLY, wrong, TRAIN_AGAIN) for server in SERVERS]
    return [replace(finding, mend=_remedy(adapter, finding.mend)) for finding in findings]


def _remedy(adapter: AdapterHeader, mend: str) -> str:
    """The remedy for this adapter. Nobody is sent to a command that refuses it."""
    if mend == EXPORT and not (adapter.is_taken_here and is_exportable(adapter.file)):
        mend = MERGE
    if mend == MERGE and not adapter.can_be_merged:
        return UNMERGED if adapter.is_taken_here else ""
    if mend == MERGE and not adapter.get("base_model_name_or_path"):
        mend += " --model BASE"
    return mend.replace("DIRECTORY", str(adapter.file.directory))


def loads(findings: list[Finding]) -> bool:
    """Whether every server loads the adapter as it was trained. Some servers may need an option for it."""
    return all(finding.verdict == NEEDS_OPTION for finding in findings)


def findings_text(findings: list[Finding]) -> str:
    """The findings for a terminal, each with its remedy below. A server without findings gets one line."""
    lines = []
    for server in SERVERS:
        mine = [finding for finding in findings if finding.server == server]
        lines += [] if mine else [f"{server:8}loads"]
        for finding in mine:
            lines.append(f"{server:8}{finding.verdict:15}{_shortened(finding.why)}")
            lines += [f"{'':23}-> {_shortened(finding.mend)}"] if finding.mend else []
    return "\n".join(lines)


def _shortened(text: str) -> str:
    """A text for a terminal: names from a file may be endless, and may hold line ends and escape codes."""
    return printable(text if len(text) <= 500 else f"{text[:300]} ... {text[-195:]}")


def _vera(directory: Path, base_config: ModelConfig | None) -> list[Finding]:
    """The findings about a VeRA adapter, which PEFT alone knows."""
    findings = []
    try:
        read_adapter(directory)
        if base_config is not None:
            with torch.device("meta"):
                model = CausalLM(base_config)
            load_adapter(model, directory)
    except UserError as error:
        findings.append(found("PEFT", WILL_NOT_LOAD, str(error), SAVE_AGAIN))
    merge = MERGE.replace("DIRECTORY", str(directory))
    why = "peft_type 'VERA' is not supported"
    return findings + [found(server, WILL_NOT_LOAD, why, merge) for server in SERVERS if server != "PEFT"]
