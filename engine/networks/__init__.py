"""Student networks: the torch code of `engine.spaces`, and the modules to build your own space from."""

from engine.networks.activations import count_activations
from engine.networks.cost import count_cost
from engine.networks.staged import Staged, conv_bn, he_init, pooled_classifier

__all__ = ["Staged", "conv_bn", "count_activations", "count_cost", "he_init", "pooled_classifier"]
