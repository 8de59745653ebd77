"""Extract what is recorded from a teacher's logits, on the teacher's device, in float32."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hf_distill.recordings.codec import Sampled, TopK


def top_k_(logits: Tensor, labels: Tensor, k: int) -> TopK:
    """The k likeliest ids, the label, and the mass of all others. Overwrites the logits.

    logits: (n, ids), at the temperature to be recorded
    labels: (n,); a label beyond the ids has no probability and is left out
    """
    values, ids = logits.topk(k)
    beyond = labels[:, None] >= logits.shape[1]
    # In a row whose label is beyond the ids, the first of the k is removed once more instead.
    column = torch.where(beyond, ids[:, :1], labels[:, None])
    label = logits.gather(1, column)
    inside = (ids == column).any(1, keepdim=True)
    # The tail is summed over its own ids, since one minus the others would cancel.
    logits.scatter_(1, ids, -torch.inf).scatter_(1, column, -torch.inf)
    top = values[:, :1]
    tail = logits.sub_(top).exp_().sum(1, keepdim=True)
    named = (values - top).exp().sum(1, keepdim=True)
    named = named + (label - top).exp().masked_fill(inside, 0.0)
    total = (tail + named).log() + top
    ids, order = ids.sort(dim=1)
    log_label = (label - total).masked_fill(inside, torch.nan)
    return TopK(
        ids=ids.cpu().numpy(),
        log_probs=(values - total).gather(1, order).cpu().numpy(),
        log_tail=(tail.log() + top - total)[:, 0].cpu().numpy(),
        log_label=log_label[:, 0].cpu().numpy(),
    )


def sampled(logits: Tensor, draws: int, generator: torch.Generator) -> Sampled:
    """Draws from the distribution, and its entropy. generator: on the CPU."""
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    entropy = -(p * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(-1)
    # float64: in float32 a sum over 50k ids leaves some of them an empty interval.
    sums = p.double().cumsum(-1)
    uniform = torch.rand(len(p), draws, generator=generator, dtype=torch.float64).to(p.device)
    drawn = torch.searchsorted(sums, uniform * sums[:, -1:]).clamp_(max=p.shape[1] - 1)
    found = drawn.sort(dim=1).values.cpu().numpy()
    first = np.diff(found, axis=1, prepend=-1) != 0
    number = np.cumsum(first, axis=1) - 1
    ids = np.full(found.shape, -1)
    counts = np.zeros(found.shape, np.int64)
    rows = np.broadcast_to(np.arange(len(found))[:, None], found.shape)
    ids[rows[first], number[first]] = found[first]
    np.add.at(counts, (rows, number), 1)
    return Sampled(ids, counts, entropy.cpu().numpy())
