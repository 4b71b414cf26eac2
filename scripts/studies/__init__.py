"""The studies of scripts/experiments.py, and the two files that they share.

small_world.py      the small model, its questions and texts; training; three figures of a model
drawing.py          colours, and the PNG of a figure

rank_and_rate.py    held-out loss against learning rate, for every rank and for all weights
singular_values.py  how many directions an update of all weights needs
equal_budgets.py    the same number of trained parameters, spent on different layers
forgetting.py       the text that a model forgets while it learns answers
merging.py          an adapter merged into W, into the dequantized weights, and quantized again
stored_bits.py      bits a weight, the error of W, and the loss with an adapter trained on it
live_bytes.py       the bytes that a training step holds, event by event, for each recompute policy
small_gradients.py  gradients that float16 cannot hold, and the loss scale
eight_bit_adam.py   the 8-bit code of AdamW's moments, beside one of equal steps
which_zero.py       A = 0 or B = 0 at the start, against learning rate

Each study has the same parts. Its docstring is the question, the expectation and the reason.
`measure(quick)` returns figures for a JSON file, `draw(figure, figures)` draws them, `table(figures)` returns
them in Markdown. A constant at the top holds each setting.
"""
