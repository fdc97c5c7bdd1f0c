import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, join_ranks, random_model, spawn
from world import TEXTS

from thinkmid.run.ranks import Ranks
from thinkmid.tokenizer import Tokenizer, train_tokenizer
from thinkmid.train import fsdp
from thinkmid.train.config import RewardConfig
from thinkmid.train.likelihood import Layout, Scores
from thinkmid.train.references import references
from thinkmid.types import Group, Prompt, Sample

ALONE = Ranks(0, 1, torch.device("cpu"), None)
MAX_SUFFIX = 5
# prefix, reference, what the samples wrote; the second document begins with a thought, the last suffix is one token
WORLD = [
    ("Ana has 3 coins.", " So there are 5 coins.", ["2+3</think> So", "</think> a", "3 3</think>x", "2+3</think> n"]),
    ("", " Ben finds 2 more.", ["a</think> Ben", "So there</think>b", "no end", "c</think> d</think> e"]),
    ("Cleo has 2 coins. Dan", " finds 1 more.", ["never", "ends", "at", "all"]),
    ("", " ", ["a</think>", "bb</think>", "c", "d</think>"]),
]  # fmt: skip


def make_text(folder, tags) -> Tokenizer:
    train_tokenizer(TEXTS, 300, folder, tags)
    return Tokenizer.load(folder)


@pytest.fixture(scope="module", params=["added", "plain"])
def text(request, tmp_path_factory):
    return make_text(tmp_path_factory.mktemp(request.param), request.param)


def model_of(text, seed=0, dtype=torch.float64):
    return random_model(replace(TINY, vocab=text.vocab_size), seed=seed, dtype=dtype)


def groups_of(text, verdicts=None) -> list[Group]:
    def sample(words):
        tokens = np.array(text.encode(words), np.int32)
        num = text.split_at_close(tokens).num_think
        zeros = np.zeros(len(tokens), np.float32)
        finish, think = ("suffix", num) if num else ("unclosed", len(tokens))
        return Sample(
            tokens=tokens, logp=zeros, drawn=zeros == 0, finish=finish, num_think=think, versions=zeros.astype(np.int32)
        )

    groups = []
    for p, (prefix, reference, written) in enumerate(WORLD):
        prompt = Prompt(id=f"prompt {p}", tokens=[*text.encode(prefix), *text.open_ids], meta={"reference": reference})
        rewards = [0.0] * 4 if verdicts is None else list(verdicts[p])
        groups.append(Group(prompt=prompt, samples=[*map(sample, written)], rewards=rewards, whys=["why"] * 4))
    return groups


def naive(model, before, suffix):
    """Mean log-prob of the suffix's tokens after others, by one whole forward; its first one if nothing is before."""
    tokens = [*before, *suffix]
    with torch.no_grad():
        logp = torch.log_softmax(model.logits(torch.tensor(tokens)), -1)
    places = [i for i in range(len(before), len(tokens)) if i]
    return sum(logp[i - 1, tokens[i]].item() for i in places) / len(places)


def expected(text, scorer, baseline, unclosed=0.5):
    """(P, G) likelihood and gain of WORLD."""
    likelihood, bare = np.zeros((4, 4)), np.zeros((4, 4))
    for p, (prefix, reference, written) in enumerate(WORLD):
        raw, suffix = text.encode(prefix), text.encode(reference)[:MAX_SUFFIX]
        skip = not raw  # nothing predicts the first token of a text
        if p >= 2:  # nothing closed, or no token to predict
            continue
        for g, words in enumerate(written):
            thought, tag, _ = words.partition("</think>")
            if not tag:
                likelihood[p, g] = math.nan
                continue
            before = [*raw, *text.open_ids, *text.encode(thought + tag), *suffix[:skip]]
            likelihood[p, g] = naive(scorer, before, suffix[skip:])
        bare[p] = naive(baseline, [*raw, *suffix[:skip]], suffix[skip:])
        worst = np.nanmin(likelihood[p])
        likelihood[p] = np.where(np.isnan(likelihood[p]), worst - unclosed, likelihood[p])
    return likelihood, likelihood - bare


def scored(text, models, groups, ranks=ALONE, pack_tokens=10_000, **reward):
    job = SimpleNamespace(model=None, frozen=None, ema=None, tokenizer=text, ranks=ranks)
    vars(job).update({"model" if name == "policy" else name: model for name, model in models.items()})
    sampling, batch = SimpleNamespace(max_suffix=MAX_SUFFIX), SimpleNamespace(pack_tokens=pack_tokens)
    scores = Scores(job, SimpleNamespace(reward=RewardConfig(**reward), sampling=sampling, batch=batch))
    groups, row = scores(groups)
    return np.array([g.rewards for g in groups]), row, groups


