"""Files that other programs read and write, each exactly as they do. Read in this order:

config_fields.py     the fields of config.json: types, limits, defaults, meanings
config_rope.py       its RoPE: types, both spellings, derived attention factors
config_json.py       config.json <-> ModelConfig: every field is honoured, harmless or refused
foreign_formats.py   formats of weights that are refused by name
bnb.py               a 4-bit weight <-> its entries in bitsandbytes' state dict
bnb_int8.py          the same for an 8-bit weight
quantized.py         a weight of either kind: how it is made, stored and announced
pickled.py           pickled weights: tensors come out, and nothing else
weight_files.py      which files hold a model's weights
weights.py           these files <-> model, tensor by tensor
peft_format.py       PEFT's names: files, configuration keys, tensor keys, initialisations
peft_rules.py        which values of adapter_config.json PEFT refuses
adapter_file.py      an adapter's two files without a model
adapter_checks.py    what contradicts what in them, and in a base model
adapter.py           PEFT's adapter files <-> the adapter on a model
merging.py           what an adapter makes of each parameter of its base
export.py            any adapter as plain LoRA
plain_adapter.py     any update as A and B beside W; factors without a model -> a plain LoRA adapter
arithmetic.py        sums, differences and shorter forms of adapters
vera_adapter.py      VeRA's configuration and tensors
adapter_header.py    an adapter's configuration, names and shapes, without its numbers
findings.py          what the linter says: verdicts and remedies
lint_peft.py         PEFT's verdict
lint_servers.py      vLLM's and SGLang's
lint.py              does an adapter load in PEFT, vLLM, SGLang?
gguf_vocabulary.py   a tokenizer in llama.cpp's terms
gguf.py              a model as one file for llama.cpp
"""
