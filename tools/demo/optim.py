"""Muon for matrices and Adam for the rest.

Their state is a dict of tensors by weight name.
"""
import torch


def orthogonal(g, steps=5):
    """Approximately the nearest matrix with equal singular values.

    By Newton-Schulz iteration (Jordan et al., Muon, 2024). Batches of matrices are allowed.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    wide = x.shape[-2] > x.shape[-1]
    x = x.mT if wide else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return (x.mT if wide else x).float()


class Optimizer:
    """Both optimizers: `step` reads the gradients and clears them."""

    def __init__(self):
        self.state, self.n = {}, 0

    @torch.no_grad()
    def step(self, weights, lr, is_matrix, decay=0.02):
        """Update weights {name: tensor} by their gradients.

        is_matrix(name, w): whether Muon trains it.
        """
        self.n += 1
        for name, w in weights.items():
            if w.grad is None:
                continue
            if is_matrix(name, w):
                m = self.state.setdefault(name, torch.zeros_like(w))
                m.lerp_(w.grad, 0.05)
                w.mul_(1 - lr * decay).sub_(orthogonal(w.grad.lerp(m, 0.95)), alpha=lr * 0.7 * max(w.shape[-2:]) ** 0.5)
            else:
                m, v = self.state.setdefault(name, (torch.zeros_like(w), torch.zeros_like(w)))
                m.lerp_(w.grad, 0.1)
                v.lerp_(w.grad.square(), 0.02)
                step = (m / (1 - 0.9 ** self.n)) / ((v / (1 - 0.98 ** self.n)).sqrt() + 1e-8)
                w.sub_(step, alpha=lr)
            w.grad = None
