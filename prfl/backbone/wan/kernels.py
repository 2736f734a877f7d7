"""prfl_kernels' operations in a diffusers Wan transformer with peft adapters: ``use_kernels`` swaps them in and out.

What diffusers lets one choose is chosen: the attention processors.  A block has no such point, so its class becomes a
subclass with the same parameters; names, adapters, saved files and merged weights are what they were.  peft's layers
stay as they are, too: the block reads an adapter's weights from them, and calls a layer itself where it is anything
but one plain LoRA (merged, a variant, several adapters at once).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch.nn.functional as F
from diffusers.models.transformers.transformer_wan import (
    WanAttention,
    WanAttnProcessor,
    WanRotaryPosEmbed,
    WanTransformerBlock,
)
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from prfl.backbone.attention import DIFFUSERS, activate, attend, for_text
from prfl.backbone.dropout import SampleDropout
from prfl.backbone.wan.text import FoldedTextProcessor, split_bias
from prfl.utils.errors import PrflError
from prfl_kernels import reference
from prfl_kernels.gated_residual_norm import gated_residual, gated_residual_norm
from prfl_kernels.lora_linear import Gelu, Normed, Projection, lora_linears
from prfl_kernels.qk_norm_rope import output_suffices, pack_tables, qk_norm_rope, unpack_tables

SWAPPED = ("lora_linear", "qk_norm_rope", "gated_residual_norm")


def use_kernels(network: nn.Module, which: Collection[str] = SWAPPED, attention: str = "sdpa") -> None:
    """Run these operations of every block by prfl_kernels; the others, or with none of them all, as diffusers does.
    attention: one of ``attention.NAMES``, as ``attention.choose_attention`` chose it; the text's is ``for_text`` of it.

    On a GPU they are Triton kernels, on a CPU plain torch that keeps as little for the backward pass.  Adapters may be
    added before or after.
    Raises PrflError for an unknown operation, and where the base is trained: its weights get no gradient from them.
    """
    if unknown := sorted(set(which) - set(SWAPPED)):
        raise PrflError(f"no kernels {unknown} for a transformer", fix=f"choose among {', '.join(SWAPPED)}")
    base = [p for name, p in network.named_parameters() if name.startswith("blocks.") and ".lora_" not in name]
    if which and any(parameter.requires_grad for parameter in base):
        raise PrflError(
            "the kernels are for a frozen base with adapters, and this base is trained",
            where="backbone.kernels",
            fix="kernels: torch",
        )
    activate(attention)
    if type(rope := getattr(network, "rope", None)) in (WanRotaryPosEmbed, PackedRotaryPosEmbed):
        rope.__class__ = PackedRotaryPosEmbed if "qk_norm_rope" in which else WanRotaryPosEmbed
    for block in network.get_submodule("blocks").children():
        block.__class__ = KernelBlock if which else WanTransformerBlock
        block.operations = frozenset(which)
        if which or attention == "triton":
            block.attn1.set_processor(KernelSelfAttention(which, attention, block.attn1))
            block.attn2.set_processor(KernelCrossAttention(which, for_text(attention), block.attn2))
            continue
        for attn, processor, backend in (
            (block.attn1, WanAttnProcessor(), attention), (block.attn2, FoldedTextProcessor(), for_text(attention)),
        ):  # fmt: skip
            processor._attention_backend = DIFFUSERS[backend]
            attn.set_processor(processor)
    network._repeated_blocks = [(KernelBlock if which else WanTransformerBlock).__name__]  # what compiling looks for


class PackedRotaryPosEmbed(WanRotaryPosEmbed):
    """Its tables as the kernel reads them, packed once for all blocks."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        return pack_tables(*super().forward(hidden_states))


