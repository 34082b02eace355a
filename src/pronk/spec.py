"""What a model, a device, a budget and a request are: frozen data, no behaviour beyond checks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from pronk.errors import RequestError

__all__ = [
    "Budget",
    "DeviceSpec",
    "LayerSpec",
    "MemoryPlan",
    "ModelSpec",
    "MoeSpec",
    "RopeSpec",
    "SamplingParams",
]


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864), half-split pairing.

    Parameters
    ----------
    theta : float
        Base of the geometric frequency series.
    kind : {"default", "linear", "dynamic", "llama3", "yarn", "longrope"}
        How the frequencies are scaled for longer contexts: position interpolation
        (arXiv:2306.15595), NTK-aware scaling fixed for the context that is loaded, the piecewise
        rule of Llama 3.1, YaRN (arXiv:2309.00071), LongRoPE (arXiv:2402.13753).
    factor, low_freq_factor, high_freq_factor : float
        Parameters of the scaling rule.
    original_context : int
        Context length, in tokens, the model was trained with before scaling.
    attention_factor : float
        What cosines and sines are multiplied by (YaRN's and LongRoPE's temperature).
    beta_fast, beta_slow : float
        YaRN: rotations within the original context above which a frequency is kept, and below
        which it is interpolated.
    truncate : bool
        YaRN: whether the bounds that follow from these are rounded to whole dimensions.
    short_factors, long_factors : tuple of float
        LongRoPE's divisors of each frequency, up to the original context and beyond it.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """The kind of one decoder layer.

    Parameters
    ----------
    attention : {"global", "window", "chunked"}
        Which earlier positions a token attends to: all; the last `window`, its own included; or
        those of its own chunk, where a sequence is cut into chunks of `window` positions.
    window : int
        Positions; 0 where attention is global.
    sinks : int
        First positions of a sequence that a window layer sees too (arXiv:2309.17453).
    rope : int or None
        Which of the model's `ropes` turns queries and keys; None: none does.
    qk_norm : {"", "head", "full", "l2"}
        Norm of queries and keys: with a weight, per head or over all heads, before they are
        turned; or without a weight, per head, after.
    mlp : {"gated", "plain", "moe"}
        The feed-forward block: ``down(act(gate(x)) * up(x))``, ``down(act(up(x)))``, or a
        mixture of gated experts.
    weights : int or None
        The layer whose weights this one uses too; None: it has its own.
    mlp_threshold : float
        What ``down`` is given is zero where its magnitude is less (arXiv:2408.14690); not in
        experts.
    """

    attention: str = "global"
    window: int = 0
    sinks: int = 0
    rope: int | None = 0
    qk_norm: str = ""
    mlp: str = "gated"
    weights: int | None = None
    mlp_threshold: float = 0.0


@dataclass(frozen=True, slots=True)
class MoeSpec:
    """A mixture of experts (Shazeer et al. 2017, arXiv:1701.06538).

    Parameters
    ----------
    experts, top_k : int
        How many there are, and the most that a token goes to.
    intermediate_size : int
        Width of one expert.
    score : {"softmax", "sigmoid"}
        What turns the router's logits into weights.
    normalize : bool
        Whether the weights of the chosen experts are divided by their sum.
    scales_input : bool
        Whether an expert's weight multiplies its input (Llama 4) rather than its output.
    shared_size : int
        Width of an expert that every token goes to; 0: there is none.
    threshold : float
        Below 1, a token goes to fewer experts: as many, from `least` on, as it takes for their
        weights to make up this share of all.
    least : int
        Fewest experts of a token where a threshold is set.
    """

    experts: int
    top_k: int
    intermediate_size: int
    score: str = "softmax"
    normalize: bool = True
    scales_input: bool = False
    shared_size: int = 0
    threshold: float = 1.0
    least: int = 1


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Everything that fixes a decoder's graph, read from a checkpoint's header.

    Sizes are in elements, ``context_length`` in tokens.

    Parameters
    ----------
    ropes : tuple of RopeSpec
        Those that layers refer to.
    attention_bias, output_bias : bool
        Whether the query, key and value projections have biases; whether attention's output has.
    activation : {"silu", "gelu", "gelu_tanh", "relu"}
    norm : {"rms", "layer"}
        Root mean square (arXiv:1910.07467), or mean and variance.
    post_norms : bool
        Whether the outputs of attention and of the MLP are normed before they are added.
    attention_scale : float or None
        What scores are multiplied by; None: one over the root of the head's size.
    attention_softcap, logit_softcap : float
        ``cap * tanh(x / cap)`` of scores and of logits; 0: none.
    embedding_scale, residual_scale, logit_scale : float
        Factors of embeddings, of what attention and MLP add, and of logits.
    alibi : float
        Steepest slope's exponent of linear biases (ALiBi, arXiv:2108.12409); 0: none.
    query_growth : tuple of (float, int) or None
        Llama 4: (scale, span): queries of layers without rope are multiplied by
        ``1 + scale * log(1 + (position + 1) // span)``.
    moe : MoeSpec or None
        The experts of layers whose MLP is "moe".
    """

    family: str
    name: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    context_length: int
    tie_embeddings: bool
    layers: tuple[LayerSpec, ...]
    ropes: tuple[RopeSpec, ...] = (RopeSpec(),)
    attention_bias: bool = False
    output_bias: bool = False
    activation: str = "silu"
    norm: str = "rms"
    post_norms: bool = False
    attention_scale: float | None = None
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    alibi: float = 0.0
    query_growth: tuple[float, int] | None = None
    moe: MoeSpec | None = None

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """The machine as Pronk sees it: cores it may use, vector ISA, memory in bytes."""

    cores: int
    isa: str
    memory: int
    cpu: str


