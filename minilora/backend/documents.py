"""Where the documents of a batch lie, for attention that computes nothing between them.

A batch (Bt, T) holds documents: runs of tokens that see each other and nothing else. A dense mask
(Bt, 1, T, T) says that too, in T bytes a token and more, and fused attention computes the hidden scores
all the same. Kernels for variable lengths need less: all tokens in one list, and where each document ends.

    document_ids    [[7, 7, 7, 2, 2, -1], [0, 0, 0, 0, 1, 1]]     -1: padding, part of no document
    lengths         3, 2, 4, 2                                    how the kernels see it
    cumulative      0, 3, 5, 9, 11
    places          0 1 2 3 4, 6 7 8 9 10 11                      of these tokens within the Bt T of the batch

`take` brings tokens into that list, and `put` brings results back, with zeros for the padding. Where padding
comes last, or nowhere, the list is the batch itself: nothing is copied.

The host must know the lengths. It reads them from document_ids on the CPU, where they best stay, as labels
do. For document_ids on a GPU it waits until the GPU is done, once a forward pass.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from minilora.backend.copies import to_device

PADDING = -1  # the document id of tokens that only fill a row


@dataclass(frozen=True)
class Documents:
    """Which tokens see which: those of one document, up to their own position, and at most `window`."""

    lengths: tuple[int, ...]  # of each document
    cumulative: Tensor  # int32 (documents + 1,), on the device
    positions: Tensor  # (Bt or 1, T), on the device: of each token within its document
    places: Tensor | None  # (N,), on the device: see the module's docstring. None: the batch's first N tokens
    window: int | None = None  # None: as long as the longest document

    @cached_property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    @cached_property
    def tokens(self) -> int:
        """Return N, the number of tokens without padding."""
        return sum(self.lengths)

    @cached_property
    def ends(self) -> Tensor:
        """Return where each document ends, int64 (documents,), on the CPU."""
        return torch.tensor(self.lengths, dtype=torch.long).cumsum(0)

    def slices(self) -> Iterator[slice]:
        """Yield where each document lies in the list of tokens."""
        end = 0
        for length in self.lengths:
            end += length
            yield slice(end - length, end)

    def within(self, window: int | None) -> "Documents":
        """Return the same documents, whose tokens see at most `window` tokens."""
        return replace(self, window=None if window is None or window >= self.longest else window)

    def take(self, x: Tensor) -> Tensor:
        """Return the documents' tokens, one document after the other: (Bt, T, ...) -> (N, ...)."""
        x = x.flatten(0, 1)
        if self.places is not None:
            return x.index_select(0, self.places)
        return x if len(x) == self.tokens else x[: self.tokens]

    def put(self, x: Tensor, Bt: int, T: int) -> Tensor:
        """Return tokens at their places in the batch, zeros elsewhere: (N, ...) -> (Bt, T, ...)."""
        if self.tokens < Bt * T:
            padded = x.new_zeros(Bt * T, *x.shape[1:])
            if self.places is None:
                padded[: self.tokens] = x
            else:
                padded.index_copy_(0, self.places, x)
            x = padded
        return x.view(Bt, T, *x.shape[1:])


def documents_of_rows(Bt: int, T: int, device: torch.device) -> Documents:
    """Return the documents of a batch whose rows are one document each, padding included."""
    cumulative = torch.arange(0, Bt * T + 1, T, dtype=torch.int32, device=device)
    return Documents((T,) * Bt, cumulative, torch.arange(T, device=device).unsqueeze(0), places=None)


def documents_of_ids(document_ids: Tensor, device: torch.device) -> Documents:
    """Return the documents of a batch from the id of each token's document, (Bt, T): runs of equal ids.

    For document_ids on a GPU the host waits.
    """
    ids = document_ids.cpu()
    positions = positions_in_documents(ids)  # (Bt, T): 0 where a document begins
    begins = (positions.flatten() == 0).nonzero().squeeze(1)
    lengths = begins.diff(append=torch.tensor([ids.numel()]))
    lengths = lengths[ids.flatten()[begins] != PADDING]
    places = (ids.flatten() != PADDING).nonzero().squeeze(1)
    padding_is_last = len(places) == 0 or places[-1] == len(places) - 1
    cumulative = torch.cat((torch.zeros(1, dtype=torch.long), lengths.cumsum(0))).int()
    return Documents(
        lengths=tuple(lengths.tolist()),
        cumulative=to_device(cumulative, device),
        positions=to_device(positions, device),
        places=None if padding_is_last else to_device(places, device),
    )


def positions_in_documents(document_ids: Tensor) -> Tensor:
    """Return each token's index within its run, (Bt, S) -> (Bt, S): [7, 7, 7, 2, 2] -> [0, 1, 2, 0, 1]."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return index - torch.where(starts, index, 0).cummax(dim=1).values


def lengths_in_documents(document_ids: Tensor) -> Tensor:
    """Return the length of each token's run, (Bt, S) -> (Bt, S): [7, 7, 7, 2, 2] -> [3, 3, 3, 2, 2]."""
    to_the_end = positions_in_documents(document_ids.flip(1)).flip(1)
    return positions_in_documents(document_ids) + to_the_end + 1
