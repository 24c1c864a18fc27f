"""Import this before a Triton kernel: without a GPU, Triton then interprets its kernels, on CPU tensors."""

from __future__ import annotations

import inspect
import os

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 1.6e-2},  # the interpreter rounds to bfloat16 towards zero
}
DTYPES = list(TOLERANCE)


def _repair() -> None:
    """`range` over device values fails under NumPy 2.4 in Triton 3.6's interpreter, as `int` of an array of one number
    is an error there; and a call of a jit function patches the whole language again, which takes a millisecond."""
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        return  # the tests skip themselves
    patch_tensor, patch_all = interpreter._patch_lang_tensor, interpreter._patch_lang
    languages, done = {id(tl), id(tl.core)}, set()

    def patch_tensor_index(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def patch_once(fn):
        modules = frozenset(id(value) for value in fn.__globals__.values() if inspect.ismodule(value)) & languages
        if modules not in done:
            done.add(modules)
            patch_all(fn)
        return _Kept()

    interpreter._patch_lang_tensor = patch_tensor_index
    interpreter._patch_lang = patch_once


class _Kept:
    """In place of a scope: the language stays patched, since this process only interprets."""

    def restore(self) -> None:
        pass


if DEVICE.type == "cpu":
    _repair()
