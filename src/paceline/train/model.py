"""Small GPT-2 models with random weights."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase


def make_gpt2(
    tokenizer: PreTrainedTokenizerBase,
    *,
    width: int,
    layers: int,
    heads: int,
    positions: int,
    seed: int,
) -> GPT2LMHeadModel:
    """A randomly initialised GPT-2 without dropout.

    Args:
        tokenizer: its size and its end of text are used.
        width: of the residual stream, a multiple of `heads`.
        layers: number of blocks.
        heads: attention heads of a block.
        positions: longest sequence, tokens.
        seed: of the initial weights.
    """
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=positions,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        activation_function="gelu_pytorch_tanh",  # GPT-2's own, in one kernel
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(seed)
    return GPT2LMHeadModel(config)
