"""What the compiler makes of the Triton kernels at real shapes; needs no GPU.

    python -P bench/static_report.py [sm_80 sm_90 sm_100]

The host code of every launch runs on meta tensors, under a driver that knows no more than an
architecture, so that each kernel is specialised and compiled just as on that GPU.  Registers and
memory come from the cubin's resource usage and its disassembly; the width of an access, and the
argument that its address derives from, from the PTX.  DESIGN says what each kernel was built for,
`faults` where it falls short, and tests/kernels/test_static_performance.py that it never does.
Columns: shared in bytes per block, local and width in bytes per thread, blocks per multiprocessor,
flight in KiB per multiprocessor.

To cover a new kernel, add a Launch of its host code to LAUNCHES and its name to DESIGN.
"""

import argparse
import os
import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

if __name__ == "__main__":  # before Triton is imported
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from tercet.kernels import _contrastive_reward_triton as reward
from tercet.kernels import _masked_mean_triton as mean
from tercet.kernels import _policy_terms as terms
from tercet.kernels import _policy_triton as policy
from tercet.kernels import _row_softmax as softmax
from tercet.kernels import _row_softmax_triton as rows
from tercet.kernels import _scaled as scaling
from tercet.kernels import _similarity_triton as similarity
from tercet.kernels._policy_config import PolicyLossConfig

ARCHS = (80, 90, 100)
SM_REGISTERS, SM_WARPS, SM_BLOCKS = 65_536, 64, 32
SM_SHARED = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}  # bytes, of which a block costs 1 KiB
TENSOR_CORES = r"HMMA|HGMMA|UTC\w*MMA"
WIDE = r"\.E(\.\w+)*\.(128|256)"  # of a load or store in machine code


class Launch(NamedTuple):
    name: str
    run: Callable[[], object]  # host code that launches the kernels, on meta tensors
    bytes_moved: int  # least traffic of all its kernels together


class Design(NamedTuple):
    """What a kernel was built for."""

    wide: tuple[str, ...]  # pointers behind which a thread moves 16 bytes at a time
    blocks: int  # least number of blocks that fit on a multiprocessor
    in_flight: int = 0  # KiB that one pass of these blocks over the first pointer asks for
    tensor_cores: bool = False


class Access(NamedTuple):
    pointer: str  # the argument that the address derives from
    store: bool
    width: int  # bytes per thread


