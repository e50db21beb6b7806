"""A model in stages in this process, whose steps are late.

A step runs when it is waited for, or another must make room: what reads too early, or overwrites, then shows in the logits.
"""
import collections
import copy

import numpy as np

from pydsa.errors import PydsaError
from pydsa.fitting import fitted
from pydsa.sampling import Picked, Sampler
from pydsa.stages.stage import Stage
from pydsa.stages.wire import Part, Step, of_outputs


class _Caches(dict):
    """The caches of a session, each in its stage."""
    number = 0


class _Pending:
    def __init__(self, run, queue):
        self._run, self._queue, self._done, self._result, self._error = run, queue, False, None, None

    def work(self):
        """Run the step."""
        try:
            self._result = self._run()
        except PydsaError as error:
            self._error = error
        self._done = True

    def drop(self):
        """Run all steps up to this one."""
        while not self._done:
            self._queue.popleft().work()

    def finish(self):
        """The result."""
        self.drop()
        if self._error:
            raise self._error
        return self._result


class Late:
    """What stages.pipeline.Pipeline is, without other processes."""
    samples, observes, steps, on, backends, picks = True, False, 0, {}, {}, 0

    def __init__(self, stages, depth):
        self.stages, self.depth, self.most = stages, depth, 0
        self._queue, self._n_sessions, self._samplers = collections.deque(), 0, {}

    def ahead(self):
        """Nothing runs ahead."""
        return self

    def settings(self, sampler):
        """The host samples."""

    def forget(self):
        """Nothing was started."""

    def check_room(self, setup, n, what):
        """There is room."""

    def make_caches(self, setup, n_ctx):
        """The caches of all stages."""
        self._n_sessions += 1
        caches = _Caches()
        for stage in self.stages:
            stage.open(self._n_sessions)
            caches.update(stage.caches(self._n_sessions))
        caches.number = self._n_sessions
        return caches

    def cut(self, caches, start, stop):
        """Copies of rows, as Runner.cut gives them."""
        return [np.array(cache.stored(stop, start)) for cache in caches.values()]

    def bind(self, variant, caches, n_tokens, n_outputs, again=False, late=(), all_rows=False):
        """A step of one session."""
        return self.bind_together(variant, [(caches, n_tokens)], n_outputs, again, late)

    def bind_together(self, variant, parts, n_outputs, again=False, late=()):
        """A step of several sessions."""
        step = copy.copy(self)
        step.binding = variant, [(caches.number, n) for caches, n in parts], n_outputs
        step.pipeline = self
        return step

    def begin(self, ids, n_past, logits, hooks=(), samplers=None, follow=None):
        """Begin a step."""
        assert not hooks
        variant, parts, n_outputs = self.binding
        positions = n_past + np.arange(len(ids)) if np.ndim(n_past) == 0 else np.asarray(n_past)

        def run():
            rows = np.asarray(ids, np.int32)
            for stage in self.stages:
                rows = stage.run(parts, variant, rows, positions, n_outputs)
            if n_outputs == 0:
                rows = np.empty((0, self.stages[0].setup.config.n_vocab))
            else:
                step = of_outputs(Step(0, 0, variant, [Part(number, 0, n) for number, n in parts], [0] * n_outputs, ids), rows)
                rows = self.stages[0].head([(part.session, part.n_tokens) for part in step.parts], rows, positions[-n_outputs:])
            picked = [self.pipeline.pick(sampler, row) for sampler, row in zip(samplers, rows)] if samplers else None
            logits[:] = rows if not samplers else np.nan       # only what is wanted comes back
            for i, one in enumerate(picked or ()):
                if one is None:
                    logits[i] = rows[i]
            return picked
        queue = self.pipeline._queue
        pending = _Pending(run, queue)
        queue.append(pending)
        self.pipeline.most = max(self.pipeline.most, len(queue))
        assert len(queue) <= self.depth
        return pending

    def pick(self, sampler, logits):
        """Sample with a copy of a sampler, as the stage with the head does."""
        if sampler is None:
            return None
        remote = Sampler.restored(sampler.state())
        sampler.follow()
        return Picked(remote.pick(logits), float(logits.max()), float(logits.min()))


def in_stages(model, borders, depth):
    """The model in stages that begin at these layers; the first has the head.

    model: of load(), on the CPU. depth: the steps that may be under way.
    """
    setup, options = model.setup, {"n_ctx": model.n_ctx, "n_ubatch": model.n_ubatch, "kv_type": model.kv_type, "device": "cpu",
                                   "index_type": model.index_type, "dsa_top_k": model.top_k, "reproducible": model.setup.reproducible}
    ends = [*borders, setup.config.n_layer]
    stages = [Stage(fitted(str(setup.file.paths[0]), layers=layers, head=layers[0] == 0, **options), model.threads)
              for layers in zip([0, *borders], ends)]
    staged = copy.copy(model)
    staged.runner = Late(stages, depth)
    return staged
