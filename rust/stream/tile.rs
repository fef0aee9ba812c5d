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
    lanes: Vec<Lane>,
}

/// Tensors whose tiles come one after the other, in turns with those of other lanes.
#[derive(Debug, Default)]
struct Lane {
    tensors: Vec<usize>,
    /// Tiles before each of them, and behind the last.
    starts: Vec<usize>,
}

impl Lane {
    fn tiles(&self) -> usize {
        self.starts.last().copied().unwrap_or(0)
    }
}

impl Grid {
    /// The grid over tensors of these lengths. A tensor without elements has one empty tile, so that it is visited too.
    pub fn new(lengths: Vec<u64>, blocks_per_tile: u64) -> Self {
        Self::in_lanes(lengths, blocks_per_tile, |_| 0)
    }

    /// [`new`](Self::new), with the tensors in lanes whose tiles take turns, so that workers are on different ones.
    pub fn in_lanes(lengths: Vec<u64>, blocks_per_tile: u64, lane: impl Fn(usize) -> usize) -> Self {
        let per_tile = blocks_per_tile.max(1) * BLOCK;
        let mut grid = Self { per_tile, lengths, lanes: Vec::new() };
        for tensor in 0..grid.lengths.len() {
            let lane = lane(tensor);
            if lane >= grid.lanes.len() {
                grid.lanes.resize_with(lane + 1, || Lane { tensors: Vec::new(), starts: vec![0] });
            }
            let tiles = grid.tiles_of(tensor);
            let lane = &mut grid.lanes[lane];
            lane.starts.push(lane.tiles() + tiles);
            lane.tensors.push(tensor);
        }
        grid
    }

    /// Number of tiles.
    pub fn len(&self) -> usize {
        self.lanes.iter().map(Lane::tiles).sum()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Tiles of one tensor.
    pub fn tiles_of(&self, tensor: usize) -> usize {
        self.lengths[tensor].div_ceil(self.per_tile).max(1) as usize
    }

    /// The tile of a number.
    pub fn tile(&self, i: usize) -> Tile {
        let (lane, i) = self.place(i);
        let k = lane.starts.partition_point(|&s| s <= i) - 1;
        let (tensor, start) = (lane.tensors[k], (i - lane.starts[k]) as u64 * self.per_tile);
        Tile { tensor, elements: start..(start + self.per_tile).min(self.lengths[tensor]) }
    }

    /// A tile's lane, and which of its tiles it is. Lanes take turns for as long as they have tiles.
    fn place(&self, mut i: usize) -> (&Lane, usize) {
        let mut turns = 0;
        loop {
            let going = || self.lanes.iter().filter(|lane| lane.tiles() > turns);
            let shortest = going().map(Lane::tiles).min().expect("a number below len()");
            let tiles = (shortest - turns) * going().count();
            if let (true, Some(lane)) = (i < tiles, going().nth(i % going().count().max(1))) {
                return (lane, turns + i / going().count());
            }
            i -= tiles;
            turns = shortest;
        }
    }
}

impl Tile {
    /// Its blocks, as tiles; one that is empty if it is.
    pub fn split(&self) -> impl Iterator<Item = Tile> + use<> {
        let Self { tensor, elements: Range { start, end } } = *self;
        let blocks = (end - start).div_ceil(BLOCK).max(1);
        (0..blocks).map(move |b| start + b * BLOCK).map(move |at| Tile { tensor, elements: at..(at + BLOCK).min(end) })
    }

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

        #[test]
        fn lanes_take_turns_and_leave_nothing_out(tensors in prop::collection::vec((0u64..3_000_000, 0usize..4), 1..8)) {
            let grid = Grid::in_lanes(tensors.iter().map(|t| t.0).collect(), 1, |i| tensors[i].1);
            let mut at = vec![0u64; tensors.len()];
            let mut lanes: [Vec<usize>; 4] = Default::default();
            for i in 0..grid.len() {
                let tile = grid.tile(i);
                prop_assert_eq!(tile.elements.start, at[tile.tensor]);
                at[tile.tensor] = tile.elements.end;
                lanes[tensors[tile.tensor].1].push(i);
            }
            prop_assert_eq!(at, tensors.iter().map(|t| t.0).collect::<Vec<_>>());
            for lane in &lanes {
                // Between two of its tiles every other lane that goes on has one.
                prop_assert!(lane.windows(2).all(|w| w[1] - w[0] <= 4));
            }
        }
    }
}
