"""The weights of one vLLM worker by operator class, from what it stores: sharded, packed and padded as it is.

Only shapes and storages are read, never a tensor's content. Names are those of vLLM's own layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from llmprobe.hooks.torch_model import plain, wrapped

KINDS = ("linear", "head", "experts", "embedding", "encoder", "unread")
_FEWEST = 4  # numbers in a byte, as densely as any format packs them
#: Layers whose inner dtype is FP4 by their class: the stored type, uint8, does not tell.
_FP4 = ("W4A4", "NvFp4", "NVFP4")
#: What `vllm...MLAAttention` makes of ``kv_b_proj`` for decoding.
_ABSORBED = ("W_UK_T", "W_UV", "W_K", "W_K_scale", "W_V", "W_V_scale")


class Storages:
    """Bytes by kind, each byte of memory once: tensors may share storage, whole or as views of parts."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[str, int, dict[int, int]]] = {}

    def add(self, kind: str, tensor: Any) -> str | None:
        """Count ``tensor``; the kind its storage was counted under before, if it was."""
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        known = self._found.get(key)
        if known is None:
            self._found[key] = known = (kind, storage.nbytes(), {})
            before = None
        else:
            before = known[0]
        size = tensor.numel() * tensor.element_size()
        places = known[2]
        places[tensor.data_ptr()] = max(places.get(tensor.data_ptr(), 0), size)
        return before

    def bytes(self) -> dict[str, int]:
        """Bytes of each kind. Views that overlap cannot fill more than their storage."""
        total = dict.fromkeys(KINDS, 0)
        for kind, size, places in self._found.values():
            total[kind] += min(size, sum(places.values()))
        return total


def weights(model: Any, has_head: bool, tied_by_config: bool, device_type: str) -> dict[str, Any]:
    """Stored bytes and parameters of matrix products by operator; see `llmprobe.compute.facts.ModelFacts`.

    Args:
        has_head: whether this rank computes logits.
        tied_by_config: whether the configuration says that the head is the input embedding.
        device_type: of the rank: kernels of a CPU keep copies that cannot be seen, whose size is assumed.

    Returns:
        ``weights_bytes``, ``operators``, ``embedding_bytes``, ``tied``, ``matmul_dtype`` (what most products
        of a token compute in, None if it is the model's own) and ``unmodelled``.
    """
    modules = list(dict.fromkeys(model.modules()))
    names = {module: name for name, module in model.named_modules()}
    unmodelled: list[str] = []
    try:
        spoken = _language(model)
    except NotImplementedError:
        spoken = None
        unmodelled.append("encoder: vLLM does not tell which modules are the language model")
    unread = _unread(modules)
    storages = Storages()
    params = dict.fromkeys(KINDS, 0)
    assumed = dict.fromkeys(KINDS, 0)
    dtypes: dict[str | None, float] = {}
    embeddings: list[tuple[int, int, Any]] = []  # parameters, bytes, module
    experts: list[tuple[int, int]] = []
    unseen: dict[str, None] = {}  # a model has many layers of one class
    tied = False
    under_embedding = True  # which of the two a shared table was counted as
    for module in modules:
        kind = _kind(names[module], module)
        if kind in ("linear", "experts") and spoken is not None and id(module) not in spoken:
            kind = "encoder"
        elif id(module) in unread:
            kind = "unread"
        stored = 0
        for tensor in (part for whole in _stored(module) for part in plain(whole)):
            before = storages.add(kind, tensor)
            stored += tensor.numel() * tensor.element_size()
            if {before, kind} == {"head", "embedding"}:
                tied, under_embedding = True, before == "embedding"
        used = _matmul_params(kind, module)
        if stored < used / _FEWEST and kind != "head":
            if device_type == "cpu":
                assumed[kind] += used * _repacked_size(module)
            else:
                unseen[f"{kind}: where {type(module).__name__} keeps its weights is not known"] = None
        params["linear" if kind == "unread" else kind] += used
        if kind == "embedding":
            embeddings.append((_matmul_params("head", module), stored, module))
        routing = _routing(module) if kind == "experts" else None
        if routing:
            experts.append(routing)
        if kind in ("linear", "experts") and used:
            dtype = _matmul_dtype(module)
            count, top_k = routing or (1, 1)
            dtypes[dtype] = dtypes.get(dtype, 0) + used * top_k / count  # what a token goes through
    found_bytes = {kind: size + assumed[kind] for kind, size in storages.bytes().items()}
    total = sum(found_bytes.values())
    # Models may look up more than tokens: positions, or a row for every layer. The head is tied to tokens.
    words, table, _ = max(embeddings, key=lambda found: found[0], default=(0, 0, None))
    if named := [found for found in embeddings if _is_input(names[found[2]])]:
        words, table, _ = named[0]
    head = {"bytes": found_bytes["head"], "params": params["head"]}
    if not head["params"] and words and tied_by_config:
        tied = True  # one module serves as both
        head["params"] = words
    elif not head["params"] and has_head:
        unmodelled.append("head: no output head was found on this rank")
    if tied and head["params"] and under_embedding:
        # The head reads the embedding's storage: one copy in memory, read once a step.
        head["bytes"] += table
    operators: dict[str, Any] = {
        "linear": {"bytes": found_bytes["linear"], "params": params["linear"]},
        "head": head,
    }
    if found_bytes["experts"]:
        operators["experts"] = {"bytes": found_bytes["experts"], "params": params["experts"]}
        if experts:
            operators["experts"]["count"], operators["experts"]["top_k"] = experts[0]
        if len(set(experts)) > 1:
            unmodelled.append("experts: layers differ in how many there are or how many serve a token")
    return {
        "weights_bytes": total,
        "operators": operators,
        "embedding_bytes": table,
        "tied": tied,
        "matmul_dtype": max(dtypes, key=lambda dtype: dtypes[dtype], default=None),
        "unmodelled": [*unmodelled, *unseen],
    }


