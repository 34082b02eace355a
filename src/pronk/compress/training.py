"""Training a student on its teacher's predictions: the loss, the loop, and how it goes on."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pronk.compress.forward import native_precision, products
from pronk.errors import PronkError, RequestError

__all__ = [
    "Recipe",
    "Trainer",
    "compare",
    "precision_of",
    "split_text",
]

Progress = Callable[[str, int, int], None]

_ROWS = 128  # of logits at a time
_CLIP = 1.0
_WARM = 0.1


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a student is trained.

    Parameters
    ----------
    steps, window, batch : int
        Optimizer steps; tokens of a sequence; sequences of a step.
    learning_rate : float
        Its peak: it rises over the first tenth of the steps and falls along a cosine to a tenth.
    temperature : float
        Both distributions are softened by it (Hinton et al. 2015, arXiv:1503.02531).
    hidden : float
        Weight of the squared distance of hidden states, layer by layer, relative to the
        teacher's square.
    seed : int
        Chooses the windows.
    precision : {"auto", "bf16", "f32"}
        Of the matrix products; weights, gradients and the loss are float32.
    """

    steps: int
    window: int = 512
    batch: int = 1
    learning_rate: float = 3e-4
    temperature: float = 1.0
    hidden: float = 0.0
    seed: int = 0
    precision: str = "auto"

    def __post_init__(self) -> None:
        for name, low, high in (
            ("steps", 1, 1 << 31), ("window", 2, 1 << 20), ("batch", 1, 1 << 16),
            ("learning_rate", 0, 1), ("temperature", 0.01, 100), ("hidden", 0, 1e6),
            ("seed", 0, 1 << 62),
        ):  # fmt: skip
            value = getattr(self, name)
            if not math.isfinite(value) or not low <= value <= high:
                option = name.replace("_", "-")
                raise RequestError(f"{option} must be in [{low:g}, {high:g}], not {value}")


def precision_of(recipe: Recipe) -> str:
    """The precision of a recipe on this machine."""
    return native_precision() if recipe.precision == "auto" else recipe.precision


