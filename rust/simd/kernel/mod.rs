//! The bodies: what is computed, once, for every format and every instruction set.
//!
//! Kernels borrow and never allocate. They run over at most [`MICRO`] elements at a time, so that everything they touch stays
//! in the first-level cache, and because the order of the sums is part of the result (see [`dot`]).
//!
//! One loop does one simple thing: that is what compilers turn into vector code, and what comes from the first-level cache costs nothing.

mod linear;
mod mask;
mod matrix;
mod measure;
mod moved;
mod panels;
mod random;
mod ranks;
mod softmax;

pub use linear::*;
pub use mask::*;
pub use matrix::*;
pub use measure::*;
pub use moved::*;
pub use panels::*;
pub use random::*;
pub use ranks::*;
pub use softmax::*;

use crate::bf16::{Element, Work};

/// Elements that one call handles, and the unit in which sums are made.
pub const MICRO: usize = 4096;

/// Partial sums.
pub const LANES: usize = 16;

/// Elements that they take at a time.
const GROUP: usize = 4 * LANES;

/// The last group, filled up with zeros, whose products change no sum.
#[inline(always)]
fn filled<W: Work>(values: &[W]) -> [W; GROUP] {
    let mut group = [W::ZERO; GROUP];
    group[..values.len()].copy_from_slice(values);
    group
}

#[inline(always)]
fn elements<E: Element>(bytes: &[u8]) -> impl Iterator<Item = E> + '_ {
    bytes.chunks_exact(E::SIZE).map(E::load)
}
