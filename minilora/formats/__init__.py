"""Files of models that other programs read and write, each exactly as they do. Read in this order:

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
gguf_vocabulary.py   a tokenizer in llama.cpp's terms
gguf.py              a model as one file for llama.cpp
"""
