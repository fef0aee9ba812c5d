//! The smallest eigenpairs of a symmetric positive matrix in memory: block Krylov iteration on its shifted inverse.
//!
//! A full eigendecomposition of a matrix of thousands of rows is bound by memory (its reduction goes through the whole matrix once a column), while a
//! Cholesky factorisation is made of products, and a few dozen eigenpairs need a few dozen solves with it.

use std::sync::{Mutex, PoisonError};

use super::dense::{add_product, cholesky, cross, invert_triangle, orthonormalise, share, transpose};
use super::eigen::symmetric;
use crate::philox::Philox;
use crate::simd::{Level, dispatch};
use crate::stream::Control;
use crate::{Error, Result};

/// Rows of a block of the factorisation.
const NB: usize = 96;
/// Columns that are solved together, and of a packed strip.
const STRIP: usize = 16;
/// Blocks of the Krylov space before it starts again from what it found.
const LONGEST: usize = 24;

/// `a - shift = l l^T`: `l` below the diagonal, `l^T` above it, and of the blocks on the diagonal the inverses.
struct Factor {
    n: usize,
    both: Vec<f64>,
    inverses: Vec<Vec<f64>>,
}

impl Factor {
    /// Nothing if the shifted matrix is not positive.
    fn new(level: Level, threads: usize, a: &[f64], n: usize, shift: f64) -> Option<Self> {
        let mut both = a.to_vec();
        (0..n).for_each(|i| both[i * n + i] -= shift);
        let mut inverses = Vec::with_capacity(n.div_ceil(NB));
        for from in (0..n).step_by(NB) {
            let size = NB.min(n - from);
            let mut block = vec![0.0; size * size];
            for i in 0..size {
                block[i * size..(i + 1) * size].copy_from_slice(&both[(from + i) * n + from..][..size]);
            }
            // `r` is the transposed factor; the inverse of the factor itself is the transposed inverse of `r`.
            let r = cholesky(&block, size, 1e-15)?;
            let upper = invert_triangle(&r, size);
            let mut inverse = vec![0.0; size * size];
            transpose(&upper, &mut inverse, size, size);
            let below = from + size;
            let rest = n - below;
            if rest > 0 {
                // The rows below: a inverse(l)^T = a inverse(r); then what they take from the rest of the matrix.
                let mut column = vec![0.0; rest * size];
                let slots: Vec<Mutex<&mut [f64]>> = column.chunks_mut(NB * size).map(Mutex::new).collect();
                share(threads, slots.len(), |i| {
                    let mut slot = slots[i].lock().unwrap_or_else(PoisonError::into_inner);
                    let rows = slot.len() / size;
                    let a = &both[(below + i * NB) * n + from..];
                    dispatch::multiply(level, &mut slot, a, &upper, [size, n, size], [rows, size, size], level.tall());
                });
                drop(slots);
                let strips = rest.div_ceil(STRIP);
                let mut packed = vec![0.0; strips * STRIP * size];
                for (i, row) in column.chunks_exact(size).enumerate() {
                    let strip = &mut packed[i / STRIP * STRIP * size..];
                    strip.iter_mut().skip(i % STRIP).step_by(STRIP).zip(row).for_each(|(o, &x)| *o = -x);
                }
                let (above, under) = both.split_at_mut(below * n);
                for (i, row) in column.chunks_exact(size).enumerate() {
                    under[i * n + from..][..size].copy_from_slice(row);
                    for (k, &x) in row.iter().enumerate() {
                        above[(from + k) * n + below + i] = x;
                    }
                }
                let slots: Vec<Mutex<&mut [f64]>> = under.chunks_mut(NB * n).map(Mutex::new).collect();
                share(threads, slots.len(), |i| {
                    let i = slots.len() - 1 - i;
                    let mut slot = slots[i].lock().unwrap_or_else(PoisonError::into_inner);
                    let rows = slot.len() / n;
                    for strip in 0..(i * NB + rows).div_ceil(STRIP) {
                        let width = STRIP.min(rest - strip * STRIP);
                        let into = &mut slot[below + strip * STRIP..];
                        let (a, b) = (&column[i * NB * size..], &packed[strip * STRIP * size..]);
                        dispatch::multiply(level, into, a, b, [n, size, STRIP], [rows, size, width], level.tall());
                    }
                });
            }
            inverses.push(inverse);
        }
        Some(Self { n, both, inverses })
    }

