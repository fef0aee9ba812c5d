//! Merging: one file per family, each family one streaming schedule (design section 6).
//!
//! [`prepare`] lays an output out, [`output`] writes it, and a family says how a tile is made.

pub mod linear;
pub mod output;
pub mod prepare;

pub use output::{Done, apply};
pub use prepare::{ApplyPlan, Prediction, ShardPlan, TensorPlan, predict};
