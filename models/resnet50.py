"""ResNet-50 (He et al. 2016, version 1.5: the stride is in the 3x3 convolution) with random weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from onnxsplit.export import Recipe


class Bottleneck(nn.Module):
    """A narrowing 1x1, a 3x3 and a widening 1x1 convolution, with a residual connection."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        wide = 4 * width
        self.body = nn.Sequential(
            *(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, wide, 1, bias=False), nn.BatchNorm2d(wide)),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != wide:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, wide, 1, stride, bias=False), nn.BatchNorm2d(wide))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


class ResNet(nn.Module):
    """A stem, four groups of blocks, the mean over the image, and a classifier."""

    def __init__(self, blocks: tuple[int, ...], width: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            *(
                nn.Conv2d(3, width, 7, 2, 3, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.MaxPool2d(3, 2, 1),
            ),
        ]
        channels = width
        for group, count in enumerate(blocks):
            for block in range(count):
                narrow = width * 2**group
                layers.append(Bottleneck(channels, narrow, 2 if block == 0 and group else 1))
                channels = 4 * narrow
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, classes)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.features(image).mean((2, 3)))


def build(blocks: tuple[int, ...] = (3, 4, 6, 3), width: int = 64, size: int = 224, classes: int = 1000) -> Recipe:
    """Return ResNet-50. Fewer ``blocks`` and a smaller ``width`` give a small model."""
    torch.manual_seed(0)
    return Recipe(
        network=ResNet(blocks, width, classes).eval(),
        inputs={"image": torch.rand(2, 3, size, size)},
        outputs=("logits",),
        dynamic_axes={"image": {0: "batch"}},
    )
