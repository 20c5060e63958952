"""llama.cpp with OpenBLAS for matrix products of 32 rows and more, as its documentation advises for prompts.

The OpenBLAS is that of scipy's own wheels, whose functions have a prefix to their names. Everything else is
as for `llama.cpp`.
"""

from __future__ import annotations

from typing import Any

from trimvlm_tools.bench.peers import llama_cpp

NAME = "llama.cpp-blas"
MODELS = llama_cpp.NAME
BUILD_REQUIREMENTS = ("scipy-openblas32==0.3.34.481.3",)
REQUIREMENTS = (*BUILD_REQUIREMENTS, *llama_cpp.REQUIREMENTS)
_PREFIXED = ("cblas_sgemm", "openblas_set_num_threads")
BUILD_ENVIRONMENT = {
    "CMAKE_ARGS": f"{llama_cpp.BUILD_ENVIRONMENT['CMAKE_ARGS']} -DGGML_BLAS=ON -DGGML_BLAS_VENDOR=OpenBLAS "
    "-DBLAS_LIBRARIES={packages}/scipy_openblas32/lib/libscipy_openblas.so "
    "-DBLAS_INCLUDE_DIRS={packages}/scipy_openblas32/include",
    "CXXFLAGS": " ".join(f"-D{name}=scipy_{name}" for name in _PREFIXED),
}
SETTINGS: dict[str, Any] = {**llama_cpp.SETTINGS, "build": BUILD_ENVIRONMENT["CMAKE_ARGS"]}
PRECISIONS = llama_cpp.PRECISIONS
ANSWERS = PRUNES = False
convert = llama_cpp.convert
open_decoder = llama_cpp.open_decoder
