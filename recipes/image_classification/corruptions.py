"""Six corruptions of images at five intensities (the paper's Fig. 3), with kornia."""

from __future__ import annotations

from collections.abc import Callable
from math import pi

import torch
from torch import Tensor

INTENSITIES = (1, 2, 3, 4, 5)

#: Name -> setting at each intensity. The paper gives none: they are chosen here.
SETTINGS: dict[str, tuple[float, ...]] = {
    "rotation": (10, 20, 35, 60, 90),  # degrees
    "gaussian_blur": (0.4, 0.6, 0.8, 1.1, 1.5),  # standard deviation, pixels
    "gaussian_noise": (0.02, 0.04, 0.07, 0.11, 0.16),  # standard deviation, of pixels 0..1
    "hue": (0.1, 0.2, 0.3, 0.4, 0.5),  # turns of the colour circle
    "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),  # added to pixels 0..1
    "contrast": (0.8, 0.65, 0.5, 0.35, 0.2),  # factor of pixels 0..1
}


def corrupt(images: Tensor, name: str, intensity: int, seed: int = 0) -> Tensor:
    """Images as one corruption leaves them.

    Args:
        images: 0..1, [B, 3, H, W].
        name: Of the corruption, a key of `SETTINGS`.
        intensity: 1, the mildest, to 5.
        seed: Of the noise.

    Returns:
        Images 0..1, [B, 3, H, W].

    Raises:
        ValueError: There is no such corruption or intensity.
        ImportError: kornia is missing.
    """
    if name not in SETTINGS:
        raise ValueError(f"corruption {name!r}: expected one of {', '.join(SETTINGS)}.")
    if intensity not in INTENSITIES:
        raise ValueError(f"intensity {intensity!r}: expected one of 1 to 5.")
    corrupted = _operations(seed)[name](images, SETTINGS[name][intensity - 1])
    return corrupted.clamp(0, 1)


def _operations(seed: int) -> dict[str, Callable[[Tensor, float], Tensor]]:
    try:
        from kornia import enhance, filters
        from kornia.geometry import transform
    except ImportError as error:
        raise ImportError("Corruptions need `pip install kornia`.") from error

    def noisy(images: Tensor, deviation: float) -> Tensor:
        draw = torch.Generator().manual_seed(seed)  # on the CPU: the same noise on every device
        noise = torch.randn(images.shape, generator=draw, dtype=images.dtype)
        return images + deviation * noise.to(images.device)

    return {
        "rotation": lambda x, angle: transform.rotate(x, x.new_tensor(angle).expand(len(x))),
        "gaussian_blur": lambda x, sigma: filters.gaussian_blur2d(x, (7, 7), (sigma, sigma)),
        "gaussian_noise": noisy,
        "hue": lambda x, turns: enhance.adjust_hue(x, 2 * pi * turns),
        "brightness": enhance.adjust_brightness,
        "contrast": enhance.adjust_contrast,
    }
