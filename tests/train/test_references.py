from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import TINY, assert_same, join_ranks, random_model, spawn
from world import TEXTS

from thinkmid.data.pack import Reply, Unit, make_pack, plan
from thinkmid.run.ranks import Ranks
from thinkmid.tokenizer import Tokenizer, train_tokenizer
from thinkmid.train import advantage, fsdp
from thinkmid.train.config import LossConfig
from thinkmid.train.loss import policy_loss, text_loss
from thinkmid.train.references import begins_true, next_token_units
from thinkmid.types import Group, Prompt, Sample

ALONE = Ranks(0, 1, torch.device("cpu"), None)
LOSS = LossConfig(denom=3.0, next_token=0.25)
MAX_SUFFIX = 6
# prefix, reference, rewards: a group alive, a document that begins with a thought, a dead group, the first one again,
# a reference of one token after nothing
WORLD = [
    ("Ana has 3 coins.", " So there are 5 coins.", [1, 0, 0]),
    ("", "Ben finds 2 more.", [0, 1, 0]),
    ("Cleo has 2 coins. Dan", " finds 1 more. So there are 3 coins.", [0, 0, 0]),
    ("Ana has 3 coins.", " So there are 5 coins.", [0, 0.25, -1]),
    ("", " ", [1, 0, 1]),
]


def make_text(folder, tags="plain") -> Tokenizer:
    train_tokenizer(TEXTS, 300, folder, tags)
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return make_text(tmp_path_factory.mktemp("text"))


def groups_of(text, world=WORLD, seed=0) -> list[Group]:
    rng = np.random.default_rng(seed)

    def sample():
        n = int(rng.integers(1, 7))
        return Sample(
            tokens=rng.integers(0, text.vocab_size, n).astype(np.int32), logp=rng.normal(-4, 1, n).astype(np.float32),
            drawn=rng.random(n) < 0.8, finish="suffix", num_think=n, versions=np.zeros(n, np.int32),
        )  # fmt: skip

    groups = []
    for prefix, reference, rewards in world:
        tokens = [*text.encode(prefix), *text.open_ids]
        prompt = Prompt(id=f"{prefix}|{reference}", tokens=tokens, meta={"reference": reference})
        groups.append(Group(prompt=prompt, samples=[sample() for _ in rewards], rewards=rewards))
    return groups


def policy_units(groups):
    return advantage.units(groups, LOSS, 3)


def gradients(model, units, loss_fn, capacity=10_000, ranks=ALONE):
    """(gradient of each parameter, summed metrics), over packs."""
    model.zero_grad(set_to_none=True)
    sums = {}
    for batch in plan(units, capacity=capacity, ranks=ranks.world, pair_cost=0.0)[ranks.rank]:
        loss, more = loss_fn(model, make_pack(batch))
        loss.backward()
        more.pop("gap_max", None)  # no sum
        for name, value in (more | {"loss": loss.detach()}).items():
            sums[name] = sums.get(name, 0) + value.double()
    whole = {n: getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for n, p in model.named_parameters()}
    return whole, ranks.sum(sums)


def joined_gradients(model, text, capacity=10_000, ranks=ALONE):
    groups = groups_of(text)
    units = next_token_units(policy_units(groups), groups, text, MAX_SUFFIX, LOSS.next_token)
    return gradients(model, units, partial(policy_loss, cfg=LOSS, temperature=1.0, first_update=True), capacity, ranks)


def separate_gradients(model, text):
    """The policy's own, and those of next-token loss over raw sequences as SFT packs them."""
    groups = groups_of(text)
    cfg = replace(LOSS, next_token=0.0)
    policy = partial(policy_loss, cfg=cfg, temperature=1.0, first_update=True)
    ours, sums = gradients(model, policy_units(groups), policy)
    sequences = [(text.encode(prefix), text.encode(reference)[:MAX_SUFFIX]) for prefix, reference, _ in WORLD]
    num = sum(len(suffix) - (not raw) for raw, suffix in sequences)
    units = []
    for raw, suffix in sequences:
        tokens = np.array([*raw, *suffix])
        weights = (np.arange(1, len(tokens)) >= len(raw)) * (LOSS.next_token / num)
        if len(tokens) > 1:
            units.append(Unit(name="raw", prefix=tokens[:1], replies=[Reply.text(tokens[1:], weights)]))
    theirs, text_sums = gradients(model, units, text_loss)
    sums["loss"] += text_sums["loss"]
    sums["next_token"] = text_sums["loss"] / LOSS.next_token
    return {name: ours[name] + theirs[name] for name in ours}, sums


