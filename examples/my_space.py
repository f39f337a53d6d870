"""A search space of your own: three stages of plain convolutions, each with a depth, a kernel size and a width.

    python cli.py search --space examples/my_space.py:SPACE

Only `name`, `choices` and `build` are required. Without `cost`, MACs and parameters are counted on built networks.
"""

from engine.space import Choice, SearchSpace

DEPTHS, KERNELS, CHANNELS = (1, 2, 3), (3, 5), (16, 24, 32, 48)


def build(choices: tuple[int, ...], classes: int, width: float):
    """The network of an architecture (one option index per choice), its channels scaled by `width`."""
    from torch import nn  # imported here, so that planning a search does not load torch

    from engine.networks import Staged, conv_bn, pooled_classifier

    stages, c_in = [], 3
    for stage in range(3):
        depth, kernel, channels = choices[3 * stage : 3 * stage + 3]
        c_out, layers = max(8, round(CHANNELS[channels] * 2**stage * width)), []
        for layer in range(DEPTHS[depth]):
            stride = 2 if stage > 0 and layer == 0 else 1
            layers.append(conv_bn(c_in, c_out, KERNELS[kernel], stride, activation=nn.ReLU(inplace=True)))
            c_in = c_out
        stages.append(nn.Sequential(*layers))
    return Staged(nn.Identity(), stages, pooled_classifier(c_in, classes))


STAGE = (Choice("depth", DEPTHS, ordinal=True), Choice("kernel", KERNELS), Choice("channels", CHANNELS, ordinal=True))
SPACE = SearchSpace(name="my_space", choices=STAGE * 3, build=build)
