"""reasonvec in NumPy: the specification that runs.

Every number that the Rust core writes is defined here, in the shortest form that is still exact.
Read it to learn what a kernel does; run it to check one, because the tests ask that the core gives
the same bits.

- `formats`: bit patterns to values and back, with one rounding
- `update`: the vector between two checkpoints, and the update of a third
- `measures`: sums in a fixed order, and what is measured with them
- `philox`: random numbers; `elementary`: the functions that they and some merges take
- `controls`: what a vector must beat before its direction gets the credit
- `encodings`: how a vector lies in its file, and digests
- `linear_merges`: methods with constant coefficients, and how any merge is rounded
- `gram_merges`: methods whose coefficients come from the products of the models
- `mask_merges`: methods that choose element by element
- `lowrank`: what an adapter adds, and low-rank tensors
- `spectral_merges`: methods that work on singular vectors
- `spectral`: leading and trailing triplets, noise floors
"""

from reasonvec.reference.controls import *  # noqa: F403
from reasonvec.reference.encodings import *  # noqa: F403
from reasonvec.reference.formats import *  # noqa: F403
from reasonvec.reference.gram_merges import *  # noqa: F403
from reasonvec.reference.linear_merges import *  # noqa: F403
from reasonvec.reference.lowrank import *  # noqa: F403
from reasonvec.reference.mask_merges import *  # noqa: F403
from reasonvec.reference.measures import *  # noqa: F403
from reasonvec.reference.philox import *  # noqa: F403
from reasonvec.reference.spectral import *  # noqa: F403
from reasonvec.reference.spectral_merges import *  # noqa: F403
from reasonvec.reference.update import *  # noqa: F403
