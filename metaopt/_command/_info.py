"""`metaopt info`: the versions and devices that metaopt stands on."""

import importlib.metadata
import os
import platform

import jax
import jax.numpy as jnp

from .._core._self_test import is_known_bad
from .._core._version import __version__


_NEEDED = ("jax", "jaxlib", "equinox", "optax", "lineax", "optimistix", "jaxopt", "numpy")
_OPTIONAL = ("matplotlib", "scikit-learn", "optuna", "tensorboardX")


def version(distribution: str) -> str | None:
    """The version of an installed package, or `None`."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> list[str]:
    """One line for each package that metaopt stands on."""
    lines = [_line("metaopt", __version__), _line("python", platform.python_version())]
    return lines + [_line(name, version(name) or "not installed") for name in _NEEDED]


def info() -> tuple[int, str]:
    """The exit code and the text of the command."""
    lines = versions()
    lines += [_line(name, version(name) or "not installed") for name in _OPTIONAL]
    lines.append(_line("system", f"{platform.system()} {platform.machine()}"))
    lines.append(_line("cores", str(os.cpu_count() or "unknown")))
    lines.append(_line("devices", _devices()))
    lines.append(_line("floats", str(jnp.zeros(()).dtype)))
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    lines.append(_line("compiled", cache or "not kept (JAX_COMPILATION_CACHE_DIR)"))
    if is_known_bad(version("jaxlib") or ""):
        lines.append(
            "This jaxlib computes wrong numbers on CPUs. `python -m metaopt check` says "
            "what to do."
        )
    return 0, "\n".join(lines) + "\n"


def _line(name: str, text: str) -> str:
    return f"{name:<14}{text}"


def _devices() -> str:
    try:
        found = jax.devices()
    except RuntimeError as error:  # such as of a backend that is not there
        return f"none: {str(error).partition(chr(10))[0]}"
    kinds = [f"{device.platform} ({device.device_kind})" for device in found]
    return ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))
