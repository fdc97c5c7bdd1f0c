"""Adapters: gradients against merged weights, the stream, the seed, and what peft makes of an export."""

from dataclasses import replace

import pytest
import torch
from conftest import TINY, assert_no_worse, assert_same, join_ranks, random_groups, random_model, spawn

from thinkmid.data.pack import duplicated, make_pack
from thinkmid.kernels import head
from thinkmid.model import adapters, lora, weights
from thinkmid.model.init import ModelSection
from thinkmid.model.transformer import Transformer
from thinkmid.train import advantage, fsdp, optim
from thinkmid.train.config import LossConfig
from thinkmid.train.loss import logprobs, policy_loss

SECTION = ModelSection(lora_rank=3, lora_alpha=5.0)
SCALE = 5 / 3
LOSS = LossConfig(denom=3.0, next_token=0.5)
GROUPS = random_groups([[1, 0, 0, 1], [0, 1, 0, 0], [1, 1, 0, 1]], seed=4)
SOME = ("k_proj", "down_proj")


def adapted_model(cfg=TINY, section=SECTION, dtype=torch.float64, **flags):
    """A random model with random adapters, both factors far from zero."""
    model = random_model(cfg, dtype=dtype, **flags)
    lora.attach(model, section)
    rng = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for module in lora.adapted(model).values():
            for factor in (module.lora_a, module.lora_b):
                factor.copy_(torch.randn(factor.shape, generator=rng, dtype=torch.float64) * 0.2)
    return model


def merged_by_hand(model, section=SECTION):
    """The same function as a plain model, every weight of it trained."""
    plain, given = Transformer(model.cfg).to(next(model.parameters()).dtype), dict(model.named_parameters())
    with torch.no_grad():
        for name, p in plain.named_parameters():
            p.copy_(given[name])
            if f"{name.removesuffix('.weight')}.lora_a" in given:
                path = name.removesuffix(".weight")
                a, b = (given[f"{path}.{factor}"].double() for factor in ("lora_a", "lora_b"))
                p += section.lora_alpha / section.lora_rank * torch.einsum("or,ri->oi", b, a)
    return plain


