"""MobileNetV2 (Sandler et al., CVPR 2018, arXiv 1801.04381) with given stages.

N batch, C channels, H W size in pixels.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from engine.networks.staged import Staged, conv_bn, he_init, pooled_classifier

# (expansion, channels, repeats, stride)
Stage = tuple[int, int, int, int]


def network(stem: int, stem_stride: int, stages: list[Stage], last: int, classes: int) -> Staged:
    """A network of inverted residual blocks; its features are the outputs of the last block of each resolution.

    It omits the published network's dropout before the classifier, because trainings here are short.
    """
    levels: list[list[nn.Module]] = []
    c_in = stem
    for expansion, c_out, repeats, stride in stages:
        if stride > 1 or not levels:
            levels.append([])
        levels[-1].append(InvertedResidual(c_in, c_out, expansion, stride))
        levels[-1].extend(InvertedResidual(c_out, c_out, expansion, 1) for _ in range(repeats - 1))
        c_in = c_out
    staged = Staged(
        conv_bn(3, stem, 3, stem_stride, activation=nn.ReLU6()),
        [nn.Sequential(*level) for level in levels],
        nn.Sequential(conv_bn(c_in, last, 1, activation=nn.ReLU6()), *pooled_classifier(last, classes)),
    )
    he_init(staged)
    return staged


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise convolution, 1x1 projection without activation; a shortcut if the shapes allow it."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        expansion: int,
        stride: int,
        kernel: int = 3,
        activation: Callable[[], nn.Module] = nn.ReLU6,
    ) -> None:
        super().__init__()
        hidden = c_in * expansion
        expand = [conv_bn(c_in, hidden, 1, activation=activation())] if expansion > 1 else []
        depthwise = conv_bn(hidden, hidden, kernel, stride, groups=hidden, activation=activation())
        self.body = nn.Sequential(*expand, depthwise, conv_bn(hidden, c_out, 1))
        self.shortcut = stride == 1 and c_in == c_out

    def forward(self, input_NCHW: Tensor) -> Tensor:
        return input_NCHW + self.body(input_NCHW) if self.shortcut else self.body(input_NCHW)