@dataclass(frozen=True, slots=True)
class Budget:
    """What the user allows: peak resident bytes of the whole process, at a context length.

    ``overhead`` is what the process took before any weights, in bytes, where that was measured.
    """

    memory: int
    context: int
    overhead: int = 0


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Planned resident bytes, by what they are for."""

    weights: int
    kv: int
    arena: int
    overhead: int

    @property
    def total(self) -> int:
        """Sum of the parts: the planned peak resident size of the process, in bytes."""
        return self.weights + self.kv + self.arena + self.overhead

    def to_dict(self) -> dict[str, int]:
        """The plan under the stable names of ``pronk inspect --json``."""
        return {
            "weights": self.weights,
            "kv": self.kv,
            "arena": self.arena,
            "overhead": self.overhead,
            "total": self.total,
        }


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen, and when generation ends.

    Parameters
    ----------
    temperature : float
        0 means greedy; otherwise logits are divided by it. Range [0, 100].
    top_k : int
        Keep the k most likely tokens; 0 keeps all.
    top_p : float
        Nucleus sampling (Holtzman et al. 2019): keep the smallest set whose
        probability reaches ``top_p``. Range (0, 1].
    min_p : float
        Drop tokens less likely than ``min_p`` times the most likely. Range [0, 1].
    repetition_penalty : float
        Divides positive and multiplies negative logits of tokens already in the prompt
        or the output (Keskar et al. 2019, CTRL); 1 is off. Range [0.01, 10].
    presence_penalty, frequency_penalty : float
        OpenAI's additive penalties over generated tokens. Range [-2, 2].
    logit_bias : Mapping[int, float]
        Added to the logits of the given token ids. Each in [-100, 100].
    seed : int or None
        Same seed, same tokens. None draws one from the system.
    stop : tuple of str
        Generation ends before the first of these strings; none of it is emitted.
    max_tokens : int or None
        Most tokens to generate; None means until the context is full.
    logprobs : int or None
        None: no log-probabilities. 0: that of the chosen token. n: also the n best.
        At most 20.
    ignore_eos : bool
        Go on after an end-of-sequence token.

    Raises
    ------
    RequestError
        If a value is out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    max_tokens: int | None = None
    logprobs: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        elif not isinstance(self.stop, tuple):
            object.__setattr__(self, "stop", tuple(self.stop))

        def check(name: str, low: float, high: float, low_open: bool = False) -> None:
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if (
                not number
                or not math.isfinite(value)
                or not low <= value <= high
                or (low_open and value == low)
            ):
                bracket = "(" if low_open else "["
                raise RequestError(
                    f"{name} must be a number in {bracket}{low:g}, {high:g}], not {value!r}"
                )

        check("temperature", 0, 100)
        check("top_p", 0, 1, low_open=True)
        check("min_p", 0, 1)
        check("repetition_penalty", 0.01, 10)
        check("presence_penalty", -2, 2)
        check("frequency_penalty", -2, 2)
        for name, low, high in (
            ("top_k", 0, 2**31 - 1),
            ("max_tokens", 1, 2**31 - 1),
            ("logprobs", 0, 20),
            ("seed", 0, 2**64 - 1),
        ):
            value = getattr(self, name)
            if value is None and name != "top_k":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise RequestError(f"{name} must be an integer in [{low}, {high}], not {value!r}")
        for token, bias in self.logit_bias.items():
            if not isinstance(token, int) or token < 0:
                raise RequestError(f"logit_bias key must be a token id, not {token!r}")
            if not isinstance(bias, int | float) or not -100 <= bias <= 100:
                raise RequestError(f"logit_bias of token {token} must be in [-100, 100]")
        if len(self.stop) > 16 or any(not s or len(s) > 1000 for s in self.stop):
            raise RequestError("stop takes at most 16 strings of 1 to 1000 characters")
