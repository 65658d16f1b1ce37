"""A tiny checkpoint on disk, with a tokenizer made here, and texts for it. Nothing comes from the network."""

import itertools
import random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import FalconConfig, FalconForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONSONANTS, VOWELS = "bdfgklmnprst", "aeiou"
SYLLABLES = [a + b for a, b in itertools.product(CONSONANTS, VOWELS)]


def words(count, seed=0):
    """`count` words of two to four syllables; no long run of them comes twice."""
    draw = random.Random(seed)
    return ["".join(draw.choices(SYLLABLES, k=draw.randint(2, 4))) for _ in range(count)]


def text_of(count, seed=0, paragraph=60):
    """`count` words in paragraphs."""
    given = words(count, seed)
    return "\n\n".join(" ".join(given[i : i + paragraph]) for i in range(0, count, paragraph))


def tiny_tokenizer():
    """Pieces are syllables and spaces: a byte-level BPE whose merges are our syllables. About 320 ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["<s>", "</s>", *alphabet, *SYLLABLES]
    merges = [(syllable[0], syllable[1]) for syllable in SYLLABLES]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def save_tiny_checkpoint(folder, *, layers=2, num_kv_heads=2, seed=1, **more):
    """A random Llama whose weights are large enough that what a head keeps matters to the loss."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=2 * num_kv_heads,
        num_key_value_heads=num_kv_heads,
        vocab_size=len(tokenizer),
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        **more,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_tiny_falcon(folder):
    """An architecture that computes its attention by itself: nothing can be put in its place."""
    tokenizer = tiny_tokenizer()
    config = FalconConfig(
        hidden_size=64, num_attention_heads=4, num_hidden_layers=2, vocab_size=len(tokenizer), alibi=False
    )
    FalconForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
