//! A vector as a folder: its format, its encodings, reading and making it.

pub mod assembly;
pub mod encode;
pub mod extract;
pub mod format;
pub mod lowrank;
mod moved;
pub mod sparse;
pub mod stored;
pub mod wide;

pub use extract::extract;
pub use format::{Encoding, Row, VectorFolder};
