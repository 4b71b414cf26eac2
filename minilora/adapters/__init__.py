"""Adapters as files, with one meaning for whoever reads them: training, merging, the linter, other programs.
Read in this order:

peft_format.py   PEFT's names: files, configuration keys, tensor keys, initialisations
peft_rules.py    which values of adapter_config.json PEFT refuses
file.py          an adapter's two files without a model
checks.py        what contradicts what in them, and in a base model
save_load.py     these files <-> the adapter on a model
vera_files.py    VeRA's configuration and tensors
merging.py       what an adapter makes of each parameter of its base
arithmetic.py    sums, differences and shorter forms of adapters
plain.py         any update as A and B beside W; factors without a model -> a plain LoRA adapter
export.py        any adapter as plain LoRA
header.py        an adapter's configuration, names and shapes, without its numbers
findings.py      what the linter says: verdicts and remedies
lint_peft.py     PEFT's verdict
lint_servers.py  vLLM's and SGLang's
lint.py          does an adapter load in PEFT, vLLM, SGLang?
"""
