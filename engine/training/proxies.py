"""Training-free scores: estimates of a network's accuracy after training, from the untrained network.

Four scores from one forward and one backward pass on a shared batch, and one forward pass on noise, in a tenth of a
second on a CPU core. For all of them, greater is better. N images, C channels, H W size in pixels.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from engine.data.dataset import Dataset, Split
from engine.data.loader import Backend, eval_batches
from engine.space import SearchSpace
from engine.tasks import PROXIES, ProxyScores
from engine.training.student import fatal, place
from engine.trial import Architecture

# The largest size in docs/results/real-size.md that takes a tenth of a second per cell of NAS-Bench-201.
IMAGES, NOISE_IMAGES = 16, 4
RELUS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU)
JACOBIAN_FLOOR = 1e-5  # added to eigenvalues of the correlation matrix, as the paper does
NO_GRADIENT = "the output does not depend on the images"


class Missing(Exception):
    """Raised if a network does not have a score; the message gives the reason."""


@dataclass(frozen=True, slots=True, eq=False)
class Relations:
    """How similar a network finds a batch's images: cosines (N, N) of last-stage features and of activation maps."""

    features: Tensor
    maps: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class ProxyBatch:
    """Inputs for scoring every architecture: `images` (N, 3, R, R) with `labels` (N,), Gaussian `noise` (M, 3, R, R),
    and the trained teacher's relations on the images, if there is a teacher."""

    images: Tensor
    labels: Tensor
    noise: Tensor
    teacher: Relations | None = None


def make_batch(
    data: Dataset,
    seed: int,
    device: torch.device,
    teacher: nn.Module | None = None,
    resolution: int = 0,
    backend: Backend = "dali",
    images: int = IMAGES,
    noise: int = NOISE_IMAGES,
) -> ProxyBatch:
    """A batch of training images, drawn with `seed`, at a resolution in pixels (0: the data's own).

    The teacher, a frozen network on the device that returns (logits, [stage features]), runs only here, once.
    """
    side, split = resolution or data.resolution, _drawn(data.train, images, seed)
    views = eval_batches(split, data=data, batch_size=len(split), resolution=side, device=str(device), backend=backend)
    seen = next(iter(views))
    generator = torch.Generator().manual_seed(seed)  # on the CPU, so that the noise is the same on every device
    gaussian = torch.randn(noise, 3, side, side, generator=generator).to(device)
    # Cloned because the backends may reuse a batch's memory.
    batch = ProxyBatch(_laid_out(seen.images).clone(), seen.labels.clone(), _laid_out(gaussian))
    return replace(batch, teacher=ask_teacher(teacher, batch)) if teacher is not None else batch


def _laid_out(images: Tensor) -> Tensor:
    return images.float().contiguous(memory_format=torch.channels_last)


def _drawn(split: Split, count: int, seed: int) -> Split:
    rows = np.sort(np.random.default_rng([seed, 0x9207]).permutation(len(split))[:count])
    return split.select(rows)


def ask_teacher(teacher: nn.Module, batch: ProxyBatch) -> Relations:
    """The teacher's relations on the images of a batch."""
    logits, features = teacher(batch.images.detach().requires_grad_())
    return relations(logits, features[-1], batch.labels)


def score_architectures(
    space: SearchSpace, architectures: Sequence[Architecture], batch: ProxyBatch, classes: int, width: float, seed: int
) -> list[ProxyScores]:
    """Scores untrained networks of a space.

    A network's initial weights, and so its scores, depend only on `seed`, space and architecture. A network that cannot
    be built or run has no scores, and its error is the reason.
    """
    return [_score_architecture(space, architecture, batch, classes, width, seed) for architecture in architectures]


def _score_architecture(
    space: SearchSpace, architecture: Architecture, batch: ProxyBatch, classes: int, width: float, seed: int
) -> ProxyScores:
    start, choices = time.perf_counter(), space.check(architecture).choices
    try:
        torch.manual_seed(_key(seed, space, choices))
        network = place(space.build(choices, classes, width), batch.images.device)
        scores, missing = score_network(network, batch)
    except Exception as error:  # a user's space may raise anything
        if fatal(error):
            raise
        scores, missing = {}, dict.fromkeys(PROXIES, f"{type(error).__name__}: {error}"[:500])
    return ProxyScores(choices, scores, missing, time.perf_counter() - start)


def _key(seed: int, space: SearchSpace, choices: tuple[int, ...]) -> int:
    identity = json.dumps([seed, space.name, choices]).encode()
    return int.from_bytes(hashlib.sha256(identity).digest()[:7], "big")


def score_network(network: nn.Module, batch: ProxyBatch) -> tuple[dict[str, float], dict[str, str]]:
    """Scores of an untrained network by name, and the reasons for missing ones.

    The network cannot be used afterwards: its running statistics change, and its parameters no longer require
    gradients. On a GPU the host waits once per score, not per layer.
    """
    network.train().requires_grad_(False)
    images = batch.images.detach().requires_grad_()
    with _relu_codes(network) as codes:
        logits, features = network(images)
    last = features[-1]
    found: dict[str, Callable[[], float]] = {
        "naswot": partial(naswot, codes),
        "diswot": partial(_diswot, logits, last, batch),
        "jacobian_covariance": partial(_jacobian_covariance, logits, images),  # after DisWOT: it frees the graph
        "expressivity": partial(_expressivity, network, batch.noise),
    }
    scores: dict[str, float] = {}
    missing: dict[str, str] = {}
    for name, compute in found.items():
        try:
            value = compute()
            if not math.isfinite(value):
                raise Missing(f"the score is {value}")
            scores[name] = value
        except Missing as reason:
            missing[name] = str(reason)
    return scores, missing


