"""The bundled model's tokenizer: byte-level BPE that splits text as Llama 3 does, with a small vocabulary.

Sharing Llama 3's split pattern and the names of its special tokens means that a prompt breaks into the same
*words* for both models, and that code which handles the beginning-of-text token for one handles it for the
other. Only the merges differ: a few thousand, learned from the training books, instead of 128,000.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PARAGRAPH = re.compile(r"[^\n]+\n*|\n+")


def learn_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """Byte-level BPE with `vocab_size` entries, special tokens first (BOS is 0, EOS is 1).

    Encoding adds exactly one BOS, unless `add_special_tokens=False`. Every byte string can be encoded.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Paragraph by paragraph: a whole book at once is one very long sequence to pre-tokenise.
    tokenizer.train_from_iterator((part for text in texts for part in PARAGRAPH.findall(text)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer saved in a model folder."""
    return AutoTokenizer.from_pretrained(str(folder))


def encode(tokenizer: Any, text: str) -> np.ndarray:
    """Token ids of `text` without special tokens, int64 [n_tokens]."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return np.asarray(ids, dtype=np.int64)
