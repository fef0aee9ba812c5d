"""reasonvec in NumPy: the specification that runs.

Every number that the Rust core writes is defined here, in the shortest form that is still exact.
Read it to learn what a kernel does; run it to check one, because the tests ask that the core gives
the same bits.

- `vectors`: formats, update and rounding, sums, digests, random numbers, controls, extraction,
  encodings, statistics
- `linear_merges`: methods with constant coefficients, and how any merge is rounded
- `gram_merges`: methods whose coefficients come from the products of the models
- `mask_merges`: methods that choose element by element
- `lowrank`: what an adapter adds, and low-rank tensors
- `spectral_merges`: methods that work on singular vectors
- `spectral`: leading and trailing triplets, noise floors
"""

from reasonvec.reference.gram_merges import *  # noqa: F403
from reasonvec.reference.linear_merges import *  # noqa: F403
from reasonvec.reference.lowrank import *  # noqa: F403
from reasonvec.reference.mask_merges import *  # noqa: F403
from reasonvec.reference.spectral import *  # noqa: F403
from reasonvec.reference.spectral_merges import *  # noqa: F403
from reasonvec.reference.vectors import *  # noqa: F403
