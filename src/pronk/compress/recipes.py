"""Recipes by name: a method, a format for each kind of matrix, and what to know about them."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from pronk.checkpoint.storage import Storage, parse_storage
from pronk.errors import RequestError

__all__ = ["RECIPES", "Recipe", "recipe_of"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a model is compressed.

    Parameters
    ----------
    name : str
    method : {"rtn", "mse", "imatrix", "gptq", "signround"}
        How weights are rounded: to the nearest; after a search for scales of least squared
        error; the same weighted by activations; column by column (GPTQ); by sign gradients.
    formats : tuple of (str, str)
        Parts of a matrix's name and its format, the first that matches; ``{group}`` stands for
        the group, as in ``int4-{group}``. Of several between bars, the first that divides the
        rows. Empty: `pronk.compress.bits` chooses.
    about : str
        What ``--list-recipes`` says.
    group : str
        Groups where the user asks for none: ``g32``, ``channel``, or empty where formats have none.
    fold : {"", "awq", "smooth"}
        What scales of activations are folded into the weights before.
    act_order, damping, sweeps : bool, float, int
        See `pronk.compress.gptq.gptq`.
    steps : int
        Steps of sign gradients a layer.
    static : str
        How scales of int8 inputs are set, for other engines: see `pronk.compress.static`.
    tune, rate : int, float
        Steps in which scales and norms are learnt end to end, and the largest change in one;
        see `pronk.compress.tune`.
    """

    name: str
    method: str
    formats: tuple[tuple[str, str], ...]
    about: str
    group: str = ""
    fold: str = ""
    act_order: bool = True
    damping: float = 0.01
    sweeps: int = 1
    steps: int = 100
    static: str = ""
    tune: int = 0
    rate: float = 2e-3

    @property
    def automatic(self) -> bool:
        """Whether formats are chosen by what each costs."""
        return not self.formats

    @property
    def calibrated(self) -> bool:
        """Whether it looks at what matrices are multiplied with."""
        return self.method not in ("rtn", "mse") or bool(self.fold or self.static or self.tune)

    def storage(self, name: str, cols: int, group: str | None = None) -> Storage:
        """The format of a matrix by its canonical name and the length of its rows."""
        for part, text in self.formats:
            if part in name:
                for one in text.replace("{group}", group or self.group).split("|"):
                    storage = parse_storage(one)
                    if not cols % storage.unit:
                        break
                return storage
        raise ValueError(f"recipe {self.name} says nothing of {name}")


_WIDER = "runs as 4 bits: unpacked to a nibble each at load, so smaller on disk only"


_OTHERS = "for other engines: Pronk rounds inputs as they come, to 12 bits"
_RANGES = {
    "minmax": "its largest",
    "percentile": "all but 1 in 10,000",
    "mse": "least squared error",
    "entropy": "least KL of its histogram",
}


def _all(text: str) -> tuple[tuple[str, str], ...]:
    return (("", text),)


def _table() -> dict[str, Recipe]:
    int4, low = _all("int4-{group}"), _all("int4-{group}-min")
    rows = [
        Recipe("int8", "mse", _all("int8-{group}"), "8 bits, least squared error", "g32"),
        Recipe("int8-channel", "mse", _all("int8-channel"), "8 bits, one scale a row"),
        Recipe("int8-gptq", "gptq", _all("int8-{group}"), "8 bits, GPTQ", "g32"),
        Recipe(
            "int8-smooth", "mse", _all("int8-{group}"), "8 bits after SmoothQuant's scaling",
            "channel", fold="smooth",
        ),
        *(
            Recipe(
                f"int8-static-{how}", "mse", _all("int8-{group}"),
                f"8 bits, and a scale of each matrix's input by {about}; {_OTHERS}", "channel",
                static=how,
            )
            for how, about in _RANGES.items()
        ),
        Recipe(
            "seed", "mse", ((".o_proj.", "bf16"), ("", "int8-{group}")),
            "attention's output in bf16, norms in f32, the rest 8 bits", "g32",
        ),
        Recipe("int4-rtn", "rtn", int4, "4 bits, round-to-nearest", "g32"),
        Recipe("int4-mse", "mse", int4, "4 bits, clipped for least squared error", "g32"),
        Recipe("int4-imatrix", "imatrix", int4, "4 bits, errors weighted by activations", "g32"),
        Recipe("int4-awq", "imatrix", int4, "4 bits, AWQ: large inputs scaled up", "g32", "awq"),
        Recipe("int4-gptq", "gptq", int4, "4 bits, GPTQ and coordinate descent", "g32"),
        Recipe("int4-awq-gptq", "gptq", int4, "4 bits, AWQ's scaling, then GPTQ", "g32", "awq"),
        Recipe("int4-signround", "signround", int4, "4 bits, sign gradients (AutoRound)", "g32"),
        Recipe("int4-min-rtn", "rtn", low, "4 bits from a minimum, round-to-nearest", "g32"),
        Recipe("int4-min-gptq", "gptq", low, "4 bits from a minimum, GPTQ", "g32"),
    ]  # fmt: skip
    for bits in (3, 2):
        formats = _all(f"int{bits}-{{group}}")
        rows += [
            Recipe(f"int{bits}-rtn", "rtn", formats, f"{bits} bits, nearest; {_WIDER}", "g64"),
            Recipe(f"int{bits}-gptq", "gptq", formats, f"{bits} bits, GPTQ; {_WIDER}", "g64"),
        ]
    head4 = (
        ("embed_tokens", "int4-{group}"), ("lm_head", "int4-{group}"), ("", "int3-{group}"),
    )  # fmt: skip
    about = f"3 bits, GPTQ, 4 the head; {_WIDER}"
    rows += [Recipe("int3-head4-gptq", "gptq", head4, about, "g64")]
    mixed = (
        ("embed_tokens", "q6_k|int8-g32"), ("lm_head", "q6_k|int8-g32"),
        ("", "q4_k|int4-g32-min"),
    )  # fmt: skip
    only = "for GGUF: Q4_K, Q6_K the head; rows that are no multiple of 256 Q4_1 and Q8_0"
    rows += [
        Recipe("k4-imatrix", "imatrix", mixed, f"errors weighted by activations, {only}"),
        Recipe("k4-gptq", "gptq", mixed, f"GPTQ, {only}"),
    ]
    wide = "runs as bf16: unpacked at load, so smaller on disk only"
    rows += [
        Recipe(
            "auto",
            "gptq",
            (),
            "GPTQ, each matrix in the format that costs least: give "
            "--bits, --size or --kl; int3 is smaller on disk only",
        ),
        Recipe("fp8", "rtn", _all("fp8"), f"e4m3, a power of two a row; {wide}"),
        Recipe("bf16", "rtn", _all("bf16"), "bfloat16"),
        Recipe("f16", "rtn", _all("f16"), "float16"),
    ]
    return {row.name: row for row in rows}


RECIPES = MappingProxyType(_table())
"""All of them. Groups of 32 n run in the kernels of 32 with the scale repeated: nothing is lost."""


def recipe_of(name: str) -> Recipe:
    """The recipe of a name.

    Raises
    ------
    RequestError
        If there is none.
    """
    recipe = RECIPES.get(name)
    if recipe is None:
        raise RequestError(f"there is no recipe {name!r}: choose from {', '.join(RECIPES)}")
    return recipe
