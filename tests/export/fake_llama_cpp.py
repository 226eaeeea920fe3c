"""A stand-in for llama-cpp-python that quantizes nothing, for what goes wrong in the child."""

from __future__ import annotations

from pathlib import Path

_MODULE = """
import ctypes, os, re, sys, time

llama_log_callback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


class llama_model_tensor_override(ctypes.Structure):
    _fields_ = [("pattern", ctypes.c_char_p), ("type", ctypes.c_int)]


class llama_model_imatrix_data(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("data", ctypes.POINTER(ctypes.c_float)),
        ("size", ctypes.c_size_t),
    ]


class Params:
    pass


_say = None


def llama_log_set(callback, _):
    global _say
    _say = callback


def llama_backend_init():
    pass


llama_model_quantize_default_params = Params


def llama_model_quantize(source, target, params):
    from gguf import GGUFReader
    tensors = GGUFReader(source.decode()).tensors
    patterns = [o.pattern.decode() for o in params.tt_overrides if o.pattern]
    for i, t in enumerate(tensors, 1):
        kind = t.tensor_type.name
        fixed = len(t.shape) < 2 or any(re.search(p, t.name) for p in patterns)
        chosen = "" if fixed else " -> 0.1 MiB (q4_K)"
        line = f"[{i:4d}/{len(tensors):4d}] {t.name} - [1, 1], type = {kind.lower()}, size = 1 MiB"
        _say(2, line.encode(), None)
        _say(5, (chosen + "\\n").encode(), None)
    if params.dry_run:
        return 0
    what = os.environ["FAKE_LLAMA_CPP"]
    if what == "abort":
        os.abort()
    if what == "sleep":
        with open(target.decode(), "wb") as file:
            file.write(bytes(1 << 16))
        time.sleep(600)
    if what == "says":
        _say(3, b"llama_model_quantize: failed to quantize: the moon is full\\n", None)
        return 1
    if what == "lies":
        with open(source.decode(), "rb") as a, open(target.decode(), "wb") as b:
            b.write(a.read())
        return 0
    raise MemoryError(what)
"""


def install(folder: Path) -> Path:
    """Puts it into a folder for `sys.path`."""
    package = folder / "fake" / "llama_cpp"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    # ctypes.byref of what is no ctypes object: the stand-in's own.
    (package / "llama_cpp.py").write_text("import ctypes as _c\n_c.byref = lambda o: o\n" + _MODULE)
    return folder / "fake"
