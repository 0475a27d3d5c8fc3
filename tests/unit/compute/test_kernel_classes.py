"""What kernels' names tell; the names are of real engines."""

from __future__ import annotations

import re

import pytest

from llmprobe.compute.kernel_classes import PATTERNS, kernel_class


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_TNT", "gemm"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "gemm"),
        ("void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<...>>", "gemm"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, __nv_bfloat16>", "gemm"),
        ("void gemv2T_kernel_val<int, int, __nv_bfloat16>", "gemm"),
        ("void marlin::Marlin<__nv_bfloat16, 256, 1, 8, 8>", "gemm"),
        ("ampere_bf16_s16816gemm_bf16_128x64_ldg8_f2f_stages_64x3_tn", "gemm"),
        ("void flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<128, 64>>", "attention"),
        ("cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<...>>>", "attention"),
        ("BatchPrefillWithPagedKVCacheKernel", "attention"),
        ("kernel_unified_attention_2d", "attention"),
        ("void vllm::reshape_and_cache_flash_kernel<__nv_bfloat16>", "attention"),
        ("void vllm::rotary_embedding_kernel<c10::BFloat16, true>", "attention"),
        ("fmha_v2_flash_attention_bf16_64_128_S_q_paged_kv_128", "attention"),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "communication"),
        ("void vllm::cross_device_reduce_1stage<__nv_bfloat16, 2>", "communication"),
        ("ncclDevKernel_AllGather_RING_LL", "communication"),
        ("multimem_all_reduce_kernel", "communication"),
        ("fused_moe_kernel", "moe"),
        ("void vllm::moe::topkGatingSoftmax<4, 64, 4, 16>", "moe"),
        ("void moe_align_block_size_kernel<int>", "moe"),
        ("void flashinfer::sampling::TopKTopPSamplingFromProbKernel<1024>", "sampling"),
        ("void at::native::(anonymous namespace)::cunn_SoftMaxForward<4, float>", "sampling"),
        ("void at::native::reduce_kernel<512, 1, ReduceOp<float, ArgMaxOps<float>>>", "sampling"),
        ("void vllm::rms_norm_kernel<c10::BFloat16>", "norm and elementwise"),
        ("void vllm::act_and_mul_kernel<c10::BFloat16, &vllm::silu_kernel>", "norm and elementwise"),
        ("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_3", "norm and elementwise"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<int>>", "set"),
        (
            "void at::native::elementwise_kernel<128, 4, gpu_kernel_impl<CUDAFunctor_add<float>>>",
            "norm and elementwise",
        ),
        ("void vllm::dynamic_per_token_scaled_fp8_quant_kernel<c10::BFloat16>", "quantization"),
        ("_selective_scan_update_kernel", "state space"),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<...>", "copy"),
        ("void flashinfer::norm::FusedAddRMSNormKernel<8u, __nv_bfloat16>", "norm and elementwise"),
        ("void flashinfer::activation::act_and_mul_kernel<__nv_bfloat16>", "norm and elementwise"),
        ("void flashinfer::gemm::CutlassGemmKernel<__nv_bfloat16>", "gemm"),
        ("void flashinfer::SinglePrefillWithKVCacheKernel<flashinfer::KernelTraits<1>>", "attention"),
        ("void flashinfer::PersistentVariableLengthMergeStatesKernel<8u, 16u>", "attention"),
        ("void deep_gemm::sm90_fp8_paged_mqa_logits<1, 64, 128>", "attention"),
        ("void vllm::topKPerRowDecode<512, true>", "attention"),
        ("_fwd_kernel_ep_scatter_1", "moe"),
        ("_lora_shrink_kernel", "gemm"),
        ("frobnicate", "other"),
    ],
)
def test_kernels_of_real_engines_are_told_apart(name: str, expected: str) -> None:
    assert kernel_class(name) == expected


def test_every_pattern_is_lower_case_and_compiles() -> None:
    for _, pattern in PATTERNS:
        re.compile(pattern)
        assert pattern == pattern.lower()
