import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from thinkmid.data.pack import Reply, Unit, make_pack
from thinkmid.eval.config import EvalSampling
from thinkmid.kernels import attention, launch
from thinkmid.model import weights
from thinkmid.model.transformer import ModelConfig
from thinkmid.rollout.engine.native import NativeEngine, draw
from thinkmid.rollout.engine.protocol import Sampling, collect
from thinkmid.thoughts import CLOSE, OPEN
from thinkmid.tokenizer import Tokenizer, train_tokenizer
from thinkmid.train.loss import logprobs
from thinkmid.types import Prompt

SENTENCES = ["The sum of 3 and 4 is 7.", "Mia has 12 apples.", "<think> 12 - 5 = 7 </think> So 7 remain."]
LENGTHS = (1, 2, 7, 31, 33, 64)  # of prompts: no prefix at all, and around the steps of the cache


@pytest.fixture(scope="module", params=["added", "plain"])
def text(request, tmp_path_factory):
    return make_text(tmp_path_factory.mktemp("tokenizer"), request.param)


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """A vocabulary without an end: every sequence gets its full thought budget."""
    text = make_text(tmp_path_factory.mktemp("tokenizer"), "added")
    return replace(text, eos_ids=(), pieces=[b"."] * text.vocab_size)


@pytest.fixture(params=["csrc", "torch"])
def path(request, monkeypatch):
    """Decoding by csrc, and by the torch twin that a GPU runs."""
    if request.param == "torch":
        monkeypatch.setattr(launch, "has_cpp", lambda: False)


def make_text(folder, tags):
    train_tokenizer(SENTENCES, 280, folder, tags)
    return Tokenizer.load(folder)


def make_model(vocab, seed=0, scale=0.3):
    cfg = ModelConfig(
        kind="qwen3", vocab=vocab, width=16, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=24, rope_theta=100.0,
        norm_eps=1e-6, tied=False, max_positions=256, eos_ids=(0,),
    )  # fmt: skip
    model, rng = weights.build(cfg), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=rng) * scale + (1.0 if name.endswith("norm.weight") else 0.0))
    return model


def make_engine(text, seed=0, version=0):
    model = make_model(text.vocab_size, seed)
    engine = NativeEngine(model.cfg, text)
    engine.load_weights(weights.stream(model), version)
    return engine, model


def make_prompts(vocab, lengths=LENGTHS):
    rng = np.random.default_rng(0)
    return [Prompt(id=str(n), tokens=rng.integers(1, vocab, n).tolist()) for n in lengths]


def seeds(num_prompts, num_siblings):
    return [[100 * p + g for g in range(num_siblings)] for p in range(num_prompts)]


def tokens_P_G(groups):
    return [[s.tokens.tolist() for s in g.samples] for g in groups]


def scripted(text, scripts, sampling, num_siblings=1, prompt=(5, 6)):
    """Samples of an engine whose model is certain of the next token: scripts[p] in turn, then its last token again."""
    engine, _ = make_engine(text)

    def decode(cache, rows, families):
        logits = torch.zeros(rows.num, text.vocab_size)
        for row, (p, _) in enumerate(rows.owner):
            logits[row, scripts[p][min(int(rows._count[row]), len(scripts[p]) - 1)]] = 1e4
        return logits

    engine._decode = decode
    prompts = [Prompt(id=str(p), tokens=list(prompt)) for p in range(len(scripts))]
    groups = collect(engine, prompts, seeds(len(scripts), num_siblings), sampling)
    return [s for g in groups for s in g.samples]


def tag_end(text, tokens):
    """Tokens up to the one that completes the first tag, by decoding ever longer starts."""
    return next(n for n in range(1, len(tokens) + 1) if CLOSE in text.decode(tokens[:n]))


