//! reasonvec: capabilities of language models as vectors in weight space.
//!
//! The map of the floors. A module may use what is on its own floor or below it, never above.
//!
//! | floor | modules | subject |
//! | --- | --- | --- |
//! | 0 | [`error`], [`dtype`], [`bf16`], [`philox`] | numbers: formats, exact widening, one rounding, random numbers |
//! | 1 | [`simd`] | lanes: one body per operation, stamped for every instruction set |
//! | 2 | [`store`] | bytes on disk: maps, headers, checkpoints, writers, journals, digests |
//! | 3 | [`stream`] | one pass over a fixed grid inside a fixed budget |
//! | 4 | [`operand`], [`product`] | what can stand in an expression: a tensor, a difference, a stored vector, a product of factors, a control |
//! | 4 | [`linalg`] | matrices that are read and never held: leading and trailing singular triplets |
//! | 5 | [`vector`], [`plan`], [`merge`], [`inspect`] | the subject |
//! | 6 | `python` | the door |

pub mod bf16;
pub mod dtype;
pub mod error;
pub mod inspect;
pub mod linalg;
pub mod merge;
pub mod operand;
pub mod philox;
pub mod plan;
pub mod product;
pub mod simd;
pub mod store;
pub mod stream;
pub mod vector;

#[cfg(feature = "python")]
mod python;

pub use error::{Error, Result};
