"""The softmax that both towers share, each holding its part of the classes.

Shapes: N images, K classes of this tower. Without an exchange, K is all of them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.exchange import Exchange


def cross_entropy(logits: Tensor, labels: Tensor, first_class: int = 0,
                  exchange: Exchange | None = None) -> tuple[Tensor, Tensor]:
    """Return the mean loss over the batch and the number of images whose label has the highest logit.

    logits [N, K] are of the classes first_class ..., labels int64 [N] of all classes. With an
    exchange three numbers an image pass between the towers, and both return the same loss.
    """
    if exchange is None:
        return F.cross_entropy(logits, labels), (logits.gather(1, labels[:, None])[:, 0] >= logits.max(1).values).sum()
    return _SharedCrossEntropy.apply(logits, labels, first_class, exchange)


def first_class(classes: int, exchange: Exchange | None = None) -> int:
    """Return the first of all classes whose logit is of this process."""
    return (classes + 1) // 2 if exchange is not None and exchange.tower else 0


def probabilities(logits: Tensor, exchange: Exchange | None = None) -> Tensor:
    """Return this tower's part [N, K] of the softmax over the classes of both."""
    highest, total = _summary(logits)
    if exchange is not None:
        highest, total = _join(highest, total, exchange.swap(torch.stack([highest, total], 1), "softmax"))
    return torch.exp(logits - highest[:, None]) / total[:, None]


def joined(own: Tensor, columns: int, exchange: Exchange | None = None) -> Tensor:
    """Return [N, columns] of this tower's [N, K], of classes or neurons, and the peer's, in both processes."""
    if exchange is None:
        return own
    own = F.pad(own, (0, (columns + 1) // 2 - own.shape[1]))  # of an odd number tower 0 holds one more
    peer = exchange.swap(own, "columns of both towers")
    return torch.cat([own, peer] if exchange.tower == 0 else [peer, own], 1)[:, :columns]


def rank_of_label(scores: Tensor, labels: Tensor, first_class: int = 0, exchange: Exchange | None = None) -> Tensor:
    """Return int64 [N]: how many classes score higher than the label (0: right, below 5: among the top five).

    Among equal scores the lower class comes first.
    """
    label_score, own = _of_label(scores, labels, first_class)
    if exchange is not None:
        label_score = label_score + exchange.swap(label_score, "score of the label")
    classes = first_class + torch.arange(scores.shape[1], device=scores.device)
    ahead = (scores > label_score[:, None]) | ((scores == label_score[:, None]) & (classes < labels[:, None]))
    rank = ahead.sum(1)
    return rank if exchange is None else rank + exchange.swap(rank, "rank of the label")


class _SharedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor, first_class: int, exchange: Exchange):
        highest, total = _summary(logits)
        label_logit, own = _of_label(logits, labels, first_class)
        from_peer = exchange.swap(torch.stack([highest, total, label_logit], 1), "loss")
        highest, total = _join(highest, total, from_peer[:, :2])
        label_logit = label_logit + from_peer[:, 2]  # one of the two is 0: the label is in one tower
        log_total = highest + total.log()
        ctx.save_for_backward(logits, log_total, labels - first_class, own)
        correct = (label_logit >= highest).sum()
        ctx.mark_non_differentiable(correct)
        return (log_total - label_logit).mean(), correct

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, _):
        # d loss / d logit = (softmax - 1 where the class is the label) / N: all of it known here
        logits, log_total, column, own = ctx.saved_tensors
        softmax = torch.exp(logits - log_total[:, None])
        is_label = own[:, None].to(softmax.dtype)
        softmax.scatter_add_(1, column.clamp(0, softmax.shape[1] - 1)[:, None], -is_label)
        return softmax * (grad / len(logits)), None, None, None


def _summary(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the highest logit [N] and the sum of exponentials relative to it [N]."""
    highest = logits.max(1).values
    return highest, torch.exp(logits - highest[:, None]).sum(1)


def _join(highest: Tensor, total: Tensor, from_peer: Tensor) -> tuple[Tensor, Tensor]:
    peer_highest, peer_total = from_peer.unbind(1)
    joint = torch.maximum(highest, peer_highest)
    return joint, total * torch.exp(highest - joint) + peer_total * torch.exp(peer_highest - joint)


def _of_label(scores: Tensor, labels: Tensor, first_class: int) -> tuple[Tensor, Tensor]:
    """Return each label's score, 0 where its class is the peer's, and a mask [N] of those that are this tower's."""
    column = labels - first_class
    own = (column >= 0) & (column < scores.shape[1])
    score = scores.gather(1, column.clamp(0, scores.shape[1] - 1)[:, None])[:, 0]
    return torch.where(own, score, torch.zeros_like(score)), own
