"""Residual networks for images: ResNet-18 and ResNet-50, with the layer names of torchvision's weights.

Source: He et al. 2015, arXiv:1512.03385; the stride of a bottleneck is in its 3x3 convolution, as everywhere today.
"""

from __future__ import annotations

from typing import Any

from brim import nn
from brim.nn import functional as F
from brim.nn import init
from brim.spec import Spec, as_dtype, default_float

__all__ = ["BasicBlock", "Bottleneck", "ResNet", "resnet18", "resnet50"]


def _conv(in_channels: int, out_channels: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, size, stride, padding=size // 2, bias=False)


class BasicBlock(nn.Module):
    """relu(x + two 3x3 convolutions of x)."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(in_channels, channels, 3, stride), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = _conv(channels, channels, 3), nn.BatchNorm2d(channels)
        self.downsample = _shortcut(in_channels, channels, stride)

    def forward(self, x: Any) -> Any:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.downsample(x))


class Bottleneck(nn.Module):
    """relu(x + a 1x1, a 3x3 and a 1x1 convolution of x, the last to four times the channels)."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1, self.bn1 = _conv(in_channels, channels, 1), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = _conv(channels, channels, 3, stride), nn.BatchNorm2d(channels)
        self.conv3, self.bn3 = _conv(channels, out_channels, 1), nn.BatchNorm2d(out_channels)
        self.downsample = _shortcut(in_channels, out_channels, stride)

    def forward(self, x: Any) -> Any:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + self.downsample(x))


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(_conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))


class ResNet(nn.Module):
    """Images (N, 3, H, W) -> scores (N, classes).

    Arguments:
        block: ``BasicBlock`` or ``Bottleneck``.
        depths: blocks in each of the four stages.
        classes: number of classes.
        image_size: height and width of the images that ``example_batch`` describes.
        width: channels of the first stage; each further one has twice as many.
    """

    def __init__(
        self,
        block: Any,
        depths: tuple[int, int, int, int],
        classes: int = 1000,
        image_size: int = 224,
        width: int = 64,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.conv1, self.bn1 = _conv(3, width, 7, 2), nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        in_channels = width
        for stage, depth in enumerate(depths):
            channels = width * 2**stage
            blocks = []
            for number in range(depth):
                blocks.append(block(in_channels, channels, 2 if stage and not number else 1))
                in_channels = channels * block.expansion
            self.register_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(in_channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def example_batch(self, batch_size: int) -> tuple[Spec, Spec]:
        """Specs of a batch of images and of their classes."""
        images = Spec((batch_size, 3, self.image_size, self.image_size), default_float)
        return images, Spec((batch_size,), as_dtype("int64"))

    def forward(self, x: Any) -> Any:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        return self.fc(x.mean(axis=(2, 3)))


def resnet18(classes: int = 1000, image_size: int = 224) -> ResNet:
    """ResNet-18: 11.7 million parameters."""
    return ResNet(BasicBlock, (2, 2, 2, 2), classes, image_size)


def resnet50(classes: int = 1000, image_size: int = 224) -> ResNet:
    """ResNet-50: 25.6 million parameters."""
    return ResNet(Bottleneck, (3, 4, 6, 3), classes, image_size)
