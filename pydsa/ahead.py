"""Generation ahead of its reader, on devices that sample by themselves.

The next id is sampled where the logits are, and its step is started before anybody asks for it: it runs while the caller looks at the id.
"""
from pydsa.plan import one_step


class Ahead:
    """The step of one session that was started before it was asked for, if there is one.

    Nothing is lost if it is never asked for: cache rows behind n_past count for nothing.
    """

    def __init__(self, runner):
        self._runner, self._started = runner, None      # (n_past, id, number of the step)

    def forget(self):
        """Whatever was started is not what comes next."""
        self._started = None

    def settings(self, sampler):
        """What the device needs to sample as a Sampler does; None if it cannot, and the logits must be fetched."""
        return sampler.settings(self._runner.backend.PICKS)

    def next(self, settings, token, n_past, bound, following, ends):
        """Append a token at position n_past -> the id sampled after it, and the greatest logit.

        bound: the Bound of a step of one token there. following: that of the step after it, which is started at once with the sampled id,
        unless ends(id). A step that was started before is not run again, if the runner has started no other since.
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
