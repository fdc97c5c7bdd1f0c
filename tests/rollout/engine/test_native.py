import itertools
import re
from dataclasses import replace

import numpy as np
import pytest
import tokenizers
import torch

from benchmarks.common import collect
from thinkmid.data.pack import Reply, Unit, make_pack
from thinkmid.eval.config import EvalSampling
from thinkmid.kernels import attention, launch
from thinkmid.model import weights
from thinkmid.model.transformer import ModelConfig, Yarn
from thinkmid.rollout.engine.native import NativeEngine, draw
from thinkmid.rollout.engine.protocol import Sampling, requests_of
from thinkmid.thoughts import CLOSE, OPEN, before_stop
from thinkmid.tokenizer import Tokenizer, train_tokenizer
from thinkmid.train.loss import logprobs
from thinkmid.types import Prompt, Request, Written

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


def make_model(vocab, seed=0, scale=0.3, **family):
    cfg = ModelConfig(
        kind="qwen3", vocab=vocab, width=16, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=24, rope_theta=100.0,
        norm_eps=1e-6, tied=False, max_positions=256, eos_ids=(0,),
    )  # fmt: skip
    cfg = replace(cfg, **family)
    model, rng = weights.build(cfg), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=rng) * scale + (1.0 if name.endswith("norm.weight") else 0.0))
    return model


def make_engine(text, seed=0, version=0, **family):
    model = make_model(text.vocab_size, seed, **family)
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


def scripted(text, scripts, sampling, num_siblings=1, prompt=(5, 6), written=None):
    """Samples of an engine whose model is certain of the next token: scripts[p] in turn, then its last token again."""
    engine, _ = make_engine(text)

    def decode(cache, rows, families):
        logits = torch.zeros(rows.num, text.vocab_size)
        for row, request in enumerate(rows.requests):
            script = scripts[request.key[0]]
            logits[row, script[min(int(rows.column("count")[row]), len(script) - 1)]] = 1e4
        return logits

    engine._decode = decode
    prompts = [Prompt(id=str(p), tokens=list(prompt)) for p in range(len(scripts))]
    requests = requests_of(prompts, seeds(len(scripts), num_siblings))
    drawn = drawn_from(engine, [replace(r, written=written) for r in requests], sampling)
    return [drawn[r.key] for r in requests]


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