def trained(model, *, share_prefix=True):
    """Loss of the policy and text, and gradients by name."""
    units = advantage.units(GROUPS, LOSS, 4)
    if not share_prefix:
        units = [part for unit in units for part in duplicated(unit)]
    pack = make_pack(units, torch.device("cpu"))
    pack = replace(pack, ce_w=torch.ones_like(pack.ce_w) * 0.1, ce_at=torch.arange(len(pack.ce_w)))
    loss, _ = policy_loss(model, pack, LOSS, temperature=0.7, first_update=True)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("targets", [SECTION.lora_targets, SOME], ids=["all", "some"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_gradients_are_those_of_the_merged_weight_projected_on_the_factors(kind, share_prefix, checkpointing, targets):
    cfg, section = replace(TINY, kind=kind, attention_bias=kind == "llama"), replace(SECTION, lora_targets=targets)
    model = adapted_model(cfg, section, checkpointing=checkpointing)
    loss, grads = trained(model, share_prefix=share_prefix)
    plain = merged_by_hand(model, section)
    exact_loss, exact = trained(plain)
    torch.testing.assert_close(loss, exact_loss, rtol=1e-12, atol=0)
    want = {}
    for path, module in lora.adapted(model).items():
        dweight = exact[f"{path}.weight"]
        want[f"{path}.lora_a"] = SCALE * module.lora_b.detach().T @ dweight
        want[f"{path}.lora_b"] = SCALE * dweight @ module.lora_a.detach().T
    assert len(want) == 2 * 2 * len(targets)
    assert_same(grads, want)


def test_no_weight_gradient_of_a_frozen_head_is_formed(monkeypatch):
    calls, product = [], head._add_product
    monkeypatch.setattr(head, "_add_product", lambda *given: calls.append(given) or product(*given))
    monkeypatch.setattr(head, "CHUNK_BYTES", {"cpu": 4 * TINY.vocab * 16})
    trained(adapted_model())
    assert not calls
    trained(random_model(dtype=torch.float64))
    assert len(calls) > 2


@pytest.mark.parametrize("tied", [False, True])
def test_the_stream_holds_merged_weights_under_the_names_of_the_base(tied):
    model = adapted_model(replace(TINY, tied=tied), dtype=torch.float32)
    plain = merged_by_hand(model)
    # rounded once, from fp32
    for dtype in (None, torch.bfloat16):
        ours, theirs = (dict(weights.stream(m, dtype=dtype)) for m in (model, plain))
        assert list(ours) == list(theirs)
        for name, whole in ours.items():
            torch.testing.assert_close(whole, theirs[name], rtol=2e-2 if dtype else 1e-6, atol=1e-6)
    before = dict(weights.stream(random_model(replace(TINY, tied=tied))))
    changed = {n for n, whole in weights.stream(model) if not torch.equal(whole, before[n])}
    assert len(changed) == 2 * 7
    assert all("_proj.weight" in name for name in changed)


def test_a_merged_weight_of_bf16_is_fp32_until_it_is_rounded_once():
    model = random_model(dtype=torch.bfloat16)
    lora.attach(model, SECTION)
    adapters.initialise(model, 0)
    path, module = next(iter(lora.adapted(model).items()))
    assert module.weight.dtype == torch.bfloat16
    assert {module.lora_a.dtype, module.lora_b.dtype} == {torch.float32}
    with torch.no_grad():
        module.lora_b.fill_(1e-3)  # less than a step of bf16 for most weights
    exact = module.weight.double() + SCALE * module.lora_b.double() @ module.lora_a.double()
    name = f"model.{path}.weight"
    wide, narrow = (dict(weights.stream(model, dtype=dtype))[name] for dtype in (None, torch.bfloat16))
    torch.testing.assert_close(wide.double(), exact, rtol=1e-6, atol=1e-7)
    assert wide.dtype == torch.float32
    assert torch.equal(narrow, wide.bfloat16())


def test_off_is_the_base_to_the_last_bit_and_on_again_afterwards():
    model, base = adapted_model(dtype=torch.float32), random_model()
    pack = make_pack(advantage.units(GROUPS, LOSS, 4), torch.device("cpu"))
    with torch.no_grad():
        on = logprobs(model, pack)
        off = logprobs(lora.Base(model), pack)
        assert torch.equal(off, logprobs(base, pack))
        assert not torch.allclose(on, off, atol=1e-2)
        assert torch.equal(logprobs(model, pack), on)


def drawn_worker(rank, world, folder):
    ranks = join_ranks(rank, world, folder)
    with torch.device("meta"):
        model = Transformer(TINY)
        lora.attach(model, SECTION)
    weights.materialise(fsdp.shard(model, ranks, compute_dtype=torch.float32), ranks.device)
    before = torch.get_rng_state()
    adapters.initialise(model, 7)
    assert torch.equal(torch.get_rng_state(), before)
    tensors = {n: weights.whole_tensor(p.detach()).clone() for n, p in model.named_parameters() if ".lora_" in n}
    if rank == 0:
        torch.save(tensors, f"{folder}/drawn{world}.pt")


def test_adapters_are_drawn_alike_on_any_number_of_ranks_and_begin_as_nothing(tmp_path):
    for world in (1, 2):
        spawn(drawn_worker, world, world, str(tmp_path))
    one, two = (torch.load(tmp_path / f"drawn{world}.pt") for world in (1, 2))
    assert one.keys() == two.keys()
    assert len(one) == 2 * 2 * 7
    assert all(torch.equal(one[name], two[name]) for name in one)
    factors = {name: x for name, x in one.items() if name.endswith("lora_a")}
    for name, x in factors.items():
        assert x.abs().max() <= x.shape[1] ** -0.5
        assert x.std() == pytest.approx((3 * x.shape[1]) ** -0.5, rel=0.4), name
    assert len({tuple(x.flatten()[:5].tolist()) for x in factors.values()}) == len(factors)
    assert not any(one[name].any() for name in one.keys() - factors.keys())


def gradients(ranks, dtype=torch.float64):
    """Of the loss over this rank's share of the groups, summed over ranks, whole."""
    model = fsdp.shard(adapted_model(dtype=dtype), ranks, compute_dtype=dtype)
    units = advantage.units(GROUPS, replace(LOSS, next_token=0.0), 4)[ranks.rank :: ranks.world]
    pack = make_pack(units, ranks.device)
    loss, _ = policy_loss(model, pack, replace(LOSS, next_token=0.0), temperature=1.0, first_update=True)
    loss.backward()
    weights.reshard(model)
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    return {n: weights.whole_tensor(p.grad) for n, p in model.named_parameters() if p.grad is not None}


def ranks_worker(rank, world, folder):
    found = gradients(join_ranks(rank, world, folder))
    if rank == 0:
        torch.save(found, f"{folder}/grads{world}.pt")


def test_gradients_do_not_change_with_the_number_of_ranks(tmp_path):
    for world in (1, 2):
        spawn(ranks_worker, world, world, str(tmp_path))
    one, two = (torch.load(tmp_path / f"grads{world}.pt") for world in (1, 2))
    assert len(one) == 2 * 2 * 7
    assert all(x.abs().max() > 1e-4 for x in one.values())
    assert_same(two, one)


def mixed_worker(rank, world, folder):
    """Frozen weights in bf16 and factors in fp32: the ranks' gradients are fp32, near those of fp64."""
    ranks = join_ranks(rank, world, folder)
    model = adapted_model(dtype=torch.bfloat16)
    wide = adapted_model(dtype=torch.float64)
    with torch.no_grad():
        for (name, p), q in zip(model.named_parameters(), wide.parameters(), strict=True):
            q.copy_(p)
            assert p.dtype == (torch.float32 if ".lora_" in name else torch.bfloat16)
    fsdp.shard(model, ranks, compute_dtype=torch.bfloat16)
    optimizer = optim.adamw(model, optim.OptimConfig(lr=1e-2))
    assert len(optimizer.state) == 2 * 2 * 7
    units = advantage.units(GROUPS, LOSS, 4)
    _, exact = trained(wide)
    pack = make_pack(units if rank == 0 else units[:1], ranks.device)  # rank 1 brings a pack, too
    weight = 1.0 if rank == 0 else 0.0
    pack = replace(pack, ce_w=torch.full_like(pack.ce_w, 0.1 * weight), ce_at=torch.arange(len(pack.ce_w)))
    pack = replace(pack, adv=pack.adv * weight)
    loss, _ = policy_loss(model, pack, LOSS, temperature=0.7, first_update=True)
    loss.backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            grad = weights.whole_tensor(p.grad)
            assert grad.dtype == p.dtype == torch.float32
            error = (grad - exact[name]).norm() / exact[name].norm()
            assert error < 0.1, f"{name}: {error}"


def test_factors_in_fp32_beside_weights_in_bf16_get_fp32_gradients(tmp_path):
    spawn(mixed_worker, 2, 2, str(tmp_path))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_peft_loads_the_adapter_and_gives_the_same_logits(tmp_path, kind):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    cfg = replace(TINY, kind=kind, head_dim=6)  # heads * head_dim is the width, as qwen2 wants
    base = random_model(cfg)
    weights.save(tmp_path / "base", cfg, weights.stream(base), dtype="float32")
    model = adapted_model(cfg, replace(SECTION, lora_targets=("q_proj", "v_proj", "down_proj")), torch.float32)
    section = replace(SECTION, lora_targets=("q_proj", "v_proj", "down_proj"))
    adapters.save(tmp_path / "adapter", model, section)
    adapters.save(tmp_path / "adapter", model, section)  # one of ours may be replaced
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    tokens = torch.arange(60) * 7 % cfg.vocab
    with torch.no_grad():
        before = theirs(tokens[None]).logits[0]
        theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
        naive, exact = theirs(tokens[None]).logits[0], theirs.double()(tokens[None]).logits[0]
        assert (before - naive).abs().max() > 0.1
        assert_no_worse(model.logits(tokens), exact, naive)


def test_adapters_stand_at_the_named_projections_alone():
    model = random_model()
    lora.attach(model, replace(SECTION, lora_targets=SOME))
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    paths = [f"layers.{i}.{path}" for i in (0, 1) for path in ("self_attn.k_proj", "mlp.down_proj")]
    assert names == {f"{path}.{factor}" for path in paths for factor in ("lora_a", "lora_b")}
    assert [n for n, _ in lora.base_parameters(model)] == [n for n, _ in Transformer(TINY).named_parameters()]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"lora_rank": -1}, "lora_rank"),
        ({"lora_alpha": 0.0}, "lora_alpha"),
        ({"lora_targets": ()}, "lora_targets"),
        ({"lora_targets": ("q_proj", "q_proj")}, "lora_targets"),
    ],
)
def test_impossible_adapters_are_refused_by_name(flags, said):
    with pytest.raises(ValueError, match=said):
        ModelSection(**flags)
