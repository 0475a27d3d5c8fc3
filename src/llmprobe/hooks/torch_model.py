"""Sizes of a torch module as it lies in memory: weights by operator class, caches by storage.

Everything is read from shapes and storages; no tensor's content is touched, so nothing synchronises.
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: Where a module's weights are used: read once a step and multiplied ("linear"), the output head, routed
#: experts, looked up by row ("embedding"), or outside of the decoding loop ("other": encoders, projectors).
KINDS = ("linear", "head", "experts", "embedding", "other")
#: Numbers in a byte, beyond which a layer's weights are taken to lie where nobody looked.
_FEWEST = 8


@dataclass
class Weights:
    """Bytes and matmul parameters of one model on this process's devices.

    ``bytes`` and ``params`` are by kind (`KINDS`). A head that shares the input embedding's storage has
    its bytes under ``head``; ``tied`` says so, and ``embedding_bytes`` still gives the table's size.
    """

    bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    params: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    embedding_bytes: int = 0
    tied: bool = False
    #: Experts of one layer, as found in the modules; 0 if there are none.
    experts: int = 0
    #: Parameters of matrix products by kind and what these compute in; None: the model's own type.
    dtypes: Counter[tuple[str, str | None]] = field(default_factory=Counter)
    #: What of it could not be read.
    unmodelled: list[str] = field(default_factory=list)

    @property
    def total_bytes(self) -> int:
        """Every distinct storage once."""
        return sum(self.bytes.values())

    def matmul_dtype(self, experts_used: float = 1.0) -> str | None:
        """What most products of a token compute in; None if it is the model's own type.

        Args:
            experts_used: the part of the experts that a token goes to.
        """
        found: dict[str | None, float] = {}
        for (kind, dtype), params in self.dtypes.items():
            found[dtype] = found.get(dtype, 0.0) + params * (experts_used if kind == "experts" else 1.0)
        return max(found, key=lambda dtype: found[dtype], default=None)


def weights(model: Any, kind_of: Callable[[str, Any], str], device_type: str) -> Weights:
    """Measure ``model``'s parameters and the buffers that are saved with it.

    Args:
        model: a ``torch.nn.Module``.
        kind_of: (name, module) → kind, for every module that owns tensors.
        device_type: only what lies there now counts (offloaded weights do not).
    """
    found = Weights()
    counted: dict[Any, str] = {}  # place in memory → the kind it was counted under
    for name, module in model.named_modules():
        own = list(_own_tensors(module))
        if not own:
            continue
        kind = kind_of(name, module)
        used = _matmul_params(kind, module, own)
        found.params[kind] += used
        if kind == "experts":
            found.experts = max(found.experts, _experts_of(name, own))
        if kind in ("linear", "experts"):
            if used:
                found.dtypes[kind, _matmul_dtype(module, own)] += used
            _look_for_gaps(found, kind, module, own, used)
        for _, parameter in own:
            for tensor in plain(parameter):
                if tensor.device.type == device_type and tensor.numel():
                    _count(found, counted, kind, tensor)
    return found


def _look_for_gaps(found: Weights, kind: str, module: Any, own: list[tuple[str, Any]], used: int) -> None:
    """Say what can be seen to lack of a module's weights."""
    cls, stored = type(module).__name__, 0
    for _, tensor in own:
        stored += sum(part.numel() * part.element_size() for part in plain(tensor))
    if stored < used / _FEWEST:
        problem = f"{kind}: where {cls} keeps its weights is not known"
    elif kind == "experts" and not used and any(_is_weight(name, tensor) for name, tensor in own):
        problem = f"experts: how many parameters {cls} multiplies by is not known"
    else:
        return
    if problem not in found.unmodelled:  # a model has many layers of one class
        found.unmodelled.append(problem)


def _is_weight(name: str, tensor: Any) -> bool:
    return tensor.dim() >= 2 and "scale" not in name and "bias" not in name


def _count(found: Weights, counted: dict[Any, str], kind: str, tensor: Any) -> None:
    # A loader may hand out views of one mapped file, so what counts is the tensor, not its storage.
    place, size = (tensor.device, tensor.data_ptr()), tensor.numel() * tensor.element_size()
    before = counted.get(place)
    if kind == "embedding" and before in (None, "head"):
        found.embedding_bytes += size
    if before is None:
        counted[place] = kind
        found.bytes[kind] += size
    elif {kind, before} == {"head", "embedding"}:
        found.tied = True
        counted[place] = "head"
        found.bytes[before] -= size
        found.bytes["head"] += size


