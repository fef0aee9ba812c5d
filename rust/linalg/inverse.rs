//! The smallest eigenpairs of a symmetric positive matrix in memory: block Krylov iteration on its shifted inverse.
//!
//! A full eigendecomposition of a matrix of thousands of rows is bound by memory (its reduction goes through the whole matrix once a column), while a
//! Cholesky factorisation is made of products, and a few dozen eigenpairs need a few dozen solves with it.

use std::sync::{Mutex, PoisonError};

use super::dense::{
    add_lower, add_product, cholesky, cross, invert_triangle, orthonormalise, pack, packed, share, transpose,
};
use super::eigen::symmetric_until;
use super::whole;
use crate::philox::Philox;
use crate::simd::{Level, dispatch};
use crate::stream::Control;
use crate::{Error, Result};

/// Rows of a block of the factorisation.
const NB: usize = 96;
/// Columns of a packed strip.
const STRIP: usize = 16;
/// Blocks of the Krylov space before it starts again from what it found: a longer one pays more for its own small eigenproblem.
const LENGTH: usize = 6;
/// Cycles before the whole problem is solved instead.
const CYCLES: usize = 24;
/// The angle at which a vector lies in the span.
const CLOSE: f64 = 1e-11;

/// `a - shift = l l^T`: `l` below the diagonal, `l^T` above it, and of the blocks on the diagonal the inverses.
struct Factor {
    n: usize,
    both: Vec<f64>,
    inverses: Vec<Vec<f64>>,
}

impl Factor {
    /// Nothing if the shifted matrix is not positive.
    fn new(level: Level, threads: usize, a: &[f64], n: usize, shift: f64, control: &Control) -> Result<Option<Self>> {
        let mut both = a.to_vec();
        (0..n).for_each(|i| both[i * n + i] -= shift);
        let mut inverses = Vec::with_capacity(n.div_ceil(NB));
        for from in (0..n).step_by(NB) {
            if control.cancelled() {
                return Err(Error::Cancelled);
            }
            let size = NB.min(n - from);
            let mut block = vec![0.0; size * size];
            for i in 0..size {
                block[i * size..(i + 1) * size].copy_from_slice(&both[(from + i) * n + from..][..size]);
            }
            // `r` is the transposed factor; the inverse of the factor itself is the transposed inverse of `r`.
            let Some(r) = cholesky(&block, size, 1e-15) else { return Ok(None) };
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
                let mut across = vec![0.0; rest * size];
                transpose(&column, &mut across, rest, size);
                let mut strips = packed(rest, size);
                pack(threads, &mut strips, &across, rest, -1.0);
                let (above, under) = both.split_at_mut(below * n);
                for (k, row) in across.chunks_exact(rest).enumerate() {
                    above[(from + k) * n + below..][..rest].copy_from_slice(row);
                }
                for (row, under) in column.chunks_exact(size).zip(under.chunks_exact_mut(n)) {
                    under[from..][..size].copy_from_slice(row);
                }
                add_lower(level, threads, &mut under[below..], n, &column, &strips, size);
            }
            inverses.push(inverse);
        }
        Ok(Some(Self { n, both, inverses }))
    }

    /// `(a - shift)^-1 x` for `n x b`, some columns apart.
    fn solve(&self, level: Level, threads: usize, x: &[f64], b: usize) -> Vec<f64> {
        let n = self.n;
        // As many columns together as leave work for every thread: the factor is read once for all of them.
        let wide = b.div_ceil(threads.max(1)).next_multiple_of(STRIP);
        let strips: Vec<Mutex<Vec<f64>>> = (0..b)
            .step_by(wide)
            .map(|from| {
                let width = wide.min(b - from);
                Mutex::new(x.chunks_exact(b).flat_map(|row| &row[from..from + width]).copied().collect())
            })
            .collect();
        share(threads, strips.len(), |s| {
            let mut y = strips[s].lock().unwrap_or_else(PoisonError::into_inner);
            let width = y.len() / n;
            for (i, inverse) in self.inverses.iter().enumerate() {
                self.step(level, &mut y, width, i, inverse, 0..i * NB);
            }
            for (i, inverse) in self.inverses.iter().enumerate().rev() {
                let size = inverse.len().isqrt();
                let mut across = vec![0.0; size * size];
                transpose(inverse, &mut across, size, size);
                self.step(level, &mut y, width, i, &across, i * NB + size..n);
            }
        });
        let mut out = vec![0.0; n * b];
        for (s, strip) in strips.into_iter().enumerate() {
            let strip = strip.into_inner().unwrap_or_else(PoisonError::into_inner);
            let width = strip.len() / n;
            for (into, from) in out.chunks_exact_mut(b).zip(strip.chunks_exact(width)) {
                into[s * wide..][..width].copy_from_slice(from);
            }
        }
        out
    }

    /// One block of a substitution: what the solved rows take from it, then the block on the diagonal.
    fn step(&self, level: Level, y: &mut [f64], width: usize, i: usize, by: &[f64], solved: std::ops::Range<usize>) {
        const RUN: usize = 256;
        let (n, from) = (self.n, i * NB);
        let size = NB.min(n - from);
        let mut sums = vec![0.0; size * width];
        for k in solved.clone().step_by(RUN) {
            let depth = RUN.min(solved.end - k);
            let (a, b) = (&self.both[from * n + k..], &y[k * width..]);
            dispatch::multiply(level, &mut sums, a, b, [width, n, width], [size, depth, width], level.tall());
        }
        let block = &mut y[from * width..(from + size) * width];
        for (s, y) in sums.iter_mut().zip(&*block) {
            *s = *y - *s;
        }
        block.fill(0.0);
        dispatch::multiply(level, block, by, &sums, [width, size, width], [size, size, width], level.tall());
    }
}