@pytest.mark.parametrize("max_batch", [4, 64])
def test_greedy_tokens_are_those_of_the_full_forward_loop(endless, path, max_batch):
    engine, model = make_engine(endless)
    prompts = make_prompts(endless.vocab_size)
    sampling = Sampling(temperature=0, max_think=40, max_batch=max_batch)
    groups = collect(engine, prompts, seeds(len(prompts), 2), sampling)
    for prompt, samples in zip(prompts, tokens_P_G(groups), strict=True):
        sequence = list(prompt.tokens)
        with torch.no_grad():
            for _ in range(40):
                sequence.append(int(model.logits(torch.tensor(sequence))[-1].argmax()))
        assert samples == [sequence[len(prompt.tokens) :]] * 2


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_reported_logprobs_are_the_trainers(endless, path, temperature):
    # one token in twelve is an end: rows finish at different times, and others take their places
    ragged = replace(endless, eos_ids=tuple(range(0, endless.vocab_size, 12)))
    engine, model = make_engine(ragged)
    prompts = make_prompts(endless.vocab_size)
    sampling = Sampling(temperature=temperature, max_think=37, max_batch=5)
    groups = collect(engine, prompts, seeds(len(prompts), 3), sampling)
    assert len({len(s.tokens) for g in groups for s in g.samples}) > 5
    units = [
        Unit(name=g.prompt.id, prefix=np.array(g.prompt.tokens), replies=[Reply.text(s.tokens, 1.0) for s in g.samples])
        for g in groups
    ]
    with torch.no_grad():
        expected = logprobs(model, make_pack(units), temperature)
    reported = np.concatenate([s.logp for g in groups for s in g.samples])
    np.testing.assert_allclose(reported, expected.numpy(), rtol=0, atol=1e-5)


def test_draws_do_not_depend_on_the_batch(text):
    engine, _ = make_engine(text)
    prompts = make_prompts(text.vocab_size)
    drawn = [
        tokens_P_G(collect(engine, prompts, seeds(len(prompts), 3), Sampling(max_think=24, max_suffix=4, max_batch=b)))
        for b in (1, 3, 64)
    ]
    assert drawn[0] == drawn[1] == drawn[2]


def test_draws_do_not_depend_on_the_order_of_prompts(text):
    engine, _ = make_engine(text)
    prompts, seeds_P_G = make_prompts(text.vocab_size), seeds(len(LENGTHS), 2)
    sampling = Sampling(max_think=24, max_suffix=4, max_batch=5)
    forward = tokens_P_G(collect(engine, prompts, seeds_P_G, sampling))
    assert tokens_P_G(collect(engine, prompts[::-1], seeds_P_G[::-1], sampling)) == forward[::-1]


def test_siblings_differ_by_their_seeds_and_by_nothing_else(endless):
    engine, _ = make_engine(endless)
    prompts = make_prompts(endless.vocab_size, [5])
    (samples,) = tokens_P_G(collect(engine, prompts, [[7, 8, 7]], Sampling(max_think=24)))
    assert samples[0] == samples[2] != samples[1]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_first_tokens_are_drawn_as_often_as_the_softmax_says(endless, temperature):
    engine, model = make_engine(endless)
    (prompt,) = make_prompts(endless.vocab_size, [9])
    sampling = Sampling(temperature=temperature, max_think=1, max_batch=4000)
    (group,) = collect(engine, [prompt], [list(range(4000))], sampling)
    with torch.no_grad():
        p = (model.logits(torch.tensor(prompt.tokens))[-1].double() / temperature).softmax(-1).numpy()
    seen = np.bincount([int(s.tokens[0]) for s in group.samples], minlength=len(p))
    assert fits(seen, p)


def test_the_second_draw_does_not_depend_on_the_first(endless):
    engine, _ = make_engine(endless)
    engine._decode = lambda cache, rows, families: torch.zeros(rows.num, 4)
    (group,) = collect(engine, [Prompt(id="", tokens=[1])], [list(range(4000))], Sampling(max_think=2, max_batch=4000))
    pairs = np.array([s.tokens for s in group.samples])
    assert fits(np.bincount(4 * pairs[:, 0] + pairs[:, 1], minlength=16), np.full(16, 1 / 16))


def fits(seen, p):
    """Chi-square, cells with few expected counts in one; four standard deviations above its mean are too much."""
    expected = p * seen.sum()
    big = expected >= 5
    seen, expected = (np.append(x[big], x[~big].sum()) for x in (seen, expected))
    seen, expected = seen[expected > 0], expected[expected > 0]
    num = len(seen) - 1
    return (((seen - expected) ** 2) / expected).sum() <= num + 4 * (2 * num) ** 0.5


LOGITS = torch.tensor([0.3, 2.0, -1.0, 1.1, 0.9, -3.0])


def draws(sampling, num=5000, logits=LOGITS):
    logp, token = draw(logits.expand(num, -1), np.random.default_rng(0).random(num), sampling)
    return logp[0], np.bincount(token.numpy(), minlength=len(logits))


def test_top_k_keeps_the_k_likeliest_in_their_proportions():
    logp, seen = draws(Sampling(top_k=3))
    p = np.exp(LOGITS.double().numpy()) * [0, 1, 0, 1, 1, 0]
    assert (seen > 0).tolist() == (p > 0).tolist()
    assert fits(seen, p / p.sum())
    torch.testing.assert_close(logp, LOGITS.log_softmax(-1))  # reported unfiltered