# windows that forget a prompt at once, or after some tokens, or never one of the shorter ones
FAMILIES = {
    "mistral": {"kind": "mistral", "window": 5, "windowed_layers": (0, 1)},
    "smollm3": {"kind": "smollm3", "tied": True, "no_rope_layers": (1,)},
    "smollm3-windowed": {"kind": "smollm3", "window": 17, "windowed_layers": (1,), "no_rope_layers": (1,)},
    "olmo2": {"kind": "olmo2", "kv_heads": 1},
    "olmo3": {
        "kind": "olmo3", "window": 40, "windowed_layers": (0,),
        "rope_scaling": Yarn(factor=4.0, attention_factor=1.2, original_max_positions=32),
    },
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_of_every_family_are_those_of_the_full_forward_loop(endless, path, family):
    engine, model = make_engine(endless, **FAMILIES[family])
    prompts = make_prompts(endless.vocab_size)
    groups = collect(engine, prompts, seeds(len(prompts), 2), Sampling(temperature=0, max_think=40, max_batch=7))
    for prompt, samples in zip(prompts, tokens_P_G(groups), strict=True):
        tokens = torch.tensor([*prompt.tokens, *samples[0]])
        with torch.no_grad():  # each token is the likeliest after what stands before it: the loop, by induction
            likeliest = model.logits(tokens)[len(prompt.tokens) - 1 : -1].argmax(-1).tolist()
        assert samples == [likeliest] * 2


@pytest.mark.parametrize("family", [{}, *FAMILIES.values()], ids=["qwen3", *FAMILIES])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_reported_logprobs_are_the_trainers(endless, path, temperature, family):
    # one token in twelve is an end: rows finish at different times, and others take their places
    ragged = replace(endless, eos_ids=tuple(range(0, endless.vocab_size, 12)))
    engine, model = make_engine(ragged, **family)
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
    np.testing.assert_allclose(reported, expected.numpy(), rtol=0, atol=2e-5 if family else 1e-5)


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


STOP = "\n\nProblem:"
NEXT = f" It is 18.{STOP} 7?"


def stop_end(text, tokens, stop=STOP):
    """Tokens up to the one that completes the last stop text, by decoding ever longer starts."""
    decoded = [text.decode(tokens[:n]) for n in range(len(tokens) + 1)]
    return next(n for n, written in enumerate(decoded) if written.count(stop) == decoded[-1].count(stop))


@pytest.mark.parametrize(
    ("opened", "words"),
    [
        (True, f"7{CLOSE}{NEXT}"),
        (True, f"7{STOP} 8{CLOSE}{NEXT}"),  # one inside the thought does not count
        (False, NEXT),
        (False, f" So{OPEN}7{STOP}{CLOSE}{NEXT}"),
        (False, f"7{CLOSE}{NEXT}"),
    ],
)
@pytest.mark.parametrize("sampling", [Sampling(max_think=60, max_suffix=60), EvalSampling(max_think=60, max_suffix=60)])
@pytest.mark.parametrize("letters", [False, True])
def test_a_sample_ends_with_the_token_that_completes_a_stop_text_outside_its_thought(
    text, opened, words, sampling, letters
):
    script = spelled(text, words) if letters else text.encode(words)
    prompt = [5, 6, *(text.open_ids if opened else [])]
    (sample,) = scripted(text, [script], replace(sampling, stop=("Mia", STOP)), prompt=prompt)
    n = stop_end(text, script)
    assert n < len(script)
    assert (sample.finish, sample.tokens.tolist(), sample.drawn.all()) == ("stop", script[:n], True)
    assert sample.num_think == (tag_end(text, script) if CLOSE in words else n)


def test_a_stop_text_may_end_inside_a_token_and_begin_in_the_one_that_closes_the_thought():
    pieces = [b"", b"x</", b"thi", b"nk>\n", b"\nPro", b"b: 7", b"<think>", b"</think>", b"\n\nProb: "]
    letters = [bytes([byte]) for byte in range(256)]
    tokenizer = Tokenizer(
        tokenizer=tokenizers.Tokenizer(tokenizers.models.BPE()),
        pieces=[*pieces, *letters],
        eos_ids=(0,),
        bos_id=None,
        open_ids=[6],
        close_ids=[7],
    )
    sampling = Sampling(max_think=9, max_suffix=9, stop=("\n\nProb:",))
    (sample,) = scripted(tokenizer, [[1, 2, 3, 4, 5, 1]], sampling, prompt=[9, 6])
    assert (sample.finish, sample.num_think, sample.tokens.tolist()) == ("stop", 3, [1, 2, 3, 4, 5])
    # the whole of it inside the thought
    (sample,) = scripted(tokenizer, [[8, 1, 2, 3, 4, 1]], sampling, prompt=[9, 6])
    assert (sample.finish, sample.num_think) == ("suffix", 4)


def test_how_a_sample_ends_that_has_a_stop_text_with_its_last_token(text):
    """Of several reasons: a stop text is no budget that ran out; the end token after it is not drawn any more."""
    script = [*text.close_ids, *text.encode(" 8 7"), text.eos_ids[0]]
    full = len(script) - 1 - len(text.close_ids)
    for stop, max_suffix, finish, n in (
        (" 8 7", 9, "stop", -1), (" 8 7", full, "stop", -1), ("9", full, "suffix", -1), ("9", 9, "eos", None),
    ):  # fmt: skip
        (sample,) = scripted(text, [script], Sampling(max_think=9, max_suffix=max_suffix, stop=(stop,)))
        assert (sample.finish, sample.tokens.tolist()) == (finish, script[:n])
    (sample,) = scripted(text, [text.encode(" 8 7")], Sampling(max_think=len(text.encode(" 8 7")), stop=(" 8 7",)))
    assert sample.finish == "stop"


def test_a_forced_tag_ends_the_thought_for_stop_texts_too(text):
    close = len(text.close_ids)
    sampling = Sampling(max_think=close + 4, max_suffix=9, force_close=True, stop=("77",))
    (sample,) = scripted(text, [text.encode("7")], sampling, prompt=[5, *text.open_ids])
    assert (sample.finish, sample.num_think, len(sample.tokens)) == ("stop", close + 4, close + 6)


def test_a_stop_text_that_never_comes_changes_no_bit(text):
    engine, _ = make_engine(text)
    prompts = make_prompts(text.vocab_size)
    sampling = Sampling(max_think=24, max_suffix=9)
    without, beside = (
        collect(engine, prompts, seeds(len(prompts), 8), replace(sampling, stop=stop)) for stop in ((), (STOP,))
    )
    pairs = [(a, b) for g, h in zip(without, beside, strict=True) for a, b in zip(g.samples, h.samples, strict=True)]
    assert all(same(a, b) for a, b in pairs)
    # and one that comes changes nothing before it
    stopped = collect(engine, prompts, seeds(len(prompts), 8), replace(sampling, stop=("i", ".")))
    ends = []
    for a, b in zip((a for a, _ in pairs), (s for g in stopped for s in g.samples), strict=True):
        assert b.tokens.tolist() == a.tokens[: len(b.tokens)].tolist()
        written = text.decode(b.tokens)
        assert (b.finish == "stop") == (before_stop(written, ["i", "."]) != written)
        ends.append(b.finish)
    assert 5 < ends.count("stop") < len(ends)


@pytest.mark.parametrize(
    ("stop", "line"),
    [
        (("",), "stop holds '': a stop text has at least one character"),
        (("a", "b</think>"), "stop holds 'b</think>': a stop text has at least one character, and no think tag"),
        (("\\n\\nQ:",), "a backslash and an n, no line break; in a flag: '[\"\\n\"]'"),
        (("é" * 64, "x" * 129), "stop holds 257 bytes; at most 256"),
    ],
)
def test_a_stop_text_that_can_stop_nothing_is_refused(stop, line):
    with pytest.raises(ValueError, match=re.escape(line)):
        Sampling(stop=stop)


def test_each_prefix_is_prefilled_once_even_with_refill(endless):
    engine, _ = make_engine(endless)
    prompts, prefilled = make_prompts(endless.vocab_size), []
    inner = engine._prefill

    def prefill(batch, prefixes):
        prefilled.extend(tokens for _, tokens in batch)
        return inner(batch, prefixes)

    engine._prefill = prefill
    collect(engine, prompts, seeds(len(prompts), 5), Sampling(max_think=3, max_batch=3))
    assert prefilled == [prompt.tokens[:-1] for prompt in prompts if len(prompt.tokens) > 1]


def drawn_from(engine, requests, sampling):
    return {request.key: sample for step in engine.generate(requests, sampling) for request, sample in step}


def test_a_generation_that_is_left_takes_no_further_step(endless):
    engine, _ = make_engine(endless)
    steps, decode = [], engine._decode
    engine._decode = lambda *given: steps.append(1) or decode(*given)
    for number, _ in enumerate(engine.generate(requests_of(make_prompts(280), seeds(6, 2)), Sampling(max_think=9)), 1):
        if number == 5:
            break
    assert len(steps) == 5


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
    assert {v for g in before for s in g.samples for v in s.versions.tolist()} == {3}
    assert {v for g in after for s in g.samples for v in s.versions.tolist()} == {4}


def test_what_comes_during_a_generation_is_drawn_as_if_it_had_been_there(endless, path):
    ragged = replace(endless, eos_ids=tuple(range(0, endless.vocab_size, 12)))
    engine, _ = make_engine(ragged)
    sampling = Sampling(max_think=37, max_batch=5)
    prompts, seeds_P_G = make_prompts(endless.vocab_size, (1, 2, 7, 31, 5, 33, 64, 70, 3, 64, 1)), seeds(11, 2)
    whole = tokens_P_G(collect(engine, prompts, seeds_P_G, sampling))
    requests, found, pulled = requests_of(prompts, seeds_P_G), {}, []

    def come():
        for number, request in enumerate(requests):
            # longer prefixes than those at the start, and more; nothing to ask until half as many have ended
            while number > 4 and len(found) < number // 2:
                yield None
            pulled.append(len(found))
            yield request

    for step in engine.generate(come(), sampling):
        found |= {request.key: sample.tokens.tolist() for request, sample in step}
    assert found == {(p, g): tokens for p, group in enumerate(whole) for g, tokens in enumerate(group)}
    assert pulled[-1] >= 10


def test_requests_are_pulled_as_places_become_free_and_one_ahead(endless):
    engine, _ = make_engine(endless)
    pulled, done = [], 0

    def endlessly():
        for number in itertools.count():
            pulled.append(number)
            yield Request(prompt=Prompt(id=str(number), tokens=[1 + number % 9]), seed=number)

    for step in engine.generate(endlessly(), Sampling(max_think=3, max_batch=4)):
        done += len(step)
        assert len(pulled) == done - len(step) + 5
        if done > 40:
            break


CUTS = {  # how a sequence ends, and what is cut through: a tag of several tokens, the thought's budget, a forced tag
    "tag": ("7</think> So 7 remain.", {"max_think": 40, "max_suffix": 4}),
    "budget": ("7 8 9 10 11 12 13 14 15", {"max_think": 6, "max_suffix": 3}),
    "forced": ("7 8 9 10 11 12 13 14 15", {"max_think": 16, "max_suffix": 4, "force_close": True}),
    "direct": ("7 8 9 10 11 12 13 14 15", {"max_think": 8, "max_suffix": 4}),
    "stop": (f"7</think> So{STOP} 7 remain.", {"max_think": 40, "max_suffix": 40, "stop": (STOP,)}),
}


@pytest.mark.parametrize("what", CUTS)
def test_a_sequence_cut_anywhere_ends_as_one_that_was_not(text, what):
    words, budgets = CUTS[what]
    sampling = (EvalSampling if what == "direct" else Sampling)(temperature=1.0, top_p=1.0, **budgets)
    script = text.encode(words)
    (whole,) = scripted(text, [script], sampling)
    n = len(whole.tokens)
    assert whole.finish == {"budget": "unclosed", "stop": "stop"}.get(what, "suffix")
    assert whole.drawn.all() == (what != "forced")
    for k in range(1, n):
        (sample,) = scripted(text, [script], sampling, written=cut(whole, k, version=-5))
        assert same(sample, whole)
        assert sample.versions.tolist() == [-5] * k + [0] * (n - k)


def cut(sample, k, version):
    streams = {name: getattr(sample, name)[:k] for name in ("tokens", "logp", "drawn")}
    return Written(**streams, versions=np.full(k, version, np.int32))


def same(a, b):
    """All but the versions, floats by their bits."""
    streams = [[getattr(s, name).tobytes() for name in ("tokens", "logp", "drawn")] for s in (a, b)]
    return streams[0] == streams[1] and (a.finish, a.num_think) == (b.finish, b.num_think)


@pytest.mark.parametrize("force_close", [False, True])
@pytest.mark.parametrize("after", [1, 7, 30, 39, 45])
def test_what_is_interrupted_and_continued_is_what_is_not_interrupted_bit_by_bit(text, path, after, force_close):
    engine, _ = make_engine(text, version=3)
    sampling = Sampling(max_think=40, max_suffix=9, force_close=force_close)
    requests = requests_of(make_prompts(text.vocab_size), seeds(len(LENGTHS), 3))
    whole = drawn_from(engine, requests, sampling)
    first = {}
    for number, step in enumerate(engine.generate(requests, sampling), 1):
        first |= {request.key: sample for request, sample in step}
        if number == after:
            break
    left = engine.unfinished()
    assert {r.key for r in left} == {r.key for r in requests} - first.keys()
    assert all(len(r.written.tokens) == after for r in left)
    engine.version = 4  # the same weights under another number
    rest = drawn_from(engine, left, sampling)
    together = first | rest
    assert together.keys() == whole.keys()
    # the same rows in the same order, until the first one ends: a matrix product's bits depend on its number of rows
    exact = same if len(left) == len(requests) else close
    assert all(exact(together[key], whole[key]) for key in whole)
    for sample in rest.values():
        assert sample.versions.tolist() == [3] * after + [4] * (len(sample.tokens) - after)


def close(a, b):
    np.testing.assert_allclose(a.logp, b.logp, rtol=0, atol=1e-5)
    return same(a, replace(b, logp=a.logp))


def test_a_generation_that_is_left_hands_back_all_that_it_pulled(endless):
    engine, _ = make_engine(endless)
    requests, sampling = requests_of(make_prompts(endless.vocab_size), seeds(6, 2)), Sampling(max_think=9, max_batch=4)
    source = iter(requests)
    assert engine.unfinished() == []
    next(engine.generate(source, sampling))
    left = engine.unfinished()
    assert [r.key for r in [*left, *source]] == [r.key for r in requests]
    assert [len(r.written.tokens) if r.written else 0 for r in left] == [1] * 4 + [0]
    # left once more, before what it brought is replayed
    carried = [
        replace(r, written=Written(**{n: np.repeat(x, 5) for n, x in vars(r.written).items()})) for r in left[:4]
    ]
    next(engine.generate(carried, sampling))
    assert [len(r.written.tokens) for r in engine.unfinished()] == [5] * 4
    assert drawn_from(engine, requests, sampling).keys() == {r.key for r in requests}
    assert engine.unfinished() == []


def test_a_sync_that_brings_too_little_is_an_error(endless):
    model = make_model(endless.vocab_size)
    engine = NativeEngine(model.cfg, endless)
    some = [(name, t) for name, t in weights.stream(model) if not name.endswith("layers.1.mlp.up_proj.weight")]
    with pytest.raises(RuntimeError, match=r"model\.layers\.1\.mlp\.up_proj"):
        engine.load_weights(some, 0)
    with pytest.raises(RuntimeError, match="no weights"):  # half a sync is none
        next(engine.generate([Request(prompt=Prompt(id="", tokens=[1]), seed=0)], Sampling()))


def test_the_consumer_of_a_running_generation_may_train(endless):
    engine, _ = make_engine(endless)
    requests = requests_of(make_prompts(endless.vocab_size), seeds(6, 1))

    def given():
        for request in requests:
            assert not torch.is_inference_mode_enabled()
            yield request

    for _ in engine.generate(given(), Sampling(max_think=2)):
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
