"""The starter's tokenizer: characters and the marks of a chat."""

from __future__ import annotations

import string
from typing import Any

PAD, USER, ASSISTANT, END, UNKNOWN = "<pad>", "<user>", "<assistant>", "<end>", "<unk>"
SPECIAL = (PAD, USER, ASSISTANT, END, UNKNOWN)
ALPHABET = tuple(sorted(string.ascii_letters + string.digits + string.punctuation + " \n"))


def build_tokenizer() -> Any:
    """One token a character, plus the marks of a chat; a ``PreTrainedTokenizerFast``."""
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate((*SPECIAL, *ALPHABET))}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN))
    raw.decoder = decoders.Fuse()
    raw.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=(
            "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}"
            "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
        ),
    )