class Report(NamedTuple):
    launch: str
    kernel: str
    arch: int
    element: str  # behind the first pointer: "f32", "bf16", ...
    threads: int
    registers: int
    shared: int  # bytes per block
    local: int  # bytes per thread: spills, and arrays that registers cannot hold
    narrow_products: list[str]  # 32-bit products, which no offset may come from
    accesses: list[Access]
    opcodes: Counter[str]  # instructions of the disassembly by name

    def design(self) -> Design:
        return DESIGN.get(f"{self.kernel} {self.element}") or DESIGN[self.kernel]

    def blocks(self) -> int:
        """Blocks that a multiprocessor holds at a time."""
        warps = self.threads // 32
        # registers go to warps in units of 256, and a warp lives on one of four partitions
        per_warp = -(-self.registers * 32 // 256) * 256
        by_registers = 4 * (SM_REGISTERS // 4 // per_warp) // warps
        by_shared = SM_SHARED[self.arch] // (self.shared + 1024)
        return min(SM_BLOCKS, SM_WARPS // warps, by_registers, by_shared)

    def width(self, pointer: str) -> int:
        """Bytes per thread of the narrowest access, but for those that are a tenth of the bytes.

        0 where a variant of the kernel has no use for the pointer.
        """
        widths = sorted(a.width for a in self.accesses if a.pointer == pointer)
        moved = 0
        for width in widths:
            moved += width
            if moved > sum(widths) / 10:
                return width
        return 0

    def in_flight(self, pointer: str) -> int:
        """Bytes that all blocks of a multiprocessor ask for in one pass over a pointer."""
        wide = (a for a in self.accesses if a.width >= 16 and not a.store)
        return sum(a.width for a in wide if a.pointer == pointer) * self.threads * self.blocks()

    def count(self, pattern: str) -> int:
        """Instructions whose name begins with the pattern."""
        return sum(n for name, n in self.opcodes.items() if re.match(pattern, name))


def faults(report: Report) -> list[str]:
    """Where a kernel falls short of its design; empty when it does not."""
    design, found = report.design(), []
    if report.local or report.count("LDL|STL"):
        found.append(f"local memory: {report.local} bytes per thread")
    found += [f"32-bit product: {line}" for line in report.narrow_products]
    for pointer in design.wide:
        if 0 < (width := report.width(pointer)) < 16:
            found.append(f"{pointer}: {width} bytes per thread, not 16")
    for store, names in ((False, "LDG|LDGSTS"), (True, "STG")):
        asked = sum(a.store == store and a.width >= 16 for a in report.accesses)
        if (got := report.count(f"({names}){WIDE}")) < asked:
            found.append(f"{names}: {got} wide ones in machine code, {asked} in PTX")
    if report.blocks() < design.blocks:
        found.append(f"blocks per multiprocessor: {report.blocks()}, not {design.blocks}")
    if design.in_flight and (flight := report.in_flight(design.wide[0]) >> 10) < design.in_flight:
        found.append(f"in flight: {flight} KiB, not {design.in_flight}")
    if design.tensor_cores and not report.count(TENSOR_CORES):
        found.append("tensor cores: not used")
    return found


class Offline:
    """The part of a Triton driver that compiling needs."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # the key of a kernel's own cache

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiled_launches(arch: int) -> Iterator[list[tuple[str, Any]]]:
    """Launches compile for `arch` instead of running; yields (kernel, binary) of each, in order."""
    found = []
    launch = triton.JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        binary = launch(self, *args, grid=grid, warmup=True, **options)
        found.append((self.fn.__name__, binary))
        return binary

    driver.set_active(Offline(arch))  # pyright: ignore[reportArgumentType]
    triton.JITFunction.run = compile_only
    try:
        yield found
    finally:
        triton.JITFunction.run = launch


def _accesses(ptx: str, arguments: list[str]) -> list[Access]:
    """Global loads and stores, each with the pointer argument that its address derives from."""
    made_from: dict[str, set[str]] = {}  # 64-bit register: registers or argument
    found = []
    for text in ptx.splitlines():
        if not (line := re.match(r"\s*(?:@!?%p\d+ )?([a-z][\w.]+)\s+(.*);", text)):
            continue
        operation, operands = line[1], line[2]
        registers = re.findall(r"%rd\d+", operands)
        if moved := re.match(r"(ld|st)\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)$", operation):
            address = re.findall(r"\[\s*(%rd\d+)", operands)[0]
            found.append((address, moved[1] == "st", int(moved[2] or 1) * int(moved[3]) // 8))
        elif operation.startswith("cp.async") and "global" in operation:
            found.append((registers[-1], False, int(re.findall(r"0x[0-9a-f]+", operands)[0], 16)))
        elif argument := re.search(r"\[\w+_param_(\d+)", operands):
            if registers and int(argument[1]) < len(arguments):
                made_from.setdefault(registers[0], set()).add(arguments[int(argument[1])])
        elif registers and not operation.startswith(("st.", "ld.")):
            made_from.setdefault(registers[0], set()).update(registers[1:])
    return [Access(_origin(at, made_from), store, width) for at, store, width in found]


def _origin(register: str, made_from: dict[str, set[str]]) -> str:
    """Name of the one pointer argument among everything that a register is made from."""
    seen, todo = set(), [register]
    while todo:
        if (name := todo.pop()) not in seen:
            seen.add(name)
            todo += made_from.get(name, ())
    (pointer,) = (name for name in seen if name.endswith("_ptr"))
    return pointer


def _tool(name: str, *arguments: str) -> str:
    path = getattr(knobs.nvidia, name).path  # comes with Triton
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def _text(cubin: bytes) -> bytes:
    """Machine code of a cubin, an ELF file: the one section whose name begins with .text."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    heads = [struct.unpack_from("<IIQQQQ", cubin, table + size * i) for i in range(count)]
    named = heads[names][4]  # where the names of sections begin
    (found,) = ((at, n) for name, _, _, _, at, n in heads if cubin[named + name :][:5] == b".text")
    return cubin[found[0] : found[0] + found[1]]


def _opcodes(cubins: list[bytes], arch: int) -> list[Counter[str]]:
    """Instructions by name; all cubins in one disassembly, which takes a third of a second."""
    texts = [_text(cubin) for cubin in cubins]
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(texts))
        file.flush()
        code = _tool("nvdisasm", "--binary", f"SM{arch}", file.name)
    names = re.findall(r"^ */\*[0-9a-f]+\*/ +(?:@!?U?P\w+ +)?([A-Z][\w.]*)", code, flags=re.M)
    assert 16 * len(names) == sum(map(len, texts)), "an instruction of 16 bytes gave no line"
    left = iter(names)
    return [Counter(islice(left, len(text) // 16)) for text in texts]


def _read(launch: Launch, kernel: str, arch: int, binary: Any, opcodes: Counter[str]) -> Report:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(binary.asm["cubin"])
        cubin.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", cubin.name)
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    ttir = binary.asm["ttir"].splitlines()
    head = next(line for line in ttir if "tt.func public" in line)
    products = [line.strip() for line in ttir if "arith.muli" in line]
    return Report(
        launch.name,
        kernel,
        arch,
        element=re.findall(r"!tt\.ptr<(\w+)>", head)[0],
        threads=32 * binary.metadata.num_warps,
        registers=used["REG"],
        shared=binary.metadata.shared,
        local=used["STACK"] + used["LOCAL"],
        narrow_products=[line for line in products if "i32" in line.rpartition(" : ")[2]],
        accesses=_accesses(binary.asm["ptx"], re.findall(r"%(\w+): ", head)),
        opcodes=opcodes,
    )


def reports(launches: list[Launch], archs: tuple[int, ...] = ARCHS) -> list[Report]:
    """One report per kernel and architecture; of launches that compile the same, the first's."""
    return [report for arch in archs for report in _of_arch(launches, arch)]


def _of_arch(launches: list[Launch], arch: int) -> list[Report]:
    todo: dict[str, tuple[Launch, str, int, Any]] = {}
    for launch in launches:
        with compiled_launches(arch) as found:
            launch.run()
        for name, binary in found:
            todo.setdefault(binary.hash, (launch, name, arch, binary))
    opcodes = _opcodes([binary.asm["cubin"] for *_, binary in todo.values()], arch)
    return [_read(*job, counted) for job, counted in zip(todo.values(), opcodes, strict=True)]


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def pooled(
    dtype: torch.dtype, batch: int, t: int, hidden: int, *, packed: bool, everything: bool = True
) -> Launch:
    """Forward and backward of masked_mean or segment_mean, with a mask and a norm or without."""
    x = _meta(batch * t, hidden, dtype=dtype) if packed else _meta(batch, t, hidden, dtype=dtype)
    cu = _meta(batch + 1, dtype=torch.int32) if packed else None
    mask = _meta(*x.shape[:-1], dtype=torch.bool) if everything else None

    def run() -> None:
        y, count, norm = mean.forward(x, cu, mask, everything)
        dy, dx = torch.empty_like(y), torch.empty_like(x)
        mean.backward(dy, y, count, norm, cu, mask, dx, everything)

    op = f"{'segment' if packed else 'masked'}_mean{'' if everything else ' plain'}"
    name = f"{op} {batch}x{t}x{hidden} {str(dtype).removeprefix('torch.')}"
    return Launch(name, run, 2 * (x.nbytes + (0 if mask is None else mask.nbytes)))


def rewarded(
    dtype: torch.dtype, groups: int, rollouts: int, hidden: int,
    *, lse: bool, document: bool, everything: bool = True,
) -> Launch:  # fmt: skip
    """Forward of contrastive_reward with seven negatives per group and group ids, or without."""
    d = _meta(groups, rollouts, hidden, dtype=dtype)
    q = _meta(groups, hidden, dtype=dtype)
    n = _meta(groups, 7, hidden, dtype=dtype) if everything else None
    ids = _meta(groups, dtype=torch.int64) if everything else None
    options: Any = {"lse": lse, "document": document, "temperature": 0.1, "weights": (1, 0.2, 0.2)}
    shape = f"{groups}x{rollouts}x{hidden} {str(dtype).removeprefix('torch.')}"
    mode = f"{'document' if document else 'query'}{' info_nce' if lse else ''}"
    mode += "" if everything else " plain"
    run = partial(reward.forward, d, q, n, ids, **options)
    moved = sum(x.nbytes for x in (d, q, n, ids) if x is not None)
    return Launch(f"contrastive_reward {mode} {shape}", run, moved)


def scored(
    dtype: torch.dtype, grad: torch.dtype, n: int, vocab: int, *, entropy: bool, first: int = 0
) -> Launch:
    """Forward and backward of token_logp, or of a tile of linear_logp that begins at `first`."""
    x, dx = _meta(n, vocab, dtype=dtype), _meta(n, vocab, dtype=grad)
    targets, scale = _meta(n, 1, dtype=torch.int64), _meta(n)
    at = rows.rows_of("static_report", "x", x)

    def run() -> None:
        state, grads = (_meta(3, n), _meta(n, 1)), (_meta(5, n), _meta(n, 1))
        rows.forward(x, at, targets, scale, state, first_column=first, entropy=entropy)
        rows.backward(dx, x, at, targets, grads, first_column=first, entropy=entropy)

    op = f"{'linear_logp tile' if first else 'token_logp'}{' entropy' if entropy else ''}"
    name = f"{op} {n}x{vocab} {str(dtype).removeprefix('torch.')}"
    return Launch(name, run, 2 * x.nbytes + dx.nbytes)


def judged(n: int, config: PolicyLossConfig, *, everything: bool) -> Launch:
    """Loss, gradient and metrics of n tokens, with everything that may be given or with nothing."""
    x, counted = _meta(n), _meta(n, dtype=torch.bool)
    given = x if everything else None
    tokens = terms.Tokens(given, x, given, given, x, counted)
    run = partial(policy.slopes, x, given, tokens, terms.Kind.of(config))
    arrays = 9 if everything else 4  # read and written
    return Launch(f"policy_loss {config.loss_type} {n}", run, arrays * x.nbytes + counted.nbytes)


def derived(
    dtype: torch.dtype, n: int, columns: int, *, index: bool, entropy: bool, softcap: float | None
) -> Launch:
    """Gradient of n rows of a tile of policy_head's logits, to the operands' dtype."""
    x, dx = _meta(n, columns), _meta(n, columns, dtype=dtype)
    query = softmax.Query(_meta(n, 1, dtype=torch.int64), _meta(n))
    grads = softmax.RowGrads(_meta(5, n), _meta(n, 1), _meta(n, dtype=torch.bool))
    live = _meta(n, dtype=torch.int64) if index else None
    run = partial(
        policy.row_gradient, dx, x, live, query, grads,
        first_column=columns, entropy=entropy, logit_scale=1.0, softcap=softcap,
    )  # fmt: skip
    name = f"policy_head tile {n}x{columns} {str(dtype).removeprefix('torch.')}"
    return Launch(f"{name}{' entropy' if entropy else ''}", run, x.nbytes + dx.nbytes)


def compared(
    dtype: torch.dtype, height: int, columns: int, *, own: bool = False, everything: bool = True
) -> Launch:
    """Sums, gradients and statistics of a tile of info_nce, with ids and limits or without."""
    stride = -(-columns // similarity.BLOCK_C) * similarity.BLOCK_C
    s, out = _meta(height, stride)[:, :columns], _meta(height, stride, dtype=dtype)[:, :columns]
    row, col, scale = _meta(height), _meta(columns), _meta()
    sides = (height, columns) if own else (columns,)
    marks: list[Any] = [None] * 4
    if everything:
        ids = [_meta(height, dtype=torch.int64), _meta(*sides, dtype=torch.int64)]
        marks = [*ids, row, None if own else col]
    frame = similarity.Frame._make([row, _meta(*sides), *marks, None if own else 0])

    def run() -> None:
        similarity.reduce(s, frame, scale, symmetric=not own)
        d_col = None if own else col
        similarity.weigh(s, frame, scale, (row, col), (row, row, d_col), out)
        similarity.describe(s, frame, scale, row)

    kind = f"{' own' if own else ''}{'' if everything else ' plain'}"
    name = f"info_nce tile{kind} {height}x{columns} {str(dtype).removeprefix('torch.')}"
    return Launch(name, run, 3 * s.nbytes + out.nbytes)


def rescaled(dtype: torch.dtype, n: int) -> Launch:
    """Saved float32 gradients times the upstream scalar, in dtype."""
    x, out = _meta(n), _meta(n, dtype=dtype)
    run = partial(scaling.fused, out, x, _meta(1))
    return Launch(f"scaled {n} {str(dtype).removeprefix('torch.')}", run, x.nbytes + out.nbytes)


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LAUNCHES = [
    pooled(BF16, 64, 2048, 4096, packed=False),
    pooled(FP32, 64, 2048, 4096, packed=False),
    pooled(BF16, 64, 2048, 4096, packed=True),
    pooled(FP32, 1024, 128, 1024, packed=True),
    pooled(BF16, 64, 2048, 1024, packed=True, everything=False),
    pooled(torch.float64, 8, 512, 1024, packed=True),
    rewarded(BF16, 8192, 8, 2048, lse=False, document=False),
    rewarded(BF16, 8192, 8, 2048, lse=True, document=True),
    rewarded(FP16, 1024, 4, 1024, lse=True, document=False),
    rewarded(FP32, 1024, 8, 1024, lse=False, document=False),
    rewarded(FP32, 1024, 8, 1024, lse=False, document=True, everything=False),
    rewarded(FP32, 1024, 8, 1024, lse=True, document=False),
    rewarded(FP32, 1024, 8, 1024, lse=True, document=True, everything=False),
    scored(BF16, BF16, 8192, 151_936, entropy=False),
    scored(BF16, BF16, 16_384, 151_936, entropy=True),
    scored(FP32, FP32, 4096, 128_256, entropy=True),
    scored(FP32, BF16, 16_384, 8192, entropy=False, first=8192),
    scored(FP32, BF16, 16_384, 8192, entropy=True, first=8192),
    judged(2**20, PolicyLossConfig(loss_type="reinforce"), everything=False),
    judged(2**20, PolicyLossConfig(beta=0.1, entropy_coef=0.1), everything=True),
    judged(2**20, PolicyLossConfig(loss_type="cispo", epsilon_high=5.0), everything=True),
    judged(2**20, PolicyLossConfig(loss_type="sapo", beta=0.1), everything=True),
    derived(BF16, 3520, 16_384, index=True, entropy=False, softcap=None),
    derived(BF16, 3520, 16_384, index=False, entropy=True, softcap=30.0),
    derived(FP32, 3520, 16_384, index=True, entropy=True, softcap=None),
    rescaled(BF16, 2**20),
    compared(BF16, 1024, 65_536),
    compared(FP16, 1024, 50_001, everything=False),
    compared(FP32, 2048, 32_768),
    compared(FP32, 4096, 7, own=True),
]

# 1024 threads, half of what a multiprocessor holds, hide the latency of streaming kernels; 32 KiB
# in flight on each of 132 keep an H200's memory busy for a latency of a microsecond.  The kernels
# that read more than they write had to have twice that and more to reach its bandwidth.
DESIGN = {
    "_masked_mean_partial": Design(("x_ptr",), blocks=16, in_flight=64),
    "_masked_mean_partial f64": Design(("x_ptr",), blocks=10, in_flight=64),
    "_masked_mean_combine": Design(("partial_ptr",), blocks=8),
    "_masked_mean_normalize": Design(("y_ptr",), blocks=8),
    "_masked_mean_row_grad": Design(("dy_ptr", "y_ptr", "grad_ptr"), blocks=8),
    "_masked_mean_scatter": Design(("dx_ptr",), blocks=8),
    "_group_fwd": Design(("d_ptr", "q_ptr", "n_ptr"), blocks=4, in_flight=32),
    "_cross_fwd": Design(("row_ptr", "col_ptr"), blocks=2, tensor_cores=True),
    "_cross_fwd f32": Design(("row_ptr", "col_ptr"), blocks=1),
    "_finish_fwd": Design((), blocks=8),
    "_policy_tokens": Design((), blocks=4),  # its mask is data, so it loads one by one: 37 B/token
    "_policy_grad": Design(("x_ptr", "dx_ptr"), blocks=4, in_flight=32),
    "_tile_fwd": Design(("s_ptr",), blocks=5, in_flight=32),
    "_tile_bwd": Design(("s_ptr", "ds_ptr"), blocks=3, in_flight=24),  # a third of it is stores
    "_tile_stats": Design(("s_ptr",), blocks=5, in_flight=32),
    "_scale": Design(("x_ptr", "out_ptr"), blocks=4, in_flight=32),
    "_row_softmax_fwd": Design(("x_ptr",), blocks=5, in_flight=96),
    "_row_softmax_bwd": Design(("x_ptr", "dx_ptr"), blocks=4, in_flight=32),
}


def row(report: Report) -> str:
    wide = report.design().wide
    widths = ",".join(str(report.width(pointer)) for pointer in wide)
    flight = str(report.in_flight(wide[0]) >> 10) if report.design().in_flight else ""
    return (
        f"  {report.kernel:24} sm_{report.arch:<4}{report.threads:8}{report.registers:6}"
        f"{report.shared:8}{report.local:7}{report.blocks():8}{flight:>8}  {widths}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("archs", nargs="*", default=[f"sm_{arch}" for arch in ARCHS])
    archs = tuple(int(arch.removeprefix("sm_")) for arch in parser.parse_args().archs)
    found = reports(LAUNCHES, archs)
    print(f"{'':34} threads  regs  shared  local  blocks  flight  width")
    for launch in LAUNCHES:
        print(f"{launch.name}: moves {launch.bytes_moved / 1e9:.2f} GB")
        for report in found:
            if report.launch == launch.name:
                print(row(report), *faults(report), sep="; ")


if __name__ == "__main__":
    main()