@pytest.mark.parametrize("capacity", [10_000, 60])
def test_next_token_loss_beside_the_policys_gives_the_sum_of_both_gradients(text, capacity):
    model = random_model(replace(TINY, vocab=text.vocab_size), dtype=torch.float64)
    want, sums = separate_gradients(model, text)
    found, joined = joined_gradients(model, text, capacity)
    for name, gradient in want.items():  # weights of rows are fp32, and cut differently here and there
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6, msg=name)
    assert joined == pytest.approx(sums, rel=1e-6)
    again, _ = joined_gradients(model, text, 10_000)
    assert_same(found, again)


def test_raw_text_is_stored_once_for_samples_and_true_suffix(text):
    groups = groups_of(text, WORLD[:1])
    (unit,) = next_token_units(policy_units(groups), groups, text, MAX_SUFFIX, 1.0)
    pack = make_pack([unit])
    raw = text.encode(WORLD[0][0])
    assert pack.tokens[: len(raw)].tolist() == raw
    assert len(pack.tokens) == len(raw) + sum(len(text.open_ids) + len(s.tokens) - 1 for s in groups[0].samples) + 5
    assert pack.positions.max() == len(raw) + len(text.open_ids) + max(len(s.tokens) for s in groups[0].samples) - 2
    assert (pack.ce_w != 0).sum() == MAX_SUFFIX


def test_dead_groups_forward_their_suffix_and_no_sample(text):
    groups = groups_of(text, WORLD[2:3])
    assert policy_units(groups) == []
    (unit,) = next_token_units([], groups, text, MAX_SUFFIX, 1.0)
    assert unit.prefix.tolist() == text.encode(WORLD[2][0])
    assert [r.tokens.tolist() for r in unit.replies] == [text.encode(WORLD[2][1])[:MAX_SUFFIX]]


def two_ranks_worker(rank, folder):
    ranks = join_ranks(rank, 2, folder)
    text = Tokenizer.load(folder)
    model = random_model(replace(TINY, vocab=text.vocab_size), dtype=torch.float64)
    want, sums = joined_gradients(model, text)
    sharded = fsdp.shard(random_model(model.cfg, dtype=torch.float64), ranks, compute_dtype=torch.float64)
    found, together = joined_gradients(sharded, text, capacity=60, ranks=ranks)
    assert_same(found, want)
    assert together == pytest.approx(sums)


def test_two_ranks_give_the_gradient_of_one(tmp_path):
    make_text(tmp_path)
    spawn(two_ranks_worker, 2, str(tmp_path))


@pytest.mark.parametrize(
    ("pieces", "reference", "num", "is_true"),
    [
        (["2 + 3", "</think>", " So", " there"], [" So", " there", " are"], 1, True),
        (["2 + 3", "</think>", " So", " there"], [" So", " there", " are"], 3, False),
        (["", "</think>", " So", " there", " is"], [" So", " there", " are"], 2, True),
        (["", "</think>", " S", "o", " not"], [" So", " there"], 1, True),  # other tokens, the same bytes
        (["", "</think>", " 12"], [" 1", "."], 1, False),  # " 1" ends inside a token that says another number
        (["", "</think>", " 12"], [" 1", "2", "."], 1, True),
        (["", "</think>", " 12"], [" 1", "2", "."], 3, False),
        (["", "</think>", " 12."], [" 1", "2", "."], 3, True),
        (["", "</think>", " Yes", "\n"], [" Yes"], 4, True),  # the reference is shorter than what is asked
        (["", "</think>", " Y"], [" Yes"], 4, False),
        (["", "</th", "ink> So", " not"], [" So", " there"], 1, True),  # the tag shares a token with the text
        (["", "</think>"], [" So"], 1, False),
        ([" So"], [" So"], 1, False),
        (["", "</think>", " So", "</think>"], [" So"], 1, False),
    ],
)
def test_a_continuation_begins_true_where_bytes_agree_up_to_an_end_of_tokens_in_both(pieces, reference, num, is_true):
    words = [piece.encode() for piece in dict.fromkeys([*pieces, *reference])]
    text = type("AnyTokenizer", (), {"pieces": words})
    ids = [words.index(piece.encode()) for piece in pieces]
    ids += [len(words) + 7]  # an id past the vocabulary adds nothing
    zeros = np.zeros(len(ids), np.float32)
    sample = Sample(
        tokens=np.array(ids),
        logp=zeros,
        drawn=zeros == 0,
        finish="suffix",
        num_think=2,
        versions=zeros.astype(np.int32),
    )
    assert begins_true(sample, [words.index(piece.encode()) for piece in reference], text, num) == is_true
