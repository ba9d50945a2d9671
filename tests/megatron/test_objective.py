"""Losses of pairs: what counts, and what a step without pairs reports."""

from __future__ import annotations

import pytest
import torch

from megacode.data.loss_marks import EQUIVALENT, OTHER, QUERY
from megacode.megatron.objective import contrastive_loss
from megacode.recipe.schema import Contrastive


def pair(*roles: int) -> torch.Tensor:
    return torch.tensor(roles, dtype=torch.uint8)


def test_padding_and_the_order_of_members_count_nothing() -> None:
    vectors = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    roles = pair(QUERY, EQUIVALENT, OTHER, QUERY, EQUIVALENT, OTHER)
    pairs = torch.tensor([1, 1, 1, 2, 2, 2])
    found = contrastive_loss(vectors, roles, pairs, Contrastive())
    assert found
    order = torch.tensor([5, 0, 4, 2, 3, 1])
    padded = torch.cat([vectors[order], torch.ones(2, 8)])
    roles, pairs = torch.cat([roles[order], pair(0, 0)]), torch.cat([pairs[order], pairs[:2]])
    again = contrastive_loss(padded, roles, pairs, Contrastive())
    assert again and [float(x) for x in again] == pytest.approx([float(x) for x in found])


def test_without_something_to_compare_there_is_no_loss() -> None:
    none, alone = Contrastive(), Contrastive(in_batch=False)
    empty = torch.zeros(0, dtype=torch.int64)
    assert contrastive_loss(torch.zeros(0, 8), empty.to(torch.uint8), empty, none) is None
    only = torch.randn(2, 8), pair(QUERY, EQUIVALENT), torch.tensor([1, 1])
    assert contrastive_loss(*only, alone) is None


def test_a_query_without_an_equivalent_candidate_is_left_out() -> None:
    vectors = torch.eye(5)
    roles = pair(QUERY, EQUIVALENT, OTHER, QUERY, OTHER)
    vectors[1] = vectors[0]
    found = contrastive_loss(vectors, roles, torch.tensor([1, 1, 1, 2, 2]), Contrastive())
    assert found and float(found[1]) == 1.0
    assert float(found[0]) == pytest.approx(2 * torch.exp(torch.tensor(-20.0)).item(), rel=1e-3)
