"""Whether checkpoints fit together, from their headers and small JSON files alone.

Two questions: may two donors be subtracted (`donors`), and where does each tensor of the difference
go in a target (`alignment`). Both answer with every problem at once. How far apart the points are
takes reading them, and is asked by `reasonvec.check`."""