def split_text(ids: Sequence[int], window: int) -> tuple[list[int], list[int]]:
    """A text's tokens to learn from, and the last tenth, but a window at least, to judge on.

    Raises
    ------
    RequestError
        If it is shorter than two windows.
    """
    if len(ids) < 2 * window:
        raise RequestError(
            f"the text has {len(ids)} tokens, fewer than two windows of {window}, one to learn "
            "from and one to judge on: give a longer --calibration text or a smaller --window"
        )
    at = len(ids) - max(window, len(ids) // 10)
    return list(ids[:at]), list(ids[at:])


def _hidden_states(model: Any, ids: Any, layers: Sequence[int]) -> tuple[Any, list[Any]]:
    """Final hidden states [batch, tokens, hidden], and those behind some layers."""
    if not layers:
        return model.model(ids, use_cache=False).last_hidden_state, []
    out = model.model(ids, use_cache=False, output_hidden_states=True)
    # The last entry is normed; the others are what goes into the next layer.
    return out.last_hidden_state, [out.hidden_states[i + 1] for i in layers]


def compare(student: Any, teacher: Any, windows: Any) -> dict[str, float]:
    """How far the student's predictions are from the teacher's, in float32.

    Parameters
    ----------
    student, teacher : transformers models
    windows : int64 [windows, length]

    Returns
    -------
    dict
        ``kl`` in nats a token, ``top1_agreement``, ``perplexity`` and ``teacher_perplexity``,
        at all tokens but the first of each window.
    """
    import torch
    from torch.nn.functional import cross_entropy, kl_div, log_softmax

    sums = dict.fromkeys(("kl", "same", "nll", "teacher_nll"), 0.0)
    count = 0
    with torch.no_grad():
        for window in windows:
            p = teacher.model(window[None], use_cache=False).last_hidden_state[0, :-1]
            q = student.model(window[None], use_cache=False).last_hidden_state[0, :-1]
            for at in range(0, len(p), _ROWS):
                a = log_softmax(teacher.lm_head(p[at : at + _ROWS]).float(), -1)
                b = log_softmax(student.lm_head(q[at : at + _ROWS]).float(), -1)
                target = window[1 + at : 1 + at + len(a)]
                sums["kl"] += float(kl_div(b, a, reduction="sum", log_target=True))
                sums["same"] += float((a.argmax(-1) == b.argmax(-1)).sum())
                sums["nll"] += float(cross_entropy(b, target, reduction="sum"))
                sums["teacher_nll"] += float(cross_entropy(a, target, reduction="sum"))
            count += len(p)
    return {
        "kl": sums["kl"] / count,
        "top1_agreement": sums["same"] / count,
        "perplexity": math.exp(min(sums["nll"] / count, 700)),
        "teacher_perplexity": math.exp(min(sums["teacher_nll"] / count, 700)),
    }


class Trainer:
    """Trains a student, and goes on from where an earlier run with the same inputs ended.

    The same inputs give the same weights, cut short or not: windows are chosen by seed and step,
    and weights and moments are kept together in one file that is replaced whole.

    Parameters
    ----------
    student, teacher : transformers models
        Of one vocabulary. What of the student requires a gradient is trained.
    ids : sequence of int
        The text to learn from.
    recipe : Recipe
    state : Path
        Where the run is kept until it is done.
    matched : sequence of (int, int)
        Pairs of layers, student's and teacher's, whose hidden states are matched.
    masks : mapping of str to bool tensors
        Of parameters that keep their zeros, where they are not zero.
    every : int
        Steps between two states kept.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        ids: Sequence[int],
        recipe: Recipe,
        state: Path,
        *,
        matched: Sequence[tuple[int, int]] = (),
        masks: dict[str, Any] | None = None,
        every: int = 25,
    ) -> None:
        import torch

        if len(ids) < recipe.window + 1:
            raise RequestError(
                f"the text to learn from has {len(ids)} tokens, fewer than one window of "
                f"{recipe.window}: give a longer text or a smaller --window"
            )
        self.student, self.teacher, self.recipe = student, teacher, recipe
        self.matched = list(matched) if recipe.hidden else []
        self.masks, self.every, self.path = masks or {}, every, state
        self._ids = torch.tensor(ids, dtype=torch.int64)
        self.precision = precision_of(recipe)
        # Tied weights are one parameter.
        self.trained = {n: p for n, p in student.named_parameters() if p.requires_grad}
        self._moments = {
            n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in self.trained.items()
        }
        self.losses: list[float] = []
        self._key = self._identity()
        self.resumed = self._load()

    def run(self, tell: Progress, what: str = "distilling") -> None:
        """Do the steps that are left."""
        self.student.train()
        try:
            while len(self.losses) < self.recipe.steps:
                tell(what, len(self.losses), self.recipe.steps)
                self.losses.append(self._step(len(self.losses)))
                if len(self.losses) % self.every == 0 and len(self.losses) < self.recipe.steps:
                    self._save()
        finally:
            self.student.eval()
        tell(what, len(self.losses), self.recipe.steps)

    def done(self) -> None:
        """Remove the state: its result has been written."""
        self.path.unlink(missing_ok=True)

    def _windows(self, step: int) -> Any:
        import torch

        seed = hashlib.sha256(f"{self.recipe.seed} {step}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(seed[:7], "little"))
        last = len(self._ids) - self.recipe.window
        starts = torch.randint(0, last + 1, (self.recipe.batch,), generator=generator)
        return torch.stack([self._ids[s : s + self.recipe.window] for s in starts.tolist()])

    def _step(self, step: int) -> float:
        import torch

        for weight in self.trained.values():
            weight.grad = None
        loss = self._backward(self._windows(step))
        if not math.isfinite(loss):
            raise PronkError(
                f"the loss is no longer finite at step {step + 1}: give a lower --learning-rate"
            )
        weights = list(self.trained.values())
        with torch.no_grad():
            for weight, name in zip(weights, self.trained, strict=True):
                if weight.grad is None:
                    weight.grad = torch.zeros_like(weight)
                if name in self.masks:
                    weight.grad.mul_(self.masks[name])
            torch.nn.utils.clip_grad_norm_(weights, _CLIP)
            self._adam(step)
        return loss

    def _adam(self, step: int) -> None:
        """Adam (Kingma & Ba 2014, arXiv:1412.6980) on plain tensors that a file can hold."""
        first, second, rate = 0.9, 0.95, self._rate(step)
        for name, weight in self.trained.items():
            mean, square = self._moments[name]
            mean.lerp_(weight.grad, 1 - first)
            square.mul_(second).addcmul_(weight.grad, weight.grad, value=1 - second)
            scale = (square / (1 - second ** (step + 1))).sqrt_().add_(1e-8)
            weight.addcdiv_(mean, scale, value=-rate / (1 - first ** (step + 1)))

    def _rate(self, step: int) -> float:
        warm = max(1, round(_WARM * self.recipe.steps))
        if step < warm:
            return self.recipe.learning_rate * (step + 1) / warm
        share = (step - warm) / max(1, self.recipe.steps - warm)
        return self.recipe.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * share)))

    def _backward(self, ids: Any) -> float:
        """The loss of some windows [batch, tokens], its gradient left in the parameters.

        Logits exist for `_ROWS` tokens at a time: those of a whole window would be the largest
        thing in memory.
        """
        import torch
        from torch.nn.functional import kl_div, log_softmax

        heat = self.recipe.temperature
        with torch.no_grad(), products(self.precision):
            goal, near = _hidden_states(self.teacher, ids, [t for _, t in self.matched])
            goal = goal.reshape(-1, goal.shape[-1])
        with products(self.precision):
            made, mine = _hidden_states(self.student, ids, [s for s, _ in self.matched])
        top = made.detach().reshape(-1, made.shape[-1]).requires_grad_()
        total = 0.0
        for at in range(0, len(top), _ROWS):
            with products(self.precision):
                with torch.no_grad():
                    p = self.teacher.lm_head(goal[at : at + _ROWS])
                q = self.student.lm_head(top[at : at + _ROWS])
            p, q = log_softmax(p.float() / heat, -1), log_softmax(q.float() / heat, -1)
            # The square keeps gradients as large whatever the temperature.
            part = kl_div(q, p, reduction="sum", log_target=True) * heat**2 / len(top)
            part.backward()
            total += float(part.detach())
        ends, grads = [made], [top.grad.reshape(made.shape).to(made.dtype)]
        for own, other in zip(mine, near, strict=True):
            wide = other.float()
            apart = (own.float() - wide).square().mean() / wide.square().mean()
            ends.append(self.recipe.hidden * apart / len(mine))
            grads.append(torch.ones(()))
            total += float(ends[-1].detach())
        torch.autograd.backward(ends, grads)
        return total

    def _identity(self) -> str:
        """A hash of everything that the result depends on."""
        import torch

        sha = hashlib.sha256(json.dumps([asdict(self.recipe), self.precision]).encode())
        sha.update(json.dumps([self.matched, torch.__version__]).encode())
        sha.update(self._ids.numpy().tobytes())
        for model in (self.student, self.teacher):
            for name, weight in model.named_parameters():
                sha.update(f"{name} {tuple(weight.shape)} {weight.requires_grad}".encode())
                sha.update(weight.detach().contiguous().view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()

    def _save(self) -> None:
        from safetensors.torch import save_file

        tensors = {f"weight.{name}": weight.detach() for name, weight in self.trained.items()}
        for name, (mean, square) in self._moments.items():
            tensors |= {f"mean.{name}": mean, f"square.{name}": square}
        part = self.path.with_name(self.path.name + ".part")
        about = {"key": self._key, "losses": json.dumps(self.losses)}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, part, metadata=about)
            part.replace(self.path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise PronkError(f"{self.path} cannot be written: {error.strerror or error}") from error

    def _load(self) -> int:
        """Take up what an earlier run has left; the steps it had done."""
        import torch
        from safetensors import SafetensorError, safe_open

        if not self.path.exists():
            return 0
        try:
            with safe_open(self.path, "pt") as file, torch.no_grad():
                about = file.metadata() or {}
                if about.get("key") != self._key:
                    return 0  # of other inputs
                for name, weight in self.trained.items():
                    weight.copy_(file.get_tensor(f"weight.{name}"))
                    mean, square = self._moments[name]
                    mean.copy_(file.get_tensor(f"mean.{name}"))
                    square.copy_(file.get_tensor(f"square.{name}"))
                self.losses = list(map(float, json.loads(about["losses"])))
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise PronkError(
                f"{self.path} is damaged ({str(error)[:100]}): remove it to start anew"
            ) from error
        return len(self.losses)
