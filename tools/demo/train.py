"""Training in phases: dense, the indexer alone, then sparse.

It is reproducible from a seed, and resumes where it stopped.
"""
import json
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from tools.demo import data, net, notes
from tools.demo.optim import Optimizer
from tools.make_model import ModelSpec

SPEC = ModelSpec(
    n_layer=4, n_layer_dense=1, n_embd=256, n_head=4, n_lora_q=128, n_lora_kv=192, n_nope=32, n_rot=32, n_v=64, n_ff=512, n_expert=8,
    n_expert_used=2, n_expert_shared=1, n_ff_exp=128, n_expert_groups=0, expert_weights_scale=1.0, indexer_n_head=8,
    indexer_head_size=64, indexer_top_k=128, n_ctx=8192, rope_scaling="absent", tied_output=True, n_vocab=3072)
BALANCE = 1e-3      # added to the bias of an expert with too few tokens in a step, subtracted with too many
WARM_UP = 20        # steps
SAMPLED = 0.15      # share of the tokens outside of answers whose loss counts, as the output matrix is a large part of the work


@dataclass(frozen=True)
class Phase:
    """A part of the training.

    stage: "dense", "indexer" (the rest is frozen, attention is dense) or "sparse".
    """
    stage: str
    length: int         # tokens of a row
    rows: int           # of a batch
    steps: int
    lr: float           # falls linearly to lr_end
    lr_end: float
    mix: tuple = (0.75, 0.05, 0.1, 0.1)     # shares of the kinds of texts in notes.KINDS
    reach: int = 8192   # positions are spread over up to this many
    kl_tokens: int = 0  # of each row, for the indexer's loss
    sharpen: float = 1  # factor of the queries of all layers but the first, before the phase begins


ENGLISH = (0.55, 0.05, 0.1, 0.3)         # a mix with more prose
LONG = (0.8, 0.02, 0.08, 0.1)            # one with few facts to repeat
PHASES = (
    Phase("dense", 128, 32, 200, 5e-4, 5e-4, (0.4, 0.5, 0.05, 0.05), 1024),
    Phase("dense", 256, 16, 200, 5e-4, 5e-4, reach=2048),
    Phase("dense", 512, 8, 600, 5e-4, 5e-4, ENGLISH),
    Phase("dense", 1024, 4, 200, 5e-4, 5e-4, ENGLISH),
    Phase("dense", 2048, 4, 240, 5e-4, 3e-4),
    Phase("dense", 4096, 2, 120, 3e-4, 1e-4),
    Phase("dense", 2048, 4, 200, 4e-4, 3e-4, LONG),
    Phase("dense", 4096, 2, 60, 3e-4, 3e-4, LONG),
    Phase("dense", 8192, 1, 40, 3e-4, 5e-5, LONG),
    Phase("indexer", 2048, 2, 200, 2e-3, 2e-3, kl_tokens=128),
    Phase("indexer", 8192, 1, 60, 1e-3, 3e-4, LONG, kl_tokens=256),
    Phase("sparse", 2048, 2, 30, 2e-4, 2e-4, LONG, kl_tokens=128),
    Phase("sparse", 4096, 1, 20, 2e-4, 1e-4, LONG, kl_tokens=128),
    Phase("sparse", 8192, 1, 10, 1e-4, 2e-5, LONG, kl_tokens=256),
    Phase("dense", 2048, 4, 120, 4e-4, 3e-4, LONG),
    Phase("dense", 8192, 1, 40, 3e-4, 1e-4, LONG),
    Phase("indexer", 8192, 1, 80, 1e-3, 3e-4, LONG, kl_tokens=256),
    Phase("sparse", 2048, 2, 60, 3e-4, 2e-4, LONG, kl_tokens=128),
    Phase("sparse", 4096, 1, 40, 2e-4, 1e-4, LONG, kl_tokens=128),
    Phase("sparse", 8192, 1, 20, 1e-4, 2e-5, LONG, kl_tokens=256),
    # The best 128 keys of 8,192 hold only 82 % of such diffuse attention, whatever the indexer does.
    Phase("dense", 2048, 4, 60, 3e-4, 2e-4, LONG, sharpen=1.75),
    Phase("indexer", 8192, 1, 120, 1e-3, 3e-4, LONG, kl_tokens=256),
    Phase("sparse", 2048, 2, 60, 3e-4, 2e-4, LONG, kl_tokens=128),
    Phase("sparse", 4096, 1, 40, 2e-4, 1e-4, LONG, kl_tokens=128),
    Phase("sparse", 8192, 1, 20, 1e-4, 2e-5, LONG, kl_tokens=256),
    Phase("dense", 4096, 2, 80, 3e-4, 2e-4, LONG, sharpen=1.15),
    Phase("indexer", 8192, 1, 80, 1e-3, 3e-4, LONG, kl_tokens=256),
    Phase("sparse", 4096, 1, 60, 2e-4, 1e-4, LONG, kl_tokens=128),
    Phase("sparse", 8192, 1, 30, 1e-4, 2e-5, LONG, kl_tokens=256),
)


