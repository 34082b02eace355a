"""Structured pruning: whole layers, KV groups of heads, neurons of MLPs, hidden channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pronk.compress.layerwise import Stream
from pronk.compress.shape import Shape

__all__ = ["block_influence", "keep_columns", "prune", "refit"]

Progress = Callable[[str, int, int], None]

DAMPING = 0.01
"""Of the mean of a Gram matrix's diagonal, added to it, as in GPTQ."""


def block_influence(model: Any, windows: Any, tell: Progress) -> list[float]:
    """How much each layer turns its input: one minus the cosine between input and output.

    The mean over all tokens, as ShortGPT has it (arXiv:2403.03853).
    """
    import torch

    stream = Stream(model, windows)
    out = []
    for i, layer in enumerate(model.model.layers):
        tell("measuring layers", i, len(model.model.layers))
        after = stream.run(layer)
        cosines = [
            torch.nn.functional.cosine_similarity(a, b, dim=-1).mean()
            for a, b in zip(stream.states, after, strict=True)
        ]
        out.append(1 - float(torch.stack(cosines).mean()))
        stream.states = after
    return out


def keep_columns(weight: Any, gram: Any, size: int, keep: int) -> Any:
    """Which groups of a matrix's columns to keep, so that its output changes least.

    One group after the other goes (single columns a few at a time, where none stands in for
    another): the one without which, once the columns that are left have been refitted, the
    output differs least. A group that others can stand in for costs
    nothing, however large it is (optimal brain surgeon, as in ZipLM, arXiv:2302.04089).

    Parameters
    ----------
    weight : float32 [rows, columns]
    gram : float32 [columns, columns]
        Sum of ``x.T @ x`` over the inputs.
    size : int
        Columns of a group, side by side.
    keep : int
        Groups to keep.

    Returns
    -------
    int64 [keep]
        The groups kept, ascending.
    """
    import torch

    groups = weight.shape[1] // size
    inverse = torch.linalg.inv(_damped(gram))
    w = weight.clone()
    left = torch.ones(groups, dtype=torch.bool)
    at_once = 1 if size > 1 else max(1, (groups - keep) // _ROUNDS)
    while (over := int(left.sum()) - keep) > 0:
        if size == 1:
            cost = w.square().sum(0) / inverse.diagonal()
        else:
            cost = torch.full((groups,), torch.inf)
            blocks = inverse.reshape(groups, size, groups, size)
            for g in left.nonzero()[:, 0].tolist():
                part = w[:, g * size : (g + 1) * size].T
                cost[g] = (part * torch.linalg.solve(blocks[g, :, g], part)).sum()
        cost[~left] = torch.inf
        goes = _apart(cost.argsort()[: min(over, at_once)], inverse) if size == 1 else cost.argmin()
        left[goes] = False
        gone = (goes.reshape(-1, 1) * size + torch.arange(size)).reshape(-1)
        # The columns that are left take over what these did.
        taken = torch.linalg.solve(inverse[gone][:, gone], inverse[gone])
        w -= w[:, gone] @ taken
        inverse -= inverse[:, gone] @ taken
        # What is gone stays gone: rounding must not bring it back.
        w[:, gone] = 0
        inverse[gone] = 0
        inverse[:, gone] = 0
        inverse[gone, gone] = 1
    return left.nonzero()[:, 0]


_ROUNDS = 32
_APART = 0.1


def _apart(order: Any, inverse: Any) -> Any:
    """Of some columns, those that can go at once: none stands in for one before it."""
    import torch

    part = inverse[order][:, order]
    near = part.square() / torch.outer(part.diagonal(), part.diagonal())
    taken: list[int] = []
    for i in range(len(order)):
        if all(float(near[i, j]) < _APART for j in taken):
            taken.append(i)
    return order[taken]


def refit(weight: Any, gram: Any, columns: Any) -> Any:
    """The matrix over some of its columns that gives nearest the output of all of them.

    Least squares over the inputs that `gram` sums up; float32 [rows, len(columns)].
    """
    import torch

    full = _damped(gram).double()
    inner = full[columns][:, columns]
    # With the same damping on both sides a matrix that keeps all columns stays as it is.
    return torch.linalg.solve(inner, full[columns] @ weight.double().T).T.float().contiguous()


def _damped(gram: Any) -> Any:
    import torch

    out = gram.clone()
    mean = float(out.diagonal().mean())
    out.diagonal().add_(DAMPING * mean if mean > 0 else 1.0)
    return torch.Tensor(out)


def prune(model: Any, windows: Any, shape: Shape, tell: Progress) -> dict[str, Any]:
    """Shrink a model in place to a shape; returns what was kept.

    Layers with the least `block_influence` go first, then hidden channels, then heads and
    neurons layer by layer (`keep_columns` of the projections that read them), the matrix that
    read what is gone refitted to what is left.

    Parameters
    ----------
    model : transformers model
        A Llama, Mistral or Qwen2; its config is not changed.
    windows : int64 [windows, length]
        Calibration text.
    shape : Shape
        What to keep.
    tell : callable
        Called with the stage, what is done and what is to do.
    """
    import torch

    kept: dict[str, Any] = {}
    decoder, config = model.model, model.config
    with torch.no_grad():
        if shape.layers < len(decoder.layers):
            influence = block_influence(model, windows, tell)
            order = sorted(range(len(influence)), key=lambda i: -influence[i])
            kept["influence"] = influence
            kept["layers"] = sorted(order[: shape.layers])
            decoder.layers = torch.nn.ModuleList(decoder.layers[i] for i in kept["layers"])
        if shape.hidden < config.hidden_size:
            kept["channels"] = _hidden(model, windows, shape.hidden, tell)
        heads = shape.kv_heads < config.num_key_value_heads
        mlp = shape.mlp < config.intermediate_size
        if not heads and not mlp:
            return kept
        stream = Stream(model, windows)
        names = ["self_attn.o_proj"] * heads + ["mlp.down_proj"] * mlp
        for i, layer in enumerate(decoder.layers):
            tell("pruning layers", i, len(decoder.layers))
            grams = stream.grams(layer, names)
            if heads:
                gram = grams["self_attn.o_proj"]
                groups = _heads(layer.self_attn, gram, shape.kv_heads)
                kept.setdefault("kv_heads", []).append(groups)
            if mlp:
                _neurons(layer.mlp, grams["mlp.down_proj"], shape.mlp)
            stream.advance(layer)
        tell("pruning layers", len(decoder.layers), len(decoder.layers))
    return kept


def _heads(attention: Any, gram: Any, keep: int) -> list[int]:
    import torch

    head = attention.head_dim
    group = head * attention.num_key_value_groups
    kept = keep_columns(attention.o_proj.weight, gram, group, keep)

    def spread(size: int) -> Any:
        return (kept[:, None] * size + torch.arange(size)).reshape(-1)

    columns = spread(group)
    _set(attention.o_proj, refit(attention.o_proj.weight, gram, columns))
    _rows(attention.q_proj, columns)
    _rows(attention.k_proj, spread(head))
    _rows(attention.v_proj, spread(head))
    return [int(g) for g in kept]


def _neurons(mlp: Any, gram: Any, keep: int) -> None:
    kept = keep_columns(mlp.down_proj.weight, gram, 1, keep)
    _set(mlp.down_proj, refit(mlp.down_proj.weight, gram, kept))
    _rows(mlp.gate_proj, kept)
    _rows(mlp.up_proj, kept)


_READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


def _hidden(model: Any, windows: Any, keep: int, tell: Progress) -> list[int]:
    """Keep the channels of the residual stream that most is read from.

    A channel counts by the energy of the normed activations in it times that of the weights
    which read it, as a share of each norm's total (the activation-based importance of Minitron,
    arXiv:2407.14679, weighted). Norms are rescaled, since the mean square that they divide by is
    then over the channels kept.
    """
    import torch

    decoder = model.model
    readers: list[tuple[Any, list[Any]]] = []
    for layer in decoder.layers:
        for norm, names in _READERS.items():
            modules = [layer.get_submodule(name) for name in names]
            readers.append((layer.get_submodule(norm), modules))
    readers.append((decoder.norm, [model.lm_head]))
    norms = [norm for norm, _ in readers]
    squares = _mean_at(model, windows, norms, lambda x: _unit(x).square().mean(0), tell)
    score = torch.zeros(model.config.hidden_size)
    for square, (norm, modules) in zip(squares, readers, strict=True):
        read = torch.stack([one.weight.square().sum(0) for one in modules]).sum(0)
        energy = square * norm.weight.square() * read
        score += energy / energy.sum()
    kept = score.topk(keep).indices.sort().values

    def shrinkage(x: Any) -> Any:
        return _unit(x)[:, kept].square().mean(-1).sqrt().mean()

    ratios = _mean_at(model, windows, norms, shrinkage, tell)
    for norm, ratio in zip(norms, ratios, strict=True):
        norm.weight = torch.nn.Parameter(norm.weight[kept] * ratio)
    _rows_of(decoder.embed_tokens, kept)
    decoder.embed_tokens.embedding_dim = keep
    if model.config.tie_word_embeddings:
        model.lm_head.weight = decoder.embed_tokens.weight
        model.lm_head.in_features = keep
    else:
        _set(model.lm_head, model.lm_head.weight[:, kept])
    for _, modules in readers[:-1]:
        for module in modules:
            _set(module, module.weight[:, kept])
    for layer in decoder.layers:
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            _rows(layer.get_submodule(name), kept)
    return [int(c) for c in kept]


def _unit(x: Any) -> Any:
    """Rows of a mean square of one."""
    import torch

    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-12)


