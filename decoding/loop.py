"""The loop of staged speculative decoding: propose, verify, commit. Read this first.

Every stage works on one shared token tree whose root is the last committed token. Stages propose from the cheapest up;
the oracle scores the best nodes in one pass, draws its own token at each of them, and the walk from the root follows
those draws as far as the tree goes. What is emitted is what the oracle drew, so speculation never changes the text.

An iteration reads nothing back from where its operations run; the host reads one small record after it, on a GPU while
the next iteration is under way already (``decoding.pipeline``).
"""

import math
import time

from decoding.config import Limits, SpeculationConfig
from decoding.execution import Eager, Execution
from decoding.stages import Stage, State, begin_all
from decoding.stats import Statistics
from kernels.layout import EOS, LENGTH, RUNNING, Record, Sampling

_REASONS = {EOS: "eos", LENGTH: "length"}


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
        execution: Execution | None = None,  # None: eager, one iteration at a time
    ):
        self.start = time.perf_counter()
        self.lower, self.oracle, self.config = lower, oracle, config
        self.ops, execution = oracle.model.ops, execution or Eager()
        self.text, self.num_prompt = list(prompt), len(prompt)
        self.finish_reason: str | None = None
        self.stats = Statistics([stage.name for stage in self.stages], execution.name)
        end = min(len(prompt) + limits.max_new_tokens, oracle.context + 1)
        contexts = [stage.context for stage in self.stages]
        chain = begin_all(self.stages, prompt, config, self.ops, execution.prefill)
        device = chain.cached_len.device
        progress = self.ops.new_progress(prompt, end, config.max_depth, contexts, limits.eos_token_ids, device)
        self.state = State(self.ops.new_tree(config.capacity, device, prompt[-1]), progress, chain)
        self.sampling = sampling.to(device)
        self.pipeline = execution.begin(self)

    @property
    def stages(self) -> list[Stage]:
        return [*self.lower, self.oracle]

    @property
    def lower_sampling(self) -> Sampling:
        """How the lower stages draw."""
        return self.sampling if self.config.shared_noise else self.sampling._replace(noise=False)

    def iterate(self) -> None:
        """One iteration: the lower stages propose, the oracle verifies, all of them commit."""
        tree, progress, chain = self.state
        for stage in self.lower:
            stage.begin_iteration(num_head=self.config.max_depth + 1)
        self.oracle.begin_iteration(num_head=1)
        oracle = len(self.lower)
        self._propose(oracle - 1)
        if oracle > 1 and self.lower[0].remembers:
            self._propose(0)  # below what the drafts have ranked last
        rows = self.ops.select_nodes(tree, oracle, self.config.budget + 1, progress.reach[oracle])
        told = max((stage.remembers for stage in self.lower), default=0)
        verdict = self.oracle.score(self.state, oracle, rows, self.sampling, told, 1.0)
        for below in self.lower:
            below.learn(self.state, verdict, level=oracle - 1)
        self.ops.verify_and_commit(tree, verdict.nodes, verdict.tokens, progress, chain)

    def _propose(self, index: int) -> None:
        """Stage ``index`` and those below it grow the tree."""
        if index < 0:
            return
        tree, progress, _ = self.state
        stage, config = self.lower[index], self.config
        if stage.is_table and index == 0:
            stage.extend(self.state, config, self.lower_sampling)
            return
        for _ in range(config.rounds[index]):
            self._propose(index - 1)
            least = config.min_score if index else -math.inf
            nodes = self.ops.select_nodes(tree, index, config.widths[index], progress.reach[index], least)
            verdict = stage.score(self.state, index, nodes, self.lower_sampling, config.children[index], config.tau)
            for below in self.lower[:index]:
                below.learn(self.state, verdict, level=index - 1)
            self.ops.insert_children(
                *(tree, index, verdict.nodes, verdict.children, verdict.scores),
                *(progress.reach[len(self.lower)], verdict.levels),
            )

    def step(self) -> list[int]:
        """The tokens that the next iteration has emitted, at least one.

        Raises FloatingPointError where a stage gave NaN logits.
        """
        record, work = self.pipeline.next()
        for stage, asked in zip(self.stages, work, strict=True):
            stage.account(asked, len(self.text))
        state = record[Record.STATE]
        if state < 0:
            name = self.stages[-state - 1].name
            raise FloatingPointError(f"stage {name!r} produced NaN logits at text length {len(self.text)}")
        emitted = self.stats.record(record)
        self.text += emitted
        if state != RUNNING:
            self.finish_reason = _REASONS[state]
        return emitted

    def close(self) -> None:
        """Give every stage's pages back, however the generation ended."""
        for stage in self.stages:
            stage.end()

    def run(self):
        """Yield the tokens of each iteration until the generation is finished."""
        while self.finish_reason is None:
            emitted = self.step()
            self.stats.seconds = time.perf_counter() - self.start
            yield emitted
