"""DBRX in float64 NumPy, one loop per sum in the formulas: what every other implementation is compared with.

It reads a `config.json` as it stands and the tensors of a Hugging Face fused checkpoint by their own names, and
shares no code with `dbrx_fn`. One sequence at a time; every array is float64 unless it holds token or expert ids.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Config = Mapping[str, Any]
Tensors = Mapping[str, NDArray[Any]]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Activation = Callable[[Floats], Floats]


def silu(x: Floats) -> Floats:
    return x / (1.0 + np.exp(-x))


def relu(x: Floats) -> Floats:
    return np.maximum(x, 0.0)


def gelu(x: Floats) -> Floats:
    erf = np.array([math.erf(value / math.sqrt(2.0)) for value in x.ravel()]).reshape(x.shape)
    return 0.5 * x * (1.0 + erf)


def gelu_tanh(x: Floats) -> Floats:
    return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS: dict[str, Activation] = {
    "silu": silu,
    "relu": relu,
    "gelu": gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
}
"""By the name that `ffn_config.ffn_act_fn` gives them."""


def softmax(x: Floats) -> Floats:
    """Over the one axis of `x`."""
    exponentials: Floats = np.exp(x - x.max())
    total: Floats = exponentials.sum()
    return exponentials / total


def layer_norm(x: Floats, weight: Floats) -> Floats:
    """`x` [time d_model], `weight` [d_model] -> [time d_model]; eps 1e-5 and no bias."""
    centered: Floats = x - x.mean(axis=-1, keepdims=True)
    variance: Floats = (centered**2).mean(axis=-1, keepdims=True)
    return centered / np.sqrt(variance + 1e-5) * weight


def rope(x: Floats, theta: float) -> Floats:
    """`x` [time head_dim], its row t at position t; dimension i turns with dimension i + head_dim / 2."""
    time, head_dim = x.shape
    half = head_dim // 2
    rotated = np.empty_like(x)
    for t in range(time):
        for i in range(half):
            angle = t * theta ** (-2.0 * i / head_dim)
            first, second = x[t, i], x[t, i + half]
            rotated[t, i] = first * math.cos(angle) - second * math.sin(angle)
            rotated[t, i + half] = first * math.sin(angle) + second * math.cos(angle)
    return rotated


def turned(x: Floats, position: int, theta: float) -> Floats:
    """One head's entries `x` [head_dim] at a position, by the reference's angles, which are float32, as it was trained.

    Its frequencies are 1 / theta^(2i / head_dim) with every step rounded, and an angle is the rounded product.
    """
    half = len(x) // 2
    rotated = np.empty_like(x)
    for i in range(half):
        exponent = np.float32(2 * i) / np.float32(2 * half)
        frequency = np.float32(1) / np.float32(theta ** float(exponent))
        angle = float(np.float32(position) * frequency)
        rotated[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        rotated[i + half] = x[i] * math.sin(angle) + x[i + half] * math.cos(angle)
    return rotated


def attention(config: Config, x: Floats, wqkv: Floats, out_proj: Floats) -> Floats:
    """Causal grouped-query attention over one sequence.

    `x` [time d_model], `wqkv` [(n_heads + 2 * kv_n_heads) * head_dim, d_model], `out_proj` [d_model d_model]
    -> [time d_model].
    """
    n_heads, kv_n_heads = config["n_heads"], config["attn_config"]["kv_n_heads"]
    head_dim = config["d_model"] // n_heads
    clip, theta = config["attn_config"].get("clip_qkv"), config["attn_config"]["rope_theta"]

    qkv = x @ wqkv.T
    if clip is not None:
        qkv = np.clip(qkv, -clip, clip)
    heads = [qkv[:, start : start + head_dim] for start in range(0, qkv.shape[1], head_dim)]
    queries = [rope(q, theta) for q in heads[:n_heads]]
    keys = [rope(k, theta) for k in heads[n_heads : n_heads + kv_n_heads]]
    values = heads[n_heads + kv_n_heads :]

    mixed = np.empty((len(x), n_heads * head_dim))
    for h in range(n_heads):
        group = h // (n_heads // kv_n_heads)
        for t in range(len(x)):
            weights = softmax(keys[group][: t + 1] @ queries[h][t] / math.sqrt(head_dim))
            mixed[t, h * head_dim : (h + 1) * head_dim] = weights @ values[group][: t + 1]
    return mixed @ out_proj.T


def route(x: Floats, weight: Floats, top_k: int, p: float | None) -> tuple[Floats, Ints]:
    """The experts of each token, likeliest first.

    `x` [tokens d_model], `weight` [experts d_model] -> weights [tokens top_k], experts int64 [tokens top_k].
    The chosen weights are divided by their p-norm, or left as they are when `p` is None.
    """
    expert_weights = np.empty((len(x), top_k))
    top_experts = np.empty((len(x), top_k), dtype=np.int64)
    for t in range(len(x)):
        probabilities = softmax(weight @ x[t])
        top_experts[t] = np.argsort(-probabilities, kind="stable")[:top_k]
        chosen = probabilities[top_experts[t]]
        expert_weights[t] = chosen if p is None else chosen / np.linalg.norm(chosen, ord=p)
    return expert_weights, top_experts


def moe(
    x: ArrayLike,
    expert_weights: ArrayLike,
    top_experts: ArrayLike,
    w1: ArrayLike,
    v1: ArrayLike,
    w2: ArrayLike,
    act: Activation = silu,
) -> Floats:
    """The weighted sum of the chosen experts: `w2 @ (act(w1 @ x) * (v1 @ x))`, one token and one expert at a time.

    `x` [tokens d_model], `expert_weights` and int `top_experts` [tokens top_k], `w1` and `v1`
    [experts ffn d_model], `w2` [experts d_model ffn] -> [tokens d_model]. Any float dtype; computed in float64.
    """
    x, expert_weights, w1, v1, w2 = (np.asarray(a, dtype=np.float64) for a in (x, expert_weights, w1, v1, w2))
    top_experts = np.asarray(top_experts, dtype=np.int64)
    out = np.zeros_like(x)
    for t in range(len(x)):
        for weight, e in zip(expert_weights[t], top_experts[t], strict=True):
            out[t] += weight * (w2[e] @ (act(w1[e] @ x[t]) * (v1[e] @ x[t])))
    return out


class Scores(NamedTuple):
    """What a model made of one sequence.

    `logits` [time vocab], `router_logits` [layer time expert], `top_experts` int64 [layer time top_k].
    """

    logits: Floats
    router_logits: Floats
    top_experts: Ints


def forward(config: Config, tensors: Tensors, tokens: ArrayLike) -> Floats:
    """`tokens` int [time] -> logits float64 [time vocab]; see `score`."""
    return score(config, tensors, tokens).logits


def score(config: Config, tensors: Tensors, tokens: ArrayLike) -> Scores:
    """`tokens` int [time] -> their logits, and what the routers said.

    `config` is a raw `config.json` and `tensors` a Hugging Face fused checkpoint, both by their own names. Absent
    keys mean what they mean to Databricks' code: `clip_qkv` no clamp, `moe_normalize_expert_weights` 1, and
    `ffn_act_fn` silu.
    """

    def tensor(name: str) -> Floats:
        return tensors[name].astype(np.float64)

    ffn = config["ffn_config"]
    act = ACTIVATIONS[(ffn.get("ffn_act_fn") or {"name": "silu"})["name"]]
    stacked = (ffn["moe_num_experts"], ffn["ffn_hidden_size"], config["d_model"])
    router_logits: list[Floats] = []
    choices: list[Ints] = []

    x = tensor("transformer.wte.weight")[np.asarray(tokens, dtype=np.int64)]
    for i in range(config["n_layers"]):
        block = f"transformer.blocks.{i}"
        norm_attn_norm = f"{block}.norm_attn_norm"
        normed = layer_norm(x, tensor(f"{norm_attn_norm}.norm_1.weight"))
        wqkv, out_proj = tensor(f"{norm_attn_norm}.attn.Wqkv.weight"), tensor(f"{norm_attn_norm}.attn.out_proj.weight")
        x = x + attention(config, normed, wqkv, out_proj)

        normed = layer_norm(x, tensor(f"{norm_attn_norm}.norm_2.weight"))
        router = tensor(f"{block}.ffn.router.layer.weight")
        p = ffn.get("moe_normalize_expert_weights", 1)
        expert_weights, top_experts = route(normed, router, ffn["moe_top_k"], p)
        router_logits.append(normed @ router.T)
        choices.append(top_experts)
        w1, v1, w2 = (tensor(f"{block}.ffn.experts.mlp.{name}").reshape(stacked) for name in ("w1", "v1", "w2"))
        x = x + moe(normed, expert_weights, top_experts, w1, v1, w2.transpose(0, 2, 1), act)

    logits = layer_norm(x, tensor("transformer.norm_f.weight")) @ tensor("lm_head.weight").T
    return Scores(logits, np.stack(router_logits), np.stack(choices))


class Loss(NamedTuple):
    """A loss's parts, and the experts that were chosen, int64 [layer token top_k]."""

    cross_entropy: float
    load_balance: float
    router_z: float
    top_experts: Ints

    def total(self, load_balance_weight: float, z_loss_weight: float = 0.0) -> float:
        """The weighted sum of the parts."""
        return self.cross_entropy + load_balance_weight * self.load_balance + z_loss_weight * self.router_z


