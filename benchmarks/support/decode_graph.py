"""A CUDA graph as long as a decode step: the linear parts of an 8B decoder at batch 1."""

from __future__ import annotations

from typing import Any

import torch

_HIDDEN, _INTERMEDIATE, _LAYERS, _VOCABULARY = 4096, 12288, 36, 151936


def decode_graph() -> Any:
    """Capture it: about 470 kernels that read 15 GB of weights."""

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) * 0.01

    layers = [
        (
            matrix(6144, _HIDDEN),
            matrix(_HIDDEN, _HIDDEN),
            matrix(2 * _INTERMEDIATE, _HIDDEN),
            matrix(_HIDDEN, _INTERMEDIATE),
        )
        for _ in range(_LAYERS)
    ]
    head, start = matrix(_VOCABULARY, _HIDDEN), matrix(1, _HIDDEN)
    linear, norm = torch.nn.functional.linear, torch.nn.functional.rms_norm

    def model() -> torch.Tensor:
        x = start
        for qkv, out, up, down in layers:
            attended = linear(norm(x, (_HIDDEN,)), qkv)[:, :_HIDDEN].sigmoid()
            x = x + linear(attended, out)
            both = linear(norm(x, (_HIDDEN,)), up)
            x = x + linear(torch.nn.functional.silu(both[:, :_INTERMEDIATE]) * both[:, _INTERMEDIATE:], down)
        return linear(x, head)

    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(3):
            model()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model()
    return graph