@pytest.mark.parametrize("pack_tokens", [10_000, 60])
@pytest.mark.parametrize("baseline", ["policy", "frozen"])
def test_likelihood_and_gain_are_those_of_a_whole_forward_of_each_sample(text, pack_tokens, baseline):
    models = {"policy": model_of(text), "frozen": model_of(text, seed=1)}
    likelihood, gain = expected(text, models["policy"], models[baseline])
    options = {"pack_tokens": pack_tokens, "baseline": baseline, "judge": 0.0}
    found, row, _ = scored(text, models, groups_of(text), **options, likelihood=1.0)
    np.testing.assert_allclose(found, likelihood, atol=1e-6)
    assert "gain" not in row
    found, row, _ = scored(text, models, groups_of(text), **options, gain=2.0)
    np.testing.assert_allclose(found, 2 * gain, atol=2e-6)
    # the metrics are of the thoughts that closed before a suffix
    of_these = np.array([[True] * 4, [True, True, False, True], [False] * 4, [False] * 4])
    assert row["likelihood"] == pytest.approx(likelihood[of_these].mean(), abs=1e-6)
    assert row["gain"] == pytest.approx(gain[of_these].mean(), abs=1e-6)


def test_the_scorer_is_the_copy_that_is_named(text):
    models = {"policy": model_of(text), "frozen": model_of(text, seed=1), "ema": model_of(text, seed=2)}
    gain = expected(text, models["ema"], models["frozen"], unclosed=3.0)[1]
    options = {"judge": 0.0, "gain": 1.0, "scorer": "ema", "baseline": "frozen", "unclosed": 3.0}
    np.testing.assert_allclose(scored(text, models, groups_of(text), **options)[0], gain, atol=1e-6)


def test_equal_thoughts_are_worth_the_same_to_the_last_bit_and_a_group_of_them_is_dead(text):
    found = scored(text, {"policy": model_of(text, dtype=torch.float32)}, groups_of(text), judge=0.0, likelihood=1.0)[0]
    assert found[0, 0] == found[0, 3] != found[0, 1]  # the same thought before other continuations
    assert len(set(found[2])) == len(set(found[3])) == 1
    # 3, 3, 0 and 3 distinct thoughts, and 4 prompts: rounding cannot tell equal ones apart if they are scored once
    groups = groups_of(text)
    assert Layout(groups, references([g.prompt for g in groups], text, MAX_SUFFIX), text).num == 13


def test_terms_are_summed_with_their_weights_and_no_verdict_stays_none(text):
    verdicts = [[1, 0, math.nan, 1], [0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 1]]
    model = model_of(text)
    likelihood, gain = expected(text, model, model)
    options = {"judge": 2.0, "likelihood": 0.5, "gain": 0.25, "prefix": 3.0, "prefix_tokens": 1}
    found, row, groups = scored(text, {"policy": model}, groups_of(text, verdicts), **options)
    begins = np.zeros((4, 4))
    begins[0, 0] = begins[1, 0] = 1  # " So" and " Ben"
    np.testing.assert_allclose(found, 2 * np.array(verdicts) + likelihood / 2 + gain / 4 + 3 * begins, atol=2e-6)
    assert (row["verdict"], row["prefix_match"]) == (pytest.approx(5 / 15), 2 / 16)
    assert groups[0].whys[0].startswith("why; judge 1, prefix 1, likelihood -")


def test_rewards_of_weight_0_run_no_forward_and_make_no_nan(text):
    verdicts = [[math.nan] * 4] * 4
    found, row, _ = scored(text, {}, groups_of(text, verdicts), judge=0.0, prefix=1.0)
    assert (found.sum(), row.keys()) == (2, {"prefix_match"})


def test_a_score_that_is_not_finite_is_no_reward_and_no_floor_for_others(text):
    model = model_of(text)
    bad = text.encode("x</think>")[0]
    with torch.no_grad():
        model.embed_tokens.weight[bad] = math.nan  # of the third sample's continuation: nobody's thought has it
    assert np.isfinite(scored(text, {"policy": model}, groups_of(text), judge=0.0, likelihood=1.0)[0]).all()
    with torch.no_grad():
        model.embed_tokens.weight[text.encode("a</think>")[0]] = math.nan
    found = scored(text, {"policy": model}, groups_of(text), judge=0.0, likelihood=1.0)[0]
    assert np.isnan(found[1]).tolist() == [True, False, False, False]
    assert found[1, 2] == np.nanmin(found[1, [1, 3]]) - 0.5


def two_ranks_worker(rank, folder):
    ranks = join_ranks(rank, 2, folder)
    text = Tokenizer.load(folder)
    model = fsdp.shard(model_of(text), ranks, compute_dtype=torch.float64)
    for pack_tokens in (10_000, 60):  # with the larger one a rank has an empty pack
        options = {"judge": 0.0, "gain": 1.0, "pack_tokens": pack_tokens}
        found = scored(text, {"policy": model}, groups_of(text), ranks, **options)[0]
        np.testing.assert_allclose(found, np.load(f"{folder}/gain.npy"), atol=1e-6)


def test_two_ranks_score_as_one(tmp_path):
    text = make_text(tmp_path, "plain")
    model = model_of(text)
    np.save(tmp_path / "gain.npy", expected(text, model, model)[1])
    spawn(two_ranks_worker, 2, str(tmp_path))