@pytest.mark.parametrize(("top_p", "kept"), [(0.01, [1]), (0.6, [1, 3]), (0.86, [1, 3, 4]), (1.0, [0, 1, 2, 3, 4, 5])])
def test_top_p_keeps_the_smallest_set_of_that_mass(top_p, kept):
    p = np.exp(LOGITS.double().numpy())
    p /= p.sum()
    by_mass = np.argsort(-p)
    assert sorted(by_mass[: int((np.cumsum(p[by_mass]) < top_p - 1e-12).sum()) + 1]) == kept  # what the table claims
    _, seen = draws(Sampling(top_p=top_p))
    assert np.flatnonzero(seen).tolist() == kept
    p = np.where(np.isin(np.arange(6), kept), p, 0.0)
    assert fits(seen, p / p.sum())


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.3), Sampling(top_p=0.9), Sampling(top_k=2)])
def test_a_token_of_probability_zero_is_never_drawn(sampling):
    edges = np.array([0.0, 2.0**-53, 0.5, 1 - 2.0**-53])
    for live in ([1], [2, 3], [1, 4]):
        logits = torch.full((len(edges), 6), -torch.inf)
        logits[:, live] = torch.tensor([0.1, 0.2])[: len(live)]
        _, token = draw(logits, edges, sampling)
        assert set(token.tolist()) <= set(live)


def test_a_thought_that_never_closes_ends_at_its_budget(text):
    (sample,) = scripted(text, [text.encode(" a")], Sampling(max_think=9, max_suffix=3))
    assert (sample.finish, len(sample.tokens), sample.num_think) == ("unclosed", 9, 9)


@pytest.mark.parametrize("max_suffix", [0, 1, 4])
def test_the_suffix_is_cut_after_n_tokens(text, max_suffix):
    script = text.encode("12 - 5 = 7</think> So 7 remain. Mia has 12 apples.")
    (sample,) = scripted(text, [script], Sampling(max_think=40, max_suffix=max_suffix))
    assert sample.num_think == tag_end(text, script)
    assert sample.tokens.tolist() == script[: sample.num_think + max_suffix]
    assert sample.finish == "suffix"
    assert sample.drawn.all()


def test_a_tag_spread_over_several_tokens_closes_the_thought(tmp_path):
    text = make_text(tmp_path, "plain")
    script = [*text.encode("7 <"), *(i for c in "/think" for i in text.encode(c)), *text.encode("> So 7")]
    assert len(script) > 8
    (sample,) = scripted(text, [script], Sampling(max_think=20, max_suffix=1))
    assert sample.num_think == tag_end(text, script)
    assert len(sample.tokens) == sample.num_think + 1


def test_a_tag_that_the_budget_cuts_is_no_tag(text):
    script = text.encode("7") * 5 + text.close_ids
    (sample,) = scripted(text, [script], Sampling(max_think=len(script) - 1))
    assert (sample.finish, len(sample.tokens)) == ("unclosed", len(script) - 1)
    (sample,) = scripted(text, [script], Sampling(max_think=len(script), max_suffix=0))
    assert (sample.finish, len(sample.tokens)) == ("suffix", len(script))


def test_a_second_tag_ends_the_sequence(text):
    script = [*text.encode("7"), *text.close_ids, *text.encode("8"), *text.close_ids, *text.encode(" So")]
    (sample,) = scripted(text, [script], Sampling(max_think=20, max_suffix=20))
    assert sample.finish == "reclosed"
    assert sample.tokens.tolist() == script[: -len(text.encode(" So"))]
    assert sample.num_think == tag_end(text, script)


@pytest.mark.parametrize("before", ["7", "7</think> So"])
def test_the_end_token_ends_thought_and_suffix(text, before):
    script = [*text.encode(before), text.eos_ids[0], *text.encode(" So 7 remain")]
    (sample,) = scripted(text, [script], Sampling(max_think=20, max_suffix=20))
    assert sample.finish == "eos"
    assert sample.tokens.tolist() == script[: len(text.encode(before)) + 1]
    assert sample.num_think == (tag_end(text, script) if CLOSE in before else len(sample.tokens))


def test_rows_of_one_batch_end_each_in_its_own_way(text):
    encode, end = text.encode, text.eos_ids[0]
    scripts = [encode("7"), encode("7</think> 8"), [*encode("7 8 9"), end], [*encode("7</think> 8</think>"), end]]
    sampling = Sampling(max_think=20, max_suffix=6, max_batch=3)
    samples = scripted(text, scripts, sampling, num_siblings=2)
    assert [s.finish for s in samples[::2]] == ["unclosed", "suffix", "eos", "reclosed"]
    assert [s.tokens.tolist() for s in samples[::2]] == [s.tokens.tolist() for s in samples[1::2]]
    assert samples[4].tokens.tolist() == scripts[2]


