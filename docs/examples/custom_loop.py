"""A Llama in one file, in the style of gpt-fast, whose KV cache is a `kvpolicy.RaggedStore`.

python docs/examples/custom_loop.py PROMPT_FILE [PLAN_FILE]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kvpolicy


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return (x.float() * scale).to(x.dtype) * self.weight


class Attention(nn.Module):
    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        q_size, kv_size = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], store: kvpolicy.RaggedStore) -> Tensor:
        def heads(y: Tensor) -> Tensor:  # [B, n, heads * D] -> [B, heads, n, D]
            return y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        q, k, v = rotate(heads(self.q_proj(x)), rope), rotate(heads(self.k_proj(x)), rope), heads(self.v_proj(x))
        # the two lines that other caches put here: update the cache, and attend over it
        attend = store.decode if x.shape[1] == 1 else store.prefill
        out = attend(self.layer, q, k, v)  # k and v are never repeated for the query heads
        return self.o_proj(out.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], store: kvpolicy.RaggedStore) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, store)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Modules are named as in a transformers checkpoint, so that its state dict fits."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.head_dim, self.theta = config.head_dim, config.rope_parameters["rope_theta"]

    @classmethod
    def from_state_dict(cls, config: Any, weights: dict[str, Tensor]) -> Llama:
        """Weights of `LlamaForCausalLM`; where the head is tied to the embedding it may be missing."""
        named = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
        named.setdefault("lm_head.weight", named["embed_tokens.weight"])
        with torch.device("meta"):
            model = cls(config)
        model.load_state_dict(named, assign=True)
        return model.eval()

    def forward(self, tokens: Tensor, store: kvpolicy.RaggedStore, position: int) -> Tensor:
        """tokens: int64 [B, n], the first of them at `position`. Returns the logits of the last, [B, vocabulary]."""
        x = self.embed_tokens(tokens)
        rope = rotations(position, tokens.shape[1], self.head_dim, self.theta, x)
        for layer in self.layers:
            x = layer(x, rope, store)
        return self.lm_head(self.norm(x[:, -1]))


def rotations(position: int, count: int, head_dim: int, theta: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of `count` positions, [count, D]."""
    frequency = theta ** -(torch.arange(0, head_dim, 2, device=like.device) / head_dim)
    angle = torch.outer(torch.arange(position, position + count, device=like.device), frequency).repeat(1, 2)
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE on [B, heads, n, D]. A store takes keys after it: entries keep their original positions."""
    first, second = x.chunk(2, dim=-1)
    return x * rope[0] + torch.cat([-second, first], dim=-1) * rope[1]


@torch.inference_mode()
def generate(model: Llama, store: kvpolicy.RaggedStore, prompt: Tensor, count: int) -> Tensor:
    """prompt: int64 [B, n]. Returns `count` tokens behind it, the most likely ones, int64 [B, count]."""
    tokens = [model(prompt, store, 0).argmax(-1, keepdim=True)]
    for position in range(prompt.shape[1], prompt.shape[1] + count - 1):
        tokens.append(model(tokens[-1], store, position).argmax(-1, keepdim=True))
    return torch.cat(tokens, dim=1)


def main() -> None:
    loaded, tokenizer = kvpolicy.load_model("smollm2-135m")
    model, config = Llama.from_state_dict(loaded.config, loaded.state_dict()), loaded.config
    if len(sys.argv) > 2:
        plan = kvpolicy.load_plan(sys.argv[2])
    else:  # a table of your own: later layers keep less
        table = torch.linspace(512, 128, config.num_hidden_layers).long()[:, None].repeat(1, config.num_key_value_heads)
        plan = kvpolicy.BudgetPlan.from_capacities(kvpolicy.ModelSpec.from_config(config), table, context_length=1024)
    store = kvpolicy.RaggedStore.from_plan(plan, retention=plan.retentions[0])
    prompt = tokenizer(Path(sys.argv[1]).read_text(encoding="utf-8"), return_tensors="pt").input_ids
    print(tokenizer.decode(generate(model, store, prompt, 48)[0]))
    print(f"{prompt.shape[1]} tokens of prompt, {store.nbytes / 1e6:.1f} of {store.dense_nbytes / 1e6:.1f} MB held")


if __name__ == "__main__":
    main()
