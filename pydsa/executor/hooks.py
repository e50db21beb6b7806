"""Hooks: objects that look into a step, or change it, at ops of their choice.

A session calls those in its `hooks`. Between the ops that no hook asks for, a step runs as without hooks.
"""
from collections.abc import Sequence


def layer_of(node):
    """The layer of a graph.Node, which its name ends with; None without one."""
    number = node.name.rpartition("-")[2]
    return int(number) if number.isdigit() else None


class Call:
    """A call of an op in a step, as a hook sees it.

    node: the graph.Node. positions: int64 [n_tokens], those of the step's tokens.
    """

    def __init__(self, backend, node, args):
        self._backend, self.node, self.args = backend, node, args
        self.positions = None

    def read(self, i):
        """Argument i of the op, a value, as a numpy array [n_rows, ...].

        On the CPU it is the value's own memory, which later ops may write: copy what must last.
        """
        return self._backend.fetch(self.args[i])

    def write(self, i, values):
        """Replace argument i of the op, a value that lies in one piece."""
        self._backend.store(self.args[i], values)


class Hook:
    """What is done at the ops of a step that wants(node) chooses.

    late: whether after() may wait for the end of the step. Steps of one token then run without a stop; the values that the chosen ops write
    have memory of their own until the end. all_rows: whether it needs the last layer's values of all tokens, where else those are computed
    alone whose logits are wanted.
    """
    late, all_rows = False, True

    def wants(self, node):
        """Whether before() and after() are called for the op of a graph.Node."""
        raise NotImplementedError

    def before(self, call):
        """Called before an op; other ops of the same interval may have run."""

    def after(self, call):
        """Called after an op; the values that it wrote are there."""

    def completed(self, ids, positions):
        """Called when the tokens of a step are in the context.

        ids: int32 [n_tokens]. positions: int64 [n_tokens].
        """


class Observer(Hook):
    """Call observe(node, arrays) after each op, with the arrays that it wrote."""

    def __init__(self, observe):
        self._observe = observe

    def wants(self, node):
        return True

    def after(self, call):
        self._observe(call.node, Written(call))


class Written(Sequence):
    """The arrays that an op wrote, fetched as numpy arrays on access."""

    def __init__(self, call):
        self._call = call

    def __len__(self):
        return self._call.node.n_out

    def __getitem__(self, i):
        return self._call.read(range(len(self))[i])


class Stops:
    """Where a step stops for hooks, and what they do at its end.

    before, after: {i: function} of the i-th call. backends, calls: those of a plan.Bound, one for each call. late: hooks whose values have
    memory of their own.
    """

    def __init__(self, backends, calls, hooks, late):
        self.hooks, self._positions = hooks, None
        self.before, self.after, self._end, self._calls = {}, {}, [], []
        for i, (node, _, args) in enumerate(calls):
            wanting = [hook for hook in hooks if hook.wants(node)]
            if wanting:
                call = Call(backends[i], node, args)
                self._calls.append(call)
                self._add(self.before, i, call, [hook.before for hook in wanting if type(hook).before is not Hook.before])
                at_once = [hook.after for hook in wanting if hook not in late and type(hook).after is not Hook.after]
                self._add(self.after, i, call, at_once)
                self._end += [(hook.after, call) for hook in wanting if hook in late]

    @staticmethod
    def _add(stops, i, call, functions):
        def stop():
            for function in functions:
                function(call)
        if functions:
            stops[i] = stop

    def begin(self, positions):
        """Tell all calls the positions of a step's tokens."""
        for call in self._calls:
            call.positions = positions

    def end(self):
        """Do what waits for the end of a step."""
        for function, call in self._end:
            function(call)
