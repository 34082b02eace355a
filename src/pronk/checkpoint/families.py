"""Model families as rows of a table: how the files of each differ from Llama's.

A family is no class: `pronk.checkpoint.hf_config` and `pronk.checkpoint.gguf_config` read any
header by its row into a ModelSpec, and `pronk.checkpoint.arrange` finds the tensors by their names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

__all__ = ["ACTIVATIONS", "FAMILIES", "Experts", "Family", "family_of"]

ACTIVATIONS = MappingProxyType(
    {
        "silu": "silu",
        "swish": "silu",
        "gelu": "gelu",
        "gelu_new": "gelu_tanh",
        "gelu_pytorch_tanh": "gelu_tanh",
        "relu": "relu",
    }
)
"""Activations by their names in Hugging Face configs."""

Names = Mapping[str, tuple[str, ...]]
"""Canonical modules by a stored module, its rows one after the other; ``*`` counts experts."""

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_ROUTED = {
    "mlp.gate": ("mlp.router",),
    "mlp.experts.*.gate_proj": ("mlp.experts.gate_proj",),
    "mlp.experts.*.up_proj": ("mlp.experts.up_proj",),
    "mlp.experts.*.down_proj": ("mlp.experts.down_proj",),
}


@dataclass(frozen=True, slots=True)
class Experts:
    """What a family fixes about its mixture of experts; see `pronk.spec.MoeSpec`.

    Parameters
    ----------
    score : {"softmax", "sigmoid"}
    normalize : bool
        Where neither a config (``norm_topk_prob``) nor a file (``expert_weights_norm``) says.
    scales_input : bool
    shared : bool
        Whether every layer with experts has a shared one, as wide as the others.
    width : str
        Config field of an expert's width.
    """

    score: str = "softmax"
    normalize: bool = True
    scales_input: bool = False
    shared: bool = False
    width: str = "intermediate_size"


@dataclass(frozen=True, slots=True)
class Family:
    """How one family's files differ from the others'. The decoder they describe is the same.

    Parameters
    ----------
    name : str
        Hugging Face's ``model_type``.
    architecture : str
        Hugging Face's class.
    gguf : str
        GGUF's ``general.architecture``.
    about : str
        What is special, for the documentation.
    defaults : Mapping
        Fields of a config that leaves them out.
    fields : Mapping
        The family's own names for config fields, by the usual ones.
    fixed : Mapping
        Config fields that must have one of these values, where they are given.
    pairs_adjacent : bool
        GGUF keeps the two rows of a rotary pair side by side, not half a head apart.
    hf_pairs_adjacent : bool
        So do Hugging Face's files.
    qkv_bias : bool
        q, k and v always have biases and o never; otherwise a config's ``attention_bias``
        gives them to all four.
    windows : {"", "all", "upper", "pattern", "rope", "nope"}
        The layers that attend to a window, where a config has one: none, all, those from
        ``max_window_layers`` on, all but each `period`-th, those with rope, those without.
    chunked : bool
        Windows are chunks.
    period : int
        Of a pattern of windows, unless the header says.
    nope_period : int
        Each so-manieth layer has no rope, unless the header says; 0: all have.
    local_theta : float
        Rope base of window layers where it is another than that of the rest.
    qk_norm : {"", "head", "full", "l2"}
    mlp : {"gated", "plain"}
    norm : {"rms", "layer"}
    norm_adds_one : bool
        Hugging Face's norms multiply by one more than the weight that is stored.
    post_norms : bool
    scales_embeddings : bool
        Embeddings are multiplied by the square root of the hidden size.
    wide_scale_layers : int
        Models of so many layers scale attention by hidden size per head, which GGUF does not say.
    alibi : bool
        Positions come from linear biases; there is no rope.
    experts : Experts or None
    wrapper : str
        Hugging Face's class of such a model that also sees; of its files, the text model is read.
    layer_prefix : str
        What a Hugging Face layer's name begins with.
    hf_names, gguf_names : Mapping
        Stored modules that are not named as most are.
    bundles : bool
        `pronk fit` and `pronk compress` write it: all but those whose experts, or whose attention,
        files do not hold as linear layers of their own.
    """

    name: str
    architecture: str
    gguf: str
    about: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fields: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    pairs_adjacent: bool = False
    hf_pairs_adjacent: bool = False
    qkv_bias: bool = False
    windows: str = ""
    chunked: bool = False
    period: int = 0
    nope_period: int = 0
    local_theta: float = 0.0
    qk_norm: str = ""
    mlp: str = "gated"
    norm: str = "rms"
    norm_adds_one: bool = False
    post_norms: bool = False
    scales_embeddings: bool = False
    wide_scale_layers: int = 0
    alibi: bool = False
    experts: Experts | None = None
    wrapper: str = ""
    layer_prefix: str = "model.layers."
    hf_names: Names = field(default_factory=dict)
    gguf_names: Names = field(default_factory=dict)
    bundles: bool = False


_SWITCHED = {"sliding_window": 4096, "use_sliding_window": False}
_GEMMA = {
    "head_dim": 256,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
}
_ONE_WAY: dict[str, tuple[object, ...]] = {"use_bidirectional_attention": (None, False)}
_FFN_NORM = {"ffn_norm": ("pre_feedforward_layernorm",)}

FAMILIES = (
    Family(
        "llama",
        "LlamaForCausalLM",
        "llama",
        "Llama 2, 3, 3.1 and 3.2, SmolLM2: rope scaled by Llama 3.1's rule, heads tied or not",
        pairs_adjacent=True,
        bundles=True,
    ),
    Family(
        "mistral",
        "MistralForCausalLM",
        "llama",
        "a sliding window in all layers, or none",
        {"sliding_window": 4096},
        pairs_adjacent=True,
        windows="all",
        bundles=True,
    ),
    Family(
        "mixtral",
        "MixtralForCausalLM",
        "llama",
        "experts: softmax over those chosen; a sliding window or none",
        {"rope_theta": 1e6, "rms_norm_eps": 1e-5},
        pairs_adjacent=True,
        windows="all",
        experts=Experts(),
        hf_names={
            "block_sparse_moe.gate": ("mlp.router",),
            "block_sparse_moe.experts.*.w1": ("mlp.experts.gate_proj",),
            "block_sparse_moe.experts.*.w3": ("mlp.experts.up_proj",),
            "block_sparse_moe.experts.*.w2": ("mlp.experts.down_proj",),
        },
        bundles=True,
    ),
    Family(
        "llama4_text",
        "Llama4ForCausalLM",
        "llama4",
        "chunked attention with rope, and each fourth layer global without, its queries growing "
        "with the position; unit queries and keys; sigmoid experts that scale their input, a "
        "shared one, dense layers between",
        {
            "rope_theta": 5e5,
            "rms_norm_eps": 1e-5,
            "head_dim": 128,
            "attention_chunk_size": 8192,
            "use_qk_norm": True,
            "attn_temperature_tuning": True,
            "floor_scale": 8192,
            "attn_scale": 0.1,
        },
        pairs_adjacent=True,
        hf_pairs_adjacent=True,
        windows="rope",
        chunked=True,
        nope_period=4,
        qk_norm="l2",
        wrapper="Llama4ForConditionalGeneration",
        experts=Experts("sigmoid", normalize=False, scales_input=True, shared=True),
        hf_names={
            "feed_forward.gate_proj": ("mlp.gate_proj",),
            "feed_forward.up_proj": ("mlp.up_proj",),
            "feed_forward.down_proj": ("mlp.down_proj",),
            "feed_forward.router": ("mlp.router",),
            "feed_forward.experts.gate_up_proj": (
                "mlp.experts.gate_proj",
                "mlp.experts.up_proj",
            ),
            "feed_forward.experts.down_proj": ("mlp.experts.down_proj",),
            "feed_forward.shared_expert.gate_proj": ("mlp.shared.gate_proj",),
            "feed_forward.shared_expert.up_proj": ("mlp.shared.up_proj",),
            "feed_forward.shared_expert.down_proj": ("mlp.shared.down_proj",),
        },
    ),
    Family(
        "smollm3",
        "SmolLM3ForCausalLM",
        "smollm3",
        "no rope in each fourth layer",
        {"rope_theta": 2e6, "tie_word_embeddings": True, "use_sliding_window": False},
        pairs_adjacent=True,
        windows="nope",
        nope_period=4,
        bundles=True,
    ),
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        "qwen2",
        "Qwen2 and 2.5: biases of q, k and v; a sliding window in the upper layers, if any",
        {**_SWITCHED, "max_window_layers": 28},
        qkv_bias=True,
        windows="upper",
        bundles=True,
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        "qwen3",
        "norms of queries and keys, head by head",
        {**_SWITCHED, "max_window_layers": 28, "head_dim": 128},
        windows="upper",
        qk_norm="head",
        bundles=True,
    ),
    Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        "qwen3moe",
        "norms of queries and keys, head by head; experts, and dense layers where a config "
        "names them",
        {**_SWITCHED, "norm_topk_prob": False},
        windows="all",
        qk_norm="head",
        experts=Experts(width="moe_intermediate_size"),
        hf_names=_ROUTED,
        bundles=True,
    ),
    Family(
        "olmoe",
        "OlmoeForCausalLM",
        "olmoe",
        "norms of queries and keys over all heads at once; experts whose weights are not "
        "normalized",
        {"rms_norm_eps": 1e-5},
        fixed={"clip_qkv": (None,)},
        qk_norm="full",
        experts=Experts(normalize=False),
        hf_names=_ROUTED,
        bundles=True,
    ),
    Family(
        "gemma2",
        "Gemma2ForCausalLM",
        "gemma2",
        "window and global layers in turn; norms before and after attention and MLP; soft caps "
        "of scores and logits; scaled embeddings; GELU",
        {
            **_GEMMA,
            "max_position_embeddings": 8192,
            "final_logit_softcapping": 30.0,
            "attn_logit_softcapping": 50.0,
        },
        fixed=_ONE_WAY,
        windows="pattern",
        period=2,
        norm_adds_one=True,
        post_norms=True,
        scales_embeddings=True,
        wide_scale_layers=46,
        gguf_names=_FFN_NORM,
        bundles=True,
    ),
    Family(
        "gemma3_text",
        "Gemma3ForCausalLM",
        "gemma3",
        "five window layers, then a global one, each kind with a rope of its own; norms before "
        "and after attention and MLP, and of queries and keys; scaled embeddings; GELU",
        {
            **_GEMMA,
            "rope_theta": 1e6,
            "max_position_embeddings": 131072,
            "vocab_size": 262208,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
        },
        # transformers reads no cap of scores for this family.
        fixed={**_ONE_WAY, "attn_logit_softcapping": (None,)},
        windows="pattern",
        period=6,
        wrapper="Gemma3ForConditionalGeneration",
        local_theta=1e4,
        qk_norm="head",
        norm_adds_one=True,
        post_norms=True,
        scales_embeddings=True,
        wide_scale_layers=62,
        gguf_names=_FFN_NORM,
        bundles=True,
    ),
    Family(
        "phi3",
        "Phi3ForCausalLM",
        "phi3",
        "q, k and v are one matrix, and so are gate and up; LongRoPE; a sliding window or none; "
        "heads that are turned in part (Phi-4-mini) are refused",
        {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
        windows="all",
        hf_names={"self_attn.qkv_proj": _QKV, "mlp.gate_up_proj": _GATE_UP},
        gguf_names={"ffn_up": _GATE_UP},
        bundles=True,
    ),
    Family(
        "mpt",
        "MptForCausalLM",
        "mpt",
        "ALiBi; layer norms without biases; q, k and v are one matrix; an MLP without a gate",
        {
            "tie_word_embeddings": True,
            "hidden_act": "gelu",
            "expansion_ratio": 4,
            "rms_norm_eps": 1e-5,
            "alibi_bias_max": 8,
        },
        {
            "hidden_size": "d_model",
            "num_attention_heads": "n_heads",
            "num_hidden_layers": "n_layers",
            "max_position_embeddings": "max_seq_len",
            "rms_norm_eps": "layer_norm_epsilon",
            "num_key_value_heads": "attn_config.kv_n_heads",
            "alibi_bias_max": "attn_config.alibi_bias_max",
        },
        {
            "no_bias": (True,),
            "logit_scale": (None,),
            "embedding_fraction": (None, 1, 1.0),
            "norm_type": (None, "low_precision_layernorm", "layernorm"),
            "attn_config.attn_type": (None, "multihead_attention"),
            "attn_config.alibi": (True,),
            "attn_config.clip_qkv": (None,),
            "attn_config.softmax_scale": (None,),
            "attn_config.prefix_lm": (None, False),
            "attn_config.qk_ln": (None, False),
            "attn_config.attn_uses_sequence_id": (None, False),
        },
        mlp="plain",
        norm="layer",
        alibi=True,
        layer_prefix="transformer.blocks.",
        hf_names={
            "transformer.wte": ("model.embed_tokens",),
            "transformer.norm_f": ("model.norm",),
            "norm_1": ("input_layernorm",),
            "attn.Wqkv": _QKV,
            "attn.out_proj": ("self_attn.o_proj",),
            "norm_2": ("post_attention_layernorm",),
            "ffn.up_proj": ("mlp.up_proj",),
            "ffn.down_proj": ("mlp.down_proj",),
        },
    ),
    Family(
        "granite",
        "GraniteForCausalLM",
        "granite",
        "factors of embeddings, scores, of what attention and MLP add, and of logits",
        {
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "attention_multiplier": 1.0,
            "logits_scaling": 1.0,
        },
        pairs_adjacent=True,
        bundles=True,
    ),
)
"""In GGUF, the first with experts, or without, stands for all that share an architecture."""


def family_of(name: str) -> Family:
    """The family of a ``model_type``."""
    return next(family for family in FAMILIES if family.name == name)
