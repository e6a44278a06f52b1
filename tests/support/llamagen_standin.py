"""A stand-in for the ``Transformer`` of LlamaGen's repository, and for its ``generate``.

It has the parts, the parameter names and the habits of that object (a static cache of full size, a
mask over all positions that ``generate`` writes into, a rotation that is zero for the condition),
and was written for these tests from that description, with other arithmetic where one can choose.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

#: Slots of every static cache that was made.
MADE: list[int] = []


class StaticCache(nn.Module):
    def __init__(self, batch: int, slots: int, heads: int, dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        MADE.append(slots)
        self.register_buffer("k_cache", torch.zeros(batch, heads, slots, dim, dtype=dtype))
        self.register_buffer("v_cache", torch.zeros(batch, heads, slots, dim, dtype=dtype))

    def update(self, input_pos, key, value):
        self.k_cache.index_copy_(2, input_pos, key)
        self.v_cache.index_copy_(2, input_pos, value)
        return self.k_cache, self.v_cache


def turn(x: Tensor, table: Tensor) -> Tensor:
    """Pairs of dimensions as complex numbers, times one of the table."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    turned = pairs * torch.view_as_complex(table.contiguous())[None, :, None]
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


def turns(side: int, dim: int, prefix: int) -> Tensor:
    entries = [torch.zeros(dim // 2, 2)] * prefix
    speeds = torch.tensor([10000.0 ** (-4 * i / dim) for i in range(dim // 4)])
    for row in range(side):
        for column in range(side):
            angle = torch.cat([row * speeds, column * speeds])
            entries.append(torch.view_as_real(torch.polar(torch.ones(dim // 2), angle)))
    return torch.stack(entries)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.n_head = self.n_kv_head = heads
        self.head_dim = width // heads
        self.wqkv = nn.Linear(width, 3 * width, bias=False)
        self.wo = nn.Linear(width, width, bias=False)
        self.resid_dropout = nn.Dropout(0.1)
        self.kv_cache = None

    def forward(self, x, freqs_cis=None, input_pos=None, mask=None):
        batch, count, width = x.shape
        shape = (batch, count, self.n_head, self.head_dim)
        q, k, v = (part.reshape(shape) for part in self.wqkv(x).chunk(3, dim=-1))
        q, k, v = (t.transpose(1, 2) for t in (turn(q, freqs_cis), turn(k, freqs_cis), v))
        if self.kv_cache is not None:
            k, v = self.kv_cache.update(input_pos, k, v)
        out = functional.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
        return self.resid_dropout(self.wo(out.transpose(1, 2).reshape(batch, count, width)))


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)

    def forward(self, x):
        return self.w2(self.w3(x) * functional.silu(self.w1(x)))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.feed_forward = FeedForward(width, 48)
        self.attention_norm = nn.RMSNorm(width, eps=1e-5)
        self.ffn_norm = nn.RMSNorm(width, eps=1e-5)

    def forward(self, x, freqs_cis, start_pos, mask=None):
        x = x + self.attention(self.attention_norm(x), freqs_cis, start_pos, mask)
        return x + self.feed_forward(self.ffn_norm(x))


class Classes(nn.Module):
    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)

    def forward(self, condition, train):
        return self.embedding_table(condition)[:, None]


class Projection(nn.Module):
    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(size, width, bias=False)
        self.fc2 = nn.Linear(width, width, bias=False)

    def forward(self, x):
        return self.fc2(functional.gelu(self.fc1(x), approximate="tanh"))


class Captions(nn.Module):
    def __init__(self, size: int, width: int, length: int) -> None:
        super().__init__()
        self.cap_proj = Projection(size, width)
        self.register_buffer("uncond_embedding", torch.randn(length, size))

    def forward(self, condition, train):
        return self.cap_proj(condition)


class Transformer(nn.Module):
    def __init__(self, kind: str, *, side=6, layers=2, heads=2, width=32, vocab=40, caption=7):
        super().__init__()
        self.model_type = kind
        self.block_size = side * side
        self.cls_token_num = 1 if kind == "c2i" else caption
        self.num_classes = 9
        captions = kind == "t2i"
        embedding = Captions(12, width, caption) if captions else Classes(self.num_classes, width)
        self.cls_embedding = embedding
        self.tok_embeddings = nn.Embedding(vocab, width)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.output = nn.Linear(width, vocab, bias=False)
        self.freqs_cis = turns(side, width // heads, self.cls_token_num)
        self.max_batch_size = self.max_seq_length = -1

    def setup_caches(self, max_batch_size, max_seq_length, dtype):
        slots = -(-max_seq_length // 8) * 8
        self.max_batch_size, self.max_seq_length = max_batch_size, slots
        for layer in self.layers:
            attention = layer.attention
            attention.kv_cache = StaticCache(
                max_batch_size, slots, attention.n_head, attention.head_dim, dtype
            )
        self.causal_mask = torch.ones(max_batch_size, slots, slots).tril().bool()
        self.freqs_cis = self.freqs_cis.clone()

    def forward(self, idx, cond_idx, input_pos=None, targets=None, mask=None, valid=None):
        parts = [] if cond_idx is None else [self.cls_embedding(cond_idx, train=self.training)]
        if idx is not None:
            parts.append(self.tok_embeddings(idx))
        x = torch.cat(parts, dim=1)
        if input_pos is None:
            table = self.freqs_cis[: x.shape[1]]
        else:
            table = self.freqs_cis[input_pos]
            mask = self.causal_mask[: len(x), None, input_pos]
        for layer in self.layers:
            x = layer(x, table, input_pos, mask)
        return self.output(self.norm(x)).float(), None


@torch.no_grad()
def generate(
    model, cond, max_new_tokens, emb_masks=None, cfg_scale=1.0, cfg_interval=-1, sample_logits=True
):
    rows, guided = len(cond), cfg_scale > 1.0
    if guided:
        nothing = torch.full_like(cond, 9) if cond.ndim == 1 else model.cls_embedding
        nothing = nothing if cond.ndim == 1 else nothing.uncond_embedding.expand_as(cond)
        cond = torch.cat([cond, nothing])
    prefix = model.cls_token_num
    model.setup_caches(
        max_batch_size=len(cond),
        max_seq_length=prefix + max_new_tokens,
        dtype=model.tok_embeddings.weight.dtype,
    )
    if emb_masks is not None:
        both = emb_masks.repeat(len(cond) // rows, 1)
        model.causal_mask[:, :, :prefix] *= both[:, None].bool()
        itself = torch.eye(model.causal_mask.shape[1]).bool()
        model.causal_mask[:] = model.causal_mask | itself
    drawn = []
    for index in range(max_new_tokens):
        if index == 0:
            logits = model(None, cond, torch.arange(prefix))[0][:, -1]
        else:
            ids = drawn[-1].repeat(len(cond) // rows, 1)
            logits = model(ids, None, torch.tensor([prefix + index - 1]))[0][:, -1]
        if guided:
            logits, other = logits[:rows], logits[rows:]
            if index == 0 or cfg_interval < 0 or index - 1 <= cfg_interval:
                logits = other + (logits - other) * cfg_scale
        chances = logits.softmax(-1)
        token = chances.multinomial(1) if sample_logits else chances.argmax(-1, keepdim=True)
        drawn.append(token)
    return torch.cat(drawn, dim=1)
