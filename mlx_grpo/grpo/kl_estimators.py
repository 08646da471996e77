"""Estimators of the KL to the reference from sampled tokens: k1, unbiased and noisy, and k3, never
negative (J. Schulman, "Approximating KL divergence", 2020).
"""

import mlx.core as mx


def kl_k1(logp_KT: mx.array, ref_logp_KT: mx.array, mask_KT: mx.array) -> mx.array:
    """Unbiased KL estimate of each completion in nats per token, [K]: mean_t(logp - ref_logp).

    Source: J. Schulman, "Approximating KL divergence" (2020), estimator k1.
    """
    return ((logp_KT - ref_logp_KT) * mask_KT).sum(axis=-1) / mx.maximum(mask_KT.sum(axis=-1), 1)


def kl_k3_sum(logp_KT: mx.array, ref_logp_KT: mx.array, mask_KT: mx.array) -> mx.array:
    """Sum over tokens of exp(-d) - 1 + d, d = logp - ref_logp: k3 of the same source.

    Never negative and far less noisy than k1.
    Divide by the number of tokens for nats per token.
    """
    d_KT = (logp_KT - ref_logp_KT) * mask_KT
    return (mx.expm1(-d_KT) + d_KT).sum()
