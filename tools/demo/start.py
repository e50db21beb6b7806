"""Initial weights in which two layers already look for repetition.

Copying from notes needs heads that look at the tokens before, and heads that compare those. A small model finds this pair of layers only
after a long time, in which neither is of use alone. So the weights are random, but head i of layer 0 starts out looking i + 1 tokens back,
and writes what it saw into a subspace of its own. The heads of layer 1 compare a token and the three before it with the four before each
key, and copy the key's token. Everything is trained from there on, and nothing is fixed.
"""
import torch

CONSTANT = 0.3      # the first number of every embedding, which queries and keys rotate; it adds the same to all logits
SLOT = 0.05         # strength of a head's output in layer 0: a token that it saw has the length of an embedding there
COPY = 0.06         # strength of a head's output in layer 1


def start_copying(weights, spec, generator):
    """Overwrite parts of the first two layers.

    n_lora_q and n_lora_kv must be large enough for the tokens that the heads compare and a value.
    """
    part, n_v, heads = spec.n_nope, spec.n_v, spec.n_head
    assert spec.n_lora_q >= heads * part and spec.n_lora_kv >= heads * part + n_v and spec.n_embd >= heads * n_v, "widths do not fit"

    def rotation(rows, columns):
        """A matrix of orthonormal rows; rows <= columns."""
        return torch.linalg.qr(torch.randn(columns, rows, generator=generator)).Q.T

    first, second = ({name[6:]: w for name, w in weights.items() if name.startswith(f"blk.{il}.")} for il in (0, 1))
    seen = look_back(weights, first, spec, rotation)            # [n_v, n_embd]: what a head of layer 0 reads of a token
    slots = first["attn_output.weight"].T.reshape(heads, n_v, spec.n_embd) / SLOT      # [n_v, n_embd] each: reads what it wrote
    narrow = rotation(part, n_v)
    compared = [narrow @ seen, *(narrow @ slot for slot in slots)]      # the token itself, and one to `heads` before it
    second["attn_q_a.weight"][:heads * part] = torch.cat(compared[:-1])
    second["attn_q_a.weight"][heads * part:] *= 0.1
    second["attn_kv_a_mqa.weight"][:heads * part] = torch.cat(compared[1:])
    value = rotation(n_v, spec.n_embd)
    value[:, 0] = 0
    second["attn_kv_a_mqa.weight"][heads * part:heads * part + n_v] = value
    queries = second["attn_q_b.weight"].view(heads, part + spec.n_rot, -1)
    queries[:, part:] = 0       # positions have no influence
    second["attn_k_b.weight"][:], second["attn_v_b.weight"][:] = 0, 0
    for head in range(heads):
        for slot in range(heads):
            turn, columns = rotation(part, part), slice(slot * part, (slot + 1) * part)
            queries[head, :part, columns] = turn
            second["attn_k_b.weight"][head, columns] = turn.T
        second["attn_v_b.weight"][head, :, heads * part:heads * part + n_v] = torch.eye(n_v)
        second["attn_output.weight"][:, head * n_v:(head + 1) * n_v] = COPY * value.T


def look_back(weights, block, spec, rotation):
    """Let head i look i + 1 tokens back.

    Returns what each head reads of a token, as a matrix.
    """
    n_key = spec.n_nope + spec.n_rot
    weights["token_embd.weight"][:, 0] = CONSTANT
    block["attn_q_a.weight"][0] = 0
    block["attn_q_a.weight"][0, 0] = 1
    latents = rotation(spec.n_lora_kv, spec.n_embd)
    latents[:, 0] = 0
    block["attn_kv_a_mqa.weight"][:spec.n_lora_kv] = latents
    pairs = min(8, spec.n_rot // 2)         # the fast frequencies, which tell neighbours apart
    block["attn_kv_a_mqa.weight"][spec.n_lora_kv:spec.n_lora_kv + 2 * pairs:2, 0] = 1
    taken, written = rotation(spec.n_v, spec.n_lora_kv), rotation(spec.n_head * spec.n_v, spec.n_embd)
    written[:, 0] = 0
    block["attn_v_b.weight"][:] = taken
    block["attn_output.weight"][:] = SLOT * written.T
    for head in range(spec.n_head):
        angles = -(head + 1) * spec.freq_base ** (-torch.arange(pairs) * 2 / spec.n_rot)
        rows = slice(head * n_key + spec.n_nope, head * n_key + spec.n_nope + 2 * pairs)
        block["attn_q_b.weight"][rows, 0] = 1.5 * torch.stack((angles.cos(), angles.sin()), -1).flatten()
    return taken @ latents
