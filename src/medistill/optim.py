"""Optimizers on explicit state, for images, students and inner loops alike."""

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


@torch.no_grad()
def adam_(
    parameter: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> None:
    """Move a parameter and both its moments in place by step number `step` (from 1) of Adam.

    m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
    p <- p - lr (m / (1 - b1^step)) / (sqrt(v / (1 - b2^step)) + eps)
    Source: Kingma and Ba, ICLR 2015, algorithm 1.
    Shapes: all four tensors are alike; moments start at zero.

    Example:
        >>> p, m, v = torch.ones(1), torch.zeros(1), torch.zeros(1)
        >>> adam_(p, torch.tensor([5.0]), m, v, step=1, lr=0.1)
        >>> round(p.item(), 4)
        0.9
    """
    first.mul_(betas[0]).add_(gradient, alpha=1 - betas[0])
    second.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    scale = (second / (1 - betas[1] ** step)).sqrt_().add_(eps)
    parameter.addcdiv_(first, scale, value=-lr / (1 - betas[0] ** step))
