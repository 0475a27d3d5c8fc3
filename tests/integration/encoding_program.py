"""Makes a tiny audio model and serves it offline: one request with a second of sound, one without.

python encoding_program.py FOLDER [DTYPE]
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

SPECIAL = ["<pad>", "<eos>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]


def make_model(path: Path) -> None:
    """A configuration and a processor; vLLM makes the weights up."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen2AudioConfig,
        Qwen2AudioEncoderConfig,
        Qwen2AudioProcessor,
        Qwen2Config,
        WhisperFeatureExtractor,
    )

    names = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={name: at for at, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    processor = Qwen2AudioProcessor(
        feature_extractor=WhisperFeatureExtractor(feature_size=16),
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>"),
    )
    encoder = Qwen2AudioEncoderConfig(
        d_model=32, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=64, num_mel_bins=16
    )
    language = Qwen2Config(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=512,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=1,
    )
    config = Qwen2AudioConfig(audio_config=encoder, text_config=language, audio_token_index=2)
    config.architectures = ["Qwen2AudioForConditionalGeneration"]
    config.save_pretrained(path)
    processor.save_pretrained(path)


def main() -> None:
    from vllm import LLM, SamplingParams

    path = Path(sys.argv[1])
    make_model(path)
    llm = LLM(
        str(path),
        load_format="dummy",
        dtype=sys.argv[2] if len(sys.argv) > 2 else "float32",
        gpu_memory_utilization=0.3,
        enforce_eager=True,
        max_model_len=1536,
        limit_mm_per_prompt={"audio": 1},
    )
    wanted = SamplingParams(max_tokens=5, ignore_eos=True)
    sound = np.random.default_rng(0).random(16_000, dtype=np.float32), 16_000
    prompt = "<|audio_bos|><|AUDIO|><|audio_eos|>what is this?"
    llm.generate([{"prompt": prompt, "multi_modal_data": {"audio": sound}}], wanted)
    llm.generate([{"prompt": "what is this?"}], wanted)


if __name__ == "__main__":
    main()