def loss(config: Config, tensors: Tensors, rows: Sequence[ArrayLike], masks: Sequence[ArrayLike]) -> Loss:
    """Of sequences of any lengths: each token is predicted from those before it, where its `masks` is true.

    All tokens but each row's last are routed, and all count alike in the means.
    """
    nats: list[float] = []
    scores: list[Scores] = []
    for row, mask in zip(rows, masks, strict=True):
        tokens = np.asarray(row, dtype=np.int64)
        scores.append(score(config, tensors, tokens[:-1]))
        for t in range(len(tokens) - 1):
            if np.asarray(mask)[t + 1]:
                nats.append(-math.log(softmax(scores[-1].logits[t])[tokens[t + 1]]))

    router_logits = np.concatenate([one.router_logits for one in scores], axis=1)
    top_experts = np.concatenate([one.top_experts for one in scores], axis=1)
    layers, tokens_in_all, experts = router_logits.shape
    balance = z = 0.0
    for layer in range(layers):
        for e in range(experts):
            share = float((top_experts[layer] == e).mean())
            probability = sum(float(softmax(said)[e]) for said in router_logits[layer]) / tokens_in_all
            balance += experts * share * probability / layers
        for said in router_logits[layer]:
            z += math.log(np.exp(said).sum()) ** 2 / tokens_in_all / layers
    return Loss(sum(nats) / max(len(nats), 1), balance, z, top_experts)


def greedy(config: Config, tensors: Tensors, tokens: Sequence[int], n: int) -> list[int]:
    """The `n` likeliest next tokens after `tokens`, each step computed anew from the whole sequence."""
    sequence = list(tokens)
    for _ in range(n):
        sequence.append(int(forward(config, tensors, sequence)[-1].argmax()))
    return sequence[len(tokens) :]