class KernelBlock(WanTransformerBlock):
    """WanTransformerBlock, its sums, norms and modulations in one pass each, its linear layers rebuilding their input
    in the backward pass from what the block keeps anyway."""

    operations: frozenset[str]

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: tuple[Tensor, Tensor]
    ) -> Tensor:
        # temb: (B, 6, D), or (B, T, 6, D) where every token has its own time (Wan 2.2).
        table = self.scale_shift_table if temb.ndim == 3 else self.scale_shift_table.unsqueeze(0)
        parts = (table + temb.float()).chunk(6, dim=-2)
        shift, scale, gate, ff_shift, ff_scale, ff_gate = (p if temb.ndim == 3 else p.squeeze(2) for p in parts)

        hidden, normed, source = self._norm(hidden_states, None, None, scale, shift, self.norm1)
        attended = self.attn1(normed, None, None, rotary_emb, source=source)
        if isinstance(self.norm2, nn.Identity):
            hidden = self._add(hidden, attended, gate)
            normed, source = hidden, None
        else:
            affine = self.norm2.weight.float() - 1, self.norm2.bias.float()
            hidden, normed, source = self._norm(hidden, attended, gate, *affine, self.norm2)
        attended = self.attn2(normed, encoder_hidden_states, None, None, source=source)
        hidden, normed, source = self._norm(hidden, attended, None, ff_scale, ff_shift, self.norm3)
        return self._add(hidden, self._feed_forward(normed, source), ff_gate)

    def _norm(
        self, x: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor, norm: Any
    ) -> tuple[Tensor, Tensor, Normed | None]:
        """x + gate y, AdaLN of it, and what rebuilds that."""
        if "gated_residual_norm" in self.operations:
            summed = gated_residual_norm(x, y, gate, scale, shift, norm.eps)
            return summed.x, summed.normed, Normed(summed.x, summed.mean, summed.rstd, scale, shift)
        x = self._add(x, y, gate) if y is not None else x
        normed = F.layer_norm(x.float(), x.shape[-1:], eps=norm.eps) * (1 + scale) + shift
        return x, normed.type_as(x), None

    def _add(self, x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
        if "gated_residual_norm" in self.operations:
            return gated_residual(x, y, gate)
        return x + y if gate is None else (x.float() + y.float() * gate).type_as(x)

    def _feed_forward(self, normed: Tensor, source: Normed | None) -> Tensor:
        up, down = self.ffn.net[0].proj, self.ffn.net[2]
        (hidden,) = project([up], normed, self.operations, source)
        (result,) = project([down], F.gelu(hidden, approximate="tanh"), self.operations, Gelu(hidden))
        return result


class KernelSelfAttention(WanAttnProcessor):
    """q, k and v from one read of their input; their norms and rotations in one pass."""

    def __init__(self, which: Collection[str], attention: str, attn: WanAttention) -> None:
        super().__init__()
        self.operations, self.attention, self.from_output = frozenset(which), attention, norms_from_output(attn)
        self._attention_backend = DIFFUSERS.get(attention)  # for what is left to diffusers' own

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
        source: Normed | None = None,
    ) -> Tensor:
        if attn.fused_projections:
            if rotary_emb is not None and rotary_emb[0].shape[-1] != attn.inner_dim // attn.heads:
                rotary_emb = unpack_tables(*rotary_emb)
            return WanAttnProcessor.__call__(
                self, attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb
            )
        query, key, value = project([attn.to_q, attn.to_k, attn.to_v], hidden_states, self.operations, source)
        cos, sin = rotary_emb or (None, None)
        query, key = normalise(attn, query, key, cos, sin, self)
        return attended(attn, query, key, value, attention_mask, self)