def is_indexer(name):
    return ".indexer." in name


def is_matrix(name, w):
    """Whether Muon trains a weight.

    The embedding, the experts' gates and the indexer's parts are left to Adam.
    """
    return w.ndim > 1 and "token_embd" not in name and "gate_inp" not in name and not is_indexer(name)


class Training:
    """The state of a run: the texts, and all that a checkpoint holds."""

    def __init__(self, folder, seed, phases=PHASES, device="cpu", spec=SPEC):
        from pydoc_data.topics import topics

        self.folder, self.seed, self.phases, self.device = Path(folder), seed, phases, torch.device(device)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.prose, self.held_out = notes.split_topics(notes.paragraphs(topics))
        if not (self.folder / "tokenizer.json").exists():
            data.train_tokenizer(self.folder / "tokenizer.json", self.prose, spec.n_vocab, digits=3)
        self.vocabulary = data.Vocabulary(self.folder / "tokenizer.json")
        self.spec = replace(spec, n_vocab=len(self.vocabulary.tokens))
        self.step, self.weights = 0, {name: w.to(self.device) for name, w in net.new_weights(self.spec, seed).items()}
        self.optimizers = {part: Optimizer() for part in ("model", "indexer")}
        if (self.folder / "checkpoint.pt").exists():
            self.load()

    def load(self):
        """Continue from the folder's checkpoint."""
        saved = torch.load(self.folder / "checkpoint.pt", weights_only=True, map_location=self.device)
        self.step, self.weights = saved["step"], saved["weights"]
        for name, optimizer in self.optimizers.items():
            optimizer.n, optimizer.state = saved["optimizers"][name]

    def save(self):
        """Write the checkpoint; an existing one stays until the new is complete."""
        path = self.folder / "checkpoint.pt"
        torch.save({"step": self.step, "weights": {name: w.detach() for name, w in self.weights.items()},
                    "optimizers": {name: (o.n, o.state) for name, o in self.optimizers.items()}}, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)

    def part(self, phase, step):
        """The optimizers of a phase, each with the weights that it trains."""
        parts = {"dense": ("model",), "indexer": ("indexer",), "sparse": ("model", "indexer")}[phase.stage]
        return [(self.optimizers[part], {name: w for name, w in self.weights.items() if is_indexer(name) == (part == "indexer")})
                for part in parts]

    def run(self, save_every=100, log_every=20):
        """Run the phases that are left, and yield rows of curves.jsonl."""
        first = 0
        for number, phase in enumerate(self.phases):
            trained = {name for _, weights in self.part(phase, 0) for name in weights}
            for name, w in self.weights.items():
                w.requires_grad_(name in trained and "exp_probs_b" not in name)
            if self.step == first and phase.sharpen != 1:
                self.sharpen(phase.sharpen)
            for step in range(max(0, self.step - first), phase.steps):
                started = time.process_time()
                row = self.one_step(phase, step)
                self.step = first + step + 1
                if step % log_every == 0 or step == phase.steps - 1:
                    row = {"step": self.step, "phase": number, "stage": phase.stage, "length": phase.length, **row,
                           "cpu_seconds": time.process_time() - started}
                    with open(self.folder / "curves.jsonl", "a") as file:
                        file.write(json.dumps({key: round(v, 5) if isinstance(v, float) else v for key, v in row.items()}) + "\n")
                    yield row
                if self.step % save_every == 0 or step == phase.steps - 1:
                    self.save()
            first += phase.steps

    def sharpen(self, factor):
        """Multiply the queries of all layers but the first.

        Softmaxes become sharper.
        """
        with torch.no_grad():
            for name, w in self.weights.items():
                if name.endswith(".attn_q_b.weight") and not is_indexer(name) and not name.startswith("blk.0."):
                    w *= factor

    def one_step(self, phase, step):
        """Run a batch and an update, and return the figures of the curves."""
        lr = (phase.lr + (phase.lr_end - phase.lr) * step / phase.steps) * min(1, (step + 1) / WARM_UP)
        torch.manual_seed(self.seed * 1_000_003 + self.step)
        arrays = data.batch(self.seed, self.step, self.vocabulary, self.prose, phase.length, phase.rows, phase.mix, phase.reach)
        ids, weights, positions = (torch.from_numpy(array).to(self.device) for array in arrays)
        learns_language = phase.stage != "indexer"
        with self.device, torch.autocast(self.device.type, torch.bfloat16):        # tensors that are made inside are on the device too
            attention = {"indexer": "probabilities"}.get(phase.stage, phase.stage)
            x, observed, loads = net.forward(self.weights, self.spec, ids[:, :-1], positions, attention, phase.kl_tokens)
            kept = (weights >= 2) | ((weights > 0) & (torch.rand(weights.shape, device=self.device) < SAMPLED))
            scores = net.logits(self.weights, x[kept]) if learns_language else None
        row, loss = {}, 0
        if phase.kl_tokens:
            loss = sum(layer.loss for layer in observed)
            row = {"kl": float(loss.detach()) / len(observed), "mass": float(sum(layer.mass for layer in observed)) / len(observed)}
        if learns_language:
            targets, w = ids[:, 1:][kept], weights[kept].float()
            entropy = F.cross_entropy(scores, targets, reduction="none")
            loss = loss + (entropy * w).sum() / w.sum()
            kinds = {"answers": w >= notes.ANSWER, "names": w == 2, "others": w < 2}
            row |= {name: float(entropy[which].detach().mean()) for name, which in kinds.items()}
            answers = kinds["answers"]
            row["recall"] = float((scores[answers].argmax(-1) == targets[answers]).float().mean())
        loss.backward()
        for optimizer, part in self.part(phase, step):
            optimizer.step(part, lr, is_matrix)
        if learns_language:
            self.balance(loads)
        return row

    @torch.no_grad()
    def balance(self, loads):
        """Raise the bias of experts with too few tokens.

        DeepSeek-V3, section 2.1.2: balance without a loss.
        """
        for il, load in enumerate(loads, self.spec.n_layer_dense):
            self.weights[f"blk.{il}.exp_probs_b.bias"] += BALANCE * torch.sign(load.float().mean() - load)


def perplexity(training, attention, length=1024):
    """The perplexity of the held-out topics, in rows of `length` tokens."""
    ids = [i for text in training.held_out for i in training.vocabulary.encode(text + "\n\n")]
    n = (len(ids) - 1) // length * length
    ids, total = torch.tensor(ids[:n + 1], device=training.device), 0.0
    with torch.no_grad(), training.device:
        for start in range(0, n, length):
            x, _, _ = net.forward(training.weights, training.spec, ids[None, start:start + length], attention=attention)
            total += float(F.cross_entropy(net.logits(training.weights, x)[0], ids[start + 1:start + length + 1], reduction="sum"))
    return float(np.exp(total / n))
