"""A tokenizer of bytes, which is made in no time."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def of_bytes(chat: str | None) -> PreTrainedTokenizerFast:
    """Like Llama's, without a token for padding; with a chat template, like Qwen's."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    found = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)} | {"<end>": len(letters)}, []))
    found.pre_tokenizer, found.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=found, eos_token="<end>")
    made.chat_template = chat
    return made
