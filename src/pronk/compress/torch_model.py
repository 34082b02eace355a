"""A checkpoint as a transformers model, and a transformers model as a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pronk.checkpoint.arrange import expected_tensors
from pronk.checkpoint.base import Checkpoint
from pronk.checkpoint.bundle import DirectoryWriter, write_json
from pronk.checkpoint.bundle_config import hf_config
from pronk.checkpoint.kinds import tensor_kind
from pronk.checkpoint.tokenizer import Tokenizer
from pronk.errors import RequestError
from pronk.spec import LayerSpec, ModelSpec

__all__ = [
    "RECORD_FILE",
    "ModelWriter",
    "from_spec",
    "need_torch",
    "state_of",
    "to_transformers",
    "use_threads",
]

RECORD_FILE = "pronk-changes.json"
"""In a directory that `ModelWriter` wrote: what was done to the model, and what was measured."""

HEAD = "lm_head.weight"

FAMILIES = ("llama", "mistral", "qwen2")
"""Those whose modules are named and whose norms multiply as the rest of this room assumes."""


def need_torch(what: str) -> None:
    """Refuse a verb whose libraries are not installed.

    Raises
    ------
    RequestError
        If torch, transformers or safetensors is missing; it says what to install.
    """
    try:
        import safetensors  # noqa: F401 (whether they are there)
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ModuleNotFoundError as error:
        raise RequestError(
            f"{what} needs {error.name}, which is not installed: "
            "pip install torch==2.13.0 'pronk[compress]'"
        ) from None


def use_threads(count: int) -> None:
    """Have torch use so many threads."""
    import torch

    torch.set_num_threads(count)


def from_spec(spec: ModelSpec) -> Any:
    """A float32 transformers model of this spec, in eval mode, its weights not yet set.

    Raises
    ------
    RequestError
        If the model is none that a plain Llama, Mistral or Qwen2 config describes.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    if spec.family not in FAMILIES:
        raise RequestError(
            f"a {spec.family} model cannot be made smaller so yet: {', '.join(FAMILIES)} can"
        )
    if any(layer != LayerSpec() for layer in spec.layers):
        raise RequestError("a model with windows or shared layers cannot be made smaller so yet")
    fields = hf_config(spec, None, None, ())
    family, _ = fields.pop("model_type"), fields.pop("torch_dtype")
    config = AutoConfig.for_model(family, **fields)
    config.use_cache = False
    with no_init_weights():  # every weight is loaded, and random ones take long
        auto: Any = AutoModelForCausalLM
        model = auto.from_config(config, dtype=torch.float32).eval()
    model.tie_weights()
    return model


def to_transformers(ckpt: Checkpoint) -> Any:
    """A checkpoint's model with its weights dequantized to float32.

    Memory: four bytes a parameter.

    Raises
    ------
    RequestError
        See `from_spec`.
    """
    import torch

    model = from_spec(ckpt.spec)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, info in ckpt.tensors.items():
            if name == HEAD and ckpt.spec.tie_embeddings:
                continue
            own[name].copy_(torch.from_numpy(ckpt.read_float(name).reshape(info.shape)))
    return model


def state_of(model: Any, spec: ModelSpec) -> dict[str, Any]:
    """The tensors a checkpoint of `spec` consists of, by name; they share the model's memory.

    Raises
    ------
    ValueError
        If the model's shapes are not those of the spec.
    """
    own = dict(model.named_parameters())
    state = {}
    for name, shape in expected_tensors(spec):
        if tuple(own[name].shape) != shape:
            raise ValueError(f"{name} is of shape {tuple(own[name].shape)}, not {shape}")
        state[name] = own[name].detach()
    return state


class ModelWriter(DirectoryWriter):
    """`DirectoryWriter` of float weights with a record of what was done to them."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        super().__init__(directory, RECORD_FILE, "a model that Pronk made smaller")

    def write(
        self,
        model: Any,
        spec: ModelSpec,
        tokenizer: Tokenizer,
        record: Mapping[str, Any],
        dtype: str = "bfloat16",
    ) -> Path:
        """Write every file and put the directory in its place.

        Parameters
        ----------
        model : transformers model
        spec : ModelSpec
            What it has become.
        tokenizer : Tokenizer
        record : Mapping
            Contents of `RECORD_FILE`.
        dtype : {"bfloat16", "float32"}
            Of the matrices; norms and biases are float32.
        """
        import torch
        from safetensors.torch import save_file

        kept = getattr(torch, dtype)
        state = {
            name: (values.to(kept) if tensor_kind(name) else values).contiguous()
            for name, values in state_of(model, spec).items()
        }
        config = hf_config(spec, None, tokenizer.bos_id, sorted(tokenizer.eos_ids))
        try:
            save_file(state, self.path / "model.safetensors", metadata={"format": "pt"})
            tokenizer.save(self.path)
            write_json(self.path / "config.json", {**config, "torch_dtype": dtype})
            write_json(self.path / RECORD_FILE, record)
        except OSError as error:
            raise self.cannot(error) from error
        return self.commit()
