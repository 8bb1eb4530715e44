"""The oracle with one mistake built in: what each trap of deepseek-v4.md section 7 would compute.

A trap test shows two things: our logits are those of the right oracle, and those of the oracle with
the mistake are far away, so the test could not pass if our code made it. The mistakes are made in
transformers' modules and never in ours: they stay what they are when our code is rewritten.

One catalogue, hence its length: a mistake is read beside its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as theirs

Patch = Callable[[Any, "Swap"], None]


class Swap:
    """Replaces attributes and puts them back."""

    def __init__(self) -> None:
        self._old: list[tuple[Any, str, Any]] = []

    def set(self, target: Any, name: str, value: Any) -> None:
        own = vars(target).get(name, self)
        self._old.append((target, name, own))
        setattr(target, name, value)

    def undo(self) -> None:
        for target, name, own in reversed(self._old):
            if own is self:
                delattr(target, name)
            else:
                setattr(target, name, own)


@contextmanager
def made(mistake: Patch, model: Any) -> Iterator[None]:
    swap = Swap()
    try:
        mistake(model, swap)
        yield
    finally:
        swap.undo()


def attentions(model: Any, *kinds: str) -> Iterator[Any]:
    for block in model.model.layers:
        if not kinds or block.self_attn.layer_type in kinds:
            yield block.self_attn


SLIDING, CSA, HCA = (
    "sliding_attention",
    "compressed_sparse_attention",
    "heavily_compressed_attention",
)


def half_split_pairs(model: Any, swap: Swap) -> None:
    """T1: pairs (k, k + n/2) instead of (2k, 2k + 1)."""

    def rotate(x: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Tensor:
        cos, sin = (torch.cat((t, t), -1).unsqueeze(unsqueeze_dim) for t in (cos, sin))
        nope, rope = x[..., : -cos.shape[-1]], x[..., -cos.shape[-1] :]
        low, high = rope.chunk(2, -1)
        return torch.cat((nope, rope * cos + torch.cat((-high, low), -1) * sin), -1)

    swap.set(theirs, "apply_rotary_pos_emb", rotate)


def rope_on_the_first_dims(model: Any, swap: Swap) -> None:
    """T1: the first instead of the last channels."""
    right = theirs.apply_rotary_pos_emb

    def rotate(x: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Tensor:
        n = 2 * cos.shape[-1]
        moved = torch.cat((x[..., n:], x[..., :n]), -1)
        out = right(moved, cos, sin, unsqueeze_dim)
        return torch.cat((out[..., -n:], out[..., :-n]), -1)

    swap.set(theirs, "apply_rotary_pos_emb", rotate)


def plain_rope_for_window_of_compressed_layers(model: Any, swap: Swap) -> None:
    """T2: the base chosen per branch: query and window rows of compressed layers plain."""
    for attention in attentions(model, CSA, HCA):
        swap.set(attention, "rope_layer_type", "main")


def compressed_rope_everywhere(model: Any, swap: Swap) -> None:
    """T2: window-only layers with the compressed layers' base and scaling."""
    for attention in attentions(model, SLIDING):
        swap.set(attention, "rope_layer_type", "compress")


def _ropes(model: Any) -> Iterator[Any]:
    for module in model.modules():
        if isinstance(module, theirs.DeepseekV4RotaryEmbedding):
            yield module


def no_yarn(model: Any, swap: Swap) -> None:
    """T2: the right base without interpolation."""
    config = model.config
    dim, theta = config.qk_rope_head_dim, config.compress_rope_theta
    plain = 1.0 / theta ** (torch.arange(0, dim, 2).float() / dim)
    for rope in _ropes(model):
        held = dict(rope._buffers)
        swap.set(rope, "_buffers", {**held, "compress_inv_freq": plain})


def mscale_on_cos_and_sin(model: Any, swap: Swap) -> None:
    """T3: YaRN's amplitude 0.1 ln(factor) + 1."""
    for rope in _ropes(model):
        swap.set(rope, "compress_attention_scaling", 1.2773)


def mscale_on_the_softmax(model: Any, swap: Swap) -> None:
    """T3: the same amplitude, squared, on the softmax scale."""
    for attention in attentions(model, CSA, HCA):
        swap.set(attention, "scaling", attention.scaling * 1.2773**2)


def unclamped_shared_expert(model: Any, swap: Swap) -> None:
    """T5."""
    for block in model.model.layers:
        swap.set(block.mlp.shared_experts, "limit", 1e30)


