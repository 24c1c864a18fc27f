"""All decoder layers of a step in one call, and each of their operations alone.

T rows of the batch   E hidden size   H query heads   Hkv key-value heads   D head dimension   N sequences of the batch
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from tercet.kernels.native.library import FORMATS, Layer, OnLayer, Shape, Step, library
from tercet.kernels.native.linear import NativeLinear


@dataclass(frozen=True)
class NativeLayer:
    attention_norm: Tensor  # [E] float32, as all norms
    qk_norm: Tensor | None  # [H + Hkv, D]
    mlp_norm: Tensor  # [E]
    qkv: NativeLinear
    output: NativeLinear
    gate_up: NativeLinear
    down: NativeLinear
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
        self._shape = native_shape(shape, layers[0].qkv.struct.k, layers[0].down.struct.k)
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
        raised: list[BaseException] = []

        def told(layer: int) -> int:
            assert on_layer is not None
            try:
                on_layer(only.start + layer)
            except BaseException as error:  # noqa: BLE001  # raised again below: C++ cannot carry it
                raised.append(error)
            return len(raised)

        call = OnLayer() if on_layer is None else OnLayer(told)
        native = native_step(step, kv_cache[only.start])
        native.layer_bytes = kv_cache.stride(0) * kv_cache.element_size()
        shape = self._shape if step.turns is None else _turned(self._shape, *step.turns)
        first = ctypes.byref(self._layers, only.start * ctypes.sizeof(Layer))
        library().layers_forward(
            ctypes.cast(first, ctypes.POINTER(Layer)),
            len(only),
            ctypes.byref(shape),
            ctypes.byref(native),
            x.data_ptr(),
            call,
            ctypes.byref(self._done),
        )
        if raised:
            raise raised[0]


def native_shape(shape: NativeShape, hidden: int, intermediate: int) -> Shape:
    """The tensors must live as long as the structure."""
    cosine, sine = shape.cosine.data_ptr(), shape.sine.data_ptr()
    return Shape(hidden, shape.heads, shape.kv_heads, shape.dim, intermediate, shape.eps, cosine, sine)


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
        layer.gate_up.struct,
        layer.down.struct,
        layer.window or 0,
    )
