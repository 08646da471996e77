"""The KL of a share of the completions stands for all of them."""

from dataclasses import replace
from statistics import fmean
from typing import Literal

import mlx.core as mx
import pytest

from mlx_grpo.config.settings import KLSettings
from mlx_grpo.core.types import Completion, Group, Prompt
from mlx_grpo.grpo.kl_estimators import kl_k1, kl_k3_sum
from mlx_grpo.grpo.logprob import token_logps
from mlx_grpo.grpo.reference import (
    kl_of_single_answers,
    kl_to_reference,
    mean_kl,
    measured_rows,
)
from mlx_grpo.models.decoder import Decoder
from tests.helpers.groups import actor_of, group_of
from tests.helpers.tiny import tiny_model


def sampled(seed: int) -> Group:
    """A group whose log-probs are the actor's own."""
    g = group_of(seed)
    logp_KT = token_logps(
        Decoder(actor_of("llama")), mx.array([g.prompt_ids]), g.tokens_KT, g.mask_KT
    )
    lengths = [int(n) for n in g.mask_KT.sum(axis=-1).tolist()]
    rows = zip(g.tokens_KT.tolist(), logp_KT.tolist(), lengths, strict=True)
    completions = [Completion(tuple(t[:n]), "", "stop", tuple(lp[:n])) for t, lp, n in rows]
    return Group(Prompt(str(seed), (), g.prompt_ids), tuple(completions))


def test_as_many_are_drawn_as_were_asked_for_and_no_row_twice() -> None:
    rows = measured_rows(42, 3, groups=16, k=6, count=24)
    assert sum(map(len, rows)) == 24
    assert all(sorted(set(r)) == r and set(r) <= set(range(6)) for r in rows)
    assert rows == measured_rows(42, 3, groups=16, k=6, count=24)
    assert rows != measured_rows(42, 4, groups=16, k=6, count=24)


@pytest.mark.parametrize(
    "share, control, completions, measured",
    [
        (0.125, "decay", 96, 12),
        (0.125, "decay", 36, 6),  # never fewer than the controller needs
        (0.125, "decay", 4, 4),
        (0.3, "decay", 24, 8),
        (0.125, "reward", 96, 96),
    ],
)
def test_a_share_of_the_completions_is_measured(
    share: float, control: Literal["decay", "reward"], completions: int, measured: int
) -> None:
    assert KLSettings(share=share, control=control).measured(completions) == measured


def test_every_completion_is_measured_equally_often() -> None:
    counts = [0] * 12
    for iteration in range(600):
        for place, rows in enumerate(measured_rows(1, iteration, groups=3, k=4, count=3)):
            for row in rows:
                counts[4 * place + row] += 1
    assert min(counts) > 110 and max(counts) < 190  # 150 each, give or take


def test_all_of_them_come_in_order() -> None:
    assert measured_rows(1, 0, groups=2, k=3, count=6) == [[0, 1, 2], [0, 1, 2]]


def test_the_kl_of_all_rows_is_that_of_the_estimators() -> None:
    reference, g = Decoder(tiny_model("llama")), group_of(3)
    ref_KT = token_logps(reference, mx.array([g.prompt_ids]), g.tokens_KT, g.mask_KT)
    actor = Decoder(actor_of("llama"))
    logp_KT = token_logps(actor, mx.array([g.prompt_ids]), g.tokens_KT, g.mask_KT)
    (found,) = kl_to_reference([sampled(3)], [[0, 1, 2]], reference, 1.0)
    assert list(found.k1.values()) == pytest.approx(kl_k1(logp_KT, ref_KT, g.mask_KT).tolist())
    assert found.k3_sum == pytest.approx(kl_k3_sum(logp_KT, ref_KT, g.mask_KT).item(), rel=1e-4)


def test_the_share_is_unbiased() -> None:
    reference, groups = Decoder(tiny_model("llama")), [sampled(s) for s in range(4)]
    alone = [kl_to_reference([g], [[i]], reference, 1.0)[0] for g in groups for i in range(3)]
    whole = mean_kl(alone)[0]
    sums = [(kl.k3_sum, kl.tokens) for kl in alone]
    drawn = []
    for iteration in range(400):
        rows = measured_rows(9, iteration, groups=4, k=3, count=6)
        part = [sums[3 * place + i] for place, own in enumerate(rows) for i in own]
        drawn.append((sum(k3 for k3, _ in part), sum(n for _, n in part)))
    assert fmean(k for k, _ in drawn) / fmean(n for _, n in drawn) == pytest.approx(whole, rel=0.05)


def test_groups_without_a_measured_row_count_nothing() -> None:
    reference = Decoder(tiny_model("llama"))
    found = kl_to_reference([sampled(1), sampled(2)], [[], [0, 1]], reference, 1.0)
    assert found[0].tokens == 0
    assert mean_kl(found) == mean_kl(found[1:])


def test_single_answers_have_the_kl_that_each_has_alone() -> None:
    reference = Decoder(tiny_model("llama"))
    groups = [replace(g, completions=(g.completions[i],)) for i in range(3) for g in [sampled(i)]]
    talked = Completion(
        (5, 6, 7, 8), "", "stop", (-1.0, 0.0, 0.0, -2.0), (True, False, False, True)
    )
    groups.append(Group(Prompt("tool", (), (9, 4)), (talked,)))
    told: list[int] = []
    together = kl_of_single_answers(groups, reference, 0.7, told.append)
    alone = kl_to_reference(groups, [[0]] * 4, reference, 0.7)
    assert [kl.tokens for kl in together] == [kl.tokens for kl in alone]
    assert together[-1].tokens == 2  # what a tool said does not count
    for a, b in zip(together, alone, strict=True):
        assert a.k1 == pytest.approx(b.k1, abs=1e-5)
        assert a.k3_sum == pytest.approx(b.k3_sum, rel=1e-4, abs=1e-5)
    assert told[-1] == 4