def _repacked_size(module: Any) -> int:
    """Bytes of a number in the copy that vLLM's CPU kernels keep, the parameter emptied or gone."""
    weight = module._parameters.get("weight")
    if weight is not None:
        return int(weight.element_size())
    return 1 if any("scale" in name for name in module._parameters) else 2


def _language(model: Any) -> set[int] | None:
    """The modules that run in every step of a multimodal model; None if all do.

    Raises:
        NotImplementedError: vLLM cannot tell either.
    """
    find = getattr(model, "get_language_model", None)
    if not callable(find):
        return None
    return {id(module) for module in find().modules()}


def _unread(modules: Iterable[Any]) -> set[int]:
    """Projections whose decoding steps read a copy instead, rearranged or in another type (MLA)."""
    found = set()
    for module in modules:
        source = getattr(module, "kv_b_proj", None)
        copies = list(_absorbed(module))
        if source is not None and copies:
            own = {part.untyped_storage().data_ptr() for tensor in _stored(source) for part in plain(tensor)}
            if own.isdisjoint(tensor.untyped_storage().data_ptr() for tensor in copies):
                found.add(id(source))
    return found


def _absorbed(module: Any) -> Iterator[Any]:
    # Plain attributes in older versions, parameters since 0.32.
    for name in _ABSORBED:
        tensor: Any = getattr(module, name, None)
        if hasattr(tensor, "untyped_storage") and tensor.numel():
            yield tensor


def _stored(module: Any) -> Iterator[Any]:
    """The tensors of one module that come from the checkpoint: no rotary tables, no scalar scales."""
    computed = getattr(module, "_non_persistent_buffers_set", ())
    for tensor in module._parameters.values():
        if tensor is not None and tensor.numel():
            yield tensor
    for name, buffer in module._buffers.items():
        if name not in computed and buffer is not None and buffer.numel() > 1:
            yield buffer
    if "MLA" in type(module).__name__:
        yield from (tensor for tensor in _absorbed(module))
    method = getattr(module, "quant_method", None)
    # One that vLLM put before it keeps what was loaded.
    for keeper in (module, method, getattr(method, "old_quant_method", None)):
        if keeper is not None and hasattr(keeper, "__dict__"):
            yield from (tensor for _, tensor in wrapped(keeper))


def _kind(name: str, module: Any) -> str:
    classes = {cls.__name__ for cls in type(module).__mro__}
    if "ParallelLMHead" in classes or name.rpartition(".")[2] == "lm_head":
        return "head"
    if "VocabParallelEmbedding" in classes or "Embedding" in classes:
        return "embedding"
    if "FusedMoE" in classes or "RoutedExperts" in classes:
        return "experts"
    return "experts" if ".experts" in f".{name}" and "shared" not in name else "linear"


def _is_input(name: str) -> bool:
    return name.rpartition(".")[2] in ("embed_tokens", "wte", "word_embeddings", "tok_embeddings")


def _matmul_params(kind: str, module: Any) -> int:
    """Logical parameters that take part in matrix products, whatever their stored form."""
    if kind == "embedding" or "base_layer" in module._modules:  # round it for adapters, with the same sizes
        return 0
    for suffix in ("_per_partition", ""):  # replicated layers name only the whole sizes
        rows, columns = (getattr(module, f"{side}_size{suffix}", None) for side in ("output", "input"))
        if isinstance(rows, int) and isinstance(columns, int):
            return rows * columns
    if kind == "head":
        vocabulary = getattr(module, "num_embeddings_per_partition", 0) or 0
        return int(vocabulary) * int(getattr(module, "embedding_dim", 0) or 0)
    if kind == "experts":
        return _expert_params(module)
    weight = module._parameters.get("weight")
    return int(weight.numel()) if weight is not None and weight.dim() >= 2 else 0


def _expert_params(module: Any) -> int:
    config = getattr(module, "moe_config", None)

    def size(unpadded: str, padded: str) -> int:
        # Kernels of packed formats want multiples of 128 or so; the rest is zeros.
        return int(getattr(config, unpadded, 0) or getattr(module, padded, 0) or 0)

    hidden = size("hidden_dim_unpadded", "hidden_size")
    inner = size("intermediate_size_per_partition_unpadded", "intermediate_size_per_partition")
    gated = getattr(config, "is_act_and_mul", True)
    return (3 if gated else 2) * hidden * inner * int(getattr(module, "local_num_experts", 0) or 0)


def _routing(module: Any) -> tuple[int, int] | None:
    """Experts that a token may go to, replicas included, and how many it goes to."""
    count, top_k = getattr(module, "global_num_experts", None), getattr(module, "top_k", None)
    return (count, top_k) if isinstance(count, int) and isinstance(top_k, int) and count and top_k else None


def _matmul_dtype(module: Any) -> str | None:
    """What a quantised layer multiplies in, None for the model's own type.

    Weights that are only stored in fewer bits are unpacked on the way: their kernels keep them as int32 or
    uint8, or, for experts in int8, in a method of that name.
    """
    method = getattr(module, "quant_method", None)
    scheme = getattr(module, "scheme", None)
    named = f"{type(method).__name__} {type(scheme).__name__}"
    for name in ("weight", "w13_weight", "qweight", "weight_packed", "w13_weight_packed"):
        tensor = module._parameters.get(name)
        if tensor is None:
            continue
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype.startswith("float8") or (dtype == "int8" and "ExpertsInt8" not in named):
            return dtype
        return "fp4" if dtype == "uint8" and any(part in named for part in _FP4) else None
    return None