def storage_bytes(tensors: Iterable[Any]) -> int:
    """Bytes of the distinct storages behind ``tensors``: what they keep resident, not what they show."""
    sizes: dict[Any, int] = {}
    for tensor in tensors:
        for part in plain(tensor):
            if part.device.type != "meta":
                storage = part.untyped_storage()
                sizes[part.device, storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def tensors_in(value: Any, depth: int = 5) -> Iterator[Any]:
    """Every tensor inside nested lists, tuples, dicts and plain objects (caches and their layers)."""
    if hasattr(value, "untyped_storage"):
        yield value
    elif depth:
        if isinstance(value, dict):
            children: Iterable[Any] = value.values()
        elif isinstance(value, (list, tuple)):
            children = value
        elif hasattr(value, "__dict__") and not isinstance(value, type) and not callable(value):
            children = vars(value).values()
        else:
            return
        for child in children:
            if child is not None and not isinstance(child, (str, int, float, bool)):
                yield from tensors_in(child, depth - 1)


def dtype_name(dtype: Any) -> str:
    """``torch.bfloat16`` as ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


def _own_tensors(module: Any) -> Iterator[tuple[str, Any]]:
    """Parameters and saved buffers that ``module`` itself holds, and what it keeps beside them.

    Quantised weights are often buffers.
    """
    for name, tensor in module._parameters.items():
        if tensor is not None:
            yield name, tensor
    unsaved = getattr(module, "_non_persistent_buffers_set", ())
    for name, tensor in module._buffers.items():
        if tensor is not None and name not in unsaved:
            yield name, tensor
    yield from wrapped(module)


def plain(tensor: Any) -> Iterator[Any]:
    """The tensors that hold the data: itself, or the parts of a wrapper subclass (torchao, DTensor)."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from plain(getattr(tensor, name))
    else:
        yield tensor


def wrapped(module: Any) -> Iterator[tuple[str, Any]]:
    """Tensors that ``module`` keeps in objects of `triton_kernels`, which are no parameters of it.

    Swizzled weights are plain attributes there, whose ``storage.data`` is the tensor; the scales of blocks
    lie in the kernel's ``PrecisionConfig``, under names that changed between versions.
    """
    for name, value in vars(module).items():
        if name.startswith("_"):
            continue
        if (tensor := _data(value)) is not None:
            yield name, tensor
        elif type(value).__name__ == "PrecisionConfig":
            for part, held in vars(value).items():
                if "scale" in part and (scale := _data(held, plain_too=True)) is not None:
                    yield f"{name}.{part}", scale


def _data(value: Any, plain_too: bool = False) -> Any:
    """The tensor behind a wrapper; a tensor itself only if ``plain_too``."""
    if hasattr(value, "untyped_storage"):
        return value if plain_too else None
    data = getattr(getattr(value, "storage", None), "data", None)
    return data if hasattr(data, "untyped_storage") else None


def _matmul_params(kind: str, module: Any, own: list[tuple[str, Any]]) -> int:
    """Logical parameters of matrix products; a packed weight's shape does not tell, its layer's sizes do."""
    inputs, outputs = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(inputs, int) and isinstance(outputs, int):
        return inputs * outputs
    found = sum(
        tensor.numel() for name, tensor in own if _is_weight(name, tensor) and tensor.is_floating_point()
    )
    return found or (_expert_params(module) if kind == "experts" else 0)


def _expert_params(module: Any) -> int:
    """Of the experts of one layer whose weights are packed, by the names that transformers' classes have."""

    def size(*names: str) -> int:
        return next((value for name in names if isinstance(value := getattr(module, name, None), int)), 0)

    gated = hasattr(module, "gate_up_proj") or hasattr(module, "gate_proj")
    hidden, inner = (
        size("hidden_size", "hidden_dim"),
        size("intermediate_size", "intermediate_dim", "expert_dim"),
    )
    return (3 if gated else 2) * size("num_experts") * hidden * inner


def _matmul_dtype(module: Any, own: list[tuple[str, Any]]) -> str | None:
    """What a quantised layer multiplies in, None for the model's own type.

    Numbers that are only stored in fewer bits are unpacked on the way. Activations are quantised too where
    weights lie in FP8, and by bitsandbytes' ``Linear8bitLt`` (LLM.int8()).
    """
    weights_of = [tensor for name, tensor in own if _is_weight(name, tensor)]
    dtype = dtype_name(max(weights_of, key=lambda tensor: tensor.numel()).dtype) if weights_of else ""
    classes = {cls.__name__ for cls in type(module).__mro__}
    if dtype.startswith("float8"):
        return dtype
    if "FP8Experts" in classes and dtype == "int8":  # FP4 in pairs, multiplied with activations in FP8
        return "float8_e4m3fn"
    return "int8" if dtype == "int8" and "Linear8bitLt" in classes else None


def _experts_of(name: str, own: list[tuple[str, Any]]) -> int:
    parts = name.split(".")
    index = parts.index("experts") + 1 if "experts" in parts else len(parts)
    if index < len(parts) and parts[index].isdecimal():
        return int(parts[index]) + 1
    return max((tensor.shape[0] for _, tensor in own if tensor.dim() == 3), default=0)


def device_facts(device: Any) -> dict[str, Any]:
    """Type, name, index and, on CUDA, UUID of a ``torch.device``; on a CPU, how many threads work."""
    import torch

    if device.type == "cpu":
        return {"type": "cpu", "name": cpu_name(), "index": 0, "threads": torch.get_num_threads()}
    if device.type != "cuda":
        return {"type": device.type, "name": device.type, "index": 0}
    properties = torch.cuda.get_device_properties(device)
    uuid = getattr(properties, "uuid", None)
    index = device.index if device.index is not None else torch.cuda.current_device()
    return {"type": "cuda", "name": properties.name, "index": index, "uuid": f"GPU-{uuid}" if uuid else ""}


def cpu_name() -> str:
    """The processor's model name, as /proc/cpuinfo gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
