"""A Llama in one file whose KV cache is a `kvpolicy.RaggedStore`: custom_loop.py PROMPT_FILE [PLAN_FILE]."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kvpolicy
from kvpolicy import RaggedStore


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

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Callable[..., Tensor]) -> Tensor:
        def heads(y: Tensor) -> Tensor:  # [B, n, heads * D] -> [B, heads, n, D]
            return y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        q, k, v = rotate(heads(self.q_proj(x)), rope), rotate(heads(self.k_proj(x)), rope), heads(self.v_proj(x))
        out = attend(self.layer, q, k, v)  # updates the cache and attends; k and v are not repeated for query heads
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

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Callable[..., Tensor]) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, attend)
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

    def forward(self, tokens: Tensor, store: RaggedStore, column: int, padding: Tensor | None = None) -> Tensor:
        """tokens: int64 [B, n], the first of them in this column; padding: int64 [B], columns before a row's first."""
        x, count = self.embed_tokens(tokens), tokens.shape[1]
        padding = tokens.new_zeros(len(tokens)) if padding is None else padding
        columns = torch.arange(column, column + count, device=tokens.device)
        rope = rotations((columns - padding[:, None]).clamp(min=0), self.head_dim, self.theta, x)
        is_step = count == 1 and column > int(padding.max())  # one token behind a prompt: every row has some
        attend = store.decode if is_step else partial(store.prefill, num_padding=(padding - column).clamp(0, count))
        for layer in self.layers:
            x = layer(x, rope, attend)
        return self.lm_head(self.norm(x[:, -1]))


def rotations(positions: Tensor, head_dim: int, theta: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions [B, n], [B, 1, n, D]."""
    frequency = theta ** -(torch.arange(0, head_dim, 2, device=like.device) / head_dim)
    angle = (positions[:, None, :, None] * frequency).repeat(1, 1, 1, 2)
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE on [B, heads, n, D]. A store takes keys after it: entries keep their original positions."""
    first, second = x.chunk(2, dim=-1)
    return x * rope[0] + torch.cat([-second, first], dim=-1) * rope[1]


@torch.inference_mode()
def generate(
    model: Llama, store: RaggedStore, prompt: Tensor, count: int, padding: Tensor | None = None, chunk: int = 999
) -> Tensor:
    """prompt: int64 [B, n], fed `chunk` columns at a time. Returns the `count` most likely tokens, int64 [B, count]."""
    for column in range(0, prompt.shape[1], chunk):
        logits = model(prompt[:, column : column + chunk], store, column, padding)
    tokens = [logits.argmax(-1, keepdim=True)]
    for column in range(prompt.shape[1], prompt.shape[1] + count - 1):
        tokens.append(model(tokens[-1], store, column, padding).argmax(-1, keepdim=True))
    return torch.cat(tokens, dim=1)


def main() -> None:
    loaded, tokenizer = kvpolicy.load_model("smollm2-135m")
    model, config = Llama.from_state_dict(loaded.config, loaded.state_dict()), loaded.config
    if len(sys.argv) > 2:
        plan = kvpolicy.load_plan(sys.argv[2])
    else:  # a table of your own: later layers keep less
        table = torch.linspace(512, 128, config.num_hidden_layers).long()[:, None].repeat(1, config.num_key_value_heads)
        plan = kvpolicy.BudgetPlan.from_capacities(kvpolicy.ModelSpec.from_config(config), table, context_length=1024)
    store = RaggedStore.from_plan(plan, retention=plan.retentions[0])
    prompt = tokenizer(Path(sys.argv[1]).read_text(encoding="utf-8"), return_tensors="pt").input_ids
    print(tokenizer.decode(generate(model, store, prompt, 48)[0]))
    print(f"{prompt.shape[1]} tokens of prompt, {store.nbytes / 1e6:.1f} of {store.dense_nbytes / 1e6:.1f} MB held")


if __name__ == "__main__":
    main()
