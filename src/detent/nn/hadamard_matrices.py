"""Hadamard matrices: square matrices of +1 and -1 whose rows are orthogonal, ``H H^T = n I`` exactly.

Three constructions give matrices of a single order; Kronecker products of those, with [[1, 1], [1, -1]] for every
factor of two, give the rest:

* Paley I: order q + 1 for a prime power q with q = 3 mod 4;
* Paley II: order 2 (q + 1) for a prime power q with q = 1 mod 4;
* Goethals-Seidel: order 4 n from four sequences of length n whose periodic autocorrelations add up to zero (Goethals
  and Seidel, "A skew Hadamard matrix of order 36", 1970). The sequences in `_SEQUENCES` are unions of orbits of a
  subgroup of the units modulo n; an exhaustive search over such unions, in order, found them within seconds.

Of the orders below 500 that are multiples of 4, only 188, 236, 268, 324, 356, 376, 404, 412,
428, 436, 452 and 472 are not reached.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache

import torch
from torch import Tensor

from detent.errors import DetentError

#: n: (generator of the subgroup of the units modulo n; for each of four sequences one element of every orbit that is
#: -1).
_SEQUENCES: dict[int, tuple[int, tuple[tuple[int, ...], ...]]] = {
    23: (22, ((2, 4, 7, 9, 10), (1, 2, 5, 6, 7, 9, 11), (1, 7, 8, 9, 11), (1, 2, 3, 11))),
    29: (28, ((1, 3, 5, 6, 8, 11, 14), (1, 3, 4, 5, 6, 11, 12, 14), (5, 6, 9, 10, 11, 13), (1, 2, 3, 7, 14))),
    39: (29, ((1, 3, 6, 13, 21), (3, 4, 6, 7, 13), (2, 3, 4, 6, 21), (2, 3, 12, 13))),
    43: (4, ((1, 6, 7), (1, 3, 7), (3, 7, 9), (2, 3, 6, 7))),
    65: (
        9,
        (
            (2, 4, 5, 11, 12, 13, 26),
            (3, 5, 10, 11, 12, 20, 26),
            (2, 3, 4, 7, 10, 11, 13, 20),
            (3, 5, 6, 10, 11, 12, 13, 26, 35),
        ),
    ),
    73: (2, ((1, 3, 9, 13), (5, 9, 11, 13), (1, 3, 5, 13, 25), (1, 3, 5, 9))),
    93: (
        2,
        (
            (3, 5, 9, 11, 15, 23, 31, 33),
            (3, 7, 9, 11, 21, 23, 33),
            (1, 3, 5, 11, 31, 45),
            (5, 7, 9, 15, 17, 21, 31, 33),
        ),
    ),
    119: (2, ((1, 7, 13, 17), (7, 11, 13, 17, 21), (1, 3, 17, 21, 51), (1, 3, 7, 17, 21))),
}


@lru_cache(maxsize=1024)
def hadamard_factors(order: int) -> tuple[int, ...] | None:
    """Orders whose matrices' Kronecker product has order `order`: constructed ones first, then powers of two up to 64.

    The factorization with the smallest sum, which is what a transform costs for each element; ``(1,)`` for order 1.
    None where no construction of this module reaches the order.
    """
    if order < 1:
        raise DetentError(f"a Hadamard matrix has a positive order, not {order}")
    twos = (order & -order).bit_length() - 1
    odd = _odd_factors(order >> twos, twos)
    if odd is None:
        return None
    twos -= sum((f & -f).bit_length() - 1 for f in odd)
    parts = max(1, -(-twos // 6)) if twos else 0
    powers = tuple(2 ** (twos // parts + (i < twos % parts)) for i in range(parts))
    return (*odd, *powers) or (1,)


@lru_cache(maxsize=1024)
def largest_block(width: int) -> int:
    """The largest divisor of `width` that has a Hadamard matrix; `width` itself where it has one. At least 1."""
    twos = width & -width
    odd = width // twos
    blocks = [d * twos for d in range(1, odd + 1) if odd % d == 0]
    return next(block for block in reversed(blocks) if hadamard_factors(block) is not None)


def hadamard_matrix(order: int) -> Tensor:
    """A Hadamard matrix, int8 [order, order] of +1 and -1.

    For powers of two it is Sylvester's, which is symmetric; others need not be.

    Raises:
        DetentError: no construction of this module reaches the order.
    """
    return _product([_single(factor) for factor in _factors(order)])


def first_column(order: int) -> Tensor:
    """The first column of `hadamard_matrix`, int8 [order], without the rest of it."""
    return _product([_single(factor)[:, :1] for factor in _factors(order)]).flatten()


def _factors(order: int) -> tuple[int, ...]:
    factors = hadamard_factors(order)
    if factors is None:
        raise DetentError(
            f"no Hadamard matrix of order {order} is known to Detent; the largest for blocks of it has order"
            f" {largest_block(order)}"
        )
    return factors


def _product(matrices: list[Tensor]) -> Tensor:
    product = torch.ones(1, 1, dtype=torch.int8)
    for matrix in matrices:
        product = torch.kron(product, matrix)
    return product


# ---- factorization --------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def _odd_factors(odd: int, twos: int) -> tuple[int, ...] | None:
    """Constructed orders whose product is `odd` times at most 2^twos, with the smallest sum; () for 1."""
    if odd == 1:
        return ()
    best: tuple[int, ...] | None = None
    for divisor in (d for d in range(3, odd + 1, 2) if odd % d == 0):
        for used in range(2, twos + 1):
            order = divisor << used
            if not _is_constructed(order):
                continue
            rest = _odd_factors(odd // divisor, twos - used)
            if rest is not None and (best is None or order + sum(rest) < sum(best)):
                best = (order, *rest)
            break  # more factors of two in this one only cost more
    return best


def _is_constructed(order: int) -> bool:
    """Whether Paley's or Goethals and Seidel's construction gives a matrix of exactly this order."""
    return _paley_one(order) or _paley_two(order) or (order % 4 == 0 and order // 4 in _SEQUENCES)


def _paley_one(order: int) -> bool:
    return order % 4 == 0 and _prime_power(order - 1) is not None


def _paley_two(order: int) -> bool:
    q = order // 2 - 1
    return order % 4 == 0 and q % 4 == 1 and _prime_power(q) is not None


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with q = p^k and p prime, or None."""
    if q < 2:
        return None
    p = next((d for d in range(2, math.isqrt(q) + 1) if q % d == 0), q)
    k = 0
    while q % p == 0:
        q, k = q // p, k + 1
    return (p, k) if q == 1 else None


