"""Lightning indexer scores over e4m3 keys, or straight over the paged FP4 keys (deepseek-v4.md 2.4,
3.1, T16).

Both forms also give the maximum of every 32 scores, with which `topk_blocks` needs to read only a
part of them.

Shape suffixes: R rows (tokens), H index heads, C channels, E entries, N blocks of 32 entries, P
pages, B bytes of a page, T places of a page table, S gathered slots.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.reference import rows
from kernels.reference.pages import IndexPages, read_rows

SCORE_BLOCK = 32


def _values(data_RB: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """e4m3 codes and fp32 scale of FP4 rows; as `round_index` does with queries."""
    with torch.device(data_RB.device):
        values = rows.fp4_decode(data_RB, channels)
    top = data_RB[:, channels // 2 :].amax(1).to(torch.int32).clamp_min(7) - 6
    scale = (top << 23).view(torch.float32)
    return (values / scale[:, None]).to(torch.float8_e4m3fn), scale


def gather_index(pages_PB: Tensor, slots_S: Tensor, layout: IndexPages) -> tuple[Tensor, Tensor]:
    """Keys of the slots as e4m3 [S, C] and one fp32 scale [S] each; slot -1 gives zeros.

    Lossless while the block scales of a key lie within 2^14 of each other; below that a value is
    rounded to 2^-9 of the key's scale.
    """
    return _values(read_rows(pages_PB, slots_S, layout), layout.dim)


def indexer_logits(
    q_RHC: Tensor, weight_RH: Tensor, keys_EC: Tensor, scale_E: Tensor, visible_R: Tensor
) -> tuple[Tensor, Tensor]:
    """Scores [R, E] and the maxima of their blocks of 32 [R, ceil(E / 32)], fp32.

    score[r, e] = scale[e] * sum over h of weight[r, h] * relu(q[r, h] . keys[e]). q and keys are
    e4m3; the scales of q are folded into `weight` (fp32). Row r sees entries below visible_R[r]
    (int32); here the others are -inf, a kernel leaves undefined what no selection reads. A maximum
    passes over nan.
    """
    accurate = torch.float64 if weight_RH.dtype == torch.float64 else torch.float32
    product = torch.einsum("rhc,ec->rhe", q_RHC.to(accurate), keys_EC.to(accurate))
    score = torch.einsum("rhe,rh->re", product.relu(), weight_RH) * scale_E
    entry = torch.arange(keys_EC.shape[0], device=q_RHC.device)
    score = score.masked_fill(entry >= visible_R[:, None], float("-inf"))
    known = F.pad(score, (0, -score.shape[1] % SCORE_BLOCK), value=float("-inf"))
    known = known.masked_fill(known.isnan(), float("-inf"))
    return score, known.view(score.shape[0], -1, SCORE_BLOCK).amax(2)


def indexer_logits_paged(
    q_RHC: Tensor,
    weight_RH: Tensor,
    pages_PB: Tensor,
    tables_RT: Tensor,
    layout: IndexPages,
    visible_R: Tensor,
) -> tuple[Tensor, Tensor]:
    """The same over the FP4 keys of each row's own pages: entry e of row r is row e % page_rows of
    page tables_RT[r, e // page_rows] (int32). E is T * page_rows, a multiple of 32; the table's
    places that hold no visible entry are not read.
    """
    entry = torch.arange(tables_RT.shape[1] * layout.page_rows, device=q_RHC.device)
    seen = entry < visible_R[:, None]
    slots = tables_RT[:, entry // layout.page_rows] * layout.page_rows + entry % layout.page_rows
    slots = torch.where(seen, slots, -1)
    found = []
    for row in range(q_RHC.shape[0]):
        keys, scale = gather_index(pages_PB, slots[row], layout)
        one = slice(row, row + 1)
        found.append(indexer_logits(q_RHC[one], weight_RH[one], keys, scale, visible_R[one]))
    return torch.cat([each[0] for each in found]), torch.cat([each[1] for each in found])
