"""The loop of staged speculative decoding: propose, verify, commit. Read this first.

Every stage works on one shared token tree whose root is the last committed token. Stages propose from the cheapest up;
the oracle scores the best nodes in one pass, draws its own token at each of them, and the walk from the root follows
those draws as far as the tree goes. What is emitted is what the oracle drew, so speculation never changes the text.
"""

import time

import torch

from decoding.config import Limits, SpeculationConfig
from decoding.stages import Stage
from decoding.stats import Statistics
from kernels.layout import Sampling
from kernels.reference import insert_children, new_tree, reroot, select_nodes, verify


class Generation:
    """One sequence on its way: the text so far, the tree below its last token, and the stages that grow it."""

    def __init__(
        self,
        lower: list[Stage],  # cheapest first, matching config.stages
        oracle: Stage,
        prompt: list[int],
        sampling: Sampling,
        limits: Limits,
        config: SpeculationConfig,
    ):
        self.lower, self.oracle, self.sampling, self.config = lower, oracle, sampling, config
        self.lower_sampling = sampling if config.shared_noise else sampling._replace(noise=False)
        self.text, self.num_prompt = list(prompt), len(prompt)
        self.eos_token_ids = limits.eos_token_ids
        self.max_len = min(len(prompt) + limits.max_new_tokens, len(prompt) + oracle.max_depth(len(prompt)) + 1)
        self.finish_reason: str | None = None
        self.stats = Statistics([stage.name for stage in lower] + [oracle.name])
        self.tree = new_tree(config.capacity)
        for stage in [*lower, oracle]:
            stage.begin(config.capacity)
        reroot(self.tree, -1, prompt[-1])

    @torch.inference_mode()
    def step(self) -> list[int]:
        """One iteration; returns the tokens it commits, at least one."""
        remaining = self.max_len - len(self.text)
        max_depth = min(self.config.max_depth, remaining - 1, self.oracle.max_depth(len(self.text)))
        if max_depth > 0:
            self._propose(len(self.lower) - 1, max_depth)
        rows = select_nodes(self.tree, len(self.lower), self.config.budget + 1, max_depth)
        _, _, drawn = self.oracle.score(self.tree, rows, self.text, self.sampling, 0, 1.0)
        accepted, next_token, ended = verify(self.tree, rows, drawn, remaining - 1, self.eos_token_ids)
        emitted = self.tree.tokens[accepted].tolist() + ([] if ended else [next_token])
        self.stats.record(self.tree, rows, accepted, emitted)
        self._commit(accepted.tolist(), emitted, ended)
        return emitted

    def _propose(self, index: int, max_depth: int) -> None:
        """Stage ``index`` and those below it grow the tree down to ``max_depth``."""
        if index < 0:
            return
        stage, config = self.lower[index], self.config
        reach = min(max_depth - 1, stage.max_depth(len(self.text)))
        for _ in range(config.rounds[index]):
            self._propose(index - 1, max_depth)
            nodes = select_nodes(self.tree, index, config.widths[index], reach)
            if len(nodes) == 0:
                break
            children, scores, _ = stage.score(
                self.tree, nodes, self.text, self.lower_sampling, config.children[index], config.tau
            )
            insert_children(self.tree, index, nodes, children, scores, max_depth)

    def _commit(self, accepted: list[int], emitted: list[int], ended: bool) -> None:
        self.text += emitted
        if ended or emitted[-1] in self.eos_token_ids:
            self.finish_reason = "eos"
        elif len(self.text) >= self.max_len:
            self.finish_reason = "length"
        if ended:
            kept = torch.tensor([-1], dtype=torch.int32)
        else:
            kept = reroot(self.tree, accepted[-1] if accepted else 0, emitted[-1])
        for stage in [*self.lower, self.oracle]:
            stage.commit(accepted, kept)

    def close(self) -> None:
        """Give every stage's pages back, however the generation ended."""
        for stage in [*self.lower, self.oracle]:
            stage.end()

    def run(self):
        """Yield the tokens of each iteration until the generation is finished."""
        start = time.perf_counter()
        while self.finish_reason is None:
            yield self.step()
            self.stats.seconds = time.perf_counter() - start
