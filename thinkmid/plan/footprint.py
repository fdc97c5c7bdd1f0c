"""What training takes of a rank's memory: bytes by owner at the moment of a step when they are most."""

from __future__ import annotations

from thinkmid.kernels.head import CHUNK_BYTES, SCORING_BYTES
from thinkmid.model.init import ModelSection
from thinkmid.model.transformer import ModelConfig
from thinkmid.plan.time import BYTES, block_parameters

# CUDA's own context, cuBLAS, loaded kernels; NCCL's buffers between ranks. By users' reports, no allocator sees them
CUDA_CONTEXT, NCCL = 1.0e9, 1.0e9
# a process on the CPU: thread pools, packed matrices, what Python makes on the way. 20, 7 and 27 MB were in use
# beyond what is counted with 7 and 16 million parameters and in mini-rlmt
CPU_PROCESS = 20e6
# glibc keeps holes between freed activations of packs that differ in length, as a share of these: 0.2 to 0.7 in twelve
# runs of models 128 to 640 wide, growing over the first packs. With its M_MMAP_THRESHOLD fixed there are none
CPU_HOLES = 0.5


def adapter_parameters(model_cfg: ModelConfig, section: ModelSection) -> int:
    """Numbers in the adapters of all blocks; 0 without."""
    q, kv = model_cfg.heads * model_cfg.head_dim, model_cfg.kv_heads * model_cfg.head_dim
    width, ffn = model_cfg.width, model_cfg.ffn
    both = {"q_proj": width + q, "k_proj": width + kv, "v_proj": width + kv, "o_proj": q + width}  # in and out
    both |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), width + ffn)
    return model_cfg.layers * section.lora_rank * sum(both[name] for name in section.lora_targets)


def kept_bytes(model_cfg: ModelConfig, section: ModelSection, span: int = 0, grouped: bool = True) -> int:
    """What autograd saves of one token in one block.

    span: in fp32, keys in a token's row of a mask, which replies that share a prefix have; 0 where none do. grouped:
    the attention reads keys and values once for a group of query heads; torch's own on GPUs, before 2.12, wants them
    repeated.
    """
    q, kv = model_cfg.heads * model_cfg.head_dim, model_cfg.kv_heads * model_cfg.head_dim
    # inputs of two norms and of what comes after (or before) each; rotated q, k, v and the attention's output, which is
    # the output projection's input; gate, up and their product
    numbers = 4 * model_cfg.width + 2 * q + 2 * (kv if grouped else q) + 3 * model_cfg.ffn
    # fp32 whatever the dtype: 1/rms of both norms, the attention's log-sum-exp
    statistics = 2 + model_cfg.heads
    if model_cfg.form.qk_norm:  # inputs of the norms of q and k
        numbers += q + kv
        statistics += model_cfg.heads + model_cfg.kv_heads if model_cfg.form.qk_norm == "head" else 2
    if section.dtype == "float32":
        # sdpa keeps its output bucket by bucket, and a copy in the pack's order follows; masks of replies become fp32
        numbers += q
        statistics += span
    if section.lora_rank:
        # the inputs of frozen projections are not needed; what lies between two factors is
        targets = set(section.lora_targets)
        numbers -= model_cfg.width * (not targets & {"q_proj", "k_proj", "v_proj"})
        numbers -= model_cfg.width * (not targets & {"gate_proj", "up_proj"}) + model_cfg.ffn * (
            "down_proj" not in targets
        )
        numbers -= q * (section.dtype == "float32" and "o_proj" not in targets)
        numbers += section.lora_rank * len(targets)
    return BYTES[section.dtype] * numbers + 4 * statistics


def mask_span(model_cfg: ModelConfig, full: int, windowed: int, longest: int) -> int:
    """Keys in a token's row of a mask, mean over layers: full, and windowed where a window is shorter than the longest
    sequence."""
    num = len(model_cfg.windowed_layers) if model_cfg.window < longest else 0
    return (full * (model_cfg.layers - num) + windowed * num) // model_cfg.layers


def activation_bytes(model_cfg: ModelConfig, section: ModelSection, span: int = 0, grouped: bool = True) -> int:
    """What autograd saves of one token of a pack until the backward; with checkpointing, the inputs of blocks."""
    residual = BYTES[section.dtype] * model_cfg.width
    block = residual if section.checkpointing else kept_bytes(model_cfg, section, span, grouped)
    # the final norm's input, its 1/rms, fp32 cosines and sines of the position
    return model_cfg.layers * block + residual + 4 + 4 * model_cfg.head_dim


