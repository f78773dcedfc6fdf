"""Many small least-squares problems with coefficients that must not be negative, solved at once."""

import numpy as np

CHOICES = ([0, 1, 2], [1, 2], [0, 1], [0, 2])  # the terms that are not 0


def nonnegative(terms: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least squares (problems, points, 3) → coefficients ≥ 0 (problems, 3) and squared errors (problems,).

    The best of the solutions without a negative coefficient in which all three terms take part, or all but one, of
    which the second or the third is left; error inf where there is none.
    """
    found = np.zeros((len(terms), 3))
    errors = np.full(len(terms), np.inf)
    for kept in CHOICES:
        part = terms[:, :, kept]
        gram = np.einsum("pik,pil->pkl", part, part) + 1e-12 * np.eye(len(kept))
        solution = np.linalg.solve(gram, np.einsum("pik,i->pk", part, target)[..., None])[..., 0]
        error = np.square(np.einsum("pik,pk->pi", part, solution) - target).sum(1)
        better = (solution >= 0).all(1) & (error < errors)
        found[better] = 0.0
        found[np.ix_(better, kept)] = solution[better]
        errors[better] = error[better]
    return found, errors
