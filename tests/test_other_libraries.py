"""The blocks of PyTorch libraries in docs/migrate.md, where these are installed.

Each is run as it stands, from the weights of the Equinox network of the page, and comes to
the number that the block of metaopt beside it prints.
"""

import re
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metaopt as mo


PAGE = (Path(__file__).parents[1] / "docs/migrate.md").read_text(encoding="utf-8")


def block(start: str) -> str:
    """The first block of code after that text."""
    found = re.search(r"```python\n(.*?)```", PAGE[PAGE.index(start) :], re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture
def data():
    x = np.random.default_rng(0).standard_normal((20, 3)).astype(np.float32)
    return x, np.sin(x[:, 0])


def hypergradient_here(data) -> tuple[float, Any]:
    """What the block of metaopt prints, and its network."""
    x, y = (jnp.asarray(part) for part in data)
    names: dict[str, Any] = dict(jax=jax, jnp=jnp, mo=mo, optax=optax, x=x, y=y)
    exec(block("Here the model is an Equinox module"), names)
    return float(names["gradient"]["rate"]), names["net"]


def names_there(torch, net: eqx.nn.MLP, data) -> dict[str, Any]:
    """The names that a block takes for granted: a network, a loss and data of PyTorch."""
    first, last = (torch.nn.Linear(*shape) for shape in ((3, 8), (8, 1)))
    for there, here in zip((first, last), net.layers):
        there.weight.data = torch.tensor(np.array(here.weight, np.float32))
        there.bias.data = torch.tensor(np.array(here.bias, np.float32))
    x, y = (torch.tensor(part) for part in data)
    return {
        "torch": torch,
        "net": torch.nn.Sequential(first, torch.nn.ReLU(), last),
        "loss": lambda predicted, targets: ((predicted[:, 0] - targets) ** 2).mean(),
        "inputs": x[:10],
        "targets": y[:10],
        "valid_inputs": x[10:],
        "valid_targets": y[10:],
    }


def test_torchopt_has_the_same_derivative_of_a_rate(data):
    pytest.importorskip("torchopt")
    torch = pytest.importorskip("torch")
    here, net = hypergradient_here(data)
    names = names_there(torch, net, data)
    exec(block("needs torch and TorchOpt"), names)
    assert float(names["rate"].grad) == pytest.approx(here, rel=1e-4)


def test_higher_has_the_same_derivative_of_a_rate(data):
    higher = pytest.importorskip("higher")
    torch = pytest.importorskip("torch")
    here, net = hypergradient_here(data)
    names = names_there(torch, net, data)
    rate = torch.tensor(0.1, requires_grad=True)
    sgd = torch.optim.SGD(names["net"].parameters(), lr=0.1)
    names |= {"higher": higher, "rate": rate, "sgd": sgd}
    exec(block("needs torch and higher"), names)
    assert float(rate.grad) == pytest.approx(here, rel=1e-4)
