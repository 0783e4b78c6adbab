"""Triton kernels of contrastive_reward: within groups, across groups, and the sum of it all.

1. `_group_fwd`  one program per group: norms, positive, negative and consistency.
2. `_cross_fwd`  one program per tile of rows and share of the columns: cosines of a tile live in
                 registers, and leave as one running sum (or log-sum-exp) per row and share.
3. `_finish_fwd` adds the shares in a fixed order and weighs the parts.

Rows and columns of step 2 are queries and rollouts (query side) or rollouts and queries (document
side).  Bytes moved: the embeddings, once per step and tile of the other side; workspace: one
inverse norm per embedding and 3 * MAX_SHARES numbers per row.
"""
# pyright: reportArgumentType=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from tercet.kernels._checks import interpreting
from tercet.kernels.reference import NORM_EPS

BLOCK_R = 64  # rows of a tile
BLOCK_C = 64  # columns of a tile: BLOCK_J groups of BLOCK_L slots
BLOCK_FINISH = 256
MAX_SHARES = 64
PROGRAMS = 512  # about four per multiprocessor of a large GPU


@triton.jit
def _group_fwd(
    d_ptr, q_ptr, n_ptr, inv_d_ptr, inv_q_ptr, positive_ptr, negative_ptr, consistency_ptr,
    stride_db, stride_dg, stride_dh, stride_qb, stride_qh, stride_nb, stride_nm, stride_nh,
    G, M, H, temperature,
    DOCUMENT: tl.constexpr, LSE: tl.constexpr, EPS: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)  # int64 before any stride
    offs_g = tl.arange(0, BLOCK_G)
    kept = offs_g < G
    d_ptr += b * stride_db + offs_g.to(tl.int64)[:, None] * stride_dg
    q_ptr += b * stride_qb
    n_ptr += b * stride_nb

    square_d = tl.zeros((BLOCK_G,), tl.float32)
    square_q = tl.zeros((), tl.float32)
    dot = tl.zeros((BLOCK_G,), tl.float32)
    for start in range(0, H, BLOCK_H):
        offs_h = start + tl.arange(0, BLOCK_H).to(tl.int64)
        inside = offs_h < H
        where = kept[:, None] & inside[None, :]
        d = tl.load(d_ptr + offs_h[None, :] * stride_dh, mask=where, other=0.0).to(tl.float32)
        q = tl.load(q_ptr + offs_h * stride_qh, mask=inside, other=0.0).to(tl.float32)
        square_d += tl.sum(d * d, axis=1)
        square_q += tl.sum(q * q, axis=0)
        dot += tl.sum(d * q[None, :], axis=1)
    inv_d = 1.0 / tl.maximum(tl.sqrt(square_d), EPS)
    inv_q = 1.0 / tl.maximum(tl.sqrt(square_q), EPS)
    tl.store(inv_d_ptr + b * G + offs_g, inv_d, mask=kept)
    tl.store(inv_q_ptr + b, inv_q)
    tl.store(positive_ptr + b * G + offs_g, dot * inv_d * inv_q, mask=kept)

    # sum over l != k of s(d_k, d_l) = s(d_k, sum of the unit rollouts) - s(d_k, d_k)
    to_all = tl.zeros((BLOCK_G,), tl.float32)
    for start in range(0, H, BLOCK_H):
        offs_h = start + tl.arange(0, BLOCK_H).to(tl.int64)
        where = kept[:, None] & (offs_h < H)[None, :]
        d = tl.load(d_ptr + offs_h[None, :] * stride_dh, mask=where, other=0.0).to(tl.float32)
        d *= inv_d[:, None]
        to_all += tl.sum(d * tl.sum(d, axis=0)[None, :], axis=1)
    consistency = (to_all - square_d * inv_d * inv_d) / tl.maximum(G - 1, 1)
    tl.store(consistency_ptr + b * G + offs_g, consistency, mask=kept)

    total = tl.zeros((BLOCK_G,), tl.float32)  # sum of cosines, or of exp(cosine / temperature - m)
    m = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    for number in range(M):
        square_n = tl.zeros((), tl.float32)
        dot = tl.zeros((BLOCK_G,), tl.float32)
        for start in range(0, H, BLOCK_H):
            offs_h = start + tl.arange(0, BLOCK_H).to(tl.int64)
            inside = offs_h < H
            n_ptrs = n_ptr + tl.cast(number, tl.int64) * stride_nm + offs_h * stride_nh
            n = tl.load(n_ptrs, mask=inside, other=0.0).to(tl.float32)
            square_n += tl.sum(n * n, axis=0)
            if DOCUMENT:
                where = kept[:, None] & inside[None, :]
                d = tl.load(d_ptr + offs_h[None, :] * stride_dh, mask=where, other=0.0)
                dot += tl.sum(d.to(tl.float32) * n[None, :], axis=1)
            else:
                q = tl.load(q_ptr + offs_h * stride_qh, mask=inside, other=0.0).to(tl.float32)
                dot += tl.sum(q * n, axis=0)
        cosine = dot / tl.maximum(tl.sqrt(square_n), EPS) * (inv_d if DOCUMENT else inv_q)
        if LSE:
            z = cosine / temperature
            m_new = tl.maximum(m, z)
            total = total * tl.exp(m - m_new) + tl.exp(z - m_new)
            m = m_new
        else:
            total += cosine
    total_or_1 = tl.where(total == 0.0, 1.0, total)  # M == 0: the logarithm of -inf's sum is -inf
    negative = m + tl.log(total_or_1) if LSE else -total
    tl.store(negative_ptr + b * G + offs_g, negative, mask=kept)


