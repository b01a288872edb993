"""The networks, plain ``nn.Module``s, and the LightningModule that learns with any of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from recipes.common.model import Classification


class ImageClassifier(Classification):
    """Learns a network of any kind; the optimizer is named in the YAML, under ``optimizer:``.

    Args:
        net: Images [B, channels, H, W] to logits [B, classes].
        loss: As of `Classification`.
    """

    def __init__(self, net: nn.Module, loss: nn.Module | None = None) -> None:
        super().__init__(loss)
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        """Logits, [B, classes], of images, [B, channels, H, W].

        Raises:
            ValueError: The network has not as many logits as the data has classes.
        """
        logits: Tensor = self.net(images)
        data = getattr(self._trainer, "datamodule", None)
        classes = getattr(data, "classes", logits.shape[-1])
        if logits.ndim != 2 or logits.shape[1] != classes:
            raise ValueError(
                f"The network's output has shape {tuple(logits.shape)}: expected "
                f"({len(images)}, {classes}), a logit for each of the {classes} classes of "
                f"{type(data).__name__}."
            )
        return logits


class MLP(nn.Sequential):
    """The paper's: two hidden layers of 64 units.

    Args:
        inputs: Pixels of an image, times channels.
        hidden: Units of each hidden layer.
        classes: Number of classes.
        activation: A class of ``torch.nn``.
        scale: Factor of the inputs, above 0, which the first weights make up for before they
            learn. Below 1 the steps of Adam, as long for every weight, change less of what the many
            inputs say.

    Raises:
        ValueError: ``scale`` is not above 0.
    """

    def __init__(
        self,
        inputs: int = 784,
        hidden: int = 64,
        classes: int = 10,
        activation: type[nn.Module] = nn.GELU,
        scale: float = 1.0,
    ) -> None:
        if not scale > 0:
            raise ValueError(f"scale={scale}: expected a factor of the inputs above 0.")
        first = nn.Linear(inputs, hidden)
        super().__init__(
            nn.Flatten(),
            *(first, activation()),
            *(nn.Linear(hidden, hidden), activation()),
            nn.Linear(hidden, classes),
        )
        self.scale = scale
        with torch.no_grad():
            first.weight.div_(scale)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, [B, classes], of images, [B, *]."""
        logits: Tensor = super().forward(self.scale * images)
        return logits