@lru_cache(maxsize=64)
def _single(order: int) -> Tensor:
    if order & (order - 1) == 0:
        return _sylvester(order)
    if order % 4 == 0 and order // 4 in _SEQUENCES:
        return _goethals_seidel(order // 4)
    return _paley(order - 1, skew=True) if _paley_one(order) else _paley(order // 2 - 1, skew=False)


# ---- constructions --------------------------------------------------------------------------------------------------


def _sylvester(order: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.int8)
    while len(matrix) < order:
        matrix = torch.kron(torch.tensor([[1, 1], [1, -1]], dtype=torch.int8), matrix)
    return matrix


def _paley(q: int, *, skew: bool) -> Tensor:
    """Paley I (`skew`) of order q + 1, or Paley II of order 2 (q + 1).

    Both border the matrix chi(a - b) over GF(q), chi being 1 for squares, -1 for other elements and 0 for 0. It is
    antisymmetric for q = 3 mod 4 and symmetric for q = 1 mod 4.
    """
    border = torch.ones(q, dtype=torch.int8)
    core = torch.zeros(q + 1, q + 1, dtype=torch.int8)
    core[0, 1:], core[1:, 0], core[1:, 1:] = border, -border if skew else border, _quadratic_characters(q)
    identity = torch.eye(q + 1, dtype=torch.int8)
    if skew:
        return core + identity
    plus = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    minus = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    return torch.kron(core, plus) + torch.kron(identity, minus)


def _quadratic_characters(q: int) -> Tensor:
    """chi(a - b) for all elements a, b of GF(q), int8 [q, q]."""
    powers = _generator_powers(q)
    p, k = _prime_power(q)  # type: ignore[misc]
    chi = torch.zeros(q, dtype=torch.int8)
    chi[powers[0::2]], chi[powers[1::2]] = 1, -1  # even powers of a generator are the squares
    digits = torch.arange(q)[:, None] // p ** torch.arange(k) % p
    difference = (digits[:, None] - digits[None]) % p
    return chi[(difference * p ** torch.arange(k)).sum(-1)]


def _generator_powers(q: int) -> list[int]:
    """1, g, g^2, ... of a generator g of GF(q)*, an element being the number with its coefficients as base-p digits.

    g is a root of a polynomial x^k - (c_{k-1} x^{k-1} + ... + c_0) over GF(p); the first one under which the powers of
    x pass through all q - 1 elements is taken, which also makes the polynomial irreducible.
    """
    p, k = _prime_power(q)  # type: ignore[misc]
    one = (1, *([0] * (k - 1)))
    for coefficients in itertools.product(range(p), repeat=k):
        element, powers = one, []
        for _ in range(q - 1):
            powers.append(sum(c * p**i for i, c in enumerate(element)))
            shifted = (0, *element[:-1])
            element = tuple((s + element[-1] * c) % p for s, c in zip(shifted, coefficients, strict=True))
            if element == one:
                break
        if element == one and len(powers) == q - 1:
            return powers
    raise DetentError(f"there is no field of {q} elements")


def _goethals_seidel(n: int) -> Tensor:
    """The array of Goethals and Seidel on four circulant matrices."""
    generator, sequences = _SEQUENCES[n]
    shift = (torch.arange(n)[None] - torch.arange(n)[:, None]) % n
    a, b, c, d = (_sequence(n, generator, chosen)[shift] for chosen in sequences)
    b, c, d = b.flip(1), c.flip(1), d.flip(1)  # X R of the paper; with circulant X, (X^T R) = (X R) turned by R
    bt, ct, dt = (x.flip(0).flip(1) for x in (b, c, d))
    rows = ((a, b, c, d), (-b, a, -dt, ct), (-c, dt, a, -bt), (-d, -ct, bt, a))
    return torch.cat([torch.cat(row, 1) for row in rows])


def _sequence(n: int, generator: int, chosen: tuple[int, ...]) -> Tensor:
    """+1 and, on the orbits of the chosen elements under multiplication with `generator`, -1."""
    sequence = torch.ones(n, dtype=torch.int8)
    for element in chosen:
        start = element
        while True:
            sequence[element] = -1
            element = element * generator % n
            if element == start:
                break
    return sequence
