//! The Gram matrix of a matrix's smaller side, in f64: what the range finder cannot give, trailing triplets and whole spectra.

use std::sync::{Mutex, PoisonError};

use super::dense::{add_product, share, transpose};
use super::eigen::symmetric;
use super::panel::{self, Scratch};
use super::rsvd::{Sweep, exactly};
use super::{Exact, Matrix, Triplets, inverse};
use crate::philox::Philox;
use crate::plan::Settings;
use crate::simd::dispatch;
use crate::stream::Control;
use crate::{Error, Result};

/// Rows (or columns) of the larger side that are multiplied before sums are joined.
const DEPTH: usize = 192;
/// Rows of the Gram matrix that a thread takes.
const STRIPE: usize = 96;
/// Columns of a packed strip.
const STRIP: usize = 16;

/// The use of a seed for the first vectors of the iteration.
const FRESH: u64 = 20;

/// A Gram matrix, `n x n`, and the matrix's sum of squares.
#[derive(Debug)]
pub(super) struct Gram {
    pub(super) n: usize,
    pub(super) values: Vec<f64>,
    pub(super) squares: f64,
}

/// Reads the matrix once and gathers `A^T A`, or `A A^T` of a matrix with fewer rows than columns.
pub(super) fn gather(sweep: &Sweep<'_>) -> Result<Gram> {
    let matrix = sweep.matrix;
    let (n, long) = (matrix.small(), matrix.rows.max(matrix.columns));
    let by_rows = matrix.columns <= matrix.rows;
    let threads = sweep.settings.threads();
    let strips = n.div_ceil(STRIP);
    let mut values = vec![0.0; n * n];
    let (mut left, mut right) = (vec![0.0; n * DEPTH], vec![0.0; strips * STRIP * DEPTH]);
    let mut squares = 0.0;
    let level = sweep.level;
    sweep.control.expect(matrix.bytes());
    for from in (0..long).step_by(DEPTH) {
        if sweep.control.cancelled() {
            return Err(Error::Cancelled);
        }
        let depth = DEPTH.min(long - from);
        // Both layouts of the piece: rows of `left` are sides, strips of `right` are packed.
        let error: Mutex<Option<(usize, Error)>> = Mutex::new(None);
        let fail = |at: usize, e: Error| {
            let mut first = error.lock().unwrap_or_else(PoisonError::into_inner);
            if first.as_ref().is_none_or(|(i, _)| at < *i) {
                *first = Some((at, e));
            }
        };
        if by_rows {
            let mut piece = vec![0.0; depth * n];
            let parts = depth.div_ceil(24);
            let sums: Vec<Mutex<f64>> = (0..parts).map(|_| Mutex::new(0.0)).collect();
            {
                let slots: Vec<Mutex<&mut [f64]>> = piece.chunks_mut(24 * n).map(Mutex::new).collect();
                share(threads, slots.len(), |i| {
                    let mut slot = slots[i].lock().unwrap_or_else(PoisonError::into_inner);
                    let mut scratch: (Scratch<f32>, Scratch<f64>) = Default::default();
                    let rows = from + i * 24..from + i * 24 + slot.len() / n;
                    let read =
                        panel::read_double(matrix, level, rows.clone(), &mut scratch, &mut Vec::new(), &mut slot);
                    match read {
                        Ok(s) => *sums[i].lock().unwrap_or_else(PoisonError::into_inner) = s,
                        Err(e) => fail(i, e),
                    }
                    if let Some(signs) = sweep.signs() {
                        dispatch::flip(level, &mut slot, signs, matrix.start + (rows.start * n) as u64);
                    }
                });
            }
            squares += sums.into_iter().map(|s| s.into_inner().unwrap_or_else(PoisonError::into_inner)).sum::<f64>();
            transpose(&piece, &mut left[..n * depth], depth, n);
        } else {
            let slots: Vec<Mutex<&mut [f64]>> = left[..n * depth].chunks_mut(STRIPE * depth).map(Mutex::new).collect();
            share(threads, slots.len(), |i| {
                let mut slot = slots[i].lock().unwrap_or_else(PoisonError::into_inner);
                let mut scratch: (Scratch<f32>, Scratch<f64>) = Default::default();
                let rows = i * STRIPE..i * STRIPE + slot.len() / depth;
                let columns = from..from + depth;
                let read =
                    panel::read_columns(matrix, level, rows.clone(), columns, &mut scratch, &mut Vec::new(), &mut slot);
                if let Err(e) = read {
                    fail(i, e);
                }
                if let Some(signs) = sweep.signs() {
                    for (row, line) in rows.zip(slot.chunks_exact_mut(depth)) {
                        dispatch::flip(level, line, signs, matrix.start + (row * matrix.columns + from) as u64);
                    }
                }
            });
            drop(slots);
            squares += left[..n * depth].chunks(dispatch::MICRO).map(|m| dispatch::dot(level, m, m)).sum::<f64>();
        }
        if let Some((_, e)) = error.into_inner().unwrap_or_else(PoisonError::into_inner) {
            return Err(e);
        }
        {
            let slots: Vec<Mutex<&mut [f64]>> =
                right[..strips * STRIP * depth].chunks_mut(STRIP * depth).map(Mutex::new).collect();
            share(threads, slots.len(), |i| {
                let mut slot = slots[i].lock().unwrap_or_else(PoisonError::into_inner);
                slot.fill(0.0);
                for c in 0..STRIP.min(n - i * STRIP) {
                    let side = &left[(i * STRIP + c) * depth..][..depth];
                    slot.iter_mut().skip(c).step_by(STRIP).zip(side).for_each(|(o, &x)| *o = x);
                }
            });
        }
        let slots: Vec<Mutex<&mut [f64]>> = values.chunks_mut(STRIPE * n).map(Mutex::new).collect();
        // The longest stripes first: they are the last ones.
        share(threads, slots.len(), |i| {
            let i = slots.len() - 1 - i;
            let mut slot = slots[i].lock().unwrap_or_else(PoisonError::into_inner);
            let rows = slot.len() / n;
            let a = &left[i * STRIPE * depth..];
            for strip in 0..(i * STRIPE + rows).div_ceil(STRIP) {
                let b = &right[strip * STRIP * depth..];
                let width = STRIP.min(n - strip * STRIP);
                let into = &mut slot[strip * STRIP..];
                dispatch::multiply(level, into, a, b, [n, depth, STRIP], [rows, depth, width], level.tall());
            }
        });
        sweep.control.advance((matrix.bytes() as f64 * depth as f64 / long as f64) as u64);
    }
    if !squares.is_finite() {
        return Err(panel::nonfinite(matrix, level));
    }
    for i in 0..n {
        for j in i + 1..n {
            values[i * n + j] = values[j * n + i];
        }
    }
    Ok(Gram { n, values, squares })
}