/// What a cycle of the iteration found: the largest eigenvalues of the inverse, descending, their vectors as columns, and of each wanted one how far
/// its image leaves the span of all of them.
struct Found {
    values: Vec<f64>,
    vectors: Vec<f64>,
    leaks: Vec<f64>,
}

/// How many vectors are looked for where `r` are wanted.
pub(super) fn wider(r: usize) -> usize {
    (r + r.clamp(16, 64)).next_multiple_of(STRIP)
}

/// How many vectors a cycle holds, and whether the whole problem is solved instead: there is no room for a space that converges, or it is small.
pub(super) fn memory(n: usize, r: usize) -> (u64, bool) {
    let b = wider(r.max(1));
    // Both of each block, what is found, and copies that are made orthonormal and solved for.
    ((2 * LENGTH * b + 7 * b) as u64, n < (LENGTH + 2) * b || n < 640)
}

/// Vectors whose span has those of the `r` smallest eigenvalues, as orthonormal columns, and how many they are: more than `r`, because what
/// lies next to the span decides how exactly the matrix itself tells them apart.
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
) -> Result<(Vec<f64>, usize)> {
    let r = r.max(1);
    let b = wider(r);
    let everything = |a: &[f64]| {
        let (_, vectors) = symmetric_until(a, n, &|| control.cancelled()).ok_or(Error::Cancelled)?;
        let b = b.min(n);
        let mut columns = vec![0.0; n * b];
        transpose(&vectors[(n - b) * n..], &mut columns, b, n);
        Ok((columns, b))
    };
    if memory(n, r).1 {
        return everything(a);
    }
    let trace: f64 = (0..n).map(|i| a[i * n + i]).sum();
    // Far enough below zero that rounding makes no pivot negative, and no eigenvalue of the inverse so large that it blurs the others.
    let mut shift = -1e-12 * trace;
    let mut block = vec![0.0; n * b];
    dispatch::normal(level, &mut block, fresh, 0, 1.0);
    let mut factor = None;
    for _ in 0..6 {
        factor = Factor::new(level, threads, a, n, shift, control)?;
        if factor.is_some() {
            break;
        }
        shift *= 16.0;
    }
    let Some(mut factor) = factor else { return everything(a) };
    // The angle after the last cycle, and what a block takes from its logarithm.
    let (mut last, mut pace) = (1.0, -0.1);
    for cycle in 0..CYCLES {
        // The first one is short: it says where to put the shift. So is the last one, which has little left to do.
        let wanted = ((CLOSE / last).ln() / pace).ceil().clamp(2.0, LENGTH as f64);
        let length = if cycle == 0 { LENGTH / 2 } else { wanted as usize };
        let found = iterate(level, threads, &factor, block, b, r, length, fresh, control)?;
        let at = |i: usize| shift + 1.0 / found.values[i];
        // The angle between a wanted vector and the span. Where many eigenvalues are one (zero, for a matrix of low rank) any vectors of theirs will do.
        let gap = (found.values[r - 1] - found.values[b - 1]).max(1e-3 * found.values[r - 1]);
        let worst = found.leaks.iter().fold(0.0f64, |m, &x| m.max(x)) / gap;
        // Rounding may leave it at a little more.
        if worst <= CLOSE || (worst <= 1e2 * CLOSE && worst > 0.3 * last) {
            return Ok((found.vectors, b));
        }
        pace = ((worst / last).ln() / length as f64).min(-0.1);
        last = worst;
        let spread = at(r - 1) - at(0);
        block = found.vectors;
        // Where eigenvalues crowd together away from zero, a shift close below them pulls their inverses apart.
        if cycle == 0 && at(0) - shift > 0.5 * spread {
            let mut below = 0.25;
            for _ in 0..5 {
                let next = at(0) - below * spread;
                if next <= shift {
                    break;
                }
                if let Some(better) = Factor::new(level, threads, a, n, next, control)? {
                    factor = better;
                    shift = next;
                    (last, pace) = (1.0, -0.1);
                    break;
                }
                below *= 2.5;
            }
        }
    }
    everything(a)
}