def training_phase(
    model_cfg: ModelConfig,
    section: ModelSection,
    pack_tokens: int,
    world: int,
    copies: int = 0,
    *,
    device: str = "cuda",
    span: int = 0,
    grouped: bool = True,
) -> dict[str, float]:
    """Bytes per rank while training, by owner. copies: of the weights, frozen or averaged; span
    and grouped as in kept_bytes."""
    n, head = model_cfg.num_parameters, model_cfg.vocab * model_cfg.width
    small, tokens = BYTES[section.dtype], pack_tokens
    trained = adapter_parameters(model_cfg, section) or n
    # a forward without a backward leaves a copy's head gathered
    kept = {"master weights of copies (fp32 shards), their heads": copies * (4 * n / world + small * head)}
    activations = tokens * activation_bytes(model_cfg, section, span, grouped)
    always = {
        **({f"frozen weights ({section.dtype} shard)": small * n / world} if section.lora_rank else {}),
        f"master weights{' of adapters' if section.lora_rank else ''} (fp32 shard)": 4 * trained / world,
        **(kept if copies else {}),
        "Adam moments (fp32 shard)": 8 * trained / world,
        "gradients (fp32 shard)": 4 * trained / world,
        "activations of one pack": activations,
        **({"holes between activations (measured share)": CPU_HOLES * activations} if device == "cpu" else {}),
        **outside(device, world),
    }
    block = tokens * kept_bytes(model_cfg, section, span, grouped)
    at_head = _at_head(model_cfg, section, tokens, world, device)
    at_block = _at_block(model_cfg, section, tokens, world, block)
    return always | (at_head if sum(at_head.values()) >= sum(at_block.values()) else at_block)


def outside(device: str, world: int) -> dict[str, float]:
    """What no tensor holds, in every phase."""
    if device == "cuda":
        return {"CUDA context and NCCL (estimate)": CUDA_CONTEXT + NCCL * (world > 1)}
    return {"process: threads, Python (measured)": CPU_PROCESS}


def scoring(model_cfg: ModelConfig, section: ModelSection, tokens: int, world: int, device: str) -> float:
    """Bytes that log-probs without gradients take on top: the head, a chunk of scores, hidden rows before and after."""
    small, head = BYTES[section.dtype], model_cfg.vocab * model_cfg.width
    chunk = min(SCORING_BYTES[device], 4 * tokens * model_cfg.vocab)
    return small * head + _head_buffer(model_cfg, small, world) + chunk + 2 * small * tokens * model_cfg.width


def _at_head(model_cfg: ModelConfig, section: ModelSection, tokens: int, world: int, device: str) -> dict[str, float]:
    """The loss: its last chunk, when the weight's gradient is whole. The embedding was freed after its own forward."""
    small, head = BYTES[section.dtype], model_cfg.vocab * model_cfg.width
    chunk = min(CHUNK_BYTES[device], 4 * tokens * model_cfg.vocab)
    # on a GPU the scores are fp32 and their gradient lies apart, in the products' dtype; on the CPU it overwrites them
    scores = chunk * (1 + small / 4) if device == "cuda" and small < 4 else chunk
    # in half precision the fp32 gradient is rounded into another tensor, when the chunk is gone
    rounded = small * head if small < 4 else 0
    owners: dict[str, float] = {
        "gathered weights (head, FSDP's buffer)": small * head + _head_buffer(model_cfg, small, world),
        "head: a chunk of scores and their gradient": scores if section.lora_rank else max(scores, rounded),
        "head: hidden rows and their gradient": 2 * small * tokens * model_cfg.width,
    }
    return owners if section.lora_rank else owners | {"head: fp32 weight gradient": 4 * head}


def _at_block(model_cfg: ModelConfig, section: ModelSection, tokens: int, world: int, kept: float) -> dict[str, float]:
    """The backward of a late block, at the gradient of its gated product, which is freed itself by then."""
    small, head, block = BYTES[section.dtype], model_cfg.vocab * model_cfg.width, _block(model_cfg)
    # FSDP2 holds the input of one reduce-scatter until the next one: the head's in the last block; later the block's
    # before, whose activations are gone then
    freed = small * tokens * model_cfg.width if section.checkpointing else kept
    owners: dict[str, float] = {
        "gathered weights (a block, the next one's buffer)": small * block * min(2, world),
        "gradients of activations": small * tokens * (2 * model_cfg.ffn + 2 * model_cfg.width),
    }
    if not section.lora_rank:
        owners["gradient of the down projection"] = small * model_cfg.width * model_cfg.ffn
        owners["fp32 gradients being summed over ranks"] = max(0 if model_cfg.tied else 4 * head, 4 * block - freed)
    if model_cfg.tied:  # waits for the embedding, whole, with its gradient
        owners["head: gathered, its gradient"] = (1 if section.lora_rank else 2) * small * head
    if section.checkpointing:
        owners["activations of a block, computed again"] = kept
    return owners


def _head_buffer(model_cfg: ModelConfig, small: int, world: int) -> int:
    """FSDP2 frees the buffer of one all-gather at the next one's copy out. After the last one of a forward that is the
    head's, or the last block's where the head is the embedding. A single rank gathers nothing."""
    return 0 if world == 1 else small * (_block(model_cfg) if model_cfg.tied else model_cfg.vocab * model_cfg.width)


def _block(model_cfg: ModelConfig) -> int:
    return block_parameters(model_cfg) // model_cfg.layers