class KernelCrossAttention(FoldedTextProcessor):
    """The same for attention to the text, whose keys are few and not rotated."""

    def __init__(self, which: Collection[str], attention: str, attn: WanAttention) -> None:
        super().__init__()
        self.operations, self.attention, self.from_output = frozenset(which), attention, norms_from_output(attn)
        self._attention_backend = DIFFUSERS.get(attention)  # for what is left to diffusers' own

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
        source: Normed | None = None,
    ) -> Tensor:
        assert encoder_hidden_states is not None
        if attn.fused_projections or attn.add_k_proj is not None:  # image tokens beside the text's
            return FoldedTextProcessor.__call__(
                self, attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb
            )
        text, bias = split_bias(encoder_hidden_states, hidden_states.shape[-1])
        (query,) = project([attn.to_q], hidden_states, self.operations, source)
        key, value = project([attn.to_k, attn.to_v], text, self.operations)
        query, _ = normalise(attn, query, None, None, None, self)
        key = attn.norm_k(key)
        return attended(attn, query, key, value, attention_mask if bias is None else bias, self)


def norms_from_output(attn: WanAttention) -> bool:
    """Whether the backward pass of the norms may start from what attention keeps; without weights (meta), yes."""
    weights = attn.norm_q.weight, attn.norm_k.weight
    return weights[0].is_meta or output_suffices(*weights)


def normalise(
    attn: WanAttention, query: Tensor, key: Tensor | None, cos: Tensor | None, sin: Tensor | None, processor: Any
) -> tuple[Tensor, Tensor | None]:
    """The norms over all heads, and the rotations where there are any."""
    weights, eps = (attn.norm_q.weight, None if key is None else attn.norm_k.weight), attn.norm_q.eps
    if "qk_norm_rope" in processor.operations:
        return qk_norm_rope(query, key, *weights, cos, sin, attn.heads, eps, processor.from_output)
    query, key = attn.norm_q(query), None if key is None else attn.norm_k(key)
    if cos is not None and sin is not None:
        query = reference.rotate(query, cos, sin, attn.heads)
        key = None if key is None else reference.rotate(key, cos, sin, attn.heads)
    return query, key


def attended(
    attn: WanAttention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, processor: Any
) -> Tensor:
    """Softmax attention, and the projection behind it."""
    query, key, value = (each.unflatten(2, (attn.heads, -1)) for each in (query, key, value))
    mixed = attend(processor.attention, query, key, value, mask)
    (projected,) = project([attn.to_out[0]], mixed.flatten(2, 3).type_as(query), processor.operations)
    return attn.to_out[1](projected)


def project(
    layers: Sequence[nn.Module], x: Tensor, operations: Collection[str], source: Normed | Gelu | None = None
) -> tuple[Tensor, ...]:
    """Each layer of x; with ``lora_linear`` those that have an adapter together.  source: what x is rebuilt from."""
    plain = [plain_lora(layer) for layer in layers]
    adapted = [each for each in plain if each is not None]
    if "lora_linear" not in operations or not adapted:
        return tuple(layer(x) for layer in layers)
    dropout = adapted[0][1]  # one adapter has one rate, and layers of one input have one mask
    seeds, rate = (dropout.mask_seeds(x), dropout.rate) if dropout else (None, 0.0)
    projections = [projection for projection, _ in adapted]
    outputs = iter(lora_linears(x, projections, source=source, dropout=0.0 if seeds is None else rate, seeds=seeds))
    return tuple(layer(x) if each is None else next(outputs) for each, layer in zip(plain, layers, strict=True))


def plain_lora(layer: nn.Module) -> tuple[Projection, SampleDropout | None] | None:
    """A layer's weights and its adapter's, and its dropout; None where it is not just one plain LoRA that is on."""
    if not isinstance(layer, LoraLayer) or layer.disable_adapters or layer.merged:
        return None
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    base = layer.get_base_layer()
    if len(names) != 1 or names[0] in layer.lora_variant or layer.lora_bias[names[0]] or type(base) is not nn.Linear:
        return None
    (name,) = names
    dropout = layer.lora_dropout[name]
    factors = layer.lora_A[name].weight, layer.lora_B[name].weight
    projection = Projection(base.weight, base.bias, *factors, layer.scaling[name])
    return projection, dropout if isinstance(dropout, SampleDropout) else None