class ConvNet(nn.Sequential):
    """Convolutions of 3x3, then fully connected layers; base of the networks with a name.

    Args:
        kernels: Of each convolution.
        pooled: Numbers of the convolutions, from 0, that are followed by max-pooling of 2x2.
        hidden: Units of each hidden fully connected layer.
        size: Height and width of the images.
        channels: Of the images.
        classes: Number of classes.
        activation: A class of ``torch.nn``.
        strided: Numbers of the convolutions with a stride of 2.
        bias: Whether convolutions have one.
    """

    def __init__(
        self,
        kernels: Sequence[int],
        pooled: Sequence[int],
        hidden: Sequence[int],
        size: int = 32,
        channels: int = 3,
        classes: int = 10,
        activation: type[nn.Module] = nn.GELU,
        strided: Sequence[int] = (),
        bias: bool = True,
    ) -> None:
        layers: list[nn.Module] = []
        side = size
        for number, (above, below) in enumerate(pairwise((channels, *kernels))):
            stride = 2 if number in strided else 1
            conv = nn.Conv2d(above, below, 3, stride, padding=1, bias=bias)
            layers += [conv, activation()]
            side = -(-side // stride)
            if number in pooled:
                layers.append(nn.MaxPool2d(2))
                side //= 2
        if side < 1:
            raise ValueError(f"size={size}: too small, pooling leaves nothing of the images.")
        layers.append(nn.Flatten())
        widths = (kernels[-1] * side**2, *hidden)
        for above, below in pairwise(widths):
            layers += [nn.Linear(above, below), activation()]
        super().__init__(*layers, nn.Linear(widths[-1], classes))


class CNN(ConvNet):
    """The paper's: 64, 128 and 64 kernels and two fully connected layers.

    The paper adds max-pooling only where it studies widths; that each convolution has a stride of 2
    here, and the first fully connected layer 128 units, is our choice.

    Args:
        shape: Of `ConvNet`: size, channels, classes, activation.
    """

    def __init__(self, **shape: Any) -> None:
        super().__init__(
            kernels=(64, 128, 64), pooled=(), hidden=(128,), strided=(0, 1, 2), **shape
        )


class WidthCNN(ConvNet):
    """The paper's Table 2: 8C, 16C and 8C kernels, each with max-pooling, and 128C units.

    Args:
        width: C.
        shape: Of `ConvNet`: size, channels, classes, activation.
    """

    def __init__(self, width: int = 1, **shape: Any) -> None:
        kernels = (8 * width, 16 * width, 8 * width)
        super().__init__(kernels=kernels, pooled=(0, 1, 2), hidden=(128 * width,), **shape)


class AlexNet(ConvNet):
    """AlexNet for 32x32: five convolutions, the first with a stride of 2, and 4096 units twice.

    Args:
        units: Of the two hidden fully connected layers.
        shape: Of `ConvNet`: size, channels, classes, activation.
    """

    def __init__(self, units: int = 4096, **shape: Any) -> None:
        kernels = (64, 192, 384, 256, 256)
        super().__init__(
            kernels=kernels, pooled=(0, 1, 4), hidden=(units, units), strided=(0,), **shape
        )


class VGG5(ConvNet):
    """128, 256, 512 and 512 kernels, each with max-pooling, and the output layer, as in PCX.

    Args:
        shape: Of `ConvNet`: size, channels, classes, activation.
    """

    def __init__(self, **shape: Any) -> None:
        super().__init__(kernels=(128, 256, 512, 512), pooled=(0, 1, 2, 3), hidden=(), **shape)


class VGG7(ConvNet):
    """Twice 128, 256 and 512 kernels, each pair with max-pooling, and the output layer.

    Args:
        shape: Of `ConvNet`: size, channels, classes, activation.
    """

    def __init__(self, **shape: Any) -> None:
        kernels = (128, 128, 256, 256, 512, 512)
        super().__init__(kernels=kernels, pooled=(1, 3, 5), hidden=(), **shape)


class ResidualBlock(nn.Module):
    """Two convolutions beside a skip connection."""

    def __init__(self, above: int, below: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(above, below, 3, stride, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(below), nn.BatchNorm2d(below)
        self.conv2 = nn.Conv2d(below, below, 3, padding=1, bias=False)
        self.act1, self.act2 = nn.ReLU(), nn.ReLU()
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or above != below:
            project = nn.Conv2d(above, below, 1, stride, bias=False)
            self.skip = nn.Sequential(project, nn.BatchNorm2d(below))

    def forward(self, x: Tensor) -> Tensor:
        """[B, below, H / stride, W / stride] of [B, above, H, W]."""
        inner = self.norm2(self.conv2(self.act1(self.norm1(self.conv1(x)))))
        result: Tensor = self.act2(inner + self.skip(x))
        return result


class ResNet18(nn.Sequential):
    """ResNet-18 for 32x32: a first convolution of 3x3 without pooling, then eight blocks.

    Args:
        width: Kernels of the first blocks; the others have 2, 4 and 8 times as many.
        channels: Of the images.
        classes: Number of classes.
    """

    def __init__(self, width: int = 64, channels: int = 3, classes: int = 10) -> None:
        widths = (width, width, 2 * width, 4 * width, 8 * width)
        blocks: list[nn.Module] = []
        for number, (above, below) in enumerate(pairwise(widths)):
            stride = 1 if number == 0 else 2
            blocks += [ResidualBlock(above, below, stride), ResidualBlock(below, below, 1)]
        super().__init__(
            nn.Conv2d(channels, width, 3, padding=1, bias=False),
            *(nn.BatchNorm2d(width), nn.ReLU()),
            *blocks,
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, classes)),
        )
