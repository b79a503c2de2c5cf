from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from tiny import byte_level_tokenizer
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from service.engines.base import EngineError, Guide, Sampling, UnsupportedError
from service.engines.local.guides import Guides, Matcher
from service.engines.local.sampler import AT_ONCE, HEAD, Pick, Row, blend, pick, prompt_scores

GREEDY = Sampling(temperature=0)
EOS = 2
INF = math.inf


def noise(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def row(sampling: Sampling, prompt: Sequence[int] = (), vocabulary: int = 100, matcher: Matcher | None = None) -> Row:
    return Row(sampling, prompt, [EOS], vocabulary, matcher)


def token(found: Pick | EngineError) -> int:
    assert isinstance(found, Pick)
    return found.id


def told(sampling: Sampling | float) -> str:
    """What a sampling says, as a test's name."""
    if not isinstance(sampling, Sampling):
        return str(sampling)
    said = {each.name: getattr(sampling, each.name) for each in fields(sampling)}
    return ",".join(f"{name}={value}" for name, value in said.items() if value != getattr(Sampling(), name)) or "none"


def draws(sampling: Sampling, logits_V: Tensor, count: int) -> list[int]:
    """The first tokens of so many answers, seeded from 0."""
    rows = [row(replace(sampling, seed=seed), vocabulary=len(logits_V)) for seed in range(count)]
    return [token(each) for each in pick(rows, logits_V.expand(count, -1))]


def answer(one: Row, logits_SV: Tensor) -> list[int]:
    """One token for each of the logits."""
    return [token(pick([one], logits_V[None])[0]) for logits_V in logits_SV]


class TestGreedy:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_takes_the_best_and_of_equals_the_first(self, dtype: torch.dtype) -> None:
        logits = torch.tensor([[1.0, 2.0, 2.0], [-INF, 0.0, -1.0]], dtype=dtype)
        assert pick([row(GREEDY), row(GREEDY)], logits) == [Pick(1), Pick(1)]

    def test_is_what_transformers_picks(self) -> None:
        logits = noise(8, 1000).bfloat16()
        assert [token(each) for each in pick([row(GREEDY)] * 8, logits)] == logits.argmax(-1).tolist()

    def test_leaves_the_logits_as_they_were(self) -> None:
        logits = noise(1, 100)
        before = logits.clone()
        pick([row(replace(GREEDY, repetition_penalty=2, logit_bias=((3, 5.0),)), range(100))], logits)
        assert torch.equal(logits, before)


class TestChanges:
    def test_a_repetition_penalty_is_transformers_own(self) -> None:
        logits = noise(1, 100)
        prompt = [5, 7, 7, 9, 11]
        one = row(replace(GREEDY, repetition_penalty=1.7), prompt)
        penalty = RepetitionPenaltyLogitsProcessor(1.7)
        tokens = list(prompt)
        for _ in range(30):
            expected = int(penalty(torch.tensor([tokens]), logits.clone()).argmax())
            assert token(pick([one], logits)[0]) == expected
            tokens.append(expected)

    def test_frequency_counts_the_answers_tokens_and_presence_takes_them_once(self) -> None:
        logits = noise(1, 100, scale=1)
        one = row(replace(GREEDY, frequency_penalty=0.3, presence_penalty=0.2), [int(logits.argmax())] * 9)
        counts = np.zeros(100)
        for _ in range(40):
            expected = int((logits[0].numpy() - 0.3 * counts - 0.2 * (counts > 0)).argmax())
            assert token(pick([one], logits)[0]) == expected
            counts[expected] += 1
        assert counts.max() > 1

    def test_penalties_of_several_rows_do_not_mix(self) -> None:
        logits = noise(3, 100)
        samplings = [replace(GREEDY, repetition_penalty=1.5), GREEDY, replace(GREEDY, presence_penalty=2)]
        rows = [row(sampling, range(50)) for sampling in samplings]
        alone = [row(sampling, range(50)) for sampling in samplings]
        for _ in range(10):
            expected = [pick([one], logits[b : b + 1])[0] for b, one in enumerate(alone)]
            assert pick(rows, logits) == expected

    def test_a_bias_is_added_after_the_penalties(self) -> None:
        logits = torch.tensor([[4.0, 3.0, 0.0]])
        assert token(pick([row(replace(GREEDY, logit_bias=((1, 1.5),)))], logits)[0]) == 1
        # Halved, then up by 1.5: 3.5 is less than 4. The other order would make it 2.75.
        assert token(pick([row(replace(GREEDY, logit_bias=((0, 1.5),), repetition_penalty=2), [0])], logits)[0]) == 0

    @pytest.mark.parametrize("beyond", [-1, 100])
    def test_a_bias_for_a_token_that_is_none_is_refused(self, beyond: int) -> None:
        with pytest.raises(UnsupportedError, match=f"token {beyond}; there are 100") as caught:
            row(Sampling(logit_bias=((1, 1.0), (beyond, 1.0))))
        assert caught.value.param == "logit_bias"

    def test_nothing_ends_an_answer_before_min_tokens(self) -> None:
        logits = torch.zeros(5, 10)
        logits[:, EOS], logits[:, 4], logits[:, 7] = 9, 8, 5
        assert answer(row(replace(GREEDY, min_tokens=2, stop_tokens=(4,)), vocabulary=10), logits) == [7, 7, 2, 2, 2]

    def test_an_ignored_end_is_a_token_like_any_other(self) -> None:
        logits = torch.zeros(2, 10)
        logits[:, EOS] = 9
        one = row(replace(GREEDY, min_tokens=2, ignore_eos=True, stop_tokens=(4,)), vocabulary=10)
        assert answer(one, logits) == [EOS, EOS]
        assert one.stops == {4}

    def test_stop_tokens_beyond_the_logits_cannot_be_picked_anyway(self) -> None:
        assert answer(row(replace(GREEDY, min_tokens=1, stop_tokens=(99,)), vocabulary=10), torch.zeros(1, 10)) == [0]


CUTS = [
    Sampling(temperature=0.7),
    Sampling(temperature=2.5),
    Sampling(top_k=1),
    Sampling(top_k=7),
    Sampling(top_p=0.5),
    Sampling(top_p=0.95),
    Sampling(top_p=1e-9),
    Sampling(min_p=0.1),
    Sampling(temperature=1.5, top_k=20, top_p=0.8),
    Sampling(temperature=1.5, top_k=40, top_p=0.9, min_p=0.05),
    Sampling(temperature=0.6, top_p=0.99, min_p=0.3),
    Sampling(temperature=1.2, top_k=10**6),
]


def by_transformers(sampling: Sampling, logits_V: Tensor) -> Tensor:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(sampling.temperature))])
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    warped_V: Tensor = warpers(torch.zeros(1, 0, dtype=torch.long), logits_V[None].clone())[0]
    return warped_V.softmax(-1)