def test_a_forced_tag_carries_no_gradient_and_the_suffix_goes_on(text):
    close = len(text.close_ids)
    (sample,) = scripted(text, [text.encode("7")], Sampling(max_think=close + 4, max_suffix=3, force_close=True))
    assert sample.tokens.tolist() == [*text.encode("7") * 4, *text.close_ids, *text.encode("7") * 3]
    assert sample.drawn.tolist() == [True] * 4 + [False] * close + [True] * 3
    assert (sample.finish, sample.num_think) == ("suffix", close + 4)


def test_nothing_is_forced_on_a_thought_that_closes_in_time(text):
    script = [*text.close_ids, *text.encode("8") * 9]
    (sample,) = scripted(text, [script], Sampling(max_think=2 * len(text.close_ids), max_suffix=3, force_close=True))
    assert sample.drawn.all()
    assert sample.tokens.tolist() == script[: len(text.close_ids) + 3]


DIRECT = EvalSampling(max_think=9, max_suffix=4)


def spelled(text, words):
    """Ids one by one, a tag its own: as many tokens as there are letters and tags."""
    return [i for part in re.split("(</?think>)", words) for i in one_by_one(text, part)]


def one_by_one(text, part):
    tags = {OPEN: text.open_ids, CLOSE: text.close_ids}
    return tags.get(part) or [i for letter in part for i in text.encode(letter)]


@pytest.mark.parametrize("force_close", [False, True])
def test_a_sample_that_opens_no_thought_has_the_whole_budget(text, force_close):
    sampling = replace(DIRECT, force_close=force_close)
    (sample,) = scripted(text, [text.encode("7")], sampling)
    assert (sample.finish, len(sample.tokens), sample.drawn.all()) == ("suffix", 13, True)


def test_a_thought_that_a_prompt_or_the_sample_opens_has_the_budget_of_thoughts(text):
    open_, close = len(text.open_ids), len(text.close_ids)
    (sample,) = scripted(text, [text.encode("7")], DIRECT, prompt=[5, 6, *text.open_ids])
    assert (sample.finish, len(sample.tokens)) == ("unclosed", 9)
    sampling = replace(DIRECT, max_think=open_ + close + 5)
    (sample,) = scripted(text, [spelled(text, f"7{OPEN}8")], sampling)
    assert (sample.finish, len(sample.tokens)) == ("unclosed", sampling.max_think)
    (sample,) = scripted(text, [spelled(text, f"7{OPEN}8{CLOSE}9")], sampling)
    assert (sample.finish, len(sample.tokens)) == ("suffix", 2 + open_ + close + 4)
    (sample,) = scripted(text, [spelled(text, f"7{OPEN}8")], replace(sampling, force_close=True))
    assert (sample.finish, sample.num_think, len(sample.tokens)) == (
        "suffix", sampling.max_think, sampling.max_new,
    )  # fmt: skip


def test_after_prompts_that_open_a_thought_the_budget_of_others_changes_nothing(text):
    engine, _ = make_engine(text)
    prompts = [Prompt(id=p.id, tokens=p.tokens + text.open_ids) for p in make_prompts(text.vocab_size)]
    budgets = {"temperature": 1.0, "top_p": 1.0, "max_think": 24, "max_suffix": 5}
    drawn = [collect(engine, prompts, seeds(len(prompts), 8), kind(**budgets)) for kind in (Sampling, EvalSampling)]
    assert tokens_P_G(drawn[0]) == tokens_P_G(drawn[1])
    ends = [[s.finish for g in groups for s in g.samples] for groups in drawn]
    assert ends[0] == ends[1]
    assert len({*ends[0]}) > 1


def test_no_sample_exceeds_both_budgets_together(text):
    for words in (f"777777777{OPEN}8", f"77777777777{CLOSE}8", f"777777777{CLOSE}{OPEN}8", f"7{CLOSE}{OPEN}8"):
        sampling = replace(DIRECT, max_think=10 * len(text.close_ids))
        (sample,) = scripted(text, [spelled(text, words)], sampling)
        assert len(sample.tokens) <= sampling.max_new
        assert sample.finish in ("suffix", "unclosed")


