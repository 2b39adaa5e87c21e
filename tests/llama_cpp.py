"""A real llama.cpp for the tests: ``xllamacpp``, which is its server as one prebuilt library.

Its Python surface knows neither logits nor control vectors, so llama.cpp's own functions inside it are
called here: the C interface (``llama.h``), and ``common_control_vector_load``, the reader behind
``--control-vector``, which is C++: its structures are laid out by hand (Itanium ABI, libstdc++, so Linux).
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xllamacpp

_lib = ctypes.CDLL(xllamacpp.xllamacpp.__file__)


class _Params(ctypes.Structure):
    """Model or context parameters: filled in and read by llama.cpp alone, no larger than this."""

    _fields_ = [("opaque", ctypes.c_char * 1024)]


class _Batch(ctypes.Structure):  # llama_batch
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_silent = _LOG(lambda level, text, data: None)
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int32
for _name, _result, _arguments in [
    ("llama_log_set", None, [_LOG, _POINTER]),
    ("llama_backend_init", None, []),
    ("llama_model_default_params", _Params, []),
    ("llama_model_load_from_file", _POINTER, [ctypes.c_char_p, _Params]),
    ("llama_model_free", None, [_POINTER]),
    ("llama_model_n_layer", _INT, [_POINTER]),
    ("llama_model_get_vocab", _POINTER, [_POINTER]),
    ("llama_vocab_n_tokens", _INT, [_POINTER]),
    ("llama_tokenize", _INT, [_POINTER, ctypes.c_char_p, _INT, _POINTER, _INT, ctypes.c_bool, ctypes.c_bool]),
    ("llama_context_default_params", _Params, []),
    ("llama_init_from_model", _POINTER, [_POINTER, _Params]),
    ("llama_free", None, [_POINTER]),
    ("llama_get_memory", _POINTER, [_POINTER]),
    ("llama_memory_clear", None, [_POINTER, ctypes.c_bool]),
    ("llama_batch_init", _Batch, [_INT, _INT, _INT]),
    ("llama_batch_free", None, [_Batch]),
    ("llama_decode", _INT, [_POINTER, _Batch]),
    ("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), [_POINTER, _INT]),
    ("llama_set_adapter_cvec", _INT, [_POINTER, _POINTER, ctypes.c_size_t, _INT, _INT, _INT]),
]:  # fmt: skip
    _function = getattr(_lib, _name)
    _function.restype, _function.argtypes = _result, _arguments
_lib.llama_log_set(_silent, None)
_lib.llama_backend_init()


class LlamaCpp:
    """One model on the CPU with llama.cpp's default parameters: 512 tokens of context."""

    def __init__(self, path: Path):
        self.model = _lib.llama_model_load_from_file(
            str(path).encode(), _lib.llama_model_default_params()
        )
        assert self.model, f"llama.cpp does not load {path}"
        self.context = _lib.llama_init_from_model(self.model, _lib.llama_context_default_params())
        assert self.context
        self.vocabulary = _lib.llama_model_get_vocab(self.model)
        self.size = _lib.llama_vocab_n_tokens(self.vocabulary)

    def __enter__(self) -> "LlamaCpp":
        return self

    def __exit__(self, *_: object) -> None:
        _lib.llama_free(self.context)
        _lib.llama_model_free(self.model)

    def tokenize(self, text: str) -> list[int]:
        data, room = text.encode(), (ctypes.c_int32 * 4096)()
        count = _lib.llama_tokenize(
            self.vocabulary, data, len(data), ctypes.addressof(room), 4096, False, True
        )
        assert count >= 0
        return list(room[:count])

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Return float32 ``(tokens, vocabulary)``, read from an empty cache in one batch."""
        _lib.llama_memory_clear(_lib.llama_get_memory(self.context), True)
        batch = _lib.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        assert _lib.llama_decode(self.context, batch) == 0
        rows = [_lib.llama_get_logits_ith(self.context, i) for i in range(len(tokens))]
        made = np.stack([np.ctypeslib.as_array(row, (self.size,)) for row in rows])
        _lib.llama_batch_free(batch)
        return made

    def greedy(self, tokens: Sequence[int], count: int) -> list[int]:
        made: list[int] = []
        for _ in range(count):
            made.append(int(self.logits([*tokens, *made])[-1].argmax()))
        return made

    def steer(self, data: np.ndarray | None, first: int = 1, last: int | None = None) -> None:
        """Apply what ``read_control_vector`` returned to layers ``first`` to ``last``; or nothing."""
        if data is None:
            assert _lib.llama_set_adapter_cvec(self.context, None, 0, 0, 0, 0) == 0
            return
        flat = np.ascontiguousarray(data, np.float32)
        end = _lib.llama_model_n_layer(self.model) if last is None else last
        done = _lib.llama_set_adapter_cvec(
            self.context, flat.ctypes.data, flat.size, flat.shape[1], first, end
        )
        assert done == 0


class _Info(ctypes.Structure):  # common_control_vector_load_info
    # the wheel is built with libstdc++'s older std::string, which is one pointer to its characters
    _fields_ = [("strength", ctypes.c_float), ("name", ctypes.c_char_p)]


class _Vector(ctypes.Structure):  # std::vector<T>
    _fields_ = [("begin", ctypes.c_void_p), ("end", ctypes.c_void_p), ("room", ctypes.c_void_p)]


class _Data(ctypes.Structure):  # common_control_vector_data
    _fields_ = [("width", ctypes.c_int), ("values", _Vector)]


def read_control_vector(path: Path, strength: float = 1.0) -> np.ndarray | None:
    """Read a file as ``--control-vector-scaled PATH:STRENGTH`` does.

    Returns float32 ``(layers, width)``, row i for layer i + 1; ``None`` where llama.cpp refuses.
    """
    name = "_Z26common_control_vector_loadRKSt6vectorI31common_control_vector_load_infoSaIS0_EE"
    load = _lib[name]
    info = _Info(strength, str(path).encode())
    begin = ctypes.addressof(info)
    infos = _Vector(begin, begin + ctypes.sizeof(info), begin + ctypes.sizeof(info))
    found = _Data()
    load.restype = None
    load(ctypes.byref(found), ctypes.byref(infos))  # a result that is no plain data comes first
    if found.width <= 0:
        return None
    count = (found.values.end - found.values.begin) // 4
    values = np.ctypeslib.as_array((ctypes.c_float * count).from_address(found.values.begin))
    return values.copy().reshape(-1, found.width)