class TestDrawing:
    @pytest.mark.parametrize("sampling", CUTS, ids=told)
    def test_shares_are_those_of_transformers(self, sampling: Sampling) -> None:
        logits = noise(60)
        shares = by_transformers(sampling, logits).double().numpy()
        count = 2000
        seen = np.bincount(draws(sampling, logits, count), minlength=60)
        assert not seen[shares == 0].any()
        common = shares * count >= 5
        rare = ~common & (shares > 0)
        got = [*seen[common], seen[rare].sum()] if rare.any() else [*seen[common]]
        due = [*shares[common], shares[rare].sum()] if rare.any() else [*shares[common]]
        if len(got) > 1:
            assert chisquare(got, np.array(due) / sum(due) * count).pvalue > 1e-3

    @pytest.mark.parametrize("sampling", CUTS, ids=told)
    def test_all_that_transformers_keeps_and_nothing_else_can_come(self, sampling: Sampling) -> None:
        logits = noise(60, scale=1.0)
        kept = set(by_transformers(sampling, logits).nonzero()[:, 0].tolist())
        seen = set(draws(sampling, logits, 2000))
        assert seen <= kept
        likely = {int(id_) for id_ in kept if by_transformers(sampling, logits)[id_] > 5e-3}
        assert likely <= seen

    @pytest.mark.parametrize("scale", [0.01, 1.0, 20.0])
    @pytest.mark.parametrize("sampling", [Sampling(top_p=0.9), Sampling(top_k=3000), Sampling(top_k=3000, top_p=0.99)])
    def test_cuts_beyond_the_head_are_those_of_transformers(self, sampling: Sampling, scale: float) -> None:
        logits = noise(2 * HEAD + 77, scale=scale)
        shares = by_transformers(sampling, logits).double().numpy()
        seen = draws(sampling, logits, 1000)
        assert shares[seen].all()
        # The mean rank of what came is near the one that is due.
        ranks = (-logits).argsort().argsort().numpy()
        due = float((shares * ranks).sum())
        spread = math.sqrt(float((shares * (ranks - due) ** 2).sum()) / 1000)
        assert abs(ranks[seen].mean() - due) < 4 * spread + 1e-9

    def test_a_token_comes_where_the_running_sum_of_shares_passes_the_number(self) -> None:
        logits = noise(5000)
        ends = logits.double().softmax(-1).cumsum(-1).numpy()
        numbers = [row(Sampling(seed=seed)).number() for seed in range(500)]
        assert draws(Sampling(), logits, 500) == np.searchsorted(ends, numbers, side="right").tolist()

    def test_of_equals_the_first_come_first(self) -> None:
        logits = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 0.0])
        assert set(draws(Sampling(top_k=1), logits, 50)) == {0}
        assert set(draws(Sampling(top_k=2), logits, 50)) == {0, 2}
        assert set(draws(Sampling(top_k=4), logits, 200)) == {0, 2, 4, 1}
        assert set(draws(Sampling(top_p=0.5), torch.zeros(8), 200)) == {0, 1, 2, 3}
        assert set(draws(Sampling(top_p=0), torch.zeros(8), 50)) == {0}

    @pytest.mark.parametrize("sampling", [Sampling(temperature=1e-45), Sampling(temperature=1e-320, top_p=0.5)])
    def test_a_tiny_temperature_is_greedy(self, sampling: Sampling) -> None:
        assert set(draws(sampling, torch.tensor([0.0, 3.0, 2.0, -INF]), 50)) == {1}

    def test_a_token_that_is_ruled_out_never_comes(self) -> None:
        logits = torch.full((300,), -INF)
        logits[[0, 299]] = torch.tensor([0.0, 1.0])
        assert set(draws(Sampling(temperature=100), logits, 100)) == {0, 299}

    @pytest.mark.parametrize("vocabulary", [1, 2, 255, 256, 257, 1000])
    def test_every_size_of_vocabulary_is_drawn_from_to_its_end(self, vocabulary: int) -> None:
        logits = torch.full((vocabulary,), -30.0)
        logits[[0, -1]] = 0
        for sampling in (Sampling(), Sampling(top_p=0.999)):
            assert set(draws(sampling, logits, 50)) == {0, vocabulary - 1}


