"""A multi-task network: one backbone, three heads (classes, a box, a mask), random weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from onnxsplit.export import Recipe


def convolution(channels: int, width: int, stride: int = 1) -> nn.Sequential:
    """A 3x3 convolution, batch norm and ReLU."""
    return nn.Sequential(nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())


class MultiTask(nn.Module):
    """Takes an image; returns class scores, a box, and a mask of the image's size."""

    def __init__(self, depth: int, width: int, classes: int) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            convolution(3, width, 2),
            convolution(width, 2 * width, 2),
            *(convolution(2 * width, 2 * width) for _ in range(depth)),
        )
        self.classes = nn.Sequential(convolution(2 * width, 4 * width, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.score = nn.Linear(4 * width, classes)
        self.box = nn.Sequential(
            convolution(2 * width, 2 * width, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2 * width, 4),
        )
        self.mask = nn.Sequential(
            convolution(2 * width, 2 * width),
            nn.ConvTranspose2d(2 * width, width, 2, 2),
            nn.ReLU(),
            nn.ConvTranspose2d(width, 1, 2, 2),
        )

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shared = self.backbone(image)
        return self.score(self.classes(shared)), self.box(shared).sigmoid(), self.mask(shared).sigmoid()


def build(depth: int = 6, width: int = 48, size: int = 128, classes: int = 50) -> Recipe:
    """Return a network whose backbone has six layers. A smaller ``depth`` and ``width`` give a small model."""
    torch.manual_seed(0)
    return Recipe(
        network=MultiTask(depth, width, classes).eval(),
        inputs={"image": torch.rand(2, 3, size, size)},
        outputs=("scores", "box", "mask"),
        dynamic_axes={"image": {0: "batch"}},
    )
