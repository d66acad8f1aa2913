"""GPU kernels and their torch specification. Tensors in, tensors out; knows no GPT-2.

This file imports neither torch nor triton: transformers probes for a package named ``kernels`` (Hugging Face's) and may
import this one in passing.
"""

__version__ = "0.1.0"
