"""Staged speculative decoding: stages, token trees, the loop, the public API and the command line."""

from decoding.config import SamplingConfig, SpeculationConfig
from decoding.decoder import GenerateOutput, StagedDecoder

__all__ = ["GenerateOutput", "SamplingConfig", "SpeculationConfig", "StagedDecoder"]