MANY = [
    GREEDY,
    Sampling(seed=1),
    Sampling(seed=2, temperature=0.7, top_p=0.9),
    Sampling(seed=3, top_k=5),
    Sampling(seed=4, min_p=0.2),
    Sampling(seed=5, temperature=3, top_p=0.98),
    Sampling(seed=6, repetition_penalty=1.3, presence_penalty=0.4),
    replace(GREEDY, frequency_penalty=1.0, logprobs=3),
    Sampling(seed=7, logprobs=2, logit_bias=((5, 3.0),), min_tokens=3),
]


class TestSeeds:
    def test_the_seed_decides(self) -> None:
        logits = noise(20, 1000)

        def got(seed: int | None) -> list[int]:
            return answer(row(Sampling(seed=seed), vocabulary=1000), logits)

        assert got(-7) == got(-7)
        assert len({tuple(got(seed)) for seed in (1, 2, -1, 2**64 + 1, None, None)}) == 6

    def test_every_pick_takes_the_next_number_whatever_is_asked_of_it(self) -> None:
        numbers = np.random.Generator(np.random.Philox(key=5)).random(3)
        one = row(Sampling(seed=5))
        for number in numbers:
            assert one.number() == one.number() == number
            one.accept(7)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("vocabulary", [2 * HEAD + 77, AT_ONCE // 2])  # all rows are drawn for at once, or two
    def test_a_row_picks_the_same_whoever_else_is_in_the_batch(self, vocabulary: int, dtype: torch.dtype) -> None:
        steps = 6
        logits_SBV = noise(steps, len(MANY), vocabulary, scale=1.5).to(dtype)
        alone = [
            [pick([one], logits_SBV[s, b : b + 1])[0] for s in range(steps)]
            for b, one in enumerate(row(sampling, range(200), vocabulary) for sampling in MANY)
        ]
        rows = [row(sampling, range(200), vocabulary) for sampling in MANY]
        order = [8, 3, 5, 1, 0, 7, 2, 6, 4]
        for s in range(steps):
            together = pick([rows[b] for b in order], logits_SBV[s][order])
            # Equal to the last bit of every log-probability.
            assert together == [alone[b][s] for b in order]


class TestFailures:
    @pytest.mark.parametrize("bad", [math.nan, INF])
    @pytest.mark.parametrize("sampling", MANY, ids=told)
    def test_a_row_whose_logits_are_no_numbers_fails_alone(self, sampling: Sampling, bad: float) -> None:
        logits = noise(3, 100)
        logits[1, 50] = bad
        first, second, third = pick([row(GREEDY), row(sampling, [50]), row(Sampling(seed=0))], logits)
        assert isinstance(second, EngineError)
        assert "not finite" in str(second)
        assert first == Pick(int(logits[0].argmax()))
        assert third == pick([row(Sampling(seed=0))], logits[2:])[0]

    @pytest.mark.parametrize("sampling", MANY, ids=told)
    def test_logits_that_are_nowhere_finite_are_a_failure(self, sampling: Sampling) -> None:
        assert "not finite" in str(pick([row(sampling)], torch.full((1, 100), -INF))[0])

    def test_rows_of_a_batch_that_broke_pick_by_themselves_what_they_would_have(self) -> None:
        logits = noise(3, 100)
        samplings = [Sampling(seed=1), Sampling(top_k=9, seed=2), Sampling(top_k=9, min_p=2.0, seed=3)]
        broken, alone = [[row(sampling) for sampling in samplings] for _ in range(2)]
        with pytest.raises(RuntimeError):
            pick(broken, logits)
        for b in (0, 1):
            assert pick([broken[b]], logits[b : b + 1]) == pick([alone[b]], logits[b : b + 1])

    def test_a_row_with_nothing_left_to_pick_says_so(self) -> None:
        logits = torch.full((1, 10), -INF)
        logits[0, EOS] = 0.0
        (found,) = pick([row(replace(GREEDY, min_tokens=1), vocabulary=10)], logits)
        assert isinstance(found, UnsupportedError)
        assert found.param == "min_tokens"
        assert "rule every token out" in str(found)


class TestLogprobs:
    def test_are_the_models_own_whatever_is_picked(self) -> None:
        logits = noise(1, 100)
        logs = logits.log_softmax(-1)[0]
        sampling = Sampling(temperature=0.3, repetition_penalty=2, logit_bias=((7, 100.0),), logprobs=3)
        (found,) = pick([row(sampling, range(100))], logits)
        assert isinstance(found, Pick)
        assert found.id == 7
        assert found.logprob == pytest.approx(logs[7].item())
        best = logs.topk(3)
        assert [id_ for id_, _ in found.top] == best.indices.tolist()
        assert [logprob for _, logprob in found.top] == pytest.approx(best.values.tolist())

    def test_each_row_gets_as_many_alternatives_as_it_asked_for(self) -> None:
        rows = [row(replace(GREEDY, logprobs=count), vocabulary=8) for count in (None, 0, 2, 20)]
        found = [each for each in pick(rows, noise(4, 8)) if isinstance(each, Pick)]
        assert [len(each.top) for each in found] == [0, 0, 2, 8]
        assert [each.logprob is None for each in found] == [True, False, False, False]

    def test_of_equals_the_lowest_ids_are_told(self) -> None:
        logits = torch.tensor([[0.0, 1.0, 0.0, 2.0, 1.0, 1.0, 0.0]])
        (found,) = prompt_scores(logits, [0], 3)
        assert [id_ for id_, _ in found.top] == [3, 1, 4]

    def test_of_a_prompt_are_those_of_its_tokens(self) -> None:
        logits = noise(150, 90).bfloat16()
        ids = torch.randint(90, (150,), generator=torch.Generator().manual_seed(1)).tolist()
        logs = logits.float().log_softmax(-1)
        scores = prompt_scores(logits, ids, 2)
        assert [each.id for each in scores] == ids
        assert [each.logprob for each in scores] == pytest.approx(logs[range(150), ids].tolist())
        assert [each.top[0][1] for each in scores] == pytest.approx(logs.amax(-1).tolist())

    def test_of_a_prompt_need_numbers(self) -> None:
        logits = noise(70, 10)
        logits[69, 3] = math.nan
        with pytest.raises(EngineError, match="prompt are not finite"):
            prompt_scores(logits, [1] * 70, 0)


class TestBlend:
    def test_is_the_weighted_mean_of_the_distributions(self) -> None:
        experts = [noise(500, seed=seed) for seed in range(3)]
        weights = [0.5, 0.3, 0.2]
        due = sum(weight * each.double().softmax(-1) for weight, each in zip(weights, experts, strict=True))
        assert torch.allclose(blend(experts, weights).double().softmax(-1), due, atol=1e-7)

    def test_of_one_expert_is_that_expert(self) -> None:
        one, other = noise(500).bfloat16(), noise(500, seed=1).bfloat16()
        assert blend([one], [1.0]) is one
        assert blend([one, other], [1.0, 0.0]) is one

    def test_of_copies_is_the_expert_bit_for_bit(self) -> None:
        one = noise(500)
        assert torch.equal(blend([one, one.clone(), one.clone()], [0.2, 0.5, 0.3]), one)

    def test_takes_batches_and_a_row_of_copies_in_them(self) -> None:
        first, second = noise(2, 500), noise(2, 500, seed=1)
        second[0] = first[0]
        mixed = blend([first, second], [0.4, 0.6])
        assert torch.equal(mixed[0], first[0])
        assert torch.equal(mixed[1], blend([first[1], second[1]], [0.4, 0.6]))

    def test_knows_what_one_expert_alone_rules_out(self) -> None:
        mixed = blend([torch.tensor([0.0, -INF, -INF]), torch.tensor([0.0, 0.0, -INF])], [0.5, 0.5])
        assert torch.allclose(mixed.softmax(-1), torch.tensor([0.75, 0.25, 0.0]))

    def test_carries_numbers_that_are_none(self) -> None:
        bad = noise(10)
        bad[3] = math.nan
        assert isinstance(pick([row(GREEDY)], blend([bad, noise(10, seed=1)], [0.5, 0.5])[None])[0], EngineError)


@pytest.fixture(scope="module")
def ids() -> dict[str, int]:
    vocabulary: dict[str, int] = byte_level_tokenizer().get_vocab()
    return vocabulary


@pytest.fixture(scope="module")
def guides(ids: dict[str, int]) -> Guides:
    return Guides(byte_level_tokenizer(), len(ids), [ids["<eos>"]])


class TestGuided:
    def test_rows_follow_their_own_guides(self, guides: Guides, ids: dict[str, int]) -> None:
        matchers = [guides.matcher(Guide("regex", "ab")), None, guides.matcher(Guide("regex", "[xy]"))]
        logits = torch.zeros(3, len(ids))
        logits[:, ids["q"]], logits[:, ids["y"]] = 9, 5
        rows = [Row(GREEDY, (), [ids["<eos>"]], len(ids), matcher) for matcher in matchers]
        assert [token(each) for each in pick(rows, logits)] == [ids["a"], ids["q"], ids["y"]]
        assert [token(each) for each in pick(rows, logits)] == [ids["b"], ids["q"], ids["<eos>"]]

    def test_a_complete_guide_ends_the_answer_before_min_tokens(self, guides: Guides, ids: dict[str, int]) -> None:
        sampling = replace(GREEDY, min_tokens=50, ignore_eos=True)
        for each in (sampling, replace(sampling, ignore_eos=False)):
            one = Row(each, (), [ids["<eos>"]], len(ids), guides.matcher(Guide("regex", "ab")))
            assert answer(one, torch.zeros(4, len(ids))) == [ids["a"], ids["b"], ids["<eos>"], ids["<eos>"]]

    def test_a_guide_that_fails_fails_its_row_alone(self, guides: Guides, ids: dict[str, int]) -> None:
        matcher = guides.matcher(Guide("regex", "ab"))
        with pytest.raises(EngineError):
            matcher.accept(ids["q"])
        rows = [Row(GREEDY, (), [ids["<eos>"]], len(ids), matcher), row(GREEDY)]
        failed, other = pick(rows, torch.zeros(2, len(ids)))
        assert isinstance(failed, EngineError)
        assert "guide" in str(failed)
        assert other == Pick(0)
