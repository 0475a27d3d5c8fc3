"""Sizes of modules and caches, from shapes and storages."""

from __future__ import annotations

import pytest

from llmprobe.hooks.torch_model import storage_bytes, tensors_in, weights

torch = pytest.importorskip("torch")


def by_name(name: str, module: object) -> str:
    for kind in ("head", "embedding", "experts"):
        if kind in name:
            return kind
    return "linear"


class Model(torch.nn.Module):  # type: ignore[misc]
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(10, 4)
        self.layer = torch.nn.Linear(4, 6)
        self.norm = torch.nn.LayerNorm(4)
        self.head = torch.nn.Linear(4, 10, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.register_buffer("saved", torch.zeros(3))
        self.register_buffer("unsaved", torch.zeros(100), persistent=False)


@pytest.mark.parametrize("tied", [False, True])
def test_bytes_and_params_are_told_by_kind_and_shared_tensors_count_once(tied: bool) -> None:
    found = weights(Model(tied), by_name, "cpu")
    table = 4 * 10 * 4
    assert found.tied is tied
    assert found.embedding_bytes == table
    assert found.bytes["head"] == table
    assert found.bytes["embedding"] == (0 if tied else table)
    assert found.bytes["linear"] == 4 * (4 * 6 + 6 + 4 + 4 + 3)
    assert found.params["linear"] == 24 and found.params["head"] == 40
    assert found.total_bytes == sum(tensor.nbytes for tensor in unique(Model(tied).state_dict()))


def unique(state: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return list({tensor.data_ptr(): tensor for tensor in state.values()}.values())


def test_views_of_one_mapped_file_count_by_their_own_size() -> None:
    whole = torch.zeros(1000)
    layer = torch.nn.Linear(4, 5, bias=False)
    layer.weight = torch.nn.Parameter(whole[:20].view(5, 4))
    assert weights(layer, by_name, "cpu").total_bytes == 80


def test_packed_weights_count_the_parameters_of_their_layer() -> None:
    layer = torch.nn.Linear(64, 8, bias=False)
    del layer.weight
    layer.register_buffer("qweight", torch.zeros(8, 8, dtype=torch.int32))
    layer.register_buffer("scales", torch.zeros(8, 2, dtype=torch.float16))
    found = weights(layer, by_name, "cpu")
    assert found.params["linear"] == 64 * 8
    assert found.bytes["linear"] == 8 * 8 * 4 + 8 * 2 * 2


def test_weights_elsewhere_do_not_count() -> None:
    assert weights(torch.nn.Linear(4, 5, device="meta"), by_name, "cpu").total_bytes == 0


def test_experts_are_counted_whether_stacked_or_listed() -> None:
    listed = torch.nn.ModuleDict({"experts": torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(3))})
    assert weights(listed, by_name, "cpu").experts == 3
    stacked = torch.nn.Module()
    stacked.experts = torch.nn.Module()
    stacked.experts.register_parameter("down_proj", torch.nn.Parameter(torch.zeros(5, 2, 2)))
    found = weights(stacked, by_name, "cpu")
    assert (found.experts, found.params["experts"]) == (5, 20)


def test_storages_count_what_stays_resident_not_what_is_shown() -> None:
    storage = torch.zeros(100)
    nested = {"layers": [{"keys": storage[:10], "values": (storage[10:20], None, "text")}]}
    assert storage_bytes(tensors_in(nested)) == 400
