"""`NativeOps`: the reference's ops on C kernels, fp32 on the CPU.

Every kernel computes a row alone, in one order, whatever stands beside it: rows need no padding,
and class `exact` costs nothing. Results differ from the reference's in the last bits, which is why
the set has its own name in the fingerprint.

Longer than our files should be: it is one list of C signatures and the calls that match them, and a
mistake between the two writes over memory.

Shape suffixes: R rows, S streams, D model width, H heads, C channels, P pairs, K slots, E entries.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.native.build import BuildError, load_library
from kernels.reference import mhc
from kernels.reference.attend import AttendSpan
from kernels.reference.ops import ReferenceOps

_PANEL = 32
_POINTER, _COUNT, _FLOAT, _FLAG = (
    ctypes.c_void_p,
    ctypes.c_int64,
    ctypes.c_float,
    ctypes.c_int,
)
_P, _N, _F, _B = _POINTER, _COUNT, _FLOAT, _FLAG
_SIGNATURES: dict[str, tuple[type, ...]] = {
    "ps_keep_memory": (),
    "ps_pack": (_P, _N, _N, _B, _P),
    "ps_product": (_P, _N, _N, _P, _B, _N, _N, _P, _N),
    "ps_enter": (_P, _N, _N, _P, _P, _P, _P, _F, _F, _N, _P, _P, _P),
    "ps_leave": (_P, _P, _P, _P, _N, _N, _P),
    "ps_head": (_P, _N, _N, _P, _P, _P, _F, _F, _P),
    "ps_norm_rope": (_P, _N, _N, _N, _B, _P, _F, _P, _P, _N, _P),
    "ps_fp8_round": (_P, _N, _N, _N, _P),
    "ps_index_round": (_P, _N, _N, _P),
    "ps_pool": (_P, _P, _N, _N, _N, _P),
    "ps_attend": (_P, _N, _N, _P, _N, _N, _N, _P, _N, _P, _F, _P, _P, _P),
    "ps_entry_mass": (_P, _N, _N, _P, _P, _N, _F, _P, _P, _P),
    "ps_index_scores": (_P, _P, _N, _N, _N, _P, _P, _P, _N),
    "ps_select": (_P, _N, _N, _P, _N, _P),
    "ps_route": (_P, _N, _N, _P, _P, _N, _F, _P, _P),
    "ps_experts": (_P, _N, _N, _P, _P, _N, _P, _N, _N, _N, _N, _F, _P),
    "ps_experts_up": (_P, _N, _N, _P, _P, _N, _P, _N, _N, _N, _N, _F, _P, _P),
    "ps_experts_down": (_P, _P, _N, _P, _N, _P, _N, _N, _N, _N, _N, _N, _N, _P, _P),
}
_MAY_FAIL = {
    "ps_enter",
    "ps_head",
    "ps_attend",
    "ps_entry_mass",
    "ps_index_scores",
    "ps_select",
    "ps_route",
    "ps_experts",
    "ps_experts_up",
    "ps_experts_down",
}


def _no_memory(result: int, *_: object) -> int:
    if result:
        raise MemoryError("a CPU kernel ran out of memory")
    return result


@dataclass(frozen=True)
class PackedWeight:
    """A weight [N, K] in panels of 32 outputs; bf16 where that loses nothing."""

    panels: Tensor
    outputs: int
    inputs: int

    @property
    def bf16(self) -> bool:
        return self.panels.dtype == torch.bfloat16


@dataclass(frozen=True)
class PackedExperts:
    """Experts `first`, `first + 1`, ... of one layer and its shared one, or a rank's part of them.

    `table` points into `kept`.
    """

    table: Tensor
    kept: tuple[tuple[PackedWeight, PackedWeight], ...]
    first: int
    unit: int

    @property
    def count(self) -> int:
        """Routed ones."""
        return len(self.kept) - 1

    @property
    def routed(self) -> tuple[int, int, int]:
        """Inner channels made, inner channels read, and outputs of a routed expert."""
        return _sizes(self.kept[0])

    @property
    def shared(self) -> tuple[int, int, int]:
        return _sizes(self.kept[-1])


def _sizes(pair: tuple[PackedWeight, PackedWeight]) -> tuple[int, int, int]:
    w13, w2 = pair
    return w13.outputs // 2, w2.inputs, w2.outputs


class NativeOps(ReferenceOps):
    """See the module. Inputs must be fp32 and on the CPU."""

    row_multiple = 1
    # Scores are made in panels, without a buffer of products: this bounds the rows of a tile.
    most_index_products = 1 << 20

    def __init__(self) -> None:
        library = load_library()
        # Another compiler or processor may order a sum otherwise: their blocks are not ours.
        self.name = f"native-{library.digest}"
        lib = library.code
        for name, arguments in _SIGNATURES.items():
            function = getattr(lib, name)
            function.argtypes = arguments
            function.restype = ctypes.c_int if name in _MAY_FAIL else None
            if name in _MAY_FAIL:
                function.errcheck = _no_memory
        self._lib = lib
        # Of the whole process, like its allocator.
        lib.ps_keep_memory()
        self._check()

    def _check(self) -> None:
        """A compiler that is wrong is found here, not in an answer."""
        generator = torch.Generator().manual_seed(1)
        x, w = (torch.randn((n, 48), generator=generator) for n in (21, 70))
        packed = self.pack(w)
        whole = self.product(x, packed)
        alone = torch.cat([self.product(row[None], packed) for row in x])
        if not torch.equal(whole, alone) or not torch.allclose(whole, x @ w.t(), atol=1e-4):
            raise BuildError("the compiled kernels compute wrong products on this machine")

    def suits(self, dtype: torch.dtype, streams: int, channels: tuple[int, ...]) -> bool:
        """fp32, four streams and widths of whole vectors."""
        return dtype == torch.float32 and streams == 4 and all(n % 16 == 0 for n in channels)

    def pad_rows(self, x: Tensor, *, multiple: int = 1) -> Tensor:
        return x if x.shape[0] else super().pad_rows(x, multiple=1)

    def pack(self, weight_NK: Tensor) -> PackedWeight:
        weight = weight_NK.float().contiguous()
        n, k = weight.shape
        small = bool((weight.to(torch.bfloat16).float() == weight).all())
        panels = torch.empty(
            (-(-n // _PANEL), k, _PANEL), dtype=torch.bfloat16 if small else torch.float32
        )
        self._lib.ps_pack(weight.data_ptr(), n, k, small, panels.data_ptr())
        return PackedWeight(panels, n, k)

    def product(self, x_RK: Tensor, weight: PackedWeight, out_RN: Tensor | None = None) -> Tensor:
        x = x_RK if x_RK.stride(-1) == 1 else x_RK.contiguous()
        rows, n = x.shape[0], weight.outputs
        out = torch.empty((rows, n)) if out_RN is None else out_RN
        self._lib.ps_product(
            x.data_ptr(),
            x.stride(0),
            rows,
            weight.panels.data_ptr(),
            weight.bf16,
            weight.inputs,
            n,
            out.data_ptr(),
            out.stride(0),
        )
        return out

    def prepare_mhc(self, gates: mhc.HyperWeights) -> mhc.HyperWeights:
        return gates.packed(self.pack(gates.fn).panels.float())

    def enter(
        self, streams_RSD: Tensor, gates: mhc.HyperWeights, norm_D: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        x, (rows, streams, width) = streams_RSD.contiguous(), streams_RSD.shape
        out = torch.empty((rows, width))
        post, comb = torch.empty((rows, streams)), torch.empty((rows, streams, streams))
        self._lib.ps_enter(
            x.data_ptr(),
            rows,
            width,
            gates.fn.data_ptr(),
            gates.scale.data_ptr(),
            gates.base.data_ptr(),
            norm_D.data_ptr(),
            gates.norm_eps,
            gates.eps,
            gates.iters,
            out.data_ptr(),
            post.data_ptr(),
            comb.data_ptr(),
        )
        return out, (post, comb)

    def leave(
        self,
        streams_RSD: Tensor,
        gates: mhc.HyperWeights,
        mixed: tuple[Tensor, ...],
        y_RD: Tensor,
        *,
        in_place: bool = False,
    ) -> Tensor:
        x, y = streams_RSD.contiguous(), y_RD.contiguous()
        post, comb = (part.contiguous() for part in mixed)
        out = x if in_place else torch.empty_like(x)
        self._lib.ps_leave(
            x.data_ptr(),
            y.data_ptr(),
            post.data_ptr(),
            comb.data_ptr(),
            x.shape[0],
            x.shape[2],
            out.data_ptr(),
        )
        return out

    def prepare_head(self, fn_SX: Tensor) -> Tensor:
        return self.pack(fn_SX).panels.float()

    def head_collapse(
        self,
        streams_RSD: Tensor,
        fn_SX: Tensor,
        scale_1: Tensor,
        base_S: Tensor,
        *,
        norm_eps: float,
        eps: float,
    ) -> Tensor:
        x = streams_RSD.contiguous()
        out = torch.empty((x.shape[0], x.shape[2]))
        self._lib.ps_head(
            x.data_ptr(),
            x.shape[0],
            x.shape[2],
            fn_SX.data_ptr(),
            scale_1.data_ptr(),
            base_S.data_ptr(),
            norm_eps,
            eps,
            out.data_ptr(),
        )
        return out

    def cos_sin(self, positions_R: Tensor, freq_P: Tensor) -> tuple[Tensor, Tensor]:
        """[R, 2 P]: each pair's value twice, sin as (-s, +s): what the kernel multiplies by."""
        cos, sin = super().cos_sin(positions_R, freq_P)
        rows, pairs = cos.shape
        return (
            torch.stack((cos, cos), -1).view(rows, 2 * pairs),
            torch.stack((-sin, sin), -1).view(rows, 2 * pairs),
        )

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> Tensor:
        return self._norm_rope(x, None, cos, -sin if inverse else sin, norm=False, eps=0.0)

    def norm_rotate(
        self, x: Tensor, weight_C: Tensor | None, cos: Tensor, sin: Tensor, *, eps: float
    ) -> Tensor:
        return self._norm_rope(x, weight_C, cos, sin, norm=True, eps=eps)

    def rms_norm(self, x_RD: Tensor, weight_D: Tensor | None, *, eps: float) -> Tensor:
        none = x_RD.new_empty((0, 0))
        return self._norm_rope(x_RD, weight_D, none, none, norm=True, eps=eps)

    def _norm_rope(
        self,
        x: Tensor,
        weight: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        *,
        norm: bool,
        eps: float,
    ) -> Tensor:
        x = x.contiguous()
        rows, channels = x.shape[0], x.shape[-1]
        out = torch.empty_like(x)
        if rows:
            self._lib.ps_norm_rope(
                x.data_ptr(),
                rows,
                x.numel() // (rows * channels),
                channels,
                norm,
                None if weight is None else weight.data_ptr(),
                eps,
                cos.data_ptr(),
                sin.data_ptr(),
                cos.shape[1],
                out.data_ptr(),
            )
        return out

    def fp8_round(self, x_RC: Tensor, nope: int) -> Tensor:
        x = x_RC.contiguous()
        out = torch.empty_like(x)
        self._lib.ps_fp8_round(x.data_ptr(), x.shape[0], x.shape[1], nope, out.data_ptr())
        return out

    def index_round(self, x_RC: Tensor, signs_CC: Tensor) -> Tensor:
        x = x_RC.contiguous()
        out = torch.empty_like(x)
        self._lib.ps_index_round(x.data_ptr(), x.shape[0], x.shape[1], out.data_ptr())
        return out

    def pool_windows(self, kv_NSC: Tensor, score_NSC: Tensor) -> Tensor:
        kv, score = kv_NSC.contiguous(), score_NSC.contiguous()
        count, slots, channels = kv.shape
        out = torch.empty((count, channels))
        self._lib.ps_pool(kv.data_ptr(), score.data_ptr(), count, slots, channels, out.data_ptr())
        return out

    def attend(
        self,
        q_RHC: Tensor,
        spans: Sequence[AttendSpan],
        sink_H: Tensor,
        *,
        window: int,
        ratio: int,
        picked_RK: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        q = q_RHC.contiguous()
        rows, heads, channels = q.shape
        out, top, norm = torch.empty_like(q), torch.empty((rows, heads)), torch.empty((rows, heads))
        picked = None if picked_RK is None else picked_RK.contiguous()
        kept = [span.history_NC.contiguous() for span in spans]
        table = [
            field
            for span, history in zip(spans, kept, strict=True)
            for field in (
                span.row,
                span.count,
                span.position,
                history.shape[0],
                history.data_ptr(),
                span.entries_EC.data_ptr(),
            )
        ]
        self._lib.ps_attend(
            q.data_ptr(),
            heads,
            channels,
            (ctypes.c_int64 * len(table))(*table),
            len(kept),
            window,
            ratio,
            None if picked is None else picked.data_ptr(),
            0 if picked is None else picked.shape[1],
            sink_H.data_ptr(),
            scale,
            out.data_ptr(),
            top.data_ptr(),
            norm.data_ptr(),
        )
        return out, top, norm

    def entry_masses(
        self,
        q_HC: Tensor,
        entries_EC: Tensor,
        picked_K: Tensor,
        top_H: Tensor,
        norm_H: Tensor,
        *,
        scale: float,
    ) -> Tensor:
        q, picked = q_HC.contiguous(), picked_K.contiguous()
        top, norm = top_H.contiguous(), norm_H.contiguous()
        mass = torch.empty(picked.shape[0])
        self._lib.ps_entry_mass(
            q.data_ptr(),
            q.shape[0],
            q.shape[1],
            entries_EC.data_ptr(),
            picked.data_ptr(),
            picked.shape[0],
            scale,
            top.data_ptr(),
            norm.data_ptr(),
            mass.data_ptr(),
        )
        return mass

    def index_scores(
        self,
        q_RHC: Tensor,
        weight_RH: Tensor,
        keys_EC: Tensor,
        visible_R: Tensor,
        *,
        key_tile: int = _PANEL,
    ) -> Tensor:
        """[R, E]; what lies beyond a row's visible entries is undefined."""
        q, weight, visible = q_RHC.contiguous(), weight_RH.contiguous(), visible_R.contiguous()
        rows, heads, channels = q.shape
        scores = torch.empty((rows, keys_EC.shape[0]))
        self._lib.ps_index_scores(
            q.data_ptr(),
            weight.data_ptr(),
            rows,
            heads,
            channels,
            keys_EC.data_ptr(),
            visible.data_ptr(),
            scores.data_ptr(),
            scores.shape[1],
        )
        return scores

    def select_visible(self, scores_RE: Tensor, visible_R: Tensor, k: int) -> Tensor:
        scores, visible = scores_RE.contiguous(), visible_R.contiguous()
        picked = torch.empty((visible.shape[0], k), dtype=torch.int64)
        self._lib.ps_select(
            scores.data_ptr(),
            scores.shape[1],
            picked.shape[0],
            visible.data_ptr(),
            k,
            picked.data_ptr(),
        )
        return picked

    def route(
        self,
        logits_RE: Tensor,
        bias_E: Tensor | None,
        table_RK: Tensor | None,
        k: int,
        *,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        logits = logits_RE.contiguous()
        rows, experts = logits.shape
        ids = torch.empty((rows, k), dtype=torch.int64)
        weights = torch.empty((rows, k))
        table = None if table_RK is None else table_RK.contiguous()
        self._lib.ps_route(
            logits.data_ptr(),
            rows,
            experts,
            None if bias_E is None else bias_E.data_ptr(),
            None if table is None else table.data_ptr(),
            k,
            scale,
            ids.data_ptr(),
            weights.data_ptr(),
        )
        return ids, weights

    def stack_experts(
        self,
        experts: Sequence[tuple[PackedWeight, PackedWeight]],
        shared: tuple[PackedWeight, PackedWeight],
        *,
        first: int,
        unit: int,
    ) -> PackedExperts:
        pairs = (*experts, shared)
        if any(w13.bf16 != w2.bf16 for w13, w2 in pairs):
            raise ValueError("an expert's two matrices must be packed alike")
        table = [
            field
            for w13, w2 in pairs
            for field in (w13.panels.data_ptr(), w2.panels.data_ptr(), w13.bf16)
        ]
        return PackedExperts(torch.tensor(table, dtype=torch.int64), pairs, first, unit)

    def experts(
        self,
        x_RD: Tensor,
        ids_RK: Tensor,
        weights_RK: Tensor,
        stack: PackedExperts,
        *,
        limit: float,
    ) -> Tensor:
        x, ids, weights = x_RD.contiguous(), ids_RK.contiguous(), weights_RK.contiguous()
        out = torch.empty_like(x)
        self._lib.ps_experts(
            x.data_ptr(),
            x.shape[0],
            x.shape[1],
            ids.data_ptr(),
            weights.data_ptr(),
            ids.shape[1],
            stack.table.data_ptr(),
            stack.count,
            stack.unit,
            stack.routed[0],
            stack.shared[0],
            limit,
            out.data_ptr(),
        )
        return out

    def experts_up(
        self,
        x_RD: Tensor,
        ids_RK: Tensor,
        weights_RK: Tensor,
        stack: PackedExperts,
        *,
        limit: float,
    ) -> tuple[Tensor, Tensor]:
        x, ids, weights = x_RD.contiguous(), ids_RK.contiguous(), weights_RK.contiguous()
        mine = int(((ids >= stack.first) & (ids < stack.first + stack.count)).sum())
        inner = torch.empty((mine, stack.routed[0]))
        shared = torch.empty((x.shape[0], stack.shared[0]))
        self._lib.ps_experts_up(
            x.data_ptr(),
            x.shape[0],
            x.shape[1],
            ids.data_ptr(),
            weights.data_ptr(),
            ids.shape[1],
            stack.table.data_ptr(),
            stack.first,
            stack.count,
            stack.routed[0],
            stack.shared[0],
            limit,
            inner.data_ptr(),
            shared.data_ptr(),
        )
        return inner, shared

    def experts_down(
        self, inner_NI: Tensor, shared_RI: Tensor, ids_RK: Tensor, stack: PackedExperts
    ) -> tuple[Tensor, Tensor]:
        inner, given, ids = inner_NI.contiguous(), shared_RI.contiguous(), ids_RK.contiguous()
        rows = given.shape[0]
        (_, width, outputs), (_, shared_width, shared_outputs) = stack.routed, stack.shared
        routed = torch.empty((rows, outputs))
        shared = torch.empty((rows, shared_outputs))
        self._lib.ps_experts_down(
            inner.data_ptr(),
            given.data_ptr(),
            rows,
            ids.data_ptr(),
            ids.shape[1],
            stack.table.data_ptr(),
            stack.first,
            stack.count,
            stack.unit,
            width,
            shared_width,
            outputs,
            shared_outputs,
            routed.data_ptr(),
            shared.data_ptr(),
        )
        return routed, shared
