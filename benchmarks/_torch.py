"""The unrolled network once more, by the torch libraries that are installed."""

import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def installed() -> dict[str, Callable[..., Callable[..., Any] | None]]:
    """The libraries that are there, by name: each makes `gradient(hyper, params, train,
    valid)`, like those in JAX, for a number of steps and an optimizer, if it can."""
    makers = {"TorchOpt": ("torchopt", by_torchopt), "higher": ("higher", by_higher)}
    if importlib.util.find_spec("torch") is None:
        return {}
    return {
        name: make
        for name, (module, make) in makers.items()
        if importlib.util.find_spec(module) is not None
    }


def _in_torch(of_tensors: Callable[..., Any]) -> Callable[..., Any]:
    """A gradient of tensors as one of JAX arrays."""
    torch: Any = importlib.import_module("torch")

    def tensor(array, trainable):
        array = np.array(array)
        dtype = torch.float32 if array.dtype.kind == "f" else torch.int64
        return torch.tensor(array, dtype=dtype, requires_grad=trainable)

    def gradient(hyper, params, train, valid):
        hyper = jax.tree.map(lambda a: tensor(a, True), hyper)
        params = jax.tree.map(lambda a: tensor(a, True), params)
        data = jax.tree.map(lambda a: tensor(a, False), (train, valid))
        loss = of_tensors(hyper, params, *data)
        leaves, structure = jax.tree.flatten(hyper)
        found = torch.autograd.grad(loss, leaves)
        return jax.tree.unflatten(structure, [g.numpy() for g in found])

    return gradient


def _cross_entropy(weights, batch):
    torch: Any = importlib.import_module("torch")

    x, y = batch
    for weight in weights[:-1]:
        x = torch.tanh(x @ weight)
    return torch.nn.functional.cross_entropy(x @ weights[-1], y)


def _decayed(weights, hyper, batch):
    decays = [h.exp() * (w**2).sum() for h, w in zip(hyper["decay"], weights)]
    return _cross_entropy(weights, batch) + sum(decays)


def _module(params):
    torch: Any = importlib.import_module("torch")

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = torch.nn.ParameterList([p.detach().clone() for p in params])

    return Net()


def by_torchopt(num_steps: int, optimizer: str):
    def loss(hyper, params, train, valid):
        torchopt: Any = importlib.import_module("torchopt")

        net = _module(params)
        if optimizer == "Adam":
            rate = lambda count: (hyper["rate"] - 3.0).exp()
            meta = torchopt.MetaAdam(net, lr=rate, eps_root=1e-12)
        else:
            rate = lambda count: hyper["rate"].exp()
            meta = torchopt.MetaSGD(net, lr=rate, momentum=0.9)
        for _ in range(num_steps):
            meta.step(_decayed(list(net.weights), hyper, train))
        return _cross_entropy(list(net.weights), valid)

    return _in_torch(loss)


def by_higher(num_steps: int, optimizer: str):
    def loss(hyper, params, train, valid):
        higher: Any = importlib.import_module("higher")
        torch: Any = importlib.import_module("torch")

        net = _module(params)
        inner = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        override = {"lr": [hyper["rate"].exp()]}
        with higher.innerloop_ctx(net, inner, override=override) as (fast, steps):
            for _ in range(num_steps):
                steps.step(_decayed(list(fast.parameters()), hyper, train))
            return _cross_entropy(list(fast.parameters()), valid)

    # Its Adam has no small number under the root, and so another derivative.
    return _in_torch(loss) if optimizer == "momentum" else None