@dataclass
class Codes:
    """Over all ReLUs so far: the number of units that both images of a pair activate, (N, N), and the number of units.

    `active` is None before the first ReLU.
    """

    active: Tensor | None = None
    units: int = 0


@contextmanager
def _relu_codes(network: nn.Module) -> Iterator[Codes]:
    """Collects the codes of every ReLU module call. ReLUs called as functions cannot be seen."""
    codes = Codes()

    @torch.no_grad()
    def collect(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        value = inputs[0]
        code = torch.gt(value, 0, out=torch.empty_like(value))
        code = (code.movedim(1, -1) if code.ndim > 2 else code).flatten(1)  # a view for channels_last memory
        codes.active = code @ code.T if codes.active is None else codes.active.addmm_(code, code.T)
        codes.units += code.shape[1]

    hooks = [m.register_forward_pre_hook(collect) for m in network.modules() if isinstance(m, RELUS)]
    try:
        yield codes
    finally:
        for hook in hooks:
            hook.remove()


def naswot(codes: Codes) -> float:
    """log det K of the images' binary codes c (N, units). K = c c' + (1 - c) (1 - c)' counts the units in which two
    images agree (Mellor et al. 2021, arXiv 2006.04647; K summed over layers). -inf for a singular K."""
    if codes.active is None:
        raise Missing("no ReLU module was called: ReLUs that are functions (torch.relu, F.relu) cannot be seen")
    both = codes.active.cpu().double()
    own = both.diagonal()
    kernel = codes.units + 2 * both - own[:, None] - own[None, :]
    return torch.linalg.slogdet(kernel).logabsdet.item()


def jacobian_covariance(jacobian: Tensor) -> float:
    """-sum(log(l + e) + 1 / (l + e)) of the eigenvalues l of the correlation matrix of the rows of `jacobian` (N, P),
    the gradient of each image's summed logits (Mellor et al., the first version of arXiv 2006.04647). NaN if an
    image has a constant gradient."""
    correlation = torch.corrcoef(jacobian).cpu().double()
    if not correlation.isfinite().all():
        return math.nan
    values = torch.linalg.eigvalsh(correlation) + JACOBIAN_FLOOR
    return -(values.log() + 1 / values).sum().item()


def _jacobian_covariance(logits: Tensor, images: Tensor) -> float:
    if not logits.requires_grad:
        raise Missing(NO_GRADIENT)
    (gradient,) = torch.autograd.grad(logits.sum(), images)
    return jacobian_covariance(gradient.flatten(1))


def diswot(student: Relations, teacher: Relations) -> float:
    """-||F_s - F_t|| - ||M_s - M_t|| with F and M the relations of the same images by features and by activation maps
    (Dong et al. 2023, arXiv 2303.15678). In the paper both networks are untrained; here the teacher is trained."""
    distances = torch.linalg.norm(student.features - teacher.features) + torch.linalg.norm(student.maps - teacher.maps)
    return -distances.item()


def relations(logits: Tensor, features: Tensor, labels: Tensor) -> Relations:
    """Relations of logits (N, classes) and last-stage features (N, C, H, W).

    The activation map is sum_c w_c F_c, where w_c is the mean gradient of the true class's logit over F_c (Grad-CAM,
    arXiv 1610.02391). For global pooling and a linear classifier, w_c is the classifier's weight, as in DisWOT; it is
    also defined for other heads.
    """
    true = logits.gather(1, labels[:, None]).sum()
    (gradient,) = torch.autograd.grad(true, features, retain_graph=True, allow_unused=True)
    if gradient is None:
        raise Missing("the logits do not depend on the last stage's features")
    with torch.no_grad():
        maps = (gradient.mean((2, 3), keepdim=True) * features).sum(1)
        return Relations(_cosines(features), _cosines(maps))


def _cosines(values: Tensor) -> Tensor:
    rows = nn.functional.normalize(values.float().flatten(1))
    return rows @ rows.T


def _diswot(logits: Tensor, features: Tensor, batch: ProxyBatch) -> float:
    if batch.teacher is None:
        raise Missing("this score needs a teacher, and there is none")
    if not (logits.requires_grad and features.requires_grad):
        raise Missing(NO_GRADIENT)
    return diswot(relations(logits, features, batch.labels), batch.teacher)


def expressivity(features: Sequence[Tensor]) -> float:
    """Sum over stage features (N, C, H, W) of the entropy of the normalised eigenvalues of the channels' covariance
    over images and pixels (AZ-NAS, Lee and Ham 2024, arXiv 2403.19232), each at most log C. NaN if a stage is
    constant."""
    channels = [feature.shape[1] for feature in features]
    rows = [feature.float().transpose(0, 1).flatten(1) for feature in features]
    on_host = torch.cat([torch.cov(each, correction=0).flatten() for each in rows]).cpu().double()
    if not on_host.isfinite().all():
        return math.nan
    total = 0.0
    for covariance, c in zip(on_host.split([c * c for c in channels]), channels, strict=True):
        values = torch.linalg.eigvalsh(covariance.view(c, c)).clamp(min=0)
        total += torch.special.entr(values / values.sum()).sum().item()
    return total


@torch.no_grad()
def _expressivity(network: nn.Module, noise: Tensor) -> float:
    return expressivity(network(noise)[1])
