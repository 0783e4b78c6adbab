"""Every Triton kernel compiles for a Hopper GPU; no GPU is needed.

To cover a new kernel, add a row to KERNELS.  Arguments that the row does not name are i32.  This
file runs itself once in a subprocess, because Triton's interpreter replaces the compiler in the
process of the tests.
"""

import json
import os
import subprocess
import sys
from importlib import import_module
from typing import Any, NamedTuple

import pytest

ACC = "tl.float32"  # strings that begin with "tl." are looked up in triton.language
MEAN = "_masked_mean_triton"
REWARD = "_contrastive_reward_triton"
ROW = "_row_softmax_triton"
POLICY = "_policy_triton"
SLOT = {"SPLIT_T": 256, "BLOCK_H": 256}
STRIDES = {"stride_xb": "i64", "stride_xt": "i64"}


class Kernel(NamedTuple):
    module: str  # inside tercet.kernels
    name: str
    types: dict[str, str]  # of the arguments that are not i32: "*bf16", "*fp32", "i64", ...
    constexprs: dict[str, Any]
    num_warps: int = 4
    wide: bool = False  # no product of 32-bit integers: every offset is 64-bit
    aligned: tuple[str, ...] = ()  # multiples of 16; then no load of a 16-bit type may be scalar

    def __str__(self) -> str:
        kinds = [str(v) for v in self.types.values() if v.startswith("*")]
        flags = [k for k, v in self.constexprs.items() if v is True]
        return "-".join([self.name, kinds[0][1:], *flags])


def _mean_kernels(dtype: str, packed: bool) -> list[Kernel]:
    cu = {"cu_ptr": "*i32"}
    slot = {**cu, "mask_ptr": "*u8"}
    layout = {"PACKED": packed, "SEARCH_STEPS": 8, "HAS_MASK": True}
    partial = {"x_ptr": dtype, **slot, "partial_ptr": "*fp32", "count_ptr": "*i32"}
    combine = {"partial_ptr": "*fp32", "slot_count_ptr": "*i32", **cu}
    combine |= {"mean_ptr": "*fp32", "count_ptr": "*i32"}
    scatter = {"dx_ptr": dtype, "grad_ptr": "*fp32", **slot}
    return [
        Kernel(
            MEAN,
            "_masked_mean_partial",
            partial | STRIDES,
            layout | {"ACC": ACC, "stride_xh": 1, "BLOCK_T": 8} | SLOT,
            num_warps=1,
            aligned=("hidden", "stride_xb", "stride_xt"),
        ),
        Kernel(
            MEAN,
            "_masked_mean_combine",
            combine,
            {"PACKED": packed, "ACC": ACC, "SPLIT_T": 256, "BLOCK_SPLITS": 8, "BLOCK_H": 256},
        ),
        Kernel(MEAN, "_masked_mean_scatter", scatter, layout | {"BLOCK_T": 16} | SLOT),
    ]


def _mean_row_kernels(normalize: bool) -> list[Kernel]:
    shared = {"EPS": 1e-12, "ACC": ACC, "BLOCK_ROW": 1024}
    pointers = {"dy_ptr": "*fp32", "y_ptr": "*fp32", "norm_ptr": "*fp32", "count_ptr": "*i32"}
    return [
        Kernel(MEAN, "_masked_mean_normalize", {"y_ptr": "*fp32", "norm_ptr": "*fp32"}, shared),
        Kernel(
            MEAN,
            "_masked_mean_row_grad",
            pointers | {"grad_ptr": "*fp32", "stride_db": "i64", "stride_dh": "i64"},
            shared | {"NORMALIZE": normalize},
        ),
    ][0 if normalize else 1 :]


MEAN_KERNELS = [
    kernel._replace(wide=True)
    for kernel in [
        *_mean_kernels("*bf16", packed=False),
        *_mean_kernels("*bf16", packed=True),
        *_mean_kernels("*fp32", packed=True),
        *_mean_row_kernels(normalize=True),
        *_mean_row_kernels(normalize=False),
    ]
]


