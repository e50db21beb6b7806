"""Panels of a plot that show ops: their shares of steps, and how near each comes to the machine's limits.

They draw rows of Bench.ops. An op has the same colour in every picture.
"""
OTHER, WHOLE = "other", "the step"
COLOURS = {         # shades of blue: products; violet: experts; red: attention; green: the indexer; brown: the rest
    "linear": "#2166ac", "head_linear": "#92c5de",
    "moe_gate_up": "#762a83", "moe_down": "#af8dc3", "moe_route": "#40004b", "moe_linear": "#c994c7", "expert_scale": "#e7d4e8",
    "sparse_attention": "#d6604d", "dense_attention": "#b2182b", "masked_attention": "#f4a582", "mha_attention": "#7f0000",
    "mha_sparse_attention": "#fc8d59",
    "indexer_select": "#1b7837", "indexer_scores": "#5aae61", "top_k": "#a6dba0", "scatter_mask": "#d9f0d3", "hadamard": "#00b894",
    "rms_norm": "#8c6d31", "layer_norm": "#bd9e39", "rope": "#e7ba52", "rope_table": "#f6e8c3", "cache_write": "#543005",
    "silu_mul": "#dfc27d", "add": "#bf812d", "scale": "#e7cb94", "get_rows": "#393b79",
    OTHER: "0.8"}
LEAST, MOST = 0.02, 13      # ops with less of every step than LEAST are drawn together, and so are those beyond MOST
FEW = 3                     # steps for which there is always room: one bar alone is not as wide as the panel


class OpPanels:
    """The panels of rows of Bench.ops, drawn into axes.

    names: the ops that are drawn, the one with the greatest shares first; OTHER stands for all that are left.
    """

    def __init__(self, rows):
        self._steps = {}
        for row in rows:
            step = row["attention"], row["n_prompt"], row["n_gen"], row["n_depth"]
            self._steps.setdefault(step, {})[row["op"], row.get("device")] = row
        shares = {op: [sum(row["share"] for (other, _), row in ops.items() if other == op) for ops in self._steps.values()]
                  for op in {row["op"] for row in rows}}
        large = sorted((op for op in shares if max(shares[op]) >= LEAST), key=lambda op: (-sum(shares[op]), op))[:MOST]
        self.names = large + [OTHER] * (len(large) < len(shares))
        self.has_ceilings = any(row["share_of_ceiling"] is not None for row in rows)

    def steps(self, key):
        """The steps of prompts or of generation, [(step, {key of a row: row})].

        key: "n_prompt" or "n_gen". A step is (attention, n_prompt, n_gen, n_depth). A row's key is its op, with the device of several.
        """
        return [(step, ops) for step, ops in self._steps.items() if step[1 if key == "n_prompt" else 2]]

    def rows(self, ops, name):
        """The rows of a step that are drawn under a name of `names`."""
        return [row for (op, _), row in ops.items() if op == name or name == WHOLE or name == OTHER and op not in self.names]

    def share(self, ops, name):
        """The share that a name has of a step's time, 0 to 1."""
        return sum(row["share"] for row in self.rows(ops, name))

    def share_of_ceiling(self, ops, name):
        """The least time for what is under a name, over the measured time.

        None if the step has nothing of that name, or the limits are unknown.
        """
        rows = self.rows(ops, name)
        if not rows or any(row["share_of_ceiling"] is None for row in rows):
            return None
        return sum(row["share_of_ceiling"] * row["us"] for row in rows) / sum(row["us"] for row in rows)

    def bars(self, axes, name, key):
        """A bar for each step, with a part for each op; its time is above."""
        steps = self.steps(key)
        bottoms = [0.0] * len(steps)
        for op in self.names:
            heights = [100 * self.share(ops, op) for _, ops in steps]
            axes.bar(range(len(steps)), heights, 0.8, bottoms, color=COLOURS[op], edgecolor="white", linewidth=0.5, label=op)
            bottoms = [low + height for low, height in zip(bottoms, heights)]
        for i, (_, ops) in enumerate(steps):
            axes.text(i, 101, duration(sum(row["us"] for row in ops.values())), ha="center", va="bottom", fontsize="x-small")
        axes.set_title(f"{name}: where a step's time goes", fontsize="medium", loc="left", pad=14)
        axes.set(ylabel="share of the step (%)", ylim=(0, 100))
        axes.spines[["top", "right"]].set_visible(False)
        self._label_steps(axes, steps)

    def ceilings(self, axes, name, key):
        """A table of shares of the ceiling: a row for each op, steps beside."""
        steps, names = self.steps(key), [WHOLE, *self.names]
        table = [[self.share_of_ceiling(ops, op) for _, ops in steps] for op in names]
        numbers = [[float("nan") if share is None else share for share in row] for row in table]
        axes.imshow(numbers, cmap="Blues", vmin=0, vmax=1.2, aspect="auto", origin="lower")     # the darkest is for what passes 1
        for y, row in enumerate(table):
            for x, share in enumerate(row):
                axes.text(x, y, "" if share is None else f"{share:.0%}", ha="center", va="center", fontsize="x-small",
                          color="white" if share is not None and share > 0.75 else "black")
        axes.hlines(0.5, -0.5, len(steps) - 0.5, color="black", linewidth=0.8)
        axes.set_yticks(range(len(names)), names, fontsize="small")
        axes.set_title(f"{name}: share of the ceiling", fontsize="medium", loc="left")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        self._label_steps(axes, steps)

    def _label_steps(self, axes, steps):
        """Below each step what tells it from the others, and its depth."""
        varying = [len({step[i] for step, _ in steps}) > 1 for i in range(3)]
        labels = []
        for (attention, n_prompt, n_gen, n_depth), _ in steps:
            parts = [attention] * varying[0] + [str(n_prompt or n_gen)] * any(varying[1:]) + [f"d{n_depth}"]
            labels.append("\n".join(parts))
        axes.set_xticks(range(len(steps)), labels, fontsize="x-small")
        axes.set_xlim(-0.5, max(len(steps), FEW) - 0.5)         # a step's cells are under its bar

    def legend(self, axes):
        """Name the colours beside bars, in the order of their parts."""
        from matplotlib.patches import Patch
        axes.legend(handles=[Patch(color=COLOURS[op], label=op) for op in reversed(self.names)], fontsize="small", frameon=False,
                    loc="center left", bbox_to_anchor=(1.01, 0.5))


def duration(microseconds):
    """A time with three digits: "812 µs", "3.41 ms", "1.2 s"."""
    for factor, unit in ((1e6, "s"), (1e3, "ms")):
        if microseconds >= factor:
            return f"{microseconds / factor:.3g} {unit}"
    return f"{microseconds:.0f} µs"
