"""Networks of NAS-Bench-201, equal to the benchmark's layer by layer, so that its table applies to them.

N batch, C channels, H W size in pixels.
"""

from __future__ import annotations

from torch import Tensor, nn, zeros_like

from engine.networks.staged import Staged, pooled_classifier


def network(
    operations: tuple[str, ...],
    edges: tuple[tuple[int, int], ...],
    channels: tuple[int, ...],
    cells: int,
    classes: int,
) -> Staged:
    """A network of `cells` equal cells per stage. Stage i has channels[i]; each but the first halves the size."""
    stages = []
    for i, c in enumerate(channels):
        reduction = [Reduction(channels[i - 1], c)] if i else []
        stages.append(nn.Sequential(*reduction, *(Cell(operations, edges, c) for _ in range(cells))))
    stem = nn.Sequential(nn.Conv2d(3, channels[0], 3, padding=1, bias=False), nn.BatchNorm2d(channels[0]))
    norm = nn.BatchNorm2d(channels[-1])
    return Staged(stem, stages, nn.Sequential(norm, nn.ReLU(inplace=True), *pooled_classifier(channels[-1], classes)))


class Cell(nn.Module):
    """Each node is a sum of operations; (N, C, H, W) in and out.

    A node without inputs is zero. Operations on it still run, since the benchmark trains and counts them.
    """

    def __init__(self, operations: tuple[str, ...], edges: tuple[tuple[int, int], ...], channels: int) -> None:
        super().__init__()
        used = [(edge, name) for edge, name in zip(edges, operations, strict=True) if name != "none"]
        self.edges = [edge for edge, _ in used]
        self.operations = nn.ModuleList(operation(name, channels) for _, name in used)

    def forward(self, input_NCHW: Tensor) -> Tensor:
        nodes: dict[int, Tensor] = {0: input_NCHW}
        for (target, source), op in zip(self.edges, self.operations, strict=True):
            value = op(nodes[source] if source in nodes else zeros_like(input_NCHW))
            nodes[target] = nodes[target] + value if target in nodes else value
        return nodes[3] if 3 in nodes else zeros_like(input_NCHW)


class Reduction(nn.Module):
    """The benchmark's residual block of stride 2: no activation after the sum, no norm on the shortcut.

    The shortcut pools with ceil_mode, so that it matches the convolutions at odd sizes too.
    """

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.body = nn.Sequential(relu_conv_bn(c_in, c_out, 3, stride=2), relu_conv_bn(c_out, c_out, 3))
        self.shortcut = nn.Sequential(nn.AvgPool2d(2, 2, ceil_mode=True), nn.Conv2d(c_in, c_out, 1, bias=False))

    def forward(self, input_NCHW: Tensor) -> Tensor:
        return self.shortcut(input_NCHW) + self.body(input_NCHW)


def operation(name: str, channels: int) -> nn.Module:
    """The module of an operation other than none; it keeps channels and size."""
    if name == "skip_connect":
        return nn.Identity()
    if name == "avg_pool_3x3":
        return nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
    return relu_conv_bn(channels, channels, {"nor_conv_1x1": 1, "nor_conv_3x3": 3}[name])


def relu_conv_bn(c_in: int, c_out: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """In the benchmark's order. The ReLU is not in place: its input may be a feature, or the input of another edge."""
    conv = nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(nn.ReLU(), conv, nn.BatchNorm2d(c_out))