    /// `(a - shift)^-1 x` for `n x b`, strips of columns apart.
    fn solve(&self, level: Level, threads: usize, x: &[f64], b: usize) -> Vec<f64> {
        let n = self.n;
        let strips: Vec<Mutex<Vec<f64>>> = (0..b.div_ceil(STRIP))
            .map(|s| {
                let width = STRIP.min(b - s * STRIP);
                let mut strip = vec![0.0; n * STRIP];
                for (into, from) in strip.chunks_exact_mut(STRIP).zip(x.chunks_exact(b)) {
                    into[..width].copy_from_slice(&from[s * STRIP..][..width]);
                }
                Mutex::new(strip)
            })
            .collect();
        share(threads, strips.len(), |s| {
            let mut y = strips[s].lock().unwrap_or_else(PoisonError::into_inner);
            for (i, inverse) in self.inverses.iter().enumerate() {
                self.step(level, &mut y, i, inverse, 0..i * NB, false);
            }
            for (i, inverse) in self.inverses.iter().enumerate().rev() {
                self.step(level, &mut y, i, inverse, ((i + 1) * NB).min(n)..n, true);
            }
        });
        let mut out = vec![0.0; n * b];
        for (s, strip) in strips.into_iter().enumerate() {
            let strip = strip.into_inner().unwrap_or_else(PoisonError::into_inner);
            let width = STRIP.min(b - s * STRIP);
            for (into, from) in out.chunks_exact_mut(b).zip(strip.chunks_exact(STRIP)) {
                into[s * STRIP..][..width].copy_from_slice(&from[..width]);
            }
        }
        out
    }

    /// One block of a substitution: what the solved rows take from it, then the block on the diagonal.
    fn step(
        &self,
        level: Level,
        y: &mut [f64],
        i: usize,
        inverse: &[f64],
        solved: std::ops::Range<usize>,
        turned: bool,
    ) {
        const RUN: usize = 256;
        let (n, from) = (self.n, i * NB);
        let size = NB.min(n - from);
        let mut sums = vec![0.0; size * STRIP];
        for k in solved.clone().step_by(RUN) {
            let depth = RUN.min(solved.end - k);
            let a = &self.both[from * n + k..];
            let b = &y[k * STRIP..];
            dispatch::multiply(level, &mut sums, a, b, [STRIP, n, STRIP], [size, depth, STRIP], level.tall());
        }
        let block = &mut y[from * STRIP..(from + size) * STRIP];
        for (s, y) in sums.iter_mut().zip(&*block) {
            *s = *y - *s;
        }
        block.fill(0.0);
        let mut across;
        let by = if turned {
            across = vec![0.0; size * size];
            transpose(inverse, &mut across, size, size);
            &across
        } else {
            inverse
        };
        dispatch::multiply(level, block, by, &sums, [STRIP, size, STRIP], [size, size, STRIP], level.tall());
    }
}

/// What a run of the iteration found: eigenvalues of the inverse, descending, their vectors as columns, and the norms of their residuals.
struct Found {
    values: Vec<f64>,
    vectors: Vec<f64>,
    residuals: Vec<f64>,
    count: usize,
}

/// Vectors of the `r` smallest eigenvalues, as columns (`n x r`), the smallest last.
///
/// # Errors
/// [`Error::Cancelled`].
pub(super) fn smallest(
    level: Level,
    threads: usize,
    a: &[f64],
    n: usize,
    r: usize,
    fresh: Philox,
    control: &Control,
) -> Result<Vec<f64>> {
    let b = (r + r / 2).next_multiple_of(STRIP);
    let whole = |a: &[f64]| {
        let (_, vectors) = symmetric(a, n);
        let mut columns = vec![0.0; n * r];
        transpose(&vectors[(n - r) * n..], &mut columns, r, n);
        columns
    };
    // Room for a space that converges; else the whole problem is small.
    if n < 10 * b || n < 640 {
        return Ok(whole(a));
    }
    let trace: f64 = (0..n).map(|i| a[i * n + i]).sum();
    // Eigenvalues below what rounding makes of zero cannot be told from it.
    let mut shift = -1e-14 * trace;
    let mut start = vec![0.0; n * b];
    dispatch::normal(level, &mut start, fresh, 0, 1.0);
    let mut factor = None;
    for _ in 0..6 {
        factor = Factor::new(level, threads, a, n, shift);
        if factor.is_some() {
            break;
        }
        shift *= 16.0;
    }
    let Some(mut factor) = factor else { return Ok(whole(a)) };
    for moved in 0..8 {
        // The first look is short: it says where to put the shift.
        let length = if moved == 0 { 3 } else { LONGEST.min(n / (2 * b)) };
        let found = iterate(level, threads, &factor, &start, b, r, length, fresh, control)?;
        let at = |i: usize| shift + 1.0 / found.values[i];
        // Close enough that neighbours outside do not turn the vectors, as far as f64 can tell.
        let gap = found.values[r - 1] - found.values[r];
        let worst = found.residuals[..r].iter().fold(0.0f64, |m, &x| m.max(x));
        let least = 4.0 * f64::EPSILON * found.values[0];
        let done = worst <= (1e-12 * gap).max(least);
        if done || (moved > 1 && found.residuals[..r].iter().all(|&x| x <= 1e-9 * gap)) {
            let mut out = vec![0.0; n * r];
            for (into, from) in out.chunks_exact_mut(r).zip(found.vectors.chunks_exact(found.count)) {
                into.iter_mut().zip(from[..r].iter().rev()).for_each(|(o, &x)| *o = x);
            }
            return Ok(out);
        }
        let spread = at(r - 1) - at(0);
        start = vec![0.0; n * b];
        for (into, from) in start.chunks_exact_mut(b).zip(found.vectors.chunks_exact(found.count)) {
            into.copy_from_slice(&from[..b]);
        }
        // Where eigenvalues crowd together away from zero, a shift close below them pulls their inverses apart.
        if moved == 0 && at(0) - shift > 0.5 * spread {
            let mut below = 0.25;
            for _ in 0..5 {
                let next = at(0) - below * spread;
                if next <= shift {
                    break;
                }
                if let Some(better) = Factor::new(level, threads, a, n, next) {
                    factor = better;
                    shift = next;
                    break;
                }
                below *= 2.5;
            }
        }
    }
    Ok(whole(a))
}