/// Every singular value, descending, and the sum of squares.
pub(super) fn spectrum_of(sweep: &Sweep<'_>) -> Result<(Vec<f64>, f64)> {
    let Gram { n, values, squares } = gather(sweep)?;
    let values = super::eigen::values(values, n, sweep.level, sweep.settings.threads());
    Ok((values.into_iter().map(|v| v.max(0.0).sqrt()).collect(), squares))
}

/// Every singular value of a matrix, descending. Those below 1e-8 of the first are what rounding makes of zero.
///
/// # Errors
/// [`Error::NonFinite`], [`Error::Io`], [`Error::Cancelled`].
pub fn spectrum(matrix: &Matrix<'_>, settings: &Settings, control: &Control) -> Result<Vec<f64>> {
    Ok(spectrum_of(&Sweep::new(matrix, settings, control)?)?.0)
}

/// The whole singular value decomposition.
///
/// # Errors
/// As [`spectrum`].
pub fn decompose(matrix: &Matrix<'_>, settings: &Settings, control: &Control) -> Result<Triplets> {
    let sweep = Sweep::new(matrix, settings, control)?;
    let Gram { n, values, squares } = gather(&sweep)?;
    let (_, vectors) = symmetric(&values, n);
    let mut columns = vec![0.0; n * n];
    transpose(&vectors, &mut columns, n, n);
    Ok(side(&sweep, columns, n, squares)?.round())
}