def unclamped_routed_experts(model: Any, swap: Swap) -> None:
    """T6."""
    for block in model.model.layers:
        swap.set(block.mlp.experts, "limit", 1e30)


def _gate(model: Any, swap: Swap, gate: Callable[[Tensor, Tensor, float], Tensor]) -> None:
    for block in model.model.layers:
        for part in (block.mlp.experts, block.mlp.shared_experts):
            limit = part.limit

            def apply(both: Tensor, limit: float = limit) -> Tensor:
                return gate(*both.chunk(2, -1), limit)

            swap.set(part, "_apply_gate", apply)
        shared = block.mlp.shared_experts

        def forward(x: Tensor, shared: Any = shared) -> Any:
            both = torch.cat((shared.gate_proj(x), shared.up_proj(x)), -1)
            return shared.down_proj(shared._apply_gate(both))

        swap.set(shared, "forward", forward)


def clamp_after_silu(model: Any, swap: Swap) -> None:
    """T6."""
    silu = torch.nn.functional.silu
    _gate(model, swap, lambda g, u, limit: silu(g).clamp(max=limit) * u.clamp(-limit, limit))


def gate_clamped_from_below(model: Any, swap: Swap) -> None:
    """T6: the gate has no lower limit."""
    silu = torch.nn.functional.silu
    _gate(model, swap, lambda g, u, limit: silu(g.clamp(-limit, limit)) * u.clamp(-limit, limit))


def up_clamped_from_above_only(model: Any, swap: Swap) -> None:
    """T6: the up projection is limited on both sides."""
    silu = torch.nn.functional.silu
    _gate(model, swap, lambda g, u, limit: silu(g.clamp(max=limit)) * u.clamp(max=limit))


def right_clamp(model: Any, swap: Swap) -> None:
    """No mistake: shows that `_gate` itself changes nothing."""
    silu = torch.nn.functional.silu
    _gate(model, swap, lambda g, u, limit: silu(g.clamp(max=limit)) * u.clamp(-limit, limit))


Coefficients = Callable[[Tensor, Tensor, Tensor, float, int], tuple[Tensor, Tensor, Tensor]]


def _mhc(model: Any, swap: Swap, coefficients: Coefficients) -> None:
    """Both instances of every block with other coefficients (pre, post, comb)."""
    for module in model.modules():
        if isinstance(module, theirs.DeepseekV4HyperConnection):

            def forward(x: Tensor, m: Any = module) -> tuple[Tensor, Tensor, Tensor]:
                n = m.hc_mult
                flat = m.input_norm(x.flatten(2).float())
                mixed = torch.nn.functional.linear(flat, m.fn)
                scale = torch.cat(
                    [s.expand(k) for s, k in zip(m.scale, (n, n, n * n), strict=True)]
                )
                pre, post, comb = (mixed * scale + m.base).split([n, n, n * n], -1)
                square = comb.view(*comb.shape[:-1], n, n)
                pre, post, comb = coefficients(pre, post, square, m.hc_eps, m.hc_sinkhorn_iters)
                return post, comb, (pre.unsqueeze(-1) * x).sum(2)

            swap.set(module, "forward", forward)


def _sinkhorn(comb: Tensor, eps: float, iters: int) -> Tensor:
    comb = comb.softmax(-1) + eps
    comb = comb / (comb.sum(-2, keepdim=True) + eps)
    for _ in range(iters - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + eps)
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
    return comb


def right_mhc(model: Any, swap: Swap) -> None:
    """No mistake: shows that `_mhc` itself changes nothing."""
    _mhc(
        model,
        swap,
        lambda a, b, c, eps, n: (a.sigmoid() + eps, 2 * b.sigmoid(), _sinkhorn(c, eps, n)),
    )


def mhc_transposed(model: Any, swap: Swap) -> None:
    """T7: the sum over the second index."""
    _mhc(
        model,
        swap,
        lambda a, b, c, eps, n: (
            a.sigmoid() + eps,
            2 * b.sigmoid(),
            _sinkhorn(c, eps, n).transpose(-1, -2),
        ),
    )


def mhc_rows_last(model: Any, swap: Swap) -> None:
    """T7: rows normalised last."""
    _mhc(
        model,
        swap,
        lambda a, b, c, eps, n: (
            a.sigmoid() + eps,
            2 * b.sigmoid(),
            _sinkhorn(c.transpose(-1, -2), eps, n).transpose(-1, -2),
        ),
    )


