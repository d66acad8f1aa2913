"""Staged speculative decoding: stages, token trees, the loop, the public API and the command line."""

import importlib.metadata

try:
    _foreign = importlib.metadata.version("kernels")
except importlib.metadata.PackageNotFoundError:
    pass
else:
    # Hugging Face's distribution owns the import name of our kernels package; transformers would fail on the mixture.
    raise ImportError(f"the distribution kernels {_foreign} hides this project's own package: pip uninstall kernels")

from decoding.config import SamplingConfig, SpeculationConfig
from decoding.decoder import GenerateOutput, StagedDecoder


def __getattr__(name: str):
    if name == "staged_generate":  # imports transformers, which takes seconds: only for those who ask
        from decoding.hf import staged_generate

        return staged_generate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["GenerateOutput", "SamplingConfig", "SpeculationConfig", "StagedDecoder", "staged_generate"]
