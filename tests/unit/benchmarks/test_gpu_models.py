"""Models with made-up weights for runs on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.gpu_models import CONFIGURATIONS, make_configuration


def test_every_token_that_a_model_may_choose_has_text(tmp_path: Path) -> None:
    """One that has none holds up vLLM's detokenizer, which then goes over the whole prompt at each token."""
    tokenizers = pytest.importorskip("tokenizers")
    path = make_configuration("dense", tmp_path / "dense")
    tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    vocab = CONFIGURATIONS["dense"]["vocab_size"]
    assert tokenizer.get_vocab_size() == vocab
    texts = tokenizer.decode_batch([[number] for number in range(vocab)], skip_special_tokens=False)
    # A byte that is no character by itself shows as the replacement character.
    assert sum(not text for text in texts) == 0
    assert tokenizer.decode(tokenizer.encode("the time per token").ids) == "the time per token"
