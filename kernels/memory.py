"""
Infini-attention (Munkhdalai et al., arXiv 2404.07143): attention inside segments of N tokens and a memory of all before.

    A_mem = sigma(q) M / (sigma(q) . z), 0 where the memory is empty,   sigma(x) = ELU(x) + 1 = exp(min(x, 0)) + max(x, 0)
    out = g A_mem + (1 - g) A_dot,   g = sigmoid(beta), one per query head
    after each segment, over its tokens j, with M and z of before it, in v_j - A_mem(k_j) for the delta rule:
    M += sum_j sigma(k_j)^T v_j  (linear)  or  sum_j sigma(k_j)^T (v_j - sigma(k_j) M / (sigma(k_j) . z))  (delta),
    z += sum_j sigma(k_j)

q (B, Tq, H, D), k and v (B, Tk, G, D), M (B, G, D, D) and z (B, G, D) in float32; head h reads the memory h // (H / G).
A_dot is kernels.attention over rotated q and k; the memory takes them un-rotated.
"""

import torch
import torch.nn.functional as F

from kernels.attention import attention


# ----------------------------------------------------------------------------------------------------------------------
# reference

def _sigma(x):
    return x.clamp(max=0).exp() + F.relu(x)  # at 0 the gradient is 1, once


def _retrieve(s, M, z):
    """s (..., n, D), M (..., D, D), z (..., D) -> s M / (s . z), 0 where z is 0."""
    weight = s @ z[..., None]
    empty = weight < torch.finfo(weight.dtype).tiny
    return (s @ M / weight.masked_fill(empty, 1.0)).masked_fill(empty, 0.0)


def _ownership(docs, segment):
    """
    docs (B, Tk) -> whose memory it is, as bools: carry (B, S), whole segment s ends in the document of the memory it
    found; writes (B, S N), the token is of the document its segment ends in; reads (B, Tk), of the memory's document.
    """
    S = docs.shape[1] // segment
    last = docs[:, segment - 1::segment]
    owner = torch.cat([docs[:, :1], last], 1)
    reads = docs == owner.repeat_interleave(segment, 1)[:, :docs.shape[1]]
    writes = docs[:, :S * segment] == last.repeat_interleave(segment, 1)
    return owner[:, 1:] == owner[:, :-1], writes, reads


