"""Head collapse and final norm (deepseek-v4.md 4.4); drafts have their own copy (1.6, 1.7).

Shape suffixes: R rows, S streams, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kernels.ops import ReferenceOps


@dataclass(frozen=True)
class HeadCollapse:
    """fp32 tensors of the `hc_head_*` instance and of the norm after it."""

    fn: Tensor
    scale: Tensor
    base: Tensor
    norm_D: Tensor
    norm_eps: float
    eps: float

    def collapse(self, ops: ReferenceOps, streams_RSD: Tensor) -> Tensor:
        """[R, D] in the streams' type."""
        x = ops.head_collapse(
            streams_RSD, self.fn, self.scale, self.base, norm_eps=self.norm_eps, eps=self.eps
        )
        return x.to(streams_RSD.dtype)

    def norm(self, ops: ReferenceOps, x_RD: Tensor) -> Tensor:
        """What the vocabulary's product reads: rounded to the type of `x_RD`, kept as fp32."""
        return ops.rms_norm(x_RD, self.norm_D, eps=self.norm_eps).to(x_RD.dtype).float()

    def __call__(self, ops: ReferenceOps, streams_RSD: Tensor) -> Tensor:
        return self.norm(ops, self.collapse(ops, streams_RSD))