def mhc_pre_without_eps(model: Any, swap: Swap) -> None:
    """T7."""
    _mhc(
        model,
        swap,
        lambda a, b, c, eps, n: (a.sigmoid(), 2 * b.sigmoid(), _sinkhorn(c, eps, n)),
    )


def mhc_post_with_eps(model: Any, swap: Swap) -> None:
    """T7."""
    _mhc(
        model,
        swap,
        lambda a, b, c, eps, n: (a.sigmoid() + eps, 2 * b.sigmoid() + eps, _sinkhorn(c, eps, n)),
    )


def mhc_post_without_two(model: Any, swap: Swap) -> None:
    """T7."""
    _mhc(
        model, swap, lambda a, b, c, eps, n: (a.sigmoid() + eps, b.sigmoid(), _sinkhorn(c, eps, n))
    )


def no_derotation(model: Any, swap: Swap) -> None:
    """T8: the attention output keeps the rotation of its values."""
    right = theirs.apply_rotary_pos_emb
    angles: set[int] = set()

    def remember(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        for cos, sin in kwargs["position_embeddings"].values():
            angles.update((id(cos), id(sin)))

    def rotate(x: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Tensor:
        # The de-rotation is the one call with a sine that was made on the spot.
        known = id(cos) not in angles or id(sin) in angles
        return right(x, cos, sin, unsqueeze_dim) if known else x

    for attention in attentions(model):
        handle = attention.register_forward_pre_hook(remember, with_kwargs=True)
        swap._old.append((_Undo(handle), "removed", None))
    swap.set(theirs, "apply_rotary_pos_emb", rotate)


class _Undo:
    """Lets `Swap.undo` remove a hook."""

    def __init__(self, handle: Any) -> None:
        object.__setattr__(self, "_handle", handle)

    def __setattr__(self, name: str, value: Any) -> None:
        self._handle.remove()


def _entry_positions(change: Callable[[Tensor, int], Tensor]) -> Patch:
    """Other RoPE positions for compressed entries and index keys."""

    def mistake(model: Any, swap: Swap) -> None:
        for attention in attentions(model, CSA, HCA):
            compressor = attention.compressor
            parts = [compressor]
            if hasattr(compressor, "indexer"):
                parts.append(compressor.indexer)
            for part in parts:
                right, ratio = part.rotary_emb.forward, part.compress_rate

                def forward(
                    x: Tensor,
                    position_ids: Tensor,
                    layer_type: str | None = None,
                    right: Any = right,
                    ratio: int = ratio,
                ) -> Any:
                    # Queries come with every position, entries with multiples of the ratio.
                    steps = position_ids.shape[1] > 1 and int(position_ids[0, 1]) == ratio
                    at = change(position_ids, ratio) if steps else position_ids
                    return right(x, position_ids=at, layer_type=layer_type)

                swap.set(part.rotary_emb, "forward", forward)

    return mistake


entry_at_its_index = _entry_positions(lambda p, ratio: p // ratio)
entry_at_its_end = _entry_positions(lambda p, ratio: p + ratio - 1)
entry_at_the_overlaps_start = _entry_positions(lambda p, ratio: (p - ratio).clamp_min(0))


def _visibility(shift: int) -> Patch:
    """Heavy entries visible `shift` tokens too early (or too late)."""

    def mistake(model: Any, swap: Swap) -> None:
        for attention in attentions(model, HCA):
            right = attention.compressor.forward

            def forward(
                x: Tensor, qr: Any, position_ids: Tensor, past: Any, layer: int, right: Any = right
            ) -> Any:
                return right(x, qr, position_ids + shift, past, layer)

            swap.set(attention.compressor, "forward", forward)

    return mistake


heavy_entry_too_early = _visibility(1)
heavy_entry_too_late = _visibility(-1)


def _selection(change: Callable[[Tensor, Tensor], Tensor]) -> Patch:
    """`change(selected [1, L, K], visible [1, L, 1])` after every indexer."""

    def mistake(model: Any, swap: Swap) -> None:
        for attention in attentions(model, CSA):
            indexer = attention.compressor.indexer
            right = indexer.forward

            def forward(
                x: Tensor, qr: Tensor, position_ids: Tensor, *rest: Any, right: Any = right
            ) -> Tensor:
                visible = ((position_ids + 1) // 4)[..., None]
                return change(right(x, qr, position_ids, *rest), visible)

            swap.set(indexer, "forward", forward)

    return mistake


padding_gathers_the_last_entry = _selection(
    lambda picked, seen: torch.where(picked < 0, seen.amax() - 1, picked)
)
padding_gathers_the_first_entry = _selection(lambda picked, seen: picked.clamp_min(0))
newest_entry_hidden = _selection(
    lambda picked, seen: torch.where(picked == seen - 1, torch.full_like(picked, -1), picked)
)


def _scores(score: Callable[[Any, Tensor, Tensor, Tensor], Tensor]) -> Patch:
    def mistake(model: Any, swap: Swap) -> None:
        for attention in attentions(model, CSA):
            scorer = attention.compressor.indexer.scorer

            def forward(q: Tensor, keys: Tensor, x: Tensor, scorer: Any = scorer) -> Tensor:
                products = torch.matmul(q, keys.transpose(-1, -2).unsqueeze(1))
                return score(scorer, products, q, x)

            swap.set(scorer, "forward", forward)

    return mistake


index_without_relu = _scores(
    lambda scorer, s, q, x: (s * scorer.weights_proj(x).unsqueeze(-1)).sum(2)
)
index_relu_after_the_sum = _scores(
    lambda scorer, s, q, x: (s * scorer.weights_proj(x).unsqueeze(-1)).sum(2).relu()
)
index_without_weights = _scores(lambda scorer, s, q, x: s.relu().sum(2))
index_right = _scores(
    lambda scorer, s, q, x: (s.relu() * scorer.weights_proj(x).unsqueeze(-1)).sum(2)
)


def groups_interleaved(model: Any, swap: Swap) -> None:
    """T24: heads dealt to the output groups in turn."""
    for attention in attentions(model):
        right, groups = attention.o_a_proj.forward, model.config.o_groups
        heads, dim = attention.num_heads, attention.head_dim

        def forward(
            x: Tensor,
            right: Any = right,
            groups: int = groups,
            heads: int = heads,
            dim: int = dim,
        ) -> Any:
            split = x.reshape(*x.shape[:-2], heads // groups, groups, dim)
            return right(split.transpose(-2, -3).reshape(x.shape))

        swap.set(attention.o_a_proj, "forward", forward)


def no_sink(model: Any, swap: Swap) -> None:
    """T26: a softmax without the sink."""
    for attention in attentions(model):
        bare = torch.nn.Parameter(torch.full_like(attention.sinks, -1e30))
        swap.set(attention, "_parameters", {**attention._parameters, "sinks": bare})


def one_sink_for_all_heads(model: Any, swap: Swap) -> None:
    """T26: the sink is a number per head."""
    for attention in attentions(model):
        same = torch.nn.Parameter(attention.sinks.mean().expand_as(attention.sinks).clone())
        swap.set(attention, "_parameters", {**attention._parameters, "sinks": same})


def _routing(score: Callable[[Tensor], Tensor]) -> Patch:
    """Weights of the same experts from other scores, with nothing added to their sum; where all
    scores are 0, so are the weights.
    """

    def mistake(model: Any, swap: Swap) -> None:
        for block in model.model.layers:
            gate = block.mlp.gate

            def forward(*inputs: Tensor, gate: Any = gate, right: Any = gate.forward) -> Any:
                logits, _, ids = right(*inputs)
                chosen = score(logits).gather(1, ids).double()
                weights = chosen / chosen.sum(-1, keepdim=True)
                weights = torch.where(chosen.sum(-1, keepdim=True) == 0, 0.0, weights)
                return logits, weights.float() * gate.routed_scaling_factor, ids

            swap.set(gate, "forward", forward)

    return mistake


# No mistake: the release adds nothing to the sum (1.4), transformers 1e-20.
weights_without_an_epsilon = _routing(lambda x: torch.nn.functional.softplus(x).sqrt())
# T9
naive_softplus = _routing(lambda x: (1 + x.exp()).log().sqrt())


def bias_in_the_weights(model: Any, swap: Swap) -> None:
    """1.4: the router's bias takes part in the choice only."""
    for block in model.model.layers:
        gate = block.mlp.gate
        if not block.mlp.is_hash:

            def forward(x: Tensor, gate: Any = gate) -> tuple[Tensor, Tensor, Tensor]:
                logits = torch.nn.functional.linear(x.reshape(-1, gate.hidden_dim), gate.weight)
                scores = gate.score_fn(logits) + gate.e_score_correction_bias
                weights, ids = scores.topk(gate.top_k, dim=-1)
                weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
                return logits, weights * gate.routed_scaling_factor, ids

            swap.set(gate, "forward", forward)