def _segments(x, segment, G):
    """(B, n N, heads, D) -> (n, B, G, heads / G N, D), contiguous: the rows of a segment and a kv head together."""
    B, T, heads, D = x.shape
    x = x.reshape(B, T // segment, segment, G, heads // G, D).permute(1, 0, 3, 4, 2, 5)
    return x.reshape(T // segment, B, G, heads // G * segment, D)


def _memory_ref(q, k, v, local, beta, M, z, docs, segment, delta):
    """The meaning of the memory: q, k un-rotated, local = A_dot -> (out, M, z). A loop over segments, nothing Tq x Tk."""
    (B, Tq, H, D), (_, Tk, G, _), acc = q.shape, k.shape, M.dtype
    S, first = Tk // segment, (Tk - Tq) // segment
    sk, vs = (_segments(x[:, :S * segment].to(acc), segment, G) for x in (k, v))
    sk = skw = _sigma(sk)
    if docs is not None:
        carry, writes, reads = _ownership(docs, segment)
        carry = carry.T[:, :, None, None].to(acc)
        skw = sk * _segments(writes[..., None, None].to(acc), segment, 1)
    Ms, zs = [M], [z]
    for s_k, s_w, dM, dz in zip(sk.unbind(), skw.unbind(), (skw.mT @ vs).unbind(), skw.sum(-2).unbind()):
        if docs is not None:
            M, z = M * carry[len(Ms) - 1, ..., None], z * carry[len(Ms) - 1]
        if delta:
            dM = dM - s_w.mT @ _retrieve(s_k, M, z)
        M, z = M + dM, z + dz
        Ms.append(M), zs.append(z)
    before = Tk - Tq - first * segment  # rows of the first segment that ask nothing
    sq = _sigma(_segments(F.pad(q.to(acc), (0, 0, 0, 0, before, -Tk % segment)), segment, G))
    states = slice(first, first + sq.shape[0])
    read = _retrieve(sq, torch.stack(Ms[states]), torch.stack(zs[states])) if len(sq) else sq
    read = read.view(len(sq), B, G, H // G, segment, D).permute(1, 0, 4, 2, 3, 5).reshape(B, -1, H, D)
    read = read[:, before:before + Tq]
    if docs is not None:
        read = read * reads[:, Tk - Tq:, None, None]
    gate = beta.to(acc).sigmoid()[:, None]
    return (gate * read + (1 - gate) * local.to(acc)).to(q.dtype), M, z


# ----------------------------------------------------------------------------------------------------------------------
# public function

def _validate(q, k, v, beta, q_rot, k_rot, segment, rule, state, docs):
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"infini_attention: q is {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: "
                         "q must be (B, Tq, H, D), k and v (B, Tk, G, D)")
    (B, Tq, H, D), (_, Tk, G, _) = q.shape, k.shape
    if q_rot.shape != q.shape or k_rot.shape != k.shape:
        raise ValueError(f"infini_attention: q_rot is {tuple(q_rot.shape)} and k_rot {tuple(k_rot.shape)}, they must be like "
                         f"q {tuple(q.shape)} and k {tuple(k.shape)}")
    if not q.dtype == k.dtype == v.dtype == q_rot.dtype == k_rot.dtype:
        raise ValueError("infini_attention: q, k, v, q_rot, k_rot are "
                         f"{', '.join(str(x.dtype) for x in (q, k, v, q_rot, k_rot))}: they must be equal")
    if H % G:
        raise ValueError(f"infini_attention: {H} query heads are not a multiple of {G} key/value heads")
    if D > 256:
        raise ValueError(f"infini_attention: head dim {D} is more than 256")
    if Tq > Tk:
        raise ValueError(f"infini_attention: {Tq} queries are more than {Tk} keys: they are the last rows of these")
    if beta.shape != (H,):
        raise ValueError(f"infini_attention: beta is {tuple(beta.shape)}, it must be one per query head, ({H},)")
    if segment < 1:
        raise ValueError(f"infini_attention: segment is {segment}, it must be at least 1 token")
    if rule not in ("delta", "linear"):
        raise ValueError(f"infini_attention: rule {rule!r} is unknown, it must be 'delta' or 'linear'")
    if state is not None and tuple(x.shape for x in state) != ((B, G, D, D), (B, G, D)):
        raise ValueError(f"infini_attention: state is {', '.join(str(tuple(x.shape)) for x in state)}, it must be "
                         f"M {(B, G, D, D)} and z {(B, G, D)}")
    if docs is not None and (docs.shape != (B, Tk) or docs.is_floating_point()):
        raise ValueError(f"infini_attention: docs are {docs.dtype} {tuple(docs.shape)}, they must be integers {(B, Tk)}")


def infini_attention(q, k, v, beta, *, q_rot, k_rot, segment, rule="delta", state=None, docs=None, scale=None,
                     alibi_slopes=None):
    """
    Attention inside segments and a compressive memory of the segments before, mixed by a learned gate -> (out like q,
    (M, z)). Infini-attention, Munkhdalai et al., arXiv 2404.07143.

    k, v (B, Tk, G, D) start at a segment boundary: key j is in segment j // segment. q (B, Tq, H, D), H a multiple of G,
    D <= 256, are the last Tq of the Tk rows: all of them in training, fewer where a stream goes on inside a segment whose
    keys come again. q and k, un-rotated, go to the memory; q_rot and k_rot, like them and rotated, to causal attention
    inside each segment, with `scale` (default 1/sqrt(D)) and alibi_slopes (H,) as in `attention`. beta (H,):
    out = sigmoid(beta) A_mem + (1 - sigmoid(beta)) A_dot. rule: "delta" writes only what the memory does not yet
    return for a key, "linear" adds.

    state = (M (B, G, D, D), z (B, G, D)), float32 (float64 for float64): the memory before the first key; None is empty, and
    reads of an empty memory are 0. Returned: the memory after all whole segments of this call. The tokens of a trailing
    partial segment are attended to, not yet written.

    docs (B, Tk) int, ids below 2^31: attention and memory stay inside a document. Segments lie as without documents; after
    each the memory is that of the document of its last token, for which an incoming state is the first key's.

    Differentiable once in q, k, v, q_rot, k_rot, beta and the state, also through the returned one. ValueError on sizes
    that do not fit.
    """
    _validate(q, k, v, beta, q_rot, k_rot, segment, rule, state, docs)
    (B, Tq, H, D), (_, Tk, G, _), acc = q.shape, k.shape, torch.promote_types(q.dtype, torch.float32)
    M, z = (x.to(acc) for x in state) if state is not None else (q.new_zeros(B, G, *n, dtype=acc) for n in ((D, D), (D,)))
    docs = docs if Tk else None
    places = (torch.arange(Tk, device=q.device) // segment).expand(B, Tk)
    if docs is not None:
        places = docs * (Tk // segment + 1) + places
    if docs is None and Tq == Tk and not Tk % segment:
        split = (x.reshape(-1, segment, *x.shape[2:]) for x in (q_rot, k_rot, v))
        local = attention(*split, scale=scale, alibi_slopes=alibi_slopes).reshape(q.shape)
    else:
        local = attention(q_rot, k_rot, v, scale=scale, alibi_slopes=alibi_slopes, q_start=Tk - Tq,
                          q_docs=places[:, Tk - Tq:], k_docs=places)
    out, M, z = _memory_ref(q, k, v, local, beta, M, z, docs, segment, rule == "delta")
    return out, (M, z)
