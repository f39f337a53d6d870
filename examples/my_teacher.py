"""A teacher of your own: the CIFAR ResNets of He et al. (arXiv 1512.03385), 6n + 2 layers, option A shortcuts.

    python cli.py teacher --arch examples/my_teacher.py:resnet20 --weights resnet20.safetensors --data cifar10

All it takes is a function of the number of classes that returns a module; its forward may return only logits.
"""

from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters: strided, with zeros for the additional channels."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.stride, self.new = stride, (c_out - c_in) // 2

    def forward(self, images: Tensor) -> Tensor:
        value = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(images)))))
        if self.new:
            images = F.pad(images[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.new, self.new))
        return F.relu(value + images)


class ResNet(nn.Module):
    """Three stages of `blocks` blocks with 16, 32 and 64 channels."""

    def __init__(self, blocks: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        stages, c_in = [], 16
        for c_out in (16, 32, 64):
            first = Block(c_in, c_out, 1 if c_out == 16 else 2)
            stages.append(nn.Sequential(first, *(Block(c_out, c_out, 1) for _ in range(blocks - 1))))
            c_in = c_out
        self.layer1, self.layer2, self.layer3 = stages
        self.linear = nn.Linear(64, classes)

    def forward(self, images: Tensor) -> Tensor:
        value = F.relu(self.bn1(self.conv1(images)))
        return self.linear(self.layer3(self.layer2(self.layer1(value))).mean((2, 3)))


def resnet20(classes: int) -> nn.Module:
    return ResNet(3, classes)


def resnet56(classes: int) -> nn.Module:
    return ResNet(9, classes)
