"""The next step of a generation, started before it is asked for.

This is for devices that sample by themselves. The device samples the next id from its own logits, and the step of that id starts at once:
it runs while the caller handles the id.
"""
from pydsa.executor.turns import one_step


class Ahead:
    """The step of one session that runs ahead of its request, if any.

    A started step that is never asked for does no harm: cache rows from n_past on are ignored and overwritten.
    """

    def __init__(self, runner):
        self._runner, self._started = runner, None      # None, or (n_past, id, number of the step)

    def forget(self):
        """Forget the started step: the next step is another one."""
        self._started = None

    def settings(self, sampler):
        """The settings with which the device samples as `sampler` does.

        None if the device cannot; the logits must then be fetched.
        """
        return sampler.settings(self._runner.picks)

    def next(self, settings, token, n_past, bound, following, ends):
        """Append a token at position n_past -> the next id and the greatest logit.

        bound: the Bound of the step of this one token. following: the Bound of the step after it, which starts at once with the sampled id,
        unless ends(id). A step that was started ahead is not run again, if the runner has started no other step since.
        """
        runner, started = self._runner, self._started
        self._started = None
        with one_step():
            if started != (n_past, token, runner.steps):
                bound.put([token], n_past)
                bound.start()
            following_id, greatest = runner.backend.pick(following.ids, following.positions, n_past + 1, bound.output, *settings)
            if not ends(following_id):
                runner.steps += 1
                following.start()
                self._started = n_past + 1, following_id, runner.steps
        return following_id, greatest
