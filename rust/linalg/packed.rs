//! Products of matrices that the caches do not hold: one factor is packed into strips, the other is taken in stripes of rows.
//!
//! Sums run over the depth in pieces of [`DEPTH`], joined in order, whatever the number of threads.

use std::sync::{Mutex, PoisonError};

use super::dense::{share, transpose};
use crate::simd::{Level, dispatch};

/// Columns of a strip: those of a register tile.
const STRIP: usize = 16;
/// Products that are summed before sums are joined: a strip of so many rows stays in the first-level cache.
const DEPTH: usize = 256;
/// Rows of the result that a thread takes.
const STRIPE: usize = 96;

/// A `depth x columns` matrix, strip by strip.
#[derive(Debug)]
pub(crate) struct Packed {
    depth: usize,
    columns: usize,
    strips: Vec<f64>,
}

impl Packed {
    /// Packs `b`, row by row, of `depth x columns`.
    pub(crate) fn new(b: &[f64], depth: usize, columns: usize) -> Self {
        let mut strips = vec![0.0; columns.div_ceil(STRIP) * STRIP * depth];
        for (k, row) in b.chunks_exact(columns.max(1)).take(depth).enumerate() {
            for (s, part) in row.chunks(STRIP).enumerate() {
                strips[(s * depth + k) * STRIP..][..part.len()].copy_from_slice(part);
            }
        }
        Self { depth, columns, strips }
    }
}

/// `into += a b` for `a` of `rows x depth`; with `lower`, nothing is made of what lies right of the diagonal's stripe.
pub(crate) fn add(level: Level, threads: usize, into: &mut [f64], a: &[f64], b: &Packed, lower: bool) {
    let Packed { depth, columns, ref strips } = *b;
    if depth == 0 || columns == 0 {
        return;
    }
    let threads = if into.len() * depth < 1 << 20 { 1 } else { threads };
    let slots: Vec<Mutex<&mut [f64]>> = into.chunks_mut(STRIPE * columns).map(Mutex::new).collect();
    share(threads, slots.len(), |i| {
        // The longest stripes first, where they differ.
        let i = slots.len() - 1 - i;
        let mut slot = slots[i].lock().unwrap_or_else(PoisonError::into_inner);
        let rows = slot.len() / columns;
        let end = if lower { (i * STRIPE + rows).min(columns) } else { columns };
        for from in (0..depth).step_by(DEPTH) {
            let deep = DEPTH.min(depth - from);
            let a = &a[i * STRIPE * depth + from..];
            for s in 0..end.div_ceil(STRIP) {
                let width = STRIP.min(columns - s * STRIP);
                let b = &strips[(s * depth + from) * STRIP..];
                let into = &mut slot[s * STRIP..];
                dispatch::multiply(level, into, a, b, [columns, depth, STRIP], [rows, deep, width], level.tall());
            }
        }
    });
}

/// `a b`, of `rows x depth` and `depth x columns`.
pub(crate) fn product(
    level: Level,
    threads: usize,
    a: &[f64],
    b: &[f64],
    [rows, depth, columns]: [usize; 3],
) -> Vec<f64> {
    let mut into = vec![0.0; rows * columns];
    add(level, threads, &mut into, a, &Packed::new(b, depth, columns), false);
    into
}

/// `into += a^T b` for `a` of `depth x p` and `b` of `depth x q`; of a symmetric result (`lower`) the half below the diagonal.
pub(crate) fn add_cross(
    level: Level,
    threads: usize,
    into: &mut [f64],
    (a, p): (&[f64], usize),
    (b, q): (&[f64], usize),
    lower: bool,
) {
    let depth = a.len() / p.max(1);
    let mut left = vec![0.0; a.len()];
    transpose(a, &mut left, depth, p);
    add(level, threads, into, &left, &Packed::new(b, depth, q), lower);
}

/// Copies what is below the diagonal above it.
pub(crate) fn mirror(values: &mut [f64], n: usize) {
    for i in 0..n {
        for j in i + 1..n {
            values[i * n + j] = values[j * n + i];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::philox::Philox;

    fn random(count: usize, seed: u64) -> Vec<f64> {
        let mut values = vec![0.0; count];
        dispatch::normal(Level::portable(), &mut values, Philox::new(seed, "p", 1), 0, 1.0);
        values
    }

    #[test]
    fn products_are_products_at_every_level_and_thread_count() {
        for [rows, depth, columns] in [[1, 1, 1], [5, 300, 17], [200, 31, 230], [97, 513, 16]] {
            let (a, b) = (random(rows * depth, 1), random(depth * columns, 2));
            let first = product(Level::portable(), 1, &a, &b, [rows, depth, columns]);
            for (e, x) in first.iter().enumerate() {
                let (i, j) = (e / columns, e % columns);
                let wanted: f64 = (0..depth).map(|k| a[i * depth + k] * b[k * columns + j]).sum();
                assert!((x - wanted).abs() < 1e-11 * depth as f64);
            }
            for level in Level::available() {
                assert_eq!(product(level, 3, &a, &b, [rows, depth, columns]), first);
            }
        }
    }

    #[test]
    fn half_a_symmetric_product_is_the_whole() {
        let (depth, n) = (70, 210);
        let a = random(depth * n, 3);
        let level = Level::portable();
        let (mut whole, mut half) = (vec![0.0; n * n], vec![0.0; n * n]);
        add_cross(level, 1, &mut whole, (&a, n), (&a, n), false);
        add_cross(level, 2, &mut half, (&a, n), (&a, n), true);
        mirror(&mut half, n);
        assert_eq!(half, whole);
    }
}
