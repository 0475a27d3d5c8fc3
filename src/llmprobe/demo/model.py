"""A tiny Llama with random weights and its own tokenizer, made on the spot: nothing is downloaded.

It says nothing sensible, but every engine serves it like any other model, and its sizes are exact.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_STAMP = "llmprobe-model.json"
_FORMAT = 2  # counts up when the same parameters give other files

_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['role'] }}: {{ message['content'] }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

# What the tokenizer's merges are learnt from. Every byte has a token of its own, so any text works.
_TEXT = """
A language model reads a prompt and writes an answer, one token after another. Reading the prompt is called
prefill: all of its tokens pass through the model together, and the work is large matrix products, so the
processor is bound by the rate of its arithmetic. Writing the answer is called decode: each step passes one
token for every request through the same weights, and all of these weights are read from memory for that one
token, so the processor is bound by the bandwidth of its memory. Between two steps the host schedules the next
batch, prepares its inputs and launches its kernels, and while it does so the device may wait with nothing to
do. Whoever wants a faster server must know which of these it is: computing, moving bytes, or waiting.

The time to the first token is what a reader waits before anything appears; the time per output token is how
fast the rest follows. A larger batch shares one reading of the weights among more requests, so the server
writes more tokens in a second, while each of its readers waits a little longer. The keys and values of what
was read before are kept in a cache, which grows with every token, and which must be read again at every step.
When that cache is full, requests have to wait in a queue, or are thrown out and read again from the start.

The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs. Numbers such as 0, 1, 2,
3, 4, 5, 6, 7, 8 and 9, dates such as 2024-12-31, code such as `for i in range(10): print(i * i)` and names
such as John, Mary, Peter, Anna, London, Paris, Tokyo and New York should be written with few tokens too.
What is the capital of France? Who wrote this story? How does a compiler work? Why is the sky blue? When will
the train arrive? Where did they go? Tell me about the history of the railway, please. Explain this function.
"""


@dataclass(frozen=True)
class ModelSpec:
    """The parameters of a tiny Llama. Equal specs give equal files, byte for byte, on one machine."""

    hidden: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    intermediate: int = 768
    vocab: int = 512
    max_length: int = 4096
    dtype: str = "bfloat16"
    tie: bool = False
    seed: int = 0


def make_model(
    path: Path,
    *,
    hidden: int = 256,
    layers: int = 4,
    heads: int = 4,
    kv_heads: int = 2,
    intermediate: int = 768,
    vocab: int = 512,
    max_length: int = 4096,
    dtype: str = "bfloat16",
    tie: bool = False,
    seed: int = 0,
) -> Path:
    """Make a model directory that vLLM and transformers load: configuration, safetensors, tokenizer.

    A directory that already holds this very model is left as it is, so this costs seconds only once.

    Args:
        path: the model's directory; made if missing.
        hidden: width of the residual stream; ``hidden / heads`` should be 32, 64 or 128 for vLLM.
        layers: decoder layers.
        heads: query heads.
        kv_heads: key and value heads.
        intermediate: width of the feed-forward part.
        vocab: tokens of the tokenizer and rows of the embedding, 300 to 700.
        max_length: longest sequence in tokens.
        dtype: a torch floating-point type's name, in which the weights are stored.
        tie: whether input and output embedding are one tensor.
        seed: of the random weights.

    Returns:
        ``path``.

    Raises:
        FileExistsError: ``path`` holds something that this function did not make.
        ImportError: torch or transformers is missing.
    """
    spec = ModelSpec(hidden, layers, heads, kv_heads, intermediate, vocab, max_length, dtype, tie, seed)
    stamp = _stamp(spec)
    if _holds(path, stamp):
        return path
    if path.exists() and any(path.iterdir()) and not (path / _STAMP).exists():
        raise FileExistsError(f"{path} exists and is not a model made by llmprobe: choose another directory")
    path.parent.mkdir(parents=True, exist_ok=True)
    # Made beside its place and renamed, so that nobody ever loads half a model.
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        _write_tokenizer(work, spec)
        _write_weights(work, spec)
        (work / _STAMP).write_text(stamp)
        work.chmod(0o755)
        if path.exists():
            shutil.rmtree(path)
        with contextlib.suppress(OSError):  # another process was faster; its model is the same
            work.rename(path)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if not _holds(path, stamp):
        raise FileExistsError(f"{path} was changed by another process while the model was made")
    return path


def is_made(path: Path, dtype: str) -> bool:
    """Whether ``path`` holds the default model in this dtype. Imports nothing of the engines."""
    return _holds(path, _stamp(ModelSpec(dtype=dtype)))


def _stamp(spec: ModelSpec) -> str:
    return json.dumps({"format": _FORMAT, **asdict(spec)}, sort_keys=True)


def _holds(path: Path, stamp: str) -> bool:
    try:
        return (path / _STAMP).read_text() == stamp
    except OSError:
        return False


def _write_tokenizer(path: Path, spec: ModelSpec) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=spec.vocab,
        min_frequency=1,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT.splitlines(), trainer)
    if tokenizer.get_vocab_size() != spec.vocab:
        raise ValueError(f"vocab={spec.vocab} cannot be learnt: the text gives {tokenizer.get_vocab_size()}")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<|end|>",
        model_max_length=spec.max_length,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = _CHAT_TEMPLATE
    fast.save_pretrained(path)


def _write_weights(path: Path, spec: ModelSpec) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=spec.vocab,
        hidden_size=spec.hidden,
        intermediate_size=spec.intermediate,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        max_position_embeddings=spec.max_length,
        tie_word_embeddings=spec.tie,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        model = LlamaForCausalLM(config).to(getattr(torch, spec.dtype))
        if not spec.tie:
            # The most likely tokens are then printable, and never the end: its row gives 0, others more.
            with torch.no_grad():
                model.lm_head.weight[_unprintable(path)] = 0
    model.save_pretrained(path)


def _unprintable(path: Path) -> list[int]:
    """Ids of the tokens that are special, or not printable ASCII by themselves."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    texts = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    return [
        token
        for token, text in enumerate(texts)
        if token in tokenizer.all_special_ids or not (text.isascii() and text.isprintable())
    ]


def main() -> None:
    """``python -m llmprobe.demo.model PATH [DTYPE]``: make the default model."""
    import sys

    make_model(Path(sys.argv[1]), dtype=sys.argv[2] if len(sys.argv) > 2 else ModelSpec.dtype)


if __name__ == "__main__":
    main()