/// One cycle of block Lanczos with full orthogonalisation: the space of `length` blocks of `b`, and of it the `b` vectors of the largest eigenvalues.
#[allow(clippy::too_many_arguments, reason = "an iteration is what it starts from and how it ends")]
fn iterate(
    level: Level,
    threads: usize,
    factor: &Factor,
    start: Vec<f64>,
    b: usize,
    r: usize,
    length: usize,
    fresh: Philox,
    control: &Control,
) -> Result<Found> {
    let n = factor.n;
    let (mut v, mut w): (Vec<Vec<f64>>, Vec<Vec<f64>>) = (vec![], vec![]);
    let mut block = start;
    let k = b * length;
    let mut t = vec![0.0; k * k];
    for i in 0..length {
        if control.cancelled() {
            return Err(Error::Cancelled);
        }
        orthonormalise(level, threads, &mut block, b, &v, fresh);
        let solved = factor.solve(level, threads, &block, b);
        v.push(block);
        for (j, v) in v.iter().enumerate() {
            let c = cross(level, threads, v, b, &solved, b);
            for x in 0..b {
                for y in 0..b {
                    let both = (j * b + x, i * b + y);
                    t[both.0 * k + both.1] = c[x * b + y];
                    t[both.1 * k + both.0] = c[x * b + y];
                }
            }
        }
        block = solved.clone();
        w.push(solved);
    }
    let (mut values, vectors) = whole::symmetric(level, threads, t, k);
    values.truncate(b);
    let mut x = vec![0.0; k * b];
    transpose(&vectors[..b * k], &mut x, b, k);
    let (mut ritz, mut image) = (vec![0.0; n * b], vec![0.0; n * b]);
    for ((v, w), x) in v.iter().zip(&w).zip(x.chunks_exact(b * b)) {
        add_product(level, threads, &mut ritz, v, b, x, b);
        add_product(level, threads, &mut image, w, b, x, b);
    }
    let mut inside = cross(level, threads, &ritz, b, &image, b);
    inside.iter_mut().for_each(|x| *x = -*x);
    add_product(level, threads, &mut image, &ritz, b, &inside, b);
    let mut leaks = vec![0.0; r];
    for row in image.chunks_exact(b) {
        leaks.iter_mut().zip(row).for_each(|(s, x)| *s += x * x);
    }
    leaks.iter_mut().for_each(|s| *s = s.sqrt());
    Ok(Found { values, vectors: ritz, leaks })
}
