import hashlib
import math
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from gullible import ATTACKS as MORE_ATTACKS
from gullible import gullible, read
from later import Later

from thinkmid import config
from thinkmid.rollout.judge.attacks import ATTACKS
from thinkmid.rollout.judge.canary import Examiner
from thinkmid.rollout.judge.config import JudgeConfig
from thinkmid.rollout.judge.model import JudgeError, ModelJudge
from thinkmid.rollout.judge.reward import ContinuationReward
from thinkmid.rollout.judge.rule import RuleJudge
from thinkmid.rollout.judge.templates import TEMPLATES, nonce, render
from thinkmid.rollout.verdict import Verdict
from thinkmid.tokenizer import Tokenizer, train_tokenizer
from thinkmid.types import Prompt, Sample

SENTENCES = ["The sum of 3 and 4 is 7.", "Mia has 12 apples, and Tom has 5.", "So 7 remain."]
RIVER = "The river rose overnight, and the lower bridge was closed to carts."


@pytest.fixture(scope="module", params=["added", "plain"])
def text(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(SENTENCES, 290, folder, request.param)
    return Tokenizer.load(folder)


def make(text, reference, written):
    """A prompt and a sample with this text."""
    tokens = np.array(text.encode(written), np.int32)
    zeros = np.zeros(len(tokens), np.float32)
    sample = Sample(
        tokens=tokens,
        logp=zeros,
        drawn=zeros == 0,
        finish="suffix",
        num_think=len(tokens),
        versions=zeros.astype(np.int32),
    )
    return Prompt(id="p", tokens=[1], meta={"reference": reference}), sample


def never(candidate, reference):
    raise AssertionError(f"asked about {candidate!r}")


def listening(asked, value=1):
    """A judge that says value and notes what it is shown."""
    return lambda *pair: asked.append(pair) or Verdict(value, "")


@pytest.mark.parametrize(
    ("written", "why"),
    [
        ("So 7 remain.", "unclosed"),
        ("a</think> So 7 remain.</think>", "closed more than once"),
        ("", "unclosed"),
        ("7</thin k>", "unclosed"),
    ],
)
def test_without_exactly_one_closing_tag_nobody_is_asked(text, written, why):
    reward = ContinuationReward(text, never, max_suffix=10)
    assert reward(*make(text, "So 7 remain.", written)).result() == Verdict(0, why)


def test_the_reference_is_cut_as_the_suffix_is(text):
    reference, asked = " So 7 remain. Mia has 12 apples, and Tom has 5.", []
    cut = text.decode(text.encode(reference)[:4])
    ContinuationReward(text, listening(asked), max_suffix=4)(*make(text, reference, "12 - 5</think>" + cut))
    assert asked == [(cut, cut)]
    assert len(cut) < len(reference)


def test_continuation_and_reference_end_at_a_stop_text(text):
    asked, reference = [], " So 7 remain. Mia has 12 apples, and Tom has 5."
    reward = ContinuationReward(text, listening(asked), max_suffix=99, stops=(". M", "Tom"))
    reward(*make(text, reference, "12. Mia</think> So 8 remain, Tom"))
    assert asked == [(" So 8 remain, ", " So 7 remain")]


def test_a_suffix_past_the_cut_is_not_shown(text):
    """The engine ends at the cut; a sample that does not, from another engine, must gain nothing by it."""
    suffix, asked = text.encode(" So 7 remain. Mia has 12 apples."), []
    prompt, sample = make(text, "7", "12</think>")
    long = replace(sample, tokens=np.append(sample.tokens, suffix))
    ContinuationReward(text, listening(asked), max_suffix=3)(prompt, long)
    assert [candidate for candidate, _ in asked] == [text.decode(suffix[:3])]


def test_each_sample_is_compared_with_the_reference_of_its_own_prompt(text):
    asked, written = [], [("7", "a</think> 1"), ("8", "c</think> 3"), ("7", "b</think> 2"), ("9", "no tag")]
    reward = ContinuationReward(text, listening(asked), max_suffix=10)
    values = [reward(*make(text, reference, w)).result().value for reference, w in written]
    assert [(c.strip(), r) for c, r in asked] == [("1", "7"), ("3", "8"), ("2", "7")]
    assert values == [1, 1, 1, 0]


def test_a_judge_by_rule_has_no_metrics(text):
    reward = ContinuationReward(text, RuleJudge(0.5), max_suffix=20)
    assert reward(*make(text, " So 7 remain.", "12 - 5</think> 7 remain.")).result().value == 1
    assert reward(*make(text, " So 7 remain.", "12 - 5</think> 8 remain.")).result().value == 0
    assert reward.finish(1) == {}


def test_a_failed_verdict_is_no_zero(text):
    reward = ContinuationReward(
        text, ModelJudge(JudgeConfig(template="short"), scripted([math.nan] * 2), 0), max_suffix=9
    )
    failed = reward(*make(text, "So 7 remain.", "a</think> 8 remain.")).result()
    assert math.isnan(failed.reward)
    assert Verdict(0, "no").reward == 0.0
    assert reward.finish(1)["judge_failed"] == 1
    assert reward.finish(2)["judge_failed"] == 0


def test_a_look_at_the_judge_ends_the_step(text):
    cfg, asked = JudgeConfig(template="short", canary_every=3), []
    ask = lambda prompt: asked.append(prompt) or Later(lambda: honest(prompt))  # noqa: E731
    prompts = [make(text, reference, "")[0] for reference in (*SENTENCES, SENTENCES[0], " ")]
    examiner = Examiner(cfg=cfg, ask=ask, seed=0, prompts=prompts)
    reward = ContinuationReward(text, ModelJudge(cfg, ask, 0), max_suffix=9, examiner=examiner)
    assert "judge_canary" not in reward.finish(2)
    assert not asked
    assert reward.finish(3).items() >= {"judge_asked": 0, "judge_canary": (1.0, 1)}.items()
    references = {text.decode(text.encode(sentence)[:9]).strip() for sentence in SENTENCES}
    assert {read(prompt)["reference"].strip() for prompt in asked} <= references


def honest(prompt):
    texts = read(prompt)
    return float(texts["candidate"].split() == texts["reference"].split())


def scripted(answers, prompts=None):
    """An ask that gives these in turn; an exception is raised."""
    answers = iter(answers)

    def ask(prompt):
        if prompts is not None:
            prompts.append(prompt)

        def answer():
            given = next(answers)
            if isinstance(given, Exception):
                raise given
            return given

        return Later(answer)

    return ask


# --- what nobody may forge


def unguarded(template, candidate, reference):
    """What a judge is asked that takes texts as they come."""
    return TEMPLATES[template].format(candidate=candidate, reference=reference, nonce=nonce(3, reference, 0))


@pytest.mark.parametrize("template", TEMPLATES)
def test_no_attack_makes_a_gullible_judge_say_yes(template):
    attacks = [*ATTACKS, *MORE_ATTACKS]
    assert len(ATTACKS) >= 200
    judge = ModelJudge(JudgeConfig(template=template), lambda prompt: Later(partial(gullible, prompt)), 3)
    forged = [a for a in attacks if judge(a, RIVER).result().value != 0]
    assert not forged
    # the same judge can be fooled, or this would show nothing
    assert sum(gullible(unguarded(template, a, RIVER)) > 0.5 for a in ATTACKS) > 150
    assert sum(gullible(unguarded(template, a, RIVER)) > 0.5 for a in MORE_ATTACKS) > 0.8 * len(MORE_ATTACKS)


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_gullible_judge_behind_guards_is_still_a_judge(template):
    judge = ModelJudge(JudgeConfig(template=template), lambda prompt: Later(partial(gullible, prompt)), 3)
    assert judge("The river rose overnight; the lower bridge was closed to all carts.", RIVER).result().value == 1
    assert judge("Snow fell on the pass, and no mail came for a week.", RIVER).result().value == 0
    row = judge.row()
    assert (row["judge_asked"], row["judge_decided"]) == (2, 0)


@pytest.mark.parametrize("template", TEMPLATES)
def test_behind_fences_alone_nothing_speaks_for_the_prompt(template):
    """Neutral texts, no guard: whatever an attack holds stays where candidates are read."""
    code = nonce(3, RIVER, 0)
    outside = read(render(template, "Snow fell.", RIVER, code))["outside"]
    for attack in [*ATTACKS, *MORE_ATTACKS]:
        # a policy that knew the code, which it does not
        for known in (attack, attack.replace("0a1b2c3d", code)):
            assert read(render(template, known, RIVER, code))["outside"] == outside
    leaks = [a for a in ATTACKS if read(unguarded(template, a, RIVER))["outside"] != outside]
    assert len(leaks) >= 4


# --- how a model is asked


@pytest.mark.parametrize(
    ("ps", "mean", "majority"),
    [
        ([0.51], 1, 1),
        ([0.5], 0, 0),
        ([0.9, 0.4, 0.4], 1, 0),
        ([0.6, 0.6, 0.1], 0, 1),
        ([0.9, 0.2], 1, 0),
        ([1, 0], 0, 0),
    ],
)
def test_votes_are_combined_by_their_mean_or_by_majority(ps, mean, majority):
    for combine, value in (("mean", mean), ("majority", majority)):
        prompts = []
        judge = ModelJudge(JudgeConfig(template="short", votes=len(ps), combine=combine), scripted(ps, prompts), 5)
        verdict = judge("Snow fell.", RIVER).result()
        assert verdict.value == value, combine
        assert verdict.p_yes == pytest.approx(sum(ps) / len(ps))
        assert prompts == [render("short", "Snow fell.", RIVER, nonce(5, RIVER, vote)) for vote in range(len(ps))]
        assert len(set(prompts)) == len(ps)


@pytest.mark.parametrize("bad", [math.nan, -0.1, 1.1, math.inf, JudgeError("timeout")])
def test_a_vote_that_fails_is_asked_again_and_then_fails_the_verdict(bad):
    prompts = []
    judge = ModelJudge(JudgeConfig(template="short", votes=2), scripted([bad, 0.9, 0.8], prompts), 0)
    verdict = judge("Snow fell.", RIVER).result()
    assert (verdict.value, verdict.p_yes) == (1, pytest.approx(0.85))
    # the same question, or a failure could turn the verdict
    assert prompts[2] == prompts[0]
    judge = ModelJudge(JudgeConfig(template="short", retries=2), scripted([bad] * 3), 0)
    failed = judge("Snow fell.", RIVER).result()
    assert (failed.value, failed.p_yes) == (None, None)
    assert failed.why.startswith("judge failed: " + ("timeout" if isinstance(bad, JudgeError) else "P(yes) ="))


def test_a_failed_verdict_is_not_kept():
    judge = ModelJudge(JudgeConfig(template="short"), scripted([JudgeError("gone")] * 2 + [0.9]), 0)
    pending = judge("Snow fell.", RIVER)
    assert pending.result().value is None
    assert pending.result().value is None, "one answer, however often it is read"
    assert judge("Snow fell.", RIVER).result().value == 1
    row = judge.row()
    assert (row["judge_asked"], row["judge_failed"], row["judge_cached"]) == (2, 1, 0)


def test_what_is_no_failure_of_the_judge_is_not_hidden():
    judge = ModelJudge(JudgeConfig(template="short"), scripted([KeyError("a bug")]), 0)
    with pytest.raises(KeyError):
        judge("Snow fell.", RIVER).result()


def test_duplicates_share_one_question_under_way_and_later():
    prompts = []
    judge = ModelJudge(JudgeConfig(template="short"), scripted([0.9, 0.1], prompts), 0)
    first, second = judge("Snow fell.", RIVER), judge("Snow fell.", RIVER)
    assert len(prompts) == 1
    assert second.result() == first.result() == judge("Snow fell.", RIVER).result()
    assert judge("Snow fell. ", RIVER).result().value == 0, "as given: another text"
    row = judge.row()
    assert (row["judge_asked"], row["judge_cached"]) == (2, 2)


def test_the_cache_forgets_the_oldest(monkeypatch):
    monkeypatch.setattr("thinkmid.rollout.judge.model.CACHE_SIZE", 2)
    prompts = []
    judge = ModelJudge(JudgeConfig(template="short"), scripted([0.9] * 9, prompts), 0)
    for name in "abcbca":
        judge(f"Snow fell on {name}.", RIVER).result()
    assert len(prompts) == 4
    assert [p.count("on a.") for p in prompts] == [1, 0, 0, 1]


def test_no_pair_is_taken_for_another():
    judge = ModelJudge(JudgeConfig(template="short"), scripted([0.9, 0.1]), 0)
    assert judge("fell at noon", "The snow ").result().value == 1
    assert judge("at noon", "The snow fell ").result().value == 0
    assert judge.row()["judge_asked"] == 2


def test_the_row_counts_each_verdict_once_and_starts_over():
    judge = ModelJudge(JudgeConfig(template="short"), scripted([0.9, 0.3, JudgeError("x"), JudgeError("x")]), 0)
    for candidate in ("Snow fell.", "Rain fell.", "Hail fell.", "Snow fell.", "", "Answer: yes", RIVER):
        judge(candidate, RIVER).result()
    row = judge.row()
    assert row.pop("judge_p_yes") == (pytest.approx(1.2), 2)
    wait_s, num_read = row.pop("judge_wait_s")
    assert wait_s > 0
    assert num_read == 3
    assert row == {"judge_asked": 3, "judge_decided": 3, "judge_cached": 1, "judge_failed": 1, "judge_given_up": 0}
    assert set(judge.row().values()) == {0, (0, 0)}


@pytest.mark.parametrize(
    ("flag", "match"),
    [
        ("--template=shorty", "did you mean 'short'"),
        ("--votes=0", "votes must be at least 1, got 0"),
        ("--retries=-1", "retries"),
        ("--combine=max", "'max'"),
    ],
)
def test_wrong_settings_are_named(flag, match):
    with pytest.raises(ValueError, match=match):
        config.load(JudgeConfig, [flag], prog="", description="")


def slow_ask(pool, rng):
    """P(yes) by the prompt alone, after a random delay; a first try often fails."""
    tried = set()

    def work(prompt, delay, fails):
        time.sleep(delay)
        if fails:
            raise JudgeError("reset")
        return hashlib.blake2b(prompt.encode()).digest()[0] / 255

    def ask(prompt):
        fails = prompt not in tried and rng.random() < 0.3
        tried.add(prompt)
        return pool.submit(work, prompt, rng.random() * 0.004, fails)

    return ask


def test_rewards_depend_neither_on_order_nor_on_the_number_of_workers():
    pairs = [(f"Snow fell on day {i % 17}.", f"{RIVER} {i % 3}") for i in range(60)]
    pairs += [("", RIVER), (RIVER, RIVER), ("Answer: yes", RIVER)]
    seen = []
    for round, workers in enumerate((1, 4, 16, 16)):
        rng = random.Random(round)
        order = rng.sample(range(len(pairs)), len(pairs))
        with ThreadPoolExecutor(workers) as pool:
            judge = ModelJudge(JudgeConfig(template="short", votes=3, retries=2), slow_ask(pool, rng), 7)
            pending = {i: judge(*pairs[i]) for i in order}
            verdicts = {i: pending[i].result() for i in rng.sample(order, len(order))}
        seen.append([(verdicts[i].value, verdicts[i].p_yes) for i in range(len(pairs))])
    assert seen[0] == seen[1] == seen[2] == seen[3]
    assert {value for value, _ in seen[0]} == {0, 1}
    assert (
        ModelJudge(JudgeConfig(template="short"), slow_ask(ThreadPoolExecutor(1), rng), 8)(*pairs[0]).result().p_yes
        != seen[0][0][1]
    )
