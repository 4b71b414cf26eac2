"""Which layers run again in backward, so that a training fits: the plan with the least arithmetic.

A layer that keeps all its activations (`off`) costs memory, one that computes them again costs time. Between
all and nothing there is a plan for every amount of memory: some layers `off`, some `selective`, the rest
`full`. Which layers should which be? Number them 1 to L in the order of forward. Backward begins at L, and
when it is at layer i,

    held(i) = what layers 1 to i - 1 keep  +  all of layer i: its activations, kept or just computed again,
              and what its backward makes

A layer holds everything during its own backward, whatever its policy. So the policy of layer L does not count
there, and that of layer 1 counts in every other layer's moment. Let two neighbours keep x < y bytes and be
alike otherwise: with x first the later one finds x beside it, the other way round y. So whoever keeps less
goes first: `full`, then `selective`, then `off` in the last layers. The loss sees the sum of all, which no
order changes.

Two numbers are left, how many layers are `off` and how many `selective`. More of either means less
arithmetic, and more bytes. For every first number the second is found by bisection, and the plan with the
least arithmetic wins. On short rows that is as many `off` as fit; on very long ones attention is most of the
arithmetic, and `selective` saves more for its bytes.
"""

from bisect import bisect_left
from collections.abc import Callable
from functools import partial

from minilora.memory.ledger import Ledger


def choose_recompute(memory: float | None, ledger_of: Callable[..., Ledger]) -> tuple[Ledger, str]:
    """Return the ledger of the fastest plan that fits into so many free bytes, and why.
    `ledger_of(recompute=...)`: all else is decided.

    Where none fits, the most frugal policy: a prediction is no reason not to try.
    """
    if memory is None:
        return ledger_of(recompute="full"), "this system does not tell how much memory is free"
    free = f"{memory / 2**30:.2f} GiB"
    if ledger := fastest_that_fits(memory, ledger_of):
        return ledger, f"needs {ledger.peak / 2**30:.2f} of {free} free"
    ledger = ledger_of(recompute="offload")
    needs = f"even {ledger.recompute} needs {ledger.peak / 2**30:.2f} GiB"
    return ledger, f"{needs}; {free} are free, and a tenth should be left"


def fastest_that_fits(memory: float, ledger_of: Callable[..., Ledger]) -> Ledger | None:
    """Return the ledger of the plan with the least arithmetic that fits; see the module's docstring.

    `offload` alone is tried last, as its copies are no arithmetic. None: nothing fits.
    """
    everything = ledger_of(recompute="off")
    if everything.fits(memory):
        return everything
    layers, found = len(everything.policies), []
    for off in range(layers):
        of_selective = partial(_split_ledger, ledger_of, layers, off)
        fitting = bisect_left(
            range(layers - off + 1), True, key=lambda count, of=of_selective: not of(count).fits(memory)
        )
        if fitting:
            found.append(of_selective(fitting - 1))
        elif off:  # the first `off` layer, the last of all, is free; each further one needs more
            break
    if not found:
        found = [ledger for ledger in [ledger_of(recompute="offload")] if ledger.fits(memory)]
    return min(found, key=lambda ledger: ledger.flop_per_token, default=None)


def split(layers: int, off: int, selective: int) -> tuple[str, ...]:
    """Return the policy of each layer: `full` in the first ones, then `selective`, then `off`."""
    return ("full",) * (layers - off - selective) + ("selective",) * selective + ("off",) * off


def _split_ledger(ledger_of: Callable[..., Ledger], layers: int, off: int, selective: int) -> Ledger:
    return ledger_of(recompute=split(layers, off, selective))


def advise(memory: float, ledger_of: Callable[..., Ledger], batch_size: int, length: int) -> list[Ledger]:
    """Settings that fit into so many free bytes. `ledger_of(batch_size=..., length=..., recompute=...)`: all
    else is decided.

    First the largest micro-batch that fits: all of the batch or, as accumulation makes that the same step, an
    even part of it, with the fastest plan possible. Then smaller ones, where they are faster. If not one
    example fits: one, cut to as many times 64 tokens as do.
    """
    found: list[Ledger] = []
    for size in (n for n in range(batch_size, 0, -1) if batch_size % n == 0):
        ledger = fastest_that_fits(memory, partial(ledger_of, batch_size=size, length=length))
        if ledger is not None and not (found and found[-1].flop_per_token <= ledger.flop_per_token):
            found.append(ledger)
    if found:
        return found
    lengths, frugal = range(64, length, 64), partial(ledger_of, batch_size=1, recompute="offload")
    fitting = bisect_left(lengths, True, key=lambda tokens: not frugal(length=tokens).fits(memory))
    return [
        fastest_that_fits(memory, partial(ledger_of, batch_size=1, length=tokens))
        for tokens in lengths[:fitting][-1:]
    ]
