"""A stand-in for the ``LPD`` object of its authors' repository, and for its mask.

It has the parts, the parameter names and the habits of that object (static caches of full size,
queries that lie in them until the tokens come, an order for each image, a mask over all positions),
and was written for these tests from that description, with other arithmetic where one can choose.
"""

from __future__ import annotations

import torch
from torch import nn

#: Positions of every static cache that was made.
MADE: list[int] = []


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(0.1)

    def enable_kv_cache(self, bs, max_seq_len, device, dtype):
        MADE.append(max_seq_len)
        self.k_cache, self.v_cache = torch.zeros(
            2, bs, self.num_heads, max_seq_len, self.head_dim, dtype=dtype
        )

    def disable_kv_cache(self):
        self.k_cache = self.v_cache = None

    def heads(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.num_heads, self.head_dim).unbind(2)
        return (t.transpose(1, 2) for t in (self.q_norm(q), self.k_norm(k), v))

    def mixed(self, x, q, k, v, mask):
        scores = q @ k.mT / self.head_dim**0.5 + mask
        out = (scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape)
        return self.proj_drop(self.proj(out))

    def forward(self, x, mask):
        return self.mixed(x, *self.heads(x), mask)

    def forward_inference(self, x, input_pos, attn_mask):
        q, k, v = self.heads(x)
        self.k_cache[:, :, input_pos], self.v_cache[:, :, input_pos] = k, v
        end = int(input_pos[-1]) + 1
        mask = attn_mask[input_pos, :end]
        return self.mixed(x, q, self.k_cache[:, :, :end], self.v_cache[:, :, :end], mask)


class Mlp(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        x = self.fc1(x)
        return self.fc2(x * (1 + torch.erf(x / 2**0.5)) / 2)


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.attn, self.mlp = Attention(width, heads), Mlp(width, 3 * width)

    def forward(self, x, mask):
        x = x + self.attn(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))

    def forward_inference(self, x, input_pos, attn_mask):
        x = x + self.attn.forward_inference(self.norm1(x), input_pos, attn_mask)
        return x + self.mlp(self.norm2(x))


class LPD(nn.Module):
    def __init__(self, side=6, width=32, depth=2, heads=2, classes=5, vocabulary=40):
        super().__init__()
        self.seq_h = self.seq_w = side
        self.seq_len, self.num_classes = side * side, classes
        self.class_emb = nn.Embedding(classes, width)
        self.token_emb = nn.Embedding(vocabulary, width)
        self.fake_latent = nn.Parameter(torch.randn(1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, self.seq_len + 1, width))
        self.z_proj_ln = nn.LayerNorm(width, eps=1e-6)
        self.mask_token = nn.Parameter(torch.randn(1, 1, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, x, mask):
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))

    def enable_kv_cache(self, max_bs, max_seq_len, n_cond_tokens=1, device="cpu"):
        for block in self.blocks:
            block.attn.enable_kv_cache(max_bs, n_cond_tokens + max_seq_len, device, torch.float32)

    def disable_kv_cache(self):
        for block in self.blocks:
            block.attn.disable_kv_cache()

    @torch.no_grad()
    def sample_tokens(
        self,
        bsz,
        cfg=1.0,
        cfg_schedule="linear",
        labels=None,
        temperature=1.0,
        attn_mask=None,
        group_sizes=None,
        orders=None,
    ):
        halves = 1 if cfg == 1.0 else 2
        if isinstance(group_sizes, str):
            group_sizes = [int(size) for size in group_sizes.strip("[]").split(",")]
        tokens, flat = torch.zeros(bsz, self.seq_len, dtype=torch.long), self.pos_embed[0]
        self.enable_kv_cache(halves * bsz, self.seq_len)
        newest, first, done = self.class_emb(labels)[:, None], 0, 0
        if halves == 2:
            newest = torch.cat([newest, self.fake_latent.expand(bsz, 1, -1)])
        where = torch.zeros(bsz, 1, dtype=torch.long)
        for size in group_sizes:
            asked = orders[:, done : done + size] + 1
            queries = self.mask_token.expand(halves * bsz, size, -1)
            places = flat[torch.cat([where, asked], 1)].repeat(halves, 1, 1)
            x = self.z_proj_ln(torch.cat([newest, queries], 1) + places)
            positions = torch.arange(first, done + 1 + size)
            for block in self.blocks:
                x = block.forward_inference(x, positions, attn_mask)
            logits = self.head(self.norm(x))[:, -size:]
            if halves == 2:
                with_class, without = logits.chunk(2)
                share = torch.arange(done, done + size) / self.seq_len
                scale = cfg if cfg_schedule == "constant" else (1 + (cfg - 1) * share)[:, None]
                logits = without + scale * (with_class - without)
            chances = (logits / temperature).softmax(-1).flatten(0, 1)
            drawn = chances.multinomial(1).view(bsz, size)
            tokens.scatter_(1, orders[:, done : done + size], drawn)
            newest, where = self.token_emb(drawn).repeat(halves, 1, 1), asked
            first, done = done + 1, done + size
        self.disable_kv_cache()
        return tokens


def block_causal_mask(sizes):
    """0 where a group sees itself and those before it, ``[L, L]``; the class is the first group."""
    group = torch.repeat_interleave(torch.arange(len(sizes) + 1), torch.tensor([1, *sizes]))
    hidden = group[None, :] > group[:, None]
    return torch.zeros(hidden.shape).masked_fill(hidden, float("-inf"))
