//! Merging: one file per family, each family one streaming schedule.
//!
//! [`prepare`] lays an output out, [`output`] writes it, and a family says how a tile is made.

mod gram;
pub mod linear;
mod mask;
pub mod method;
pub mod output;
mod points;
pub mod prepare;
mod rows;
mod spectral;

pub use method::{MethodPlan, Rescale};
pub use output::{Done, apply};
pub use prepare::{ApplyPlan, Prediction, ShardPlan, TensorPlan, predict};
