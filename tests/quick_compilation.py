"""Compilation that takes little time and makes slow programs, for tests.

Most of the time of a test is the compiler's. The option `jax_disable_most_optimizations`
takes a third of it away, and the flags here more than half of the rest; without the option
they cost time. Run as a script, this prints the flags.
"""

import importlib.metadata
import os


# A version of jaxlib that does not know a flag stops.
_FLAGS = {
    "0.10": [
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_cpu_parallel_codegen_split_count=1",
    ]
}


def xla_flags() -> str:
    """What `XLA_FLAGS` holds, and the flags of a quick compilation."""
    given = os.environ.get("XLA_FLAGS", "").split()
    version = importlib.metadata.version("jaxlib")
    quick = _FLAGS.get(".".join(version.split(".")[:2]), [])
    return " ".join([*given, *(flag for flag in quick if flag not in given)])


if __name__ == "__main__":
    print(xla_flags())
