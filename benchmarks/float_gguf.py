"""A GGUF file with the same weights in float32: what others quantize, and what all can run."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np


def write_float(source: Path, target: Path) -> None:
    """Dequantize every tensor; the metadata stays as it is, but for the type of the file."""
    reader = gguf.GGUFReader(source)
    arch = str(reader.fields["general.architecture"].contents())
    part = target.with_suffix(".part")
    writer = gguf.GGUFWriter(part, arch)
    for name, field in reader.fields.items():
        # The writer makes these itself.
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind is gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=inner)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        shape = tuple(int(n) for n in reversed(tensor.shape))
        writer.add_tensor(tensor.name, np.ascontiguousarray(values, np.float32).reshape(shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.replace(target)