def _reward_kernels(dtype: str, lse: bool, document: bool, ids: bool) -> list[Kernel]:
    weights = dict.fromkeys(("negative_weight", "consistency_weight", "hard_weight"), "fp32")
    parts = dict.fromkeys(("positive_ptr", "negative_ptr", "consistency_ptr"), "*fp32")
    embeddings = {"d_ptr": dtype, "q_ptr": dtype, "n_ptr": dtype}
    norms = {"inv_d_ptr": "*fp32", "inv_q_ptr": "*fp32", "temperature": "fp32"}
    shares = dict.fromkeys(("sum_ptr", "max_ptr", "count_ptr"), "*fp32")
    sides = {"row_ptr": dtype, "col_ptr": dtype, "temperature": "fp32"} | shares
    sides |= {"inv_row_ptr": "*fp32", "inv_col_ptr": "*fp32"} | ({"id_ptr": "*i64"} if ids else {})
    block_h = 32 if dtype == "*fp32" else 64
    tile = {"BLOCK_R": 64, "BLOCK_J": 64, "BLOCK_L": 1, "BLOCK_H": block_h, "UPCAST": False}
    tile |= {"stride_rh": 1, "stride_ch": 1}
    tile |= {} if document else {"BLOCK_J": 8, "BLOCK_L": 8}
    finish = {"total_ptr": "*fp32", "hard_ptr": "*fp32", "temperature": "fp32"}
    finish |= shares | parts | weights
    return [
        Kernel(
            REWARD,
            "_group_fwd",
            embeddings | parts | norms,
            {"DOCUMENT": document, "LSE": lse, "EPS": 1e-12, "BLOCK_G": 8, "BLOCK_H": 1024}
            | {"stride_dh": 1, "stride_qh": 1, "stride_nh": 1},
            wide=True,
            aligned=("H", "stride_db", "stride_dg", "stride_qb", "stride_nb", "stride_nm"),
        ),
        Kernel(
            REWARD,
            "_cross_fwd",
            sides,
            {"LSE": lse, "HAS_IDS": ids} | tile | ({} if ids else {"id_ptr": None}),
            num_warps=8,
            wide=True,
            aligned=("H", "stride_rb", "stride_rg", "stride_cb", "stride_cg"),
        ),
        Kernel(REWARD, "_finish_fwd", finish, {"LSE": lse, "BLOCK": 256}, wide=True),
    ]


REWARD_KERNELS = [
    *_reward_kernels("*fp32", lse=False, document=False, ids=False),
    *_reward_kernels("*bf16", lse=False, document=True, ids=True),
    *_reward_kernels("*bf16", lse=True, document=True, ids=False),
    *_reward_kernels("*fp16", lse=True, document=False, ids=True),
]


def _row_kernels(dtype: str, entropy: bool) -> list[Kernel]:
    rows = ("scale", "max", "rest", "spread", "picked", "dtarget", "log_sum", "a", "b")
    strides = {"stride_outer": "i64", "stride_inner": "i64", "target_ptr": "*i64"}
    forward = {"x_ptr": dtype} | strides | {f"{name}_ptr": "*fp32" for name in rows[:5]}
    backward = {"x_ptr": dtype, "dx_ptr": dtype} | strides
    backward |= {f"{name}_ptr": "*fp32" for name in ("max", "scale", *rows[5:])}
    flags = {"ENTROPY": entropy, "BLOCK_V": 2048, "GROUP": 4 if dtype == "*fp32" else 8}
    flags |= {"STAGES": 4}
    return [
        Kernel(ROW, "_row_softmax_fwd", forward, {"FIRST": True, **flags}, wide=True),
        Kernel(ROW, "_row_softmax_fwd", forward, {"FIRST": False, **flags}, wide=True),
        Kernel(
            ROW,
            "_row_softmax_bwd",
            backward,
            {"ENTROPY": entropy, "BLOCK_V": 4096},
            8,
            wide=True,
            aligned=("V", "stride_outer", "stride_inner"),
        ),
    ]


ROW_KERNELS = [
    kernel
    for dtype in ("*bf16", "*fp32")
    for entropy in (False, True)
    for kernel in _row_kernels(dtype, entropy)
]


