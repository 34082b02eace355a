"""Calibration text on its way through a model, one layer at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["Stream", "cut_windows"]


def cut_windows(ids: Sequence[int], length: int, count: int, what: str = "calibration text") -> Any:
    """The first `count` windows of a text, int64 [windows, length]; fewer if it has no more.

    Raises
    ------
    RequestError
        If the text is shorter than one window.
    """
    import torch

    from pronk.errors import RequestError

    whole = min(count, len(ids) // length)
    if whole < 1:
        raise RequestError(
            f"the {what} has {len(ids)} tokens, fewer than one window of {length}: "
            "give a longer text or a smaller --window"
        )
    return torch.tensor(ids[: whole * length], dtype=torch.int64).reshape(whole, length)


class _FirstLayerReached(Exception):  # noqa: N818 (no error: it ends a run early)
    pass


class Stream:
    """Hidden states of some windows before a layer, which move on layer by layer.

    A layer that was changed before `advance` feeds what it now gives to those behind it, so
    each is fitted to the inputs that it will get (as GPTQ and SparseGPT do).

    Parameters
    ----------
    model : transformers model
    windows : int64 [windows, length]
    """

    def __init__(self, model: Any, windows: Any) -> None:
        import torch

        self.states: list[Any] = []
        self._kwargs: dict[str, Any] = {}

        def catch(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.states.append(args[0])
            self._kwargs = kwargs
            raise _FirstLayerReached

        hook = model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
        try:
            with torch.no_grad():
                for window in windows:
                    try:
                        model(window[None], use_cache=False)
                    except _FirstLayerReached:
                        continue
        finally:
            hook.remove()

    def run(self, layer: Any) -> list[Any]:
        """What `layer` makes of the states."""
        import torch

        out = []
        with torch.no_grad():
            for state in self.states:
                made = layer(state, **self._kwargs)
                out.append(made[0] if isinstance(made, tuple) else made)
        return out

    def advance(self, layer: Any) -> None:
        """Move the states behind `layer`."""
        self.states = self.run(layer)

    def grams(self, layer: Any, names: Sequence[str]) -> dict[str, Any]:
        """Of the inputs x of some linear modules of a layer, the sums of ``x.T @ x``.

        Parameters
        ----------
        layer : module
        names : sequence of str
            Such as ``"mlp.down_proj"``.

        Returns
        -------
        dict
            Float32 [columns, columns] by name.
        """
        sums: dict[str, Any] = {}

        def watch(name: str) -> Any:
            def hook(module: Any, args: tuple[Any, ...]) -> None:
                x = args[0].reshape(-1, args[0].shape[-1])
                sums[name] = x.T @ x if name not in sums else sums[name].addmm_(x.T, x)

            return layer.get_submodule(name).register_forward_pre_hook(hook)

        hooks = [watch(name) for name in names]
        try:
            self.run(layer)
        finally:
            for hook in hooks:
                hook.remove()
        return sums