def _mean_at(
    model: Any, windows: Any, norms: list[Any], of: Callable[[Any], Any], tell: Progress
) -> list[Any]:
    """The mean over windows of a function of each norm's input, float32 [tokens, hidden]."""
    sums: dict[int, Any] = {}

    def hook(module: Any, args: tuple[Any, ...]) -> None:
        value = of(args[0].reshape(-1, args[0].shape[-1]))
        sums[id(module)] = sums.get(id(module), 0) + value

    hooks = [norm.register_forward_pre_hook(hook) for norm in norms]
    try:
        for i, window in enumerate(windows):
            tell("measuring channels", i, len(windows))
            model.model(window[None], use_cache=False)
    finally:
        for one in hooks:
            one.remove()
    return [sums[id(norm)] / len(windows) for norm in norms]


def _rows_of(embedding: Any, kept: Any) -> None:
    import torch

    embedding.weight = torch.nn.Parameter(embedding.weight[:, kept].contiguous())


def _rows(linear: Any, rows: Any) -> None:
    """Keep some outputs of a linear module."""
    import torch

    if linear.bias is not None:
        linear.bias = torch.nn.Parameter(linear.bias[rows].contiguous())
    _set(linear, linear.weight[rows])


def _set(linear: Any, weight: Any) -> None:
    import torch

    linear.weight = torch.nn.Parameter(weight.contiguous())
    linear.out_features, linear.in_features = weight.shape
