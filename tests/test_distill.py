from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine.config import SearchConfig
from engine.training.distill import Objective, pair, teacher_output

CONFIG = SearchConfig(ce_weight=0.5, kd_weight=2.0, at_weight=10.0, nst_weight=3.0, kd_temperature=3.0)


def output(channels: list[int], sides: list[int], seed: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    features = [torch.randn(4, c, s, s, generator=generator) for c, s in zip(channels, sides, strict=True)]
    return torch.randn(4, 5, generator=generator), features


LABELS = torch.tensor([0, 1, 2, 4])
MINE, THEIRS = output([4, 8], [8, 4], 0), output([16, 8, 8], [16, 8, 4], 1)


@pytest.mark.parametrize(
    ("student", "teacher", "pairs"),
    [
        ([32, 16, 8], [32, 16, 8], [(0, 0), (1, 1), (2, 2)]),
        ([8, 4], [16, 8, 4], [(0, 1), (1, 2)]),
        ([8, 8, 4], [8, 4, 4], [(1, 0), (2, 2)]),  # the last of a size stands for it
        ([32], [7, 5], [(0, 1)]),  # nothing shared: coarse with coarse
    ],
)
def test_stages_pair_by_size(student: list[int], teacher: list[int], pairs: list[tuple[int, int]]) -> None:
    def shapes(sides: list[int]) -> list[torch.Size]:
        return [torch.Size([1, 3, side, side]) for side in sides]

    assert pair(shapes(student), shapes(teacher)) == pairs


@pytest.mark.parametrize("kd_loss", ["kd", "at", "nst", "kd+at", "kd+nst", "hint", "similarity"])
def test_every_loss_teaches_the_student(kd_loss: str) -> None:
    mine = (MINE[0].clone().requires_grad_(), [f.clone().requires_grad_() for f in MINE[1]])
    objective = Objective(CONFIG, kd_loss, mine, THEIRS)  # type: ignore[arg-type]
    loss = objective(mine, teacher_output(THEIRS, objective.feature_keys), LABELS)
    loss.backward()
    assert loss.shape == ()
    assert torch.isfinite(loss)
    assert mine[0].grad is not None
    if kd_loss != "kd":
        assert any(f.grad is not None and f.grad.abs().sum() > 0 for f in mine[1])


def test_the_weights_weigh_the_terms() -> None:
    def loss(config: SearchConfig, kd_loss: str) -> torch.Tensor:
        objective = Objective(config, kd_loss, MINE, THEIRS)  # type: ignore[arg-type]
        return objective(MINE, teacher_output(THEIRS, objective.feature_keys), LABELS)

    entropy = torch.nn.functional.cross_entropy(MINE[0], LABELS)
    t = CONFIG.kd_temperature
    divergence = t**2 * torch.nn.functional.kl_div(
        (MINE[0] / t).log_softmax(1), (THEIRS[0] / t).softmax(1), reduction="batchmean"
    )
    torch.testing.assert_close(loss(CONFIG, "kd"), 0.5 * entropy + 2.0 * divergence)
    attention = (loss(CONFIG, "at") - 0.5 * entropy) / 10
    torch.testing.assert_close(loss(replace(CONFIG, at_weight=20.0), "at"), 0.5 * entropy + 20 * attention)
    torch.testing.assert_close(loss(CONFIG, "kd+at"), 0.5 * entropy + 2.0 * divergence + 10 * attention)


@pytest.mark.parametrize("kd_loss", ["none", "kd"])
def test_labels_are_smoothed_with_and_without_a_teacher(kd_loss: str) -> None:
    smooth = replace(CONFIG, label_smoothing=0.2, ce_weight=1.0)

    def loss(config: SearchConfig) -> torch.Tensor:
        objective = Objective(config, kd_loss, MINE, THEIRS)  # type: ignore[arg-type]
        return objective(MINE, teacher_output(THEIRS, []), LABELS)

    entropies = [torch.nn.functional.cross_entropy(MINE[0], LABELS, label_smoothing=share) for share in (0.0, 0.2)]
    torch.testing.assert_close(loss(smooth) - loss(replace(smooth, label_smoothing=0.0)), entropies[1] - entropies[0])


def test_without_a_teacher_it_is_cross_entropy() -> None:
    objective = Objective(CONFIG, "none", MINE, None)
    torch.testing.assert_close(objective(MINE, None, LABELS), torch.nn.functional.cross_entropy(MINE[0], LABELS))


def test_a_loss_that_needs_a_teacher_says_so() -> None:
    with pytest.raises(ValueError, match="needs a teacher"):
        Objective(CONFIG, "kd", MINE, None)