@triton.jit
def _cross_fwd(
    row_ptr, col_ptr, inv_row_ptr, inv_col_ptr, id_ptr, sum_ptr, max_ptr, count_ptr,
    stride_rb, stride_rg, stride_rh, stride_cb, stride_cg, stride_ch,
    B, ROW_G, COL_G, H, num_rows, tiles_per_share, num_shares, temperature,
    LSE: tl.constexpr, HAS_IDS: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    share = tl.program_id(0) % num_shares
    rows = (tl.program_id(0) // num_shares).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_kept = rows < num_rows
    row_group = rows // ROW_G
    row_id = tl.load(id_ptr + row_group, mask=row_kept, other=0) if HAS_IDS else row_group
    inv_row = tl.load(inv_row_ptr + rows, mask=row_kept, other=0.0)
    row_ptrs = row_ptr + row_group * stride_rb + (rows % ROW_G) * stride_rg  # [BLOCK_R]
    slots = tl.arange(0, BLOCK_J * BLOCK_L)

    total = tl.zeros((BLOCK_R,), tl.float32)  # sum of maxima, or of exp(cosine / temperature - m)
    m = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    count = tl.zeros((BLOCK_R,), tl.float32)
    first = share.to(tl.int64) * tiles_per_share
    for tile in range(first, first + tiles_per_share):
        best = tl.full((BLOCK_R, BLOCK_J), float("-inf"), tl.float32)
        for low in range(0, COL_G, BLOCK_L):
            col_group = (tile * BLOCK_J + slots // BLOCK_L).to(tl.int64)
            col_slot = (low + slots % BLOCK_L).to(tl.int64)
            col_kept = (col_group < B) & (col_slot < COL_G)
            col_ptrs = col_ptr + col_group * stride_cb + col_slot * stride_cg
            acc = tl.zeros((BLOCK_R, BLOCK_J * BLOCK_L), tl.float32)
            for start in range(0, H, BLOCK_H):
                offs_h = start + tl.arange(0, BLOCK_H).to(tl.int64)
                a = tl.load(
                    row_ptrs[:, None] + offs_h[None, :] * stride_rh,
                    mask=row_kept[:, None] & (offs_h < H)[None, :], other=0.0,
                )  # fmt: skip
                c = tl.load(
                    col_ptrs[None, :] + offs_h[:, None] * stride_ch,
                    mask=col_kept[None, :] & (offs_h < H)[:, None], other=0.0,
                )  # fmt: skip
                if UPCAST:  # the interpreter multiplies bfloat16 as integers
                    a, c = a.to(tl.float32), c.to(tl.float32)
                acc = tl.dot(a, c, acc, input_precision="ieee")
            # what the products do not need is loaded behind them: registers are short there
            inv_col = tl.load(inv_col_ptr + col_group * COL_G + col_slot, mask=col_kept, other=0.0)
            acc = acc * inv_row[:, None] * inv_col[None, :]
            if LSE:
                ids = tl.load(id_ptr + col_group, mask=col_kept, other=0) if HAS_IDS else col_group
                keep = col_kept[None, :] & (ids[None, :] != row_id[:, None])
                z = tl.where(keep, acc / temperature, float("-inf"))
                m_new = tl.maximum(m, tl.max(z, axis=1))
                shift = tl.where(m_new == float("-inf"), 0.0, m_new)
                total = total * tl.exp(m - shift) + tl.sum(tl.exp(z - shift[:, None]), axis=1)
                m = m_new
                count += tl.sum(keep.to(tl.float32), axis=1)
            else:
                acc = tl.where(acc == acc, acc, float("inf"))  # a maximum would drop NaN
                acc = tl.where(col_kept[None, :], acc, float("-inf"))
                acc = tl.reshape(acc, (BLOCK_R, BLOCK_J, BLOCK_L))
                best = tl.maximum(best, tl.max(acc, axis=2))
        if not LSE:
            groups = tile * BLOCK_J + tl.arange(0, BLOCK_J)
            ids = tl.load(id_ptr + groups, mask=groups < B, other=0) if HAS_IDS else groups
            other = (groups < B)[None, :] & (ids[None, :] != row_id[:, None])  # [BLOCK_R, BLOCK_J]
            best = tl.where(best == float("inf"), float("nan"), best)
            total += tl.sum(tl.where(other, best, 0.0), axis=1)
            count += tl.sum(other.to(tl.float32), axis=1)
    offs = share.to(tl.int64) * num_rows + rows
    tl.store(sum_ptr + offs, total, mask=row_kept)
    tl.store(max_ptr + offs, m, mask=row_kept)
    tl.store(count_ptr + offs, count, mask=row_kept)


@triton.jit
def _finish_fwd(
    total_ptr, positive_ptr, negative_ptr, consistency_ptr, hard_ptr,
    sum_ptr, max_ptr, count_ptr, num_rewards, REWARDS_PER_ROW, num_rows, num_shares, M,
    temperature, negative_weight, consistency_weight, hard_weight,
    LSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    kept = offs < num_rewards
    row = offs // REWARDS_PER_ROW
    positive = tl.load(positive_ptr + offs, mask=kept, other=0.0)
    negative = tl.load(negative_ptr + offs, mask=kept, other=0.0)
    consistency = tl.load(consistency_ptr + offs, mask=kept, other=0.0)

    count = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    m = positive / temperature
    if LSE:
        m = tl.maximum(m, negative)  # the negatives' own log-sum-exp
        total = tl.exp(positive / temperature - m) + tl.exp(negative - m)
    for share in range(num_shares):
        at = tl.cast(share, tl.int64) * num_rows + row
        part = tl.load(sum_ptr + at, mask=kept, other=0.0)
        if LSE:
            part_m = tl.load(max_ptr + at, mask=kept, other=float("-inf"))
            m_new = tl.maximum(m, part_m)
            total = total * tl.exp(m - m_new) + part * tl.exp(part_m - m_new)
            m = m_new
        else:
            total += part
        count += tl.load(count_ptr + at, mask=kept, other=0.0)
    if LSE:
        hard = temperature * (tl.log(1.0 + M + count) - (m + tl.log(total)))
        negative = tl.zeros((BLOCK,), tl.float32)
        tl.store(negative_ptr + offs, negative, mask=kept)
    else:
        hard = -total / tl.maximum(count, 1.0)
    reward = positive + negative_weight * negative + consistency_weight * consistency
    tl.store(hard_ptr + offs, hard, mask=kept)
    tl.store(total_ptr + offs, (reward + hard_weight * hard) / temperature, mask=kept)


def _shares(num_groups: int, num_rows: int, block_j: int) -> tuple[int, int]:
    """Column tiles per share, and shares per row tile."""
    tiles = triton.cdiv(num_groups, block_j)
    wanted = min(tiles, MAX_SHARES, triton.cdiv(PROGRAMS, triton.cdiv(num_rows, BLOCK_R)))
    tiles_per_share = triton.cdiv(tiles, wanted)
    return tiles_per_share, triton.cdiv(tiles, tiles_per_share)


def forward(
    rollouts: Tensor,
    queries: Tensor,
    negatives: Tensor | None,
    group_ids: Tensor | None,
    *,
    lse: bool,
    document: bool,
    temperature: float,
    weights: tuple[float, float, float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Total and parts, each [groups, rollouts] float32; weights: negative, consistency, hard."""
    num_groups, num_rollouts, hidden = rollouts.shape
    total, positive, negative, consistency, hard = (
        rollouts.new_empty((num_groups, num_rollouts), dtype=torch.float32) for _ in range(5)
    )
    if not num_groups:
        return total, positive, negative, consistency, hard
    inv_d = torch.empty_like(positive)
    inv_q = rollouts.new_empty(num_groups, dtype=torch.float32)
    num_negatives = 0 if negatives is None else negatives.shape[1]
    n = rollouts if negatives is None else negatives

    block_g = triton.next_power_of_2(num_rollouts)
    block_h = min(max(16, 8192 // block_g), triton.next_power_of_2(hidden))
    _group_fwd[(num_groups,)](
        rollouts, queries, n, inv_d, inv_q, positive, negative, consistency,
        *rollouts.stride(), *queries.stride(), *n.stride(),
        G=num_rollouts, M=num_negatives, H=hidden, temperature=temperature,
        DOCUMENT=document, LSE=lse, EPS=NORM_EPS, BLOCK_G=block_g, BLOCK_H=block_h,
    )  # fmt: skip

    stride_b, stride_h = queries.stride()
    query_side = (queries, (stride_b, 0, stride_h), inv_q, 1)
    document_side = (rollouts, rollouts.stride(), inv_d, num_rollouts)
    row, col = (document_side, query_side) if document else (query_side, document_side)
    num_rows = num_groups * row[3]
    block_l = min(triton.next_power_of_2(col[3]), BLOCK_C)
    block_j = BLOCK_C // block_l
    tiles_per_share, num_shares = _shares(num_groups, num_rows, block_j)
    shares = rollouts.new_empty((3, num_shares, num_rows), dtype=torch.float32).unbind()
    wide = (
        rollouts.dtype == torch.float32
    )  # no tensor cores: the tile's products pass through registers
    _cross_fwd[(triton.cdiv(num_rows, BLOCK_R) * num_shares,)](
        row[0], col[0], row[2], col[2], group_ids, *shares, *row[1], *col[1],
        B=num_groups, ROW_G=row[3], COL_G=col[3], H=hidden,
        num_rows=num_rows, tiles_per_share=tiles_per_share, num_shares=num_shares,
        temperature=temperature,
        LSE=lse, HAS_IDS=group_ids is not None, UPCAST=interpreting(),
        BLOCK_R=BLOCK_R, BLOCK_J=block_j, BLOCK_L=block_l,
        BLOCK_H=16 if wide else 64, num_warps=8 if wide else 4,
    )  # fmt: skip

    negative_weight, consistency_weight, hard_weight = weights
    num_rewards = num_groups * num_rollouts
    _finish_fwd[(triton.cdiv(num_rewards, BLOCK_FINISH),)](
        total, positive, negative, consistency, hard, *shares,
        num_rewards=num_rewards, REWARDS_PER_ROW=num_rewards // num_rows, num_rows=num_rows,
        num_shares=num_shares, M=num_negatives, temperature=temperature,
        negative_weight=negative_weight, consistency_weight=consistency_weight,
        hard_weight=hard_weight,
        LSE=lse, BLOCK=BLOCK_FINISH,
    )  # fmt: skip
    return total, positive, negative, consistency, hard
