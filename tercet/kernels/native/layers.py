"""All decoder layers of a step in one call, and each half of a layer alone.

T rows of the batch   E hidden size   H query heads   Hkv key-value heads   D head dimension   N sequences of the batch
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tercet.kernels.native.library import FORMATS, Layer, Linear, OnLayer, Shape, Step, library
from tercet.kernels.native.linear import NativeLinear


@dataclass(frozen=True)
class NativeLayer:
    attention_norm: Tensor  # [E] float32, as all norms
    qk_norm: Tensor | None  # [H + Hkv, D]
    mlp_norm: Tensor  # [E]
    qkv: NativeLinear
    output: NativeLinear
    gate_up: NativeLinear | None  # None: its MLP is of another kind, and computed elsewhere
    down: NativeLinear | None
    window: int | None


@dataclass(frozen=True)
class NativeShape:
    heads: int
    kv_heads: int
    dim: int
    eps: float
    cosine: Tensor  # [max context, D / 2] float32
    sine: Tensor


@dataclass(frozen=True)
class NativeStep:
    positions: Tensor  # [T] int64: rows of the shape's cosine and sine, or of `turns`
    slots: Tensor  # [T] int64
    spans: Tensor  # [N, 4] int64: first row, rows, context, address of its block table
    turns: tuple[Tensor, Tensor] | None = None  # cosine and sine of this step alone


class NativeLayers:
    def __init__(self, shape: NativeShape, layers: Sequence[NativeLayer]) -> None:
        self._kept = (shape, tuple(layers))  # the structures hold addresses
        self._shape = native_shape(shape, layers[0].qkv.struct.k)
        self._layers = (Layer * len(layers))(*map(_layer, layers))
        self._done = ctypes.c_int64()

    @property
    def layers_done(self) -> int:
        """Over all steps; grows during one. Any thread."""
        return self._done.value

    def forward(
        self,
        x: Tensor,
        step: NativeStep,
        kv_cache: Tensor,
        on_layer: Callable[[int], None] | None,
        only: range | None = None,
    ) -> None:
        """x [T, E] float32 in place; kv_cache [layers, blocks, 2, block size, Hkv, D]. What on_layer raises ends it.
        only: of the layers, those that follow each other."""
        only = range(len(self._layers)) if only is None else only
        told = _Told(on_layer, only.start)
        native = native_step(step, kv_cache[only.start])
        native.layer_bytes = kv_cache.stride(0) * kv_cache.element_size()
        shape, done = self._shape_of(step), ctypes.byref(self._done)
        library().layers_forward(
            self._at(only.start), len(only), ctypes.byref(shape), ctypes.byref(native), x.data_ptr(), told.call, done
        )
        told.raise_what_it_raised()

    def attention_half(
        self,
        layer: int,
        x: Tensor,
        out: Tensor,
        step: NativeStep,
        kv_cache: Tensor,
        on_layer: Callable[[int], None] | None,
    ) -> None:
        """out [T, E] float32 += the attention of layer `layer` over norm(x), behind its output projection. out may be
        x. As in `forward` the cache is that of all layers, and what on_layer raises ends it."""
        told, shape, native = _Told(on_layer, 0), self._shape_of(step), native_step(step, kv_cache[layer])
        library().attention_half(
            self._at(layer),
            ctypes.byref(shape),
            ctypes.byref(native),
            x.data_ptr(),
            out.data_ptr(),
            told.call,
            layer,
        )
        told.raise_what_it_raised()

    def mlp_half(self, layer: int, x: Tensor, out: Tensor) -> None:
        """out [T, E] float32 += the MLP of layer `layer` over norm(x). out may be x."""
        assert self._kept[1][layer].down is not None, "its MLP is computed elsewhere"
        library().mlp_half(self._at(layer), ctypes.byref(self._shape), len(x), x.data_ptr(), out.data_ptr())

    def count(self) -> None:
        """A layer is done whose halves were computed one by one."""
        self._done.value += 1

    def _at(self, layer: int) -> Any:
        """A pointer to a layer's structure, the later ones behind it."""
        return ctypes.byref(self._layers[layer])

    def _shape_of(self, step: NativeStep) -> Shape:
        return self._shape if step.turns is None else _turned(self._shape, *step.turns)


class _Told:
    """An `on_layer` as C++ calls it."""

    def __init__(self, on_layer: Callable[[int], None] | None, first: int) -> None:
        """first: is added to the number that C++ gives."""
        self._on_layer, self._first = on_layer, first
        self._raised: BaseException | None = None
        self.call = OnLayer() if on_layer is None else OnLayer(self._tell)

    def _tell(self, layer: int) -> int:
        assert self._on_layer is not None
        try:
            self._on_layer(self._first + layer)
        except BaseException as error:  # noqa: BLE001  # raised again by Python: C++ cannot carry it
            self._raised = error
        return self._raised is not None

    def raise_what_it_raised(self) -> None:
        if self._raised is not None:
            raise self._raised


def native_shape(shape: NativeShape, hidden: int) -> Shape:
    """The tensors must live as long as the structure."""
    cosine, sine = shape.cosine.data_ptr(), shape.sine.data_ptr()
    return Shape(hidden, shape.heads, shape.kv_heads, shape.dim, shape.eps, cosine, sine)


def _turned(shape: Shape, cosine: Tensor, sine: Tensor) -> Shape:
    """The tensors must live as long as the structure."""
    turned = Shape.from_buffer_copy(shape)
    turned.cosine, turned.sine = cosine.data_ptr(), sine.data_ptr()
    return turned


def native_step(step: NativeStep, cache: Tensor) -> Step:
    """cache: one layer's. As above."""
    return Step(
        len(step.positions),
        step.positions.data_ptr(),
        step.slots.data_ptr(),
        step.spans.data_ptr(),
        len(step.spans),
        cache.data_ptr(),
        0,
        cache.shape[2],
        FORMATS[str(cache.dtype).removeprefix("torch.")],
    )


def _layer(layer: NativeLayer) -> Layer:
    return Layer(
        layer.attention_norm.data_ptr(),
        None if layer.qk_norm is None else layer.qk_norm.data_ptr(),
        layer.mlp_norm.data_ptr(),
        layer.qkv.struct,
        layer.output.struct,
        Linear() if layer.gate_up is None else layer.gate_up.struct,
        Linear() if layer.down is None else layer.down.struct,
        layer.window or 0,
    )
