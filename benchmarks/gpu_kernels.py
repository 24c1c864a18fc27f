"""Each kernel against the roofline and against others' kernels, at the shapes of one layer.

E hidden size   H query heads   Hkv key-value heads   D head size   S block size
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu_rivals import decode_rivals, prefill_rivals
from benchmarks.gpu_sizes import BLOCK, Sizes
from benchmarks.gpu_timing import Least, Row, Timer, Work, first_line
from tercet.kernels.triton import activation, decode, gather, prefill, rms_norm, rope, sampling, shared_prefix
from tercet.models.triton_layers import decode_programs

OURS = "tercet"


@dataclass(frozen=True)
class KernelCase:
    name: str
    least: Least
    make: Callable[[torch.device], dict[str, Work]]  # OURS, and the rivals, which compute the same

    def run(self, timer: Timer, rates: dict[str, float]) -> Row:
        works = self.make(timer.device)
        seconds = timer.seconds(works.pop(OURS))
        rivals = {name: _rival_seconds(timer, work) for name, work in works.items()}
        fraction = self.least.seconds(rates) / seconds
        return Row(self.name, seconds, self.least, fraction, self.least.bound(rates), rivals)


def _rival_seconds(timer: Timer, work: Work) -> float | str:
    try:
        return timer.seconds(work)
    except Exception as error:  # noqa: BLE001  # others' libraries may lack anything here; ours is measured all the same
        return first_line(error)


def cases(sizes: Sizes) -> Iterator[KernelCase]:
    yield from _rows_at_a_time(sizes)
    for shape in sizes.attended:
        yield _decode(sizes, *shape, flex=shape == sizes.attended[-1])
    for shape in sizes.prefilled:
        yield _prefill(sizes, *shape, flex=shape == sizes.prefilled[0])
    yield _shared_prefix(sizes, *sizes.shared)
    yield from _moves(sizes)
    for rows in sizes.drawn:
        yield from _draws(sizes, rows)


# ---- what is done a row at a time


def _rows_at_a_time(sizes: Sizes) -> Iterator[KernelCase]:
    config, rows, dtype = sizes.config, sizes.rows, sizes.dtype
    hidden, middle = config.hidden_size, config.intermediate_size
    row, gate = rows * hidden * dtype.itemsize, rows * middle * dtype.itemsize
    where = f"{rows} rows"

    def norm(device: torch.device) -> dict[str, Work]:
        x, weight = _random(device, dtype, rows, hidden), _random(device, dtype, hidden)
        return {
            OURS: lambda: rms_norm.rms_norm(x, weight, 1e-5),
            "torch": lambda: functional.rms_norm(x, (hidden,), weight, 1e-5),
        }

    def add_norm(device: torch.device) -> dict[str, Work]:
        x, residual = (_random(device, dtype, rows, hidden) for _ in range(2))
        weight = _random(device, dtype, hidden)
        return {
            OURS: lambda: rms_norm.add_rms_norm(x, residual, weight, 1e-5)[0],
            "torch": lambda: functional.rms_norm(x + residual, (hidden,), weight, 1e-5),
        }

    def silu(device: torch.device) -> dict[str, Work]:
        both = _random(device, dtype, rows, 2 * middle)
        first, second = both.chunk(2, -1)
        return {
            OURS: lambda: activation.silu_and_mul(both),
            "torch": lambda: functional.silu(first) * second,
        }

    yield KernelCase(f"rms_norm, {where} of {hidden}", Least(2 * row), norm)
    yield KernelCase(f"add_rms_norm, {where} of {hidden}", Least(4 * row), add_norm)
    yield KernelCase(f"silu_and_mul, {where} of 2 x {middle}", Least(3 * gate), silu)
    yield _rope(sizes)


def _rope(sizes: Sizes) -> KernelCase:
    config, rows, dtype = sizes.config, sizes.rows, sizes.dtype
    kv_heads, dim, heads = config.num_kv_heads, config.head_dim, config.num_heads + 2 * config.num_kv_heads

    def make(device: torch.device) -> dict[str, Work]:
        qkv = _random(device, dtype, rows, heads, dim)
        angles = torch.rand(rows, dim // 2, device=device)
        cos, sin = angles.cos(), angles.sin()
        cache = _random(device, dtype, -(-rows // BLOCK), 2, BLOCK, kv_heads, dim)
        slots = torch.randperm(len(cache) * BLOCK, device=device)[:rows]
        return {OURS: lambda: rope.rope_and_write(qkv, cos, sin, cache, slots, kv_heads)}

    # All is read once and written once, with an angle's cosine and sine for each row and pair.
    least = Least(2 * rows * heads * dim * dtype.itemsize + 2 * rows * (dim // 2) * 4)
    return KernelCase(f"rope_and_write, {rows} rows of {heads} x {dim}", least, make)


# ---- attention


@dataclass(frozen=True)
class Pages:
    """Random K and V of `batch` sequences of `length` tokens, in blocks that lie anywhere."""

    cache: Tensor  # [blocks, 2, S, Hkv, D]
    tables: Tensor  # [B, blocks of one] int32
    contexts: Tensor  # [B] int32

    @classmethod
    def random(cls, sizes: Sizes, device: torch.device, batch: int, length: int) -> Pages:
        config, each = sizes.config, -(-length // BLOCK)
        cache = _random(device, sizes.dtype, batch * each, 2, BLOCK, config.num_kv_heads, config.head_dim)
        tables = torch.randperm(batch * each, device=device).view(batch, each).int()
        return cls(cache, tables, torch.full((batch,), length, dtype=torch.int32, device=device))

    def dense(self) -> tuple[Tensor, Tensor]:
        """Keys and values, [B, Hkv, L, D], contiguous."""
        both = self.cache[self.tables.long()].permute(2, 0, 4, 1, 3, 5).flatten(3, 4)  # [2, B, Hkv, blocks * S, D]
        keys, values = both[..., : int(self.contexts[0]), :].contiguous()
        return keys, values


def kv_bytes(sizes: Sizes, tokens: int) -> int:
    """K and V of one layer."""
    return 2 * tokens * sizes.config.num_kv_heads * sizes.config.head_dim * sizes.dtype.itemsize


def attention_least(sizes: Sizes, rows: int, tokens: int, pairs: int) -> Least:
    """rows: query rows, each read and its result written; tokens: whose K and V are read; pairs: of a row and a token
    that it sees, for each head a product of D for the score and one for the sum."""
    config = sizes.config
    head_bytes = config.num_heads * config.head_dim * sizes.dtype.itemsize
    return Least(2 * rows * head_bytes + kv_bytes(sizes, tokens), 4 * pairs * config.num_heads * config.head_dim)


def causal_pairs(rows: int, context: int) -> int:
    """The last `rows` of `context` tokens: each sees itself and those before it."""
    return rows * (context - rows) + rows * (rows + 1) // 2


def _decode(sizes: Sizes, batch: int, context: int, *, flex: bool) -> KernelCase:
    config = sizes.config

    def make(device: torch.device) -> dict[str, Work]:
        pages = Pages.random(sizes, device, batch, context)
        query = _random(device, sizes.dtype, batch, config.num_heads, config.head_dim)
        programs = decode_programs(device)
        plan = decode.plan_decode(  # once for all layers
            pages.contexts, config.num_kv_heads, most_context=context, window=None, programs=programs
        )
        options = {"most_context": context, "programs": programs, "plan": plan}
        paged = (query, pages.cache, pages.tables, pages.contexts)
        ours: dict[str, Work] = {OURS: lambda: decode.decode_attention(*paged, **options)}
        return ours | decode_rivals(query, *pages.dense(), flex=flex)

    least = attention_least(sizes, batch, batch * context, batch * context)
    return KernelCase(f"decode_attention, {batch} x {context}", least, make)


def _prefill(sizes: Sizes, rows: int, context: int, *, flex: bool) -> KernelCase:
    config = sizes.config

    def make(device: torch.device) -> dict[str, Work]:
        pages = Pages.random(sizes, device, 1, context)
        query = _random(device, sizes.dtype, rows, config.num_heads, config.head_dim)
        starts = torch.tensor([0, rows], dtype=torch.int32, device=device)
        paged = (query, pages.cache, pages.tables, starts, pages.contexts)
        ours: dict[str, Work] = {OURS: lambda: prefill.prefill_attention(*paged, most_rows=rows)}
        return ours | prefill_rivals(query, *pages.dense(), flex=flex)

    least = attention_least(sizes, rows, context, causal_pairs(rows, context))
    return KernelCase(f"prefill_attention, {rows} of {context}", least, make)


def _shared_prefix(sizes: Sizes, batch: int, prefix: int, own: int) -> KernelCase:
    config = sizes.config

    def make(device: torch.device) -> dict[str, Work]:
        pages = Pages.random(sizes, device, 1, prefix + batch * -(-own // BLOCK) * BLOCK)
        shared = prefix // BLOCK
        table, tables = pages.tables[0, :shared], pages.tables[0, shared:].view(batch, -1)
        length = torch.tensor([prefix], dtype=torch.int32, device=device)
        contexts = torch.full((batch,), prefix + own, dtype=torch.int32, device=device)
        query = _random(device, sizes.dtype, batch, config.num_heads, config.head_dim)
        whole = torch.cat((table.expand(batch, -1), tables), 1)
        programs = decode_programs(device)
        return {
            OURS: lambda: shared_prefix.shared_prefix_attention(
                query, pages.cache, table, length, tables, contexts, most_prefix=prefix, most_context=own,
                programs=programs,
            ),
            "decode_attention": lambda: decode.decode_attention(
                query, pages.cache, whole, contexts, most_context=prefix + own, programs=programs
            ),
        }  # fmt: skip

    least = attention_least(sizes, batch, prefix + batch * own, batch * (prefix + own))
    return KernelCase(f"shared_prefix_attention, {batch} x ({prefix} + {own})", least, make)


# ---- blocks that move, tokens that are drawn


def _moves(sizes: Sizes) -> Iterator[KernelCase]:
    config, blocks = sizes.config, sizes.moved
    half = max(1, config.num_kv_heads // 2)
    least = Least(2 * kv_bytes(sizes, blocks * BLOCK) * half / config.num_kv_heads)
    where = f"{blocks} blocks, {half} of {config.num_kv_heads} heads"

    def make(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        cache = _random(device, sizes.dtype, 2 * blocks, 2, BLOCK, config.num_kv_heads, config.head_dim)
        chosen = torch.randperm(2 * blocks, device=device)[:blocks]
        return cache, chosen, gather.gather(cache, chosen, 0, half)

    def gathered(device: torch.device) -> dict[str, Work]:
        cache, chosen, _ = make(device)
        return {
            OURS: lambda: gather.gather(cache, chosen, 0, half),
            "torch": lambda: cache[..., :half, :][chosen],
        }

    def scattered(device: torch.device) -> dict[str, Work]:
        cache, chosen, packed = make(device)
        return {
            OURS: lambda: gather.scatter(cache, chosen, 0, packed),
            "torch": lambda: cache[..., :half, :].index_copy_(0, chosen, packed),
        }

    yield KernelCase(f"gather, {where}", least, gathered)
    yield KernelCase(f"scatter, {where}", least, scattered)


def _draws(sizes: Sizes, rows: int) -> Iterator[KernelCase]:
    vocab = sizes.config.vocab_size
    least = Least(rows * vocab * 4)

    def make(device: torch.device, temperature: float, top_p: float) -> tuple[Tensor, Work]:
        logits = _random(device, torch.float32, rows, vocab) * 3
        wanted = sampling.SamplingRows(
            torch.full((rows,), temperature, device=device),
            torch.zeros(rows, device=device),
            torch.zeros(rows, dtype=torch.int32, device=device),
            torch.full((rows,), top_p, device=device),
            torch.arange(2 * rows, device=device).view(rows, 2),
        )
        return logits, lambda: sampling.sample(logits, wanted)

    def greedy(device: torch.device) -> dict[str, Work]:
        logits, ours = make(device, 0.0, 1.0)
        return {OURS: ours, "torch argmax": lambda: logits.argmax(-1)}

    def nucleus(device: torch.device) -> dict[str, Work]:
        logits, ours = make(device, 0.8, 0.9)
        return {OURS: ours, "torch softmax, sort": lambda: (logits / 0.8).softmax(-1).sort(-1, descending=True)}

    yield KernelCase(f"sample, greedy, {rows} x {vocab}", least, greedy)
    yield KernelCase(f"sample, top-p 0.9, {rows} x {vocab}", least, nucleus)


def _random(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=device)
