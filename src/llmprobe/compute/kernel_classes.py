"""What kind of work a kernel does, told by its name, be it demangled or not.

The table is read from the top; the first pattern that is found in the lower-case name decides. Names come
from cuBLAS, CUTLASS, Triton, FlashAttention, FlashInfer, NCCL, PyTorch and vLLM.
"""

from __future__ import annotations

import re

COMMUNICATION = "communication"
COPY = "copy"
SET = "set"
GRAPH = "graph"

#: (class, pattern). Order matters: the communication of a fused kernel is what makes it wait, an expert's
#: product is first of all an expert's.
PATTERNS: tuple[tuple[str, str], ...] = (
    (
        COMMUNICATION,
        r"nccl|all_?reduce|all_?gather|reduce_?scatter|alltoall|all_to_all|all2all|nvshmem|multimem|"
        r"one_?shot|two_?shot|cross_device_reduce|deep_?ep|\bpplx|sendrecv|symm_mem",
    ),
    (
        "moe",
        r"moe|expert|topk_?gating|top_?k_?softmax|grouped_?gemm|permute_?(tokens|copy)|align_block_size|"
        r"silu_mul_.*expert|routing(main|indices|kernel)|ep_(scatter|gather)",
    ),
    (
        "sampling",
        # What chooses keys for sparse attention (mqa_logits, topKPerRow) is no sampling.
        r"sampl|top_?[kp]_?(mask|renorm|filter|logits)|top_?p\b|radix_?topk|topk(?!_?per_?row)|argmax|multinomial|"
        r"gumbel|exponential|penalt|(?<!mqa_)logit|cunn_softmax|softmax_?warp_?forward|bitmask|rejection|distribution_",
    ),
    (
        "attention",
        # flashinfer has kernels of all sorts.
        r"flash(?!infer)|fmha|attention|attn|paged|mla_|_mla|\bmha|xqa|batch_?(prefill|decode)|merge_?state|"
        r"mqa_logits|topk_?per_?row|reshape_and_cache|concat_and_cache|kv_?cache|rotary|rope",
    ),
    (
        "state space",
        r"mamba|selective_scan|causal_conv1d|chunk_(scan|state|cumsum)|ssd_|gated_delta|delta_rule|linear_attn",
    ),
    (
        "gemm",
        r"gemm|gemv|cutlass|cublas|xmma|wgmma|nvjet|matmul|\bmm_|_mm_|\bbmm|hgmma|sgmma|splitk|"
        r"marlin|machete|awq|gptq|dot_kernel|deep_?gemm|qmm|exl2|lora_(shrink|expand)",
    ),
    ("quantization", r"quant|scaled_fp8|per_token_group|fp8_|_fp8|int8"),
    (COPY, r"memcpy|copy_?kernel|catarraybatched|direct_copy|transpose|contiguous"),
    (SET, r"memset|fill_?functor|fillkernel"),
    (
        "norm and elementwise",
        r"norm|elementwise|silu|gelu|swiglu|act_and_mul|activation|reduce_kernel|triton_(poi|red|per|for)|"
        r"functor|index|gather|scatter|embedding|softmax|vectorized|unrolled|cumsum|scan|sort|arange|where|"
        r"add_kernel|mul_kernel",
    ),
)
OTHER = "other"

#: Classes whose time counts as moving data between devices, or to and from the host, not as computing.
NOT_COMPUTE = frozenset({COMMUNICATION, COPY, SET})

_LONGEST = 1000
_COMPILED = tuple((label, re.compile(pattern)) for label, pattern in PATTERNS)


def kernel_class(name: str) -> str:
    """The class of a kernel of that name; `OTHER` if nothing tells."""
    lowered = name[:_LONGEST].lower()
    for label, pattern in _COMPILED:
        if pattern.search(lowered):
            return label
    return OTHER
