"""Gradients over tasks once more, by the torch libraries that are installed."""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import numpy as np


def contenders(network: str, model: Any, tasks: Any, rate: float, num_steps: int):
    """By name, functions that return the mean query loss and its gradient."""
    if importlib.util.find_spec("torch") is None:
        return {}
    makers = {"TorchOpt": ("torchopt", _by_torchopt), "higher": ("higher", _by_higher)}
    torch: Any = importlib.import_module("torch")
    arrays = jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))
    params = [torch.tensor(np.asarray(a)) for a in arrays]
    loss = {"waves": _squared_error, "images": _cross_entropy}[network]
    each = _tensors(torch, tasks)
    return {
        name: make(_module(torch, params), loss, each, rate, num_steps)
        for name, (module, make) in makers.items()
        if importlib.util.find_spec(module) is not None
    }


def _tensors(torch: Any, tasks: Any) -> list[Any]:
    """Pairs of support and query examples, a list of tasks."""

    def tensor(a):
        a = np.array(a)
        return torch.tensor(a, dtype=torch.float32 if a.dtype.kind == "f" else torch.int64)

    parts = [[tensor(a) for a in part] for part in (tasks.support, tasks.query)]
    return [[[a[i] for a in part] for part in parts] for i in range(len(parts[0][0]))]


def _module(torch: Any, params: Any):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.arrays = torch.nn.ParameterList(params)

    return Net()


def _squared_error(net: Any, batch: Any):
    x, y = batch
    arrays, x = list(net.arrays), x[:, None]
    for weight, bias in zip(arrays[0:-2:2], arrays[1:-2:2]):
        x = (x @ weight.T + bias).relu()
    return ((x @ arrays[-2].T + arrays[-1])[:, 0] - y).square().mean()


def _cross_entropy(net: Any, batch: Any):
    functional: Any = importlib.import_module("torch.nn.functional")
    x, y = batch
    arrays = list(net.arrays)
    for weight, bias, scale, shift in zip(*(arrays[i:-2:4] for i in range(4))):
        x = functional.conv2d(x, weight, bias.flatten(), stride=2, padding=1)
        x = functional.batch_norm(x, None, None, scale, shift, training=True).relu()
    return functional.cross_entropy(x.mean((2, 3)) @ arrays[-2].T + arrays[-1], y)


def _by_torchopt(
    net: Any, loss: Callable, tasks: list[Any], rate: float, num_steps: int
) -> Callable[[], tuple[Any, Any]]:
    torch: Any = importlib.import_module("torch")
    torchopt: Any = importlib.import_module("torchopt")

    def run():
        start, total = list(net.arrays), torch.zeros(())
        before = torchopt.extract_state_dict(net, by="reference")
        for support, query in tasks:
            optimizer = torchopt.MetaSGD(net, lr=rate)
            for _ in range(num_steps):
                optimizer.step(loss(net, support))
            total = total + loss(net, query)
            torchopt.recover_state_dict(net, before)
        value = total / len(tasks)
        return value.item(), torch.autograd.grad(value, start)

    return run


def _by_higher(
    net: Any, loss: Callable, tasks: list[Any], rate: float, num_steps: int
) -> Callable[[], tuple[Any, Any]]:
    torch: Any = importlib.import_module("torch")
    higher: Any = importlib.import_module("higher")

    def run():
        value, sums = 0.0, None
        for support, query in tasks:
            inner = torch.optim.SGD(net.parameters(), lr=rate)
            with higher.innerloop_ctx(net, inner, copy_initial_weights=False) as (
                fast,
                step,
            ):
                for _ in range(num_steps):
                    step.step(loss(fast, support))
                found = loss(fast, query) / len(tasks)
                # Task by task, so that the graph of one is kept.
                each = torch.autograd.grad(found, list(net.parameters()))
            value += found.item()
            sums = each if sums is None else [a + b for a, b in zip(sums, each)]
        return value, sums

    return run