def _token_kernel(form: int, **absent: None) -> Kernel:
    kinds = ("logp", "entropy", "old", "advantage", "ref", "sampler", "weight", "slope", "dentropy")
    pointers = {f"{name}_ptr": "*fp32" for name in (*kinds, "stats")} | {"counted_ptr": "*u8"}
    numbers = ("lower", "upper", "delta", "beta", "entropy_coef", "tau_pos", "tau_neg", "cap")
    flags = {"KL": 0 if absent else 3, "BONUS": not absent, "MAX": 20.0, "NUM_STATS": 14}
    return Kernel(
        POLICY,
        "_policy_tokens",
        {k: v for k, v in pointers.items() if k not in absent} | dict.fromkeys(numbers, "fp32"),
        {"FORM": form, "BLOCK_N": 1024} | flags | absent,
        wide=True,
    )


def _policy_grad_kernel(dtype: str, *, entropy: bool, capped: bool, index: bool) -> Kernel:
    names = ("dtarget", "max", "scale", "log_sum", "a", "b")
    types = {"x_ptr": "*fp32", "dx_ptr": dtype} | {f"{name}_ptr": "*fp32" for name in names}
    types |= {"target_ptr": "*i64", "logit_scale": "fp32", "softcap": "fp32"}
    flags = {"ENTROPY": entropy, "CAPPED": capped, "BLOCK_V": 4096}
    return Kernel(
        POLICY,
        "_policy_grad",
        types | ({"index_ptr": "*i64"} if index else {}),
        flags | ({} if index else {"index_ptr": None}),
        num_warps=8,
        wide=True,
        aligned=("V",),
    )


NOT_GIVEN = dict.fromkeys(
    f"{name}_ptr" for name in ("entropy", "old", "ref", "sampler", "dentropy")
)
POLICY_KERNELS = [
    *(_token_kernel(form) for form in range(4)),
    _token_kernel(0, **NOT_GIVEN),
    _policy_grad_kernel("*bf16", entropy=False, capped=False, index=True),
    _policy_grad_kernel("*bf16", entropy=True, capped=True, index=False),
    _policy_grad_kernel("*fp32", entropy=True, capped=False, index=True),
]
KERNELS: list[Kernel] = [
    *MEAN_KERNELS,
    *REWARD_KERNELS,
    *ROW_KERNELS,
    *POLICY_KERNELS,
]


def _compile(kernel: Kernel) -> dict[str, Any]:
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget

    fn = getattr(import_module(f"tercet.kernels.{kernel.module}"), kernel.name)
    constexprs = {
        k: getattr(tl, v[3:]) if isinstance(v, str) and v.startswith("tl.") else v
        for k, v in kernel.constexprs.items()
    }
    unknown = {*kernel.types, *constexprs} - set(fn.arg_names)
    if unknown:
        raise ValueError(f"{kernel.name} has no arguments {sorted(unknown)}; correct its row")
    signature = {
        name: "constexpr" if name in constexprs else kernel.types.get(name, "i32")
        for name in fn.arg_names
    }
    multiples = [name.endswith("_ptr") or name in kernel.aligned for name in fn.arg_names]
    attrs = {
        (i,): [["tt.divisibility", 16]] for i, is_multiple in enumerate(multiples) if is_multiple
    }
    source = triton.compiler.ASTSource(
        fn=fn, signature=signature, constexprs=constexprs, attrs=attrs if kernel.aligned else None
    )
    options = {"num_warps": kernel.num_warps}
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    products = [line.strip() for line in binary.asm["ttir"].splitlines() if "arith.muli" in line]
    narrow = [line for line in products if "i32" in line.rpartition(" : ")[2]]
    return {
        "cubin_bytes": len(binary.asm["cubin"]),
        "narrow_products": narrow,
        "scalar_loads": binary.asm["ptx"].count("ld.global.b16"),
    }


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-P", __file__], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(KERNELS)), ids=[str(k) for k in KERNELS])
def test_compiles_for_hopper(index, compiled):
    result = compiled[index]
    assert result["cubin_bytes"] > 1000
    if KERNELS[index].wide:
        assert result["narrow_products"] == []
    if KERNELS[index].aligned:
        assert result["scalar_loads"] == 0


if __name__ == "__main__":
    sys.stdout.write(json.dumps([_compile(kernel) for kernel in KERNELS]) + "\n")
