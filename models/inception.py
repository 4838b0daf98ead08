"""An Inception-like network (Szegedy et al. 2015: parallel branches, joined along channels) with random weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from onnxsplit.export import Recipe


def convolution(channels: int, width: int, size: int) -> nn.Sequential:
    """Convolution, batch norm and ReLU; the image keeps its size."""
    return nn.Sequential(
        nn.Conv2d(channels, width, size, padding=size // 2, bias=False), nn.BatchNorm2d(width), nn.ReLU()
    )


class Mixed(nn.Module):
    """Four branches side by side: 1x1, 3x3, two 3x3, and pooled."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [
                convolution(channels, width, 1),
                nn.Sequential(convolution(channels, width, 1), convolution(width, width, 3)),
                nn.Sequential(
                    convolution(channels, width, 1),
                    convolution(width, width, 3),
                    convolution(width, width, 3),
                ),
                nn.Sequential(nn.AvgPool2d(3, 1, 1), convolution(channels, width, 1)),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], dim=1)


class Inception(nn.Module):
    """A stem, mixed blocks with pooling after every second one, and a classifier."""

    def __init__(self, blocks: int, width: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [convolution(3, width, 3), nn.MaxPool2d(2)]
        channels = width
        for block in range(blocks):
            layers.append(Mixed(channels, width))
            channels = 4 * width
            if block % 2:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, classes)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.features(image).mean((2, 3)))


def build(blocks: int = 6, width: int = 64, size: int = 128, classes: int = 100) -> Recipe:
    """Return six mixed blocks. Fewer ``blocks`` and a smaller ``width`` give a small model."""
    torch.manual_seed(0)
    return Recipe(
        network=Inception(blocks, width, classes).eval(),
        inputs={"image": torch.rand(2, 3, size, size)},
        outputs=("logits",),
        dynamic_axes={"image": {0: "batch"}},
    )
