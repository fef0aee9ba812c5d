//! The grid. Blocks are fixed, counted from the start of each tensor: sums and digests are made of them. Tiles are whole numbers of blocks, as many as
//! the budget allows: what a worker takes at a time. No output depends on tiles.

use std::ops::Range;

/// Elements of a block.
pub const BLOCK: u64 = 1 << 18;

/// A run of whole blocks of one tensor (the tensor's last block may be short).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tile {
    /// Which tensor.
    pub tensor: usize,
    /// Which elements.
    pub elements: Range<u64>,
}

/// Every tile of a list of tensors, in order, without holding them.
#[derive(Debug)]
pub struct Grid {
    per_tile: u64,
    lengths: Vec<u64>,
    /// Tiles before each tensor, and the total.
    starts: Vec<usize>,
}

impl Grid {
    /// The grid over tensors of these lengths. A tensor without elements has one empty tile, so that it is visited too.
    pub fn new(lengths: Vec<u64>, blocks_per_tile: u64) -> Self {
        let per_tile = blocks_per_tile.max(1) * BLOCK;
        let mut starts = vec![0];
        let mut total = 0;
        for n in &lengths {
            total += n.div_ceil(per_tile).max(1) as usize;
            starts.push(total);
        }
        Self { per_tile, lengths, starts }
    }

    /// Number of tiles.
    pub fn len(&self) -> usize {
        self.starts[self.lengths.len()]
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Tiles of one tensor.
    pub fn tiles_of(&self, tensor: usize) -> usize {
        self.starts[tensor + 1] - self.starts[tensor]
    }

    /// The tile of a number.
    pub fn tile(&self, i: usize) -> Tile {
        let tensor = self.starts.partition_point(|&s| s <= i) - 1;
        let start = (i - self.starts[tensor]) as u64 * self.per_tile;
        Tile { tensor, elements: start..(start + self.per_tile).min(self.lengths[tensor]) }
    }
}

impl Tile {
    /// Its blocks, as (number, elements).
    pub fn blocks(&self) -> impl Iterator<Item = (u64, Range<u64>)> + use<> {
        let (start, end) = (self.elements.start, self.elements.end);
        (start / BLOCK..end.div_ceil(BLOCK)).map(move |b| (b, b * BLOCK..((b + 1) * BLOCK).min(end)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn tiles_cover_every_element_once(lengths in prop::collection::vec(0u64..3_000_000, 1..6), k in 1u64..5) {
            let grid = Grid::new(lengths.clone(), k);
            let mut at = vec![0u64; lengths.len()];
            for i in 0..grid.len() {
                let tile = grid.tile(i);
                prop_assert_eq!(tile.elements.start, at[tile.tensor]);
                let in_blocks: u64 = tile.blocks().map(|(_, r)| r.end - r.start).sum();
                prop_assert_eq!(in_blocks, tile.elements.end - tile.elements.start);
                at[tile.tensor] = tile.elements.end;
            }
            prop_assert_eq!(at, lengths);
        }
    }
}
