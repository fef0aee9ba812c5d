//! The digest of a tensor: a hash of the hashes of its blocks.
//!
//! Blocks of [`BLOCK`](crate::stream::BLOCK) elements are hashed while they are in cache, by whichever thread has them, and the digest is the
//! hash of their hashes in order, so it can be made in the same pass as the arithmetic.

use serde::{Deserialize, Serialize};

use super::checkpoint::TensorView;
use super::map::Pool;
use crate::Result;
use crate::stream::BLOCK;

/// The hash function.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Algorithm {
    /// No digests (to measure what they cost).
    #[serde(rename = "none")]
    None,
    /// XXH3-128, seed 0: detects damage.
    #[serde(rename = "xxh3-128")]
    Xxh3,
    /// BLAKE3: detects forgery too.
    #[serde(rename = "blake3")]
    Blake3,
}

/// The hash of one block; unused bytes are zero.
pub type BlockHash = [u8; 32];

impl Algorithm {
    /// Bytes of a hash.
    pub fn size(self) -> usize {
        match self {
            Self::None => 0,
            Self::Xxh3 => 16,
            Self::Blake3 => 32,
        }
    }

    /// The hash of some bytes.
    pub fn hash(self, bytes: &[u8]) -> BlockHash {
        let mut hash = [0u8; 32];
        match self {
            Self::None => {}
            Self::Xxh3 => hash[..16].copy_from_slice(&twox_hash::XxHash3_128::oneshot(bytes).to_be_bytes()),
            Self::Blake3 => hash = *blake3::hash(bytes).as_bytes(),
        }
        hash
    }

    /// The digest made of block hashes, in lower-case hexadecimal; `None` when digests are off.
    pub fn digest(self, blocks: &[BlockHash]) -> Option<String> {
        if self == Self::None {
            return None;
        }
        let joined: Vec<u8> = blocks.iter().flat_map(|h| &h[..self.size()]).copied().collect();
        Some(self.hash(&joined)[..self.size()].iter().map(|b| format!("{b:02x}")).collect())
    }

    /// The digest of some bytes that are all in memory.
    pub fn digest_bytes(self, bytes: &[u8], item_size: usize) -> Option<String> {
        let blocks: Vec<_> = bytes.chunks(BLOCK as usize * item_size).map(|b| self.hash(b)).collect();
        self.digest(&blocks)
    }

    /// The digest of a tensor on disk.
    ///
    /// # Errors
    /// [`crate::Error::Io`] if it cannot be read.
    pub fn digest_tensor(self, tensor: &TensorView, pool: &Pool) -> Result<Option<String>> {
        let n = tensor.elements();
        let mut blocks = Vec::with_capacity(n.div_ceil(BLOCK) as usize);
        let mut at = 0;
        while at < n {
            let end = (at + BLOCK).min(n);
            blocks.push(self.hash(&tensor.window(at..end, pool)?));
            at = end;
        }
        Ok(self.digest(&blocks))
    }
}

/// The digest of bytes that come piece by piece.
pub struct Stream {
    algorithm: Algorithm,
    block: usize,
    filled: usize,
    state: State,
    blocks: Vec<BlockHash>,
}

enum State {
    None,
    Xxh3(Box<twox_hash::xxhash3_128::Hasher>),
    Blake3(Box<blake3::Hasher>),
}

impl Stream {
    /// A digest of items of some size.
    pub fn new(algorithm: Algorithm, item_size: usize) -> Self {
        let state = State::new(algorithm);
        Self { algorithm, block: BLOCK as usize * item_size, filled: 0, state, blocks: Vec::new() }
    }

    /// Takes in the next bytes.
    pub fn update(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(self.block - self.filled));
            match &mut self.state {
                State::None => {}
                State::Xxh3(h) => h.write(now),
                State::Blake3(h) => {
                    h.update(now);
                }
            }
            self.filled += now.len();
            bytes = later;
            if self.filled == self.block {
                self.close();
            }
        }
    }

    fn close(&mut self) {
        let mut hash = [0u8; 32];
        match std::mem::replace(&mut self.state, State::new(self.algorithm)) {
            State::None => {}
            State::Xxh3(h) => hash[..16].copy_from_slice(&h.finish_128().to_be_bytes()),
            State::Blake3(h) => hash = *h.finalize().as_bytes(),
        }
        self.blocks.push(hash);
        self.filled = 0;
    }

    /// The digest of everything.
    pub fn finish(mut self) -> Option<String> {
        if self.filled > 0 {
            self.close();
        }
        self.algorithm.digest(&self.blocks)
    }
}

impl State {
    fn new(algorithm: Algorithm) -> Self {
        match algorithm {
            Algorithm::None => Self::None,
            Algorithm::Xxh3 => Self::Xxh3(Box::default()),
            Algorithm::Blake3 => Self::Blake3(Box::default()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_give_the_digest_of_the_whole() {
        let bytes: Vec<u8> = (0..2 * BLOCK as usize + 77).map(|i| (i * 31 % 251) as u8).collect();
        for algorithm in [Algorithm::Xxh3, Algorithm::Blake3] {
            for item in [1, 2] {
                for piece in [1000, 65536, bytes.len()] {
                    let mut stream = Stream::new(algorithm, item);
                    bytes.chunks(piece).for_each(|p| stream.update(p));
                    assert_eq!(stream.finish(), algorithm.digest_bytes(&bytes, item));
                }
            }
            assert_eq!(Stream::new(algorithm, 1).finish(), algorithm.digest_bytes(&[], 1));
        }
    }
}
