//! The low-rank encoding: `u`, `s` and `v` of a matrix that is `u @ diag(s) @ v`, or of each matrix of a stack, never multiplied out on disk.
//!
//! `s` stands by itself, in f64: a spectrum can be read without the factors, a rank cut without arithmetic, and the factors of a LoRA are kept bit
//! for bit, with its scale as every weight.

use super::format::Row;
use crate::bf16::Element;
use crate::dtype::Dtype;
use crate::product::Product;
use crate::store::{Checkpoint, TensorView};
use crate::{Error, Result};

/// The parts, in the order of their bytes.
pub const ROLES: [&str; 3] = ["u", "s", "v"];

/// A product from its parts as they are stored: `u` of [rows, rank], `s` of [rank], `v` of [rank, columns], each with the number of matrices
/// before that for a stack. Problems come without the path.
///
/// # Errors
/// [`Error::Usage`] for parts that do not fit each other or `shape`; [`Error::Io`].
pub fn product([u, s, v]: [TensorView; 3], shape: &[u64]) -> Result<Product> {
    let bad = |problem: String| Error::Usage(problem);
    let (matrices, rows, columns) = match *shape {
        [rows, columns] => (None, rows, columns),
        [matrices, rows, columns] => (Some(matrices), rows, columns),
        _ => return Err(bad(format!("the shape {shape:?} is no matrix, and only matrices have factors"))),
    };
    let rank = rank(&s);
    let expected: Vec<u64> = matrices.into_iter().chain([rank]).collect();
    if s.dtype() != Dtype::F64 || s.entry.shape != expected || rank == 0 || rank > rows.min(columns) {
        return Err(bad(format!(
            "expected s of 1 to {} F64{}, found {} {:?}",
            rows.min(columns),
            matrices.map_or(String::new(), |n| format!(" for each of {n} matrices")),
            s.dtype(),
            s.entry.shape
        )));
    }
    let weights: Vec<f64> = s.read()?.chunks_exact(8).map(f64::load).collect();
    if let Some(i) = weights.iter().position(|w| !w.is_finite()) {
        return Err(bad(format!("s holds {} at {i}", weights[i])));
    }
    match matrices {
        None => Product::new(u, Some(v), false, weights, 1.0, shape).map_err(bad),
        Some(_) => Product::stack(u, v, weights, shape).map_err(bad),
    }
}

/// How many triplets each matrix has.
pub(super) fn rank(s: &TensorView) -> u64 {
    s.entry.shape.last().copied().unwrap_or(0)
}

/// The product of a row of a manifest.
pub(super) fn open(row: &Row, data: &Checkpoint) -> Result<Product> {
    let bad = |problem: &str| Error::Usage(problem.to_owned());
    let part = |role: &str| match row.parts.get(role) {
        Some(part) => data.tensor(&part.entry),
        None => Err(Error::Usage(format!("a low-rank tensor needs the part {role:?}"))),
    };
    if row.parts.keys().any(|role| !ROLES.contains(&role.as_str()) && role != "padding") || row.wide != 0 {
        return Err(bad("a low-rank tensor has the parts u, s and v, and no second parts"));
    }
    let [u, s, v] = [part("u")?, part("s")?, part("v")?];
    if row.rank != Some(rank(&s)) {
        return Err(Error::Usage(format!("the row says rank {:?}, s has {}", row.rank, rank(&s))));
    }
    product([u, s, v], &row.shape)
}