/// The block Lanczos iteration with full orthogonalisation, `length` blocks at most; it stops when the first `r` vectors are as exact as they get.
#[allow(clippy::too_many_arguments, reason = "an iteration is what it starts from and how it ends")]
fn iterate(
    level: Level,
    threads: usize,
    factor: &Factor,
    start: &[f64],
    b: usize,
    r: usize,
    length: usize,
    fresh: Philox,
    control: &Control,
) -> Result<Found> {
    let n = factor.n;
    let (mut v, mut w): (Vec<Vec<f64>>, Vec<Vec<f64>>) = (vec![], vec![]);
    let mut block = start.to_vec();
    let mut t: Vec<f64> = vec![];
    for i in 0..length {
        if control.cancelled() {
            return Err(Error::Cancelled);
        }
        orthonormalise(level, threads, &mut block, b, &v, fresh);
        let solved = factor.solve(level, threads, &block, b);
        v.push(block);
        w.push(solved);
        let k = b * (i + 1);
        // One more block of rows and columns of v^T w.
        let mut grown = vec![0.0; k * k];
        for (into, from) in grown.chunks_exact_mut(k).zip(t.chunks_exact((k - b).max(1))) {
            into[..k - b].copy_from_slice(from);
        }
        for (j, v) in v.iter().enumerate() {
            let c = cross(level, threads, v, b, &w[i], b);
            for x in 0..b {
                for y in 0..b {
                    let both = (j * b + x, i * b + y);
                    grown[both.0 * k + both.1] = c[x * b + y];
                    grown[both.1 * k + both.0] = c[x * b + y];
                }
            }
        }
        t = grown;
        let last = i + 1 == length;
        // The eigenproblem of the whole space grows with it: not at every step.
        if !last && (i < 5 || i % 3 != 2) {
            block = w[i].clone();
            continue;
        }
        let (values, vectors) = symmetric(&t, k);
        let count = b.min(k);
        let mut x = vec![0.0; k * count];
        transpose(&vectors[..count * k], &mut x, count, k);
        let (mut ritz, mut image) = (vec![0.0; n * count], vec![0.0; n * count]);
        for (j, (v, w)) in v.iter().zip(&w).enumerate() {
            add_product(level, threads, &mut ritz, v, b, &x[j * b * count..(j + 1) * b * count], count);
            add_product(level, threads, &mut image, w, b, &x[j * b * count..(j + 1) * b * count], count);
        }
        let mut squares = vec![0.0; count];
        for (ritz, image) in ritz.chunks_exact(count).zip(image.chunks_exact(count)) {
            for (((s, &value), &x), &y) in squares.iter_mut().zip(&values).zip(ritz).zip(image) {
                *s += (y - value * x) * (y - value * x);
            }
        }
        let residuals: Vec<f64> = squares.iter().map(|s| s.sqrt()).collect();
        let gap = values[r - 1] - values[r];
        let worst = residuals[..r].iter().fold(0.0f64, |m, &x| m.max(x));
        if last || worst <= (1e-12 * gap).max(4.0 * f64::EPSILON * values[0]) {
            return Ok(Found { values, vectors: ritz, residuals, count });
        }
        block = w[i].clone();
    }
    Err(Error::Usage("no length".into()))
}
