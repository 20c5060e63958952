"""A decoder as a GGUF file in fp32, for llama.cpp, with the `gguf` package's writer and its map of names.

Only the decoder: no tokenizer is written, because it is fed ids.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from trimvlm_tools.bench.peers._plain_decoder import PlainDecoder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def write_gguf(decoder: PlainDecoder, path: Path) -> None:
    """Writes a Llama or Qwen2 decoder, weight by weight.

    Raises:
        ValueError: a weight has no place in llama.cpp's graph of this architecture.
    """
    import gguf
    import numpy as np

    config = decoder.config
    arch = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}[config["model_type"]]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(decoder.head_dim)
    writer.add_value_length(decoder.head_dim)
    writer.add_rope_dimension_count(decoder.head_dim)
    writer.add_rope_freq_base(decoder.rope_theta)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    placed = {name: names.get_name(name, try_suffixes=(".weight", ".bias")) for name in decoder.tensors}
    if lost := [name for name, place in placed.items() if place is None]:
        raise ValueError(f"llama.cpp's {gguf.MODEL_ARCH_NAMES[arch]} has no place for {', '.join(lost)}")
    for name, place in placed.items():
        shape = decoder.tensors[name].shape
        writer.add_tensor_info(place, shape, np.dtype(np.float32), 4 * int(np.prod(shape)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name in placed:
        writer.write_tensor_data(np.ascontiguousarray(_rows(decoder, name)))
    writer.close()


def _rows(decoder: PlainDecoder, name: str) -> NDArray[np.float32]:
    """A weight as llama.cpp's graph has it."""
    values = decoder.tensors[name].read()
    config = decoder.config
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    projection = name.split(".")[-2]
    if config["model_type"] != "llama" or projection not in heads:
        return values
    return interleave(values, heads[projection])


def interleave(values: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows of a query or key projection, from halves to pairs.

    transformers rotates row i of a head with row i + C/2, llama.cpp's Llama row 2i with row 2i + 1.

    Args:
        values: [heads * C, D] or, of a bias, [heads * C].
    """
    split = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return split.swapaxes(1, 2).reshape(values.shape)
