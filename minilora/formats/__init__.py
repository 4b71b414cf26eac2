"""Files that other programs read and write, each exactly as they do. Read in this order:

config_fields.py     the fields of config.json: types, limits, defaults, meanings
config_json.py       config.json <-> ModelConfig: every field is honoured, harmless or refused
bnb.py               a 4-bit weight <-> its entries in bitsandbytes' state dict
weights.py           safetensors <-> model, tensor by tensor
peft_format.py       PEFT's names: files, configuration keys, tensor keys, initialisations
adapter.py           PEFT's adapter files <-> the adapter on a model
adapter_header.py    an adapter's configuration, names and shapes, without its numbers
plain_adapter.py     factors without a model -> a plain LoRA adapter
arithmetic.py        sums, differences and shorter forms of adapters
vera_adapter.py      PEFT's VeRA adapters, and VeRA as plain LoRA
peft_rules.py        which configurations PEFT refuses, and which layers they choose
lint.py              does an adapter load in PEFT, vLLM, SGLang?
gguf_vocabulary.py   a tokenizer in llama.cpp's terms
gguf.py              a model as one file for llama.cpp
"""
