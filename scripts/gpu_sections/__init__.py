"""The sections of scripts/check_gpu.py, in the order to read them.

report.py         what was seen: a line of JSON for every event, and a table
section.py        a section, and the fence around it: a process of its own, with a deadline
card.py           the card, its clock, and what it can do at best
models.py         models of random weights, made on the card, and steps that train them

attention.py      the environment; which attention PyTorch chooses, and what a new length costs
gradients.py      every recompute policy against `off`
kernel_rates.py   the kernels beside the copy rate, and beside bitsandbytes
operation_calls.py  those of the operations between the products, with the bytes that they move
steps.py          a training step of a 7B: speed beside its limit, memory beside the ledger
peer.py           the same step in transformers + PEFT + bitsandbytes
t4.py             the same card, used as a T4 would be
decode.py         tokens a second of an answer
programs.py       the trainer, stopped and resumed; the tests that need a GPU
"""