/// Triplets from orthonormal vectors of the smaller side (`small x r`): one more reading takes the other side's.
pub(super) fn side(sweep: &Sweep<'_>, vectors: Vec<f64>, r: usize, squares: f64) -> Result<Exact> {
    let matrix = sweep.matrix;
    let (level, threads) = (sweep.level, sweep.settings.threads());
    let by_rows = matrix.columns <= matrix.rows;
    let long = matrix.rows.max(matrix.columns);
    let mut other = vec![0.0; long * r];
    let error: Mutex<Option<(usize, Error)>> = Mutex::new(None);
    sweep.control.expect(matrix.bytes());
    let slots: Vec<Mutex<&mut [f64]>> = other.chunks_mut(48 * r.max(1)).map(Mutex::new).collect();
    share(threads, slots.len(), |i| {
        if sweep.control.cancelled() {
            return;
        }
        let mut slot = slots[i].lock().unwrap_or_else(PoisonError::into_inner);
        let count = slot.len() / r;
        let range = i * 48..i * 48 + count;
        let mut scratch: (Scratch<f32>, Scratch<f64>) = Default::default();
        let mut piece = vec![0.0; count * matrix.small()];
        let read = if by_rows {
            panel::read_double(matrix, level, range, &mut scratch, &mut Vec::new(), &mut piece).map(|_| ())
        } else {
            let mut across = vec![0.0; piece.len()];
            let read =
                panel::read_columns(matrix, level, 0..matrix.rows, range, &mut scratch, &mut Vec::new(), &mut across);
            transpose(&across, &mut piece, matrix.rows, count);
            read
        };
        match read {
            Ok(()) => add_product(level, 1, &mut slot, &piece, matrix.small(), &vectors, r),
            Err(e) => {
                let mut first = error.lock().unwrap_or_else(PoisonError::into_inner);
                if first.as_ref().is_none_or(|(at, _)| i < *at) {
                    *first = Some((i, e));
                }
            }
        }
    });
    drop(slots);
    if let Some((_, e)) = error.into_inner().unwrap_or_else(PoisonError::into_inner) {
        return Err(e);
    }
    if sweep.control.cancelled() {
        return Err(Error::Cancelled);
    }
    sweep.control.advance(matrix.bytes());
    Ok(if by_rows {
        exactly(level, threads, other, vectors, r, squares)
    } else {
        exactly(level, threads, vectors, other, r, squares)
    })
}

/// The `rank` smallest singular triplets, still descending: the last one is the smallest.
///
/// # Errors
/// As [`spectrum`].
pub fn bottom(matrix: &Matrix<'_>, rank: usize, settings: &Settings, control: &Control) -> Result<Triplets> {
    Ok(bottom_exact(matrix, rank, settings, control)?.round())
}

/// [`bottom`] with vectors in f64: what they make together is the dropped part to 1e-10, where f32 rounds it to 1e-7.
///
/// # Errors
/// As [`spectrum`].
pub fn bottom_exact(matrix: &Matrix<'_>, rank: usize, settings: &Settings, control: &Control) -> Result<Exact> {
    let sweep = Sweep::new(matrix, settings, control)?;
    let Gram { n, values, squares } = gather(&sweep)?;
    let r = rank.min(n);
    let fresh = Philox::new(0, matrix.name, FRESH);
    let vectors = inverse::smallest(sweep.level, settings.threads(), &values, n, r, fresh, control)?;
    drop(values);
    side(&sweep, vectors, r, squares)
}
