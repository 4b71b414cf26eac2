"""The table of bad inputs: some hundred mistakes, by kind.

Each module makes the cases of one kind, with `cases()`. Families of cases come from short loops: every field
of config.json with a value of each wrong sort. A new way to fail becomes one more line here.

    controls.py        what must succeed, so that the harness cannot pass because everything fails
    command_line.py    options: unknown, empty, doubled, of wrong types, huge, with control characters
    yaml_files.py      settings files: aliases, depth, tags, pipes; and lists of a sweep
    config_json.py     a model's config.json: every honoured field with wrong values; the file as a whole
    adapters.py        an adapter's adapter_config.json
    weights.py         safetensors files and their index
    pickled.py         pickled weights
    vocabularies.py    tokenizers
    templates.py       chat templates
    datasets.py        rows in every format
    addresses.py       s3://, https:// and others, with and without credentials
    outputs.py         outputs over inputs, and outputs that cannot be written
    checkpoints.py     states to resume from
    environment.py     variables and limits of the process
    records.py         metrics and settings that compare.py and sweep.py read
"""

from fuzz.bad_inputs import (
    adapters,
    addresses,
    checkpoints,
    command_line,
    config_json,
    controls,
    datasets,
    environment,
    outputs,
    pickled,
    records,
    templates,
    vocabularies,
    weights,
    yaml_files,
)

KINDS = (
    controls, command_line, yaml_files, config_json, adapters, weights, pickled, vocabularies, templates,
    datasets, addresses, outputs, checkpoints, environment, records,
)  # fmt: skip
TABLE = [case for kind in KINDS for case in kind.cases()]
