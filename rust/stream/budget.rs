//! Who may hold how many bytes.

/// The memory that a pass may take, and how it is shared out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// Workers that run.
    pub threads: usize,
    /// Blocks of a tile.
    pub blocks_per_tile: u64,
    /// The most bytes that all workers together hold.
    pub bytes: u64,
}

impl Budget {
    /// Shares `limit` bytes among at most `threads` workers, each of which holds `fixed` bytes and `per_block` for every block of its tile,
    /// which has `longest` at most.
    ///
    /// Fewer workers run where the limit has no room for all. One worker with one block always runs: the answer says what that takes.
    pub fn share(limit: u64, threads: usize, fixed: u64, per_block: u64, longest: u64) -> Self {
        let least = fixed + per_block;
        let threads = (limit / least.max(1)).clamp(1, threads.max(1) as u64);
        let room = (limit / threads).saturating_sub(fixed);
        let blocks = (room / per_block.max(1)).clamp(1, longest);
        Self { threads: threads as usize, blocks_per_tile: blocks, bytes: threads * (fixed + blocks * per_block) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_limit_holds_whenever_one_worker_fits(limit in 1u64..1 << 32, threads in 1usize..64, fixed in 0u64..1 << 22, block in 1u64..1 << 24, longest in 1u64..9) {
            let b = Budget::share(limit, threads, fixed, block, longest);
            prop_assert!(b.threads >= 1 && b.threads <= threads && b.blocks_per_tile >= 1 && b.blocks_per_tile <= longest);
            prop_assert!(b.bytes <= limit || (b.threads == 1 && b.blocks_per_tile == 1));
        }
    }
}
