"""The versions of the software that a result depends on, for reports and for comparing runs."""

import platform

import torch

from ace_ext.ops._extension import build_info


def versions() -> dict[str, str]:
    """The versions of ace_ext, torch, transformers and Python, and the compiler that built the extension.

    Raises:
        ImportError: the compiled module cannot be loaded.
    """
    import transformers

    build = build_info()
    return {
        "ace_ext": str(build["version"]),
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
        "python": platform.python_version(),
        "compiler": str(build["compiler"]),
    }
