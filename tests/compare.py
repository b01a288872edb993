"""What compares tensors and modules."""

import copy

import torch


def relative(a, b):
    """Relative distance of two tensors."""
    return float((a - b).norm() / b.norm().clamp_min(1e-300))


def far(model, other, entry=0.0):
    """Largest relative distance of two modules' parameters, with its name.

    `entry` is the least size of an entry to which a distance is compared: a bias that starts at
    zero and whose gradient is zero but for rounding (a key's, in attention) stays near zero.
    """
    distances = []
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        size = max(float(q.detach().norm()), entry * q.numel() ** 0.5, 1e-300)
        distances.append((float((p - q).detach().norm()) / size, name))
    return max(distances)


def twin(model):
    return copy.deepcopy(model)


def gradients(model):
    """Of all parameters, flat."""
    return torch.cat([p.grad.flatten() for p in model.parameters()])
