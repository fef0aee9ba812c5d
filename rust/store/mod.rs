//! Bytes on disk: read-only windows, headers, checkpoints; pre-laid-out writers, journals and digests.

pub mod buffer;
pub mod checkpoint;
pub mod digest;
pub mod header;
pub mod journal;
pub mod map;
#[cfg(target_os = "linux")]
mod mapping;
pub mod writer;

pub use checkpoint::{Checkpoint, TensorView};
pub use digest::Algorithm;
pub use map::{FileMap, Pool, Window};