def test_each_prefix_is_prefilled_once_even_with_refill(endless):
    engine, _ = make_engine(endless)
    prompts, prefilled = make_prompts(endless.vocab_size), []
    inner = engine._prefill

    def prefill(batch, prefixes):
        prefilled.extend(p for p, _ in batch)
        return inner(batch, prefixes)

    engine._prefill = prefill
    collect(engine, prompts, seeds(len(prompts), 5), Sampling(max_think=3, max_batch=3))
    assert sorted(prefilled) == [p for p, prompt in enumerate(prompts) if len(prompt.tokens) > 1]


def test_a_stop_leaves_the_generation_incomplete(endless):
    engine, _ = make_engine(endless)
    asked = []

    def stop():
        asked.append(1)
        return len(asked) > 5

    assert collect(engine, make_prompts(endless.vocab_size), seeds(6, 2), Sampling(max_think=9), stop) is None
    assert len(asked) == 6


def test_new_weights_take_effect_in_place(endless):
    engine, _ = make_engine(endless, seed=0, version=3)
    prompts, sampling = make_prompts(endless.vocab_size), Sampling(temperature=0, max_think=8)
    held = [t.data_ptr() for _, t in engine.named_weights()]
    before = collect(engine, prompts, seeds(6, 1), sampling)
    engine.load_weights(weights.stream(make_model(endless.vocab_size, seed=1)), 4)
    after = collect(engine, prompts, seeds(6, 1), sampling)
    fresh = collect(make_engine(endless, seed=1)[0], prompts, seeds(6, 1), sampling)
    assert tokens_P_G(after) == tokens_P_G(fresh) != tokens_P_G(before)
    assert [t.data_ptr() for _, t in engine.named_weights()] == held
    assert {s.version for g in before for s in g.samples} == {3}
    assert {s.version for g in after for s in g.samples} == {4}


def test_what_is_appended_to_a_running_generation_is_drawn_as_if_it_had_been_there(endless, path):
    ragged = replace(endless, eos_ids=tuple(range(0, endless.vocab_size, 12)))
    engine, _ = make_engine(ragged)
    sampling = Sampling(max_think=37, max_batch=5)
    prompts, seeds_P_G = make_prompts(endless.vocab_size, (1, 2, 7, 31, 5, 33, 64, 70, 3, 64, 1)), seeds(11, 2)
    whole = tokens_P_G(collect(engine, prompts, seeds_P_G, sampling))
    now, now_seeds, found = prompts[:2], seeds_P_G[:2], {}
    for p, g, sample in engine.generate(now, now_seeds, sampling):
        found[p, g] = sample.tokens.tolist()
        if len(found) % 2 == 0 and len(now) < len(prompts):  # longer prefixes than those at the start, and more
            now.append(prompts[len(now)])
            now_seeds.append(seeds_P_G[len(now_seeds)])
    assert found == {(p, g): tokens for p, group in enumerate(whole) for g, tokens in enumerate(group)}


def test_a_sync_that_brings_too_little_is_an_error(endless):
    model = make_model(endless.vocab_size)
    engine = NativeEngine(model.cfg, endless)
    some = [(name, t) for name, t in weights.stream(model) if not name.endswith("layers.1.mlp.up_proj.weight")]
    with pytest.raises(RuntimeError, match=r"model\.layers\.1\.mlp\.up_proj"):
        engine.load_weights(some, 0)
    with pytest.raises(RuntimeError, match="no weights"):  # half a sync is none
        next(engine.generate([Prompt(id="", tokens=[1])], [[0]], Sampling()))


def test_the_consumer_of_a_running_generation_may_train(endless):
    engine, _ = make_engine(endless)
    for _ in engine.generate(make_prompts(endless.vocab_size), seeds(6, 1), Sampling(max_think=2)):
        assert not torch.is_inference_mode_enabled()


def test_lengths_are_worked_out_once_for_all_layers(endless, monkeypatch):
    engine, model = make_engine(endless)
    plans, plan = [], attention._plan
    monkeypatch.setattr(attention, "_plan", lambda *given: plans.append(given) or plan(*given))
    answers = [engine.ask(prompt.tokens, (3, 4)) for prompt in make_prompts(endless.vocab_size)]
    engine.drain()
    assert len(plans) == 1
    collect(engine, make_prompts(endless.vocab_size), seeds(len(LENGTHS), 2), Sampling(max_think=1))
    assert len(plans) == 2
    monkeypatch.undo()
    for answer, prompt in zip(answers, make_prompts(endless.vocab_size), strict=True):
        with torch.no_grad():
            logits = model.logits(torch.tensor(prompt.tokens))[-1]
        assert answer.result() == pytest.approx((logits[3] - logits[4]).sigmoid().item(), rel=1e-4)
