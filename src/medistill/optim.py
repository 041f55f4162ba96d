"""Stochastic gradient descent on explicit state, for images, students and inner loops alike."""

import torch
from torch import Tensor

Tensors = list[Tensor] | tuple[Tensor, ...]


@torch.no_grad()
def sgd_(
    parameters: Tensors,
    gradients: Tensors,
    velocity: Tensors,
    *,
    lr: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
) -> None:
    """Move `parameters` and `velocity` in place by one step of SGD with momentum.

    v <- momentum v + (g + weight_decay p);  p <- p - lr v
    Source: Sutskever et al., ICML 2013, in the form of torch.optim.SGD without dampening.
    Shapes: the three sequences hold tensors of equal shapes; velocity starts at zero.

    Example:
        >>> p, v = [torch.tensor([1.0])], [torch.tensor([0.0])]
        >>> sgd_(p, [torch.tensor([2.0])], v, lr=0.1, momentum=0.9)
        >>> p[0].item(), v[0].item()
        (0.800000011920929, 2.0)
    """
    if weight_decay:
        gradients = torch._foreach_add(gradients, parameters, alpha=weight_decay)
    if momentum:
        torch._foreach_mul_(velocity, momentum)
        torch._foreach_add_(velocity, gradients)
        gradients = velocity
    torch._foreach_add_(parameters, gradients, alpha=-lr)
