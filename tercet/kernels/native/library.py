"""The C++ kernels as a shared library: compiled once for this CPU, by the compiler that is at hand, and then loaded.

It lies in the user's cache folder under a name that is a hash of the sources, the compiler and the CPU. The Python
side calls it by ctypes, which lets go of the GIL meanwhile.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
from ctypes import (
    CFUNCTYPE,
    POINTER,
    Structure,
    c_char_p,
    c_double,
    c_float,
    c_int,
    c_int32,
    c_int64,
    c_uint32,
    c_void_p,
)
from pathlib import Path

SOURCES = Path(__file__).parent
FLAGS = (
    *("-O3", "-std=gnu++20", "-march=native", "-ffp-contract=off", "-fno-math-errno"),
    *("-shared", "-fPIC", "-pthread"),
)
BUILD_S = 300.0  # a compiler that takes longer is stopped
FORMATS = {"float32": 0, "bfloat16": 1, "q4": 2, "q8": 3}  # of weights, the first two of caches too, as in linear.h


class Linear(Structure):
    _fields_ = (("weight", c_void_p), ("bias", c_void_p), ("n", c_int64), ("k", c_int64), ("format", c_int))


class ExpertWeights(Structure):
    _fields_ = (("gate_up", Linear), ("down", Linear), ("count", c_int64))


class Layer(Structure):
    _fields_ = (
        ("attention_norm", c_void_p),
        ("qk_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("qkv", Linear),
        ("output", Linear),
        ("gate_up", Linear),
        ("down", Linear),
        ("window", c_int64),
    )


class Shape(Structure):
    _fields_ = (
        *((name, c_int64) for name in ("hidden", "heads", "kv_heads", "dim")),
        ("eps", c_float),
        ("cosine", c_void_p),
        ("sine", c_void_p),
    )


class Step(Structure):
    _fields_ = (
        ("rows", c_int64),
        ("positions", c_void_p),
        ("slots", c_void_p),
        ("spans", c_void_p),
        ("num_spans", c_int64),
        ("cache", c_void_p),
        ("layer_bytes", c_int64),
        ("block_size", c_int64),
        ("cache_format", c_int32),
    )


class Draw(Structure):
    _fields_ = (
        *((name, c_float) for name in ("temperature", "min_p", "top_p")),
        ("top_k", c_int64),
        ("first", c_uint32),
        ("second", c_uint32),
        ("greedy", c_int32),
    )


class Communicator(Structure):
    _fields_ = (
        ("memory", c_void_p),
        *((name, c_int64) for name in ("rank", "size", "capacity", "spins")),
        ("timeout_s", c_double),
        ("round", c_uint32),
    )


OnLayer = CFUNCTYPE(c_int, c_int64)  # of the layer; not 0: stop

_SIGNATURES = {
    "lanes": (c_int, ()),
    "instructions": (c_char_p, ()),
    "set_threads": (None, (c_int,)),
    "pack": (None, (c_void_p, c_int64, c_int64, c_int, c_void_p)),
    "pack_quantised_weight": (None, (c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int, c_void_p)),
    "linear_forward": (None, (POINTER(Linear), c_void_p, c_int64, c_void_p)),
    "rms_norm_forward": (None, (c_void_p, c_void_p, c_float, c_int64, c_int64, c_void_p)),
    "silu_and_mul_forward": (None, (c_void_p, c_int64, c_int64, c_void_p)),
    "rotate_and_write_forward": (None, (c_void_p, c_void_p, POINTER(Shape), POINTER(Step))),
    "attention_forward": (None, (c_void_p, c_int64, POINTER(Shape), POINTER(Step), c_int64, c_void_p)),
    "draw_tokens_forward": (None, (c_void_p, c_int64, c_int64, POINTER(Draw), c_void_p)),
    "experts_forward": (
        c_int64,
        (POINTER(ExpertWeights), c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_void_p),
    ),
    "attention_half": (
        c_int,
        (POINTER(Layer), POINTER(Shape), POINTER(Step), c_void_p, c_void_p, OnLayer, c_int64),
    ),
    "mlp_half": (None, (POINTER(Layer), POINTER(Shape), c_int64, c_void_p, c_void_p)),
    "layers_forward": (
        c_int,
        (POINTER(Layer), c_int64, POINTER(Shape), POINTER(Step), c_void_p, OnLayer, c_void_p),
    ),
    "communicator_bytes": (c_int64, (c_int64, c_int64)),
    "communicator_stop": (None, (POINTER(Communicator),)),
    "communicator_all_reduce": (c_int, (POINTER(Communicator), c_void_p, c_int64)),
    "communicator_gather": (c_int, (POINTER(Communicator), c_void_p, c_int64, c_void_p)),
}  # name -> (result, arguments), as in library.cpp


class NativeMissingError(Exception):
    """Why there are no native kernels here."""


@functools.cache
def library() -> ctypes.CDLL:
    """Builds it if need be, which takes some ten seconds. Raises NativeMissingError."""
    loaded = ctypes.CDLL(str(build()))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


def is_built() -> bool:
    """Whether `library` need not compile it. Raises NativeMissingError."""
    return _wanted()[1].exists()


def _wanted() -> tuple[str, Path]:
    """The compiler, and where what it makes lies."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None or shutil.which(compiler) is None:
        named = f" {compiler}" if compiler else ""
        raise NativeMissingError(f"there is no C++ compiler{named}; install g++, or set CXX to one")
    sources = sorted(path for path in SOURCES.iterdir() if path.suffix in {".h", ".cpp"})
    version = _run([compiler, "--version"])
    facts = [version, *FLAGS, _cpu(), *(f"{path.name} {path.read_text()}" for path in sources)]
    name = f"kernels-{hashlib.sha256(chr(0).join(facts).encode()).hexdigest()[:24]}.so"
    return compiler, _cache_folder() / name


def build() -> Path:
    """Compile it if need be. Raises NativeMissingError."""
    compiler, target = _wanted()
    folder = target.parent
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            made = folder / f"{target.name}.{os.getpid()}"
            _run([compiler, *FLAGS, str(SOURCES / "library.cpp"), "-o", str(made)])
            made.replace(target)
    return target


def _cache_folder() -> Path:
    """A folder that nobody else can write to."""
    base = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    folder = Path(base) / "tercet"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = folder.stat()
    except OSError as error:
        raise NativeMissingError(f"{folder}: {error.strerror}; set XDG_CACHE_HOME to a folder of yours") from error
    if about.st_uid != os.getuid() or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise NativeMissingError(f"{folder} can be written by others; `chmod 700` it, or set XDG_CACHE_HOME")
    return folder


def _cpu() -> str:
    """What -march=native looks at."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    wanted = ("flags", "Features", "model name", "model\t", "cpu family")
    return "\n".join([platform.machine(), *sorted({line for line in lines if line.startswith(wanted)})])


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=BUILD_S)  # noqa: S603  # CXX is the user's
    except subprocess.CalledProcessError as error:
        said = next((line for line in error.stderr.splitlines() if "error" in line), error.stderr[-200:])
        raise NativeMissingError(f"{command[0]} failed with exit code {error.returncode}: {said}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeMissingError(f"{command[0]}: {error}") from error
    return done.stdout
