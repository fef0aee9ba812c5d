//! The Gram matrix of a matrix's smaller side, in f64: what the range finder cannot give, trailing triplets and whole spectra.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use super::dense::{add_lower, add_product, pack, packed, share, transpose, transpose_shared};
use super::eigen::{symmetric_until, values as values_until};
use super::panel::{self, Scratch};
use super::rsvd::{Sweep, some};
use super::thin::exactly;
use super::{Exact, Matrix, Triplets, inverse};
use crate::philox::Philox;
use crate::plan::Settings;
use crate::simd::dispatch;
use crate::stream::Control;
use crate::{Error, Result};

/// Rows (or columns) of the larger side that are multiplied before sums are joined.
const DEPTH: usize = 384;
/// Rows that are read at a time across the whole depth.
const STRIPE: usize = 96;

/// Rows of the larger side that a worker multiplies with vectors of the smaller one.
const ROWS: usize = 48;

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
    let mut values = vec![0.0; n * n];
    // A piece along the smaller side, as it is read where that is the other one, and packed as both factors.
    let mut piece = vec![0.0; n * DEPTH];
    let mut across = vec![0.0; if by_rows { 0 } else { n * DEPTH }];
    let mut both = packed(n, DEPTH);
    let mut squares = 0.0;
    let (level, scale) = (sweep.level, sweep.scale());
    sweep.control.expect(matrix.bytes());
    for from in (0..long).step_by(DEPTH) {
        if sweep.control.cancelled() {
            return Err(Error::Cancelled);
        }
        let depth = DEPTH.min(long - from);
        let error: Mutex<Option<(usize, Error)>> = Mutex::new(None);
        let fail = |at: usize, e: Error| {
            let mut first = error.lock().unwrap_or_else(PoisonError::into_inner);
            if first.as_ref().is_none_or(|(i, _)| at < *i) {
                *first = Some((at, e));
            }
        };
        if by_rows {
            let parts = depth.div_ceil(24);
            let sums: Vec<Mutex<f64>> = (0..parts).map(|_| Mutex::new(0.0)).collect();
            {
                let slots: Vec<Mutex<&mut [f64]>> = piece[..depth * n].chunks_mut(24 * n).map(Mutex::new).collect();
                share(threads, slots.len(), |i| {
                    let mut slot = slots[i].lock().unwrap_or_else(PoisonError::into_inner);
                    let mut scratch: (Scratch<f32>, Scratch<f64>) = Default::default();
                    let rows = from + i * 24..from + i * 24 + slot.len() / n;
                    let read = panel::read_double(
                        (matrix, scale),
                        level,
                        rows.clone(),
                        &mut scratch,
                        &mut Vec::new(),
                        &mut slot,
                    );
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
        } else {
            read_across(sweep, from..from + depth, &mut across[..n * depth])?;
            squares += across[..n * depth].chunks(dispatch::MICRO).map(|m| dispatch::dot(level, m, m)).sum::<f64>();
            transpose_shared(threads, &across[..n * depth], &mut piece[..n * depth], n, depth);
        }
        if let Some((_, e)) = error.into_inner().unwrap_or_else(PoisonError::into_inner) {
            return Err(e);
        }
        pack(threads, &mut both, &piece[..n * depth], n);
        add_lower(level, threads, &mut values, n, &both, depth);
        sweep.control.advance((matrix.bytes() as f64 * depth as f64 / long as f64) as u64);
    }
    if sweep.rescaled(squares)? {
        drop((values, piece, across, both));
        return gather(sweep);
    }
    for i in 0..n {
        for j in i + 1..n {
            values[i * n + j] = values[j * n + i];
        }
    }
    Ok(Gram { n, values, squares })
}

/// Some columns of a matrix with fewer rows than columns, row by row. What is stored in blocks is decoded anew for every call, whole: better
/// many columns at a time.
fn read_across(sweep: &Sweep<'_>, columns: Range<usize>, across: &mut [f64]) -> Result<()> {
    let (matrix, level, scale) = (sweep.matrix, sweep.level, sweep.scale());
    let depth = columns.len();
    let error: Mutex<Option<(usize, Error)>> = Mutex::new(None);
    let slots: Vec<Mutex<&mut [f64]>> = across.chunks_mut(STRIPE * depth).map(Mutex::new).collect();
    share(sweep.settings.threads(), slots.len(), |i| {
        let mut slot = slots[i].lock().unwrap_or_else(PoisonError::into_inner);
        let mut scratch: (Scratch<f32>, Scratch<f64>) = Default::default();
        let rows = i * STRIPE..i * STRIPE + slot.len() / depth;
        let read = panel::read_columns(
            (matrix, scale),
            level,
            rows.clone(),
            columns.clone(),
            &mut scratch,
            &mut Vec::new(),
            &mut slot,
        );
        if let Err(found) = read {
            let mut first = error.lock().unwrap_or_else(PoisonError::into_inner);
            if first.as_ref().is_none_or(|(at, _)| i < *at) {
                *first = Some((i, found));
            }
        }
        if let Some(signs) = sweep.signs() {
            for (row, line) in rows.zip(slot.chunks_exact_mut(depth)) {
                dispatch::flip(level, line, signs, matrix.start + (row * matrix.columns + columns.start) as u64);
            }
        }
    });
    error.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), |(_, found)| Err(found))
}

/// Bytes that [`decompose`] and [`spectrum`] hold at most, or with a rank those of [`bottom_exact`].
pub(super) fn memory(rows: usize, columns: usize, rank: Option<usize>, threads: usize) -> u64 {
    let (n, long) = (rows.min(columns) as u64, rows.max(columns) as u64);
    let gathering = 8 * (n * n + (4 * n + 24) * DEPTH as u64);
    // Vectors of both sides, twice while they are made orthonormal and once more while they are turned; and what reads them.
    let reading = if columns <= rows { threads * ROWS } else { DEPTH.min(columns) } as u64 * 16 * n;
    let sides = |r: u64| 8 * r * (3 * long + 2 * n) + reading;
    let solving = match rank {
        // The matrix, its eigenvectors as rows and as columns, and the reflectors.
        None => 8 * n * n * 7 / 2,
        Some(r) => {
            let (space, whole) = inverse::memory(n as usize, r);
            // A factor is there until a better one is.
            8 * n * n + if whole { 8 * n * n * 5 / 2 } else { 2 * 8 * n * n + 8 * n * space }
        }
    };
    let r = rank.map_or(n, |r| inverse::wider(r) as u64);
    gathering.max(solving).max(sides(r))
}

/// Every singular value, descending.
pub(super) fn spectrum_of(sweep: &Sweep<'_>) -> Result<Vec<f64>> {
    let Gram { n, values, .. } = gather(sweep)?;
    let values = values_until(values, n, &|| sweep.control.cancelled()).ok_or(Error::Cancelled)?;
    sweep.restored_values(values.into_iter().map(|v| v.max(0.0).sqrt()).collect())
}

/// Every singular value of a matrix, descending. Those below 1e-8 of the first are what rounding makes of zero.
///
/// # Errors
/// [`Error::NonFinite`], [`Error::Io`], [`Error::Cancelled`].
pub fn spectrum(matrix: &Matrix<'_>, settings: &Settings, control: &Control) -> Result<Vec<f64>> {
    spectrum_of(&Sweep::new(matrix, settings, control)?)
}

/// The whole singular value decomposition, at the scale of the sweep.
pub(super) fn decompose(sweep: &Sweep<'_>) -> Result<Triplets> {
    let Gram { n, values, squares } = gather(sweep)?;
    let (_, vectors) = symmetric_until(&values, n, &|| sweep.control.cancelled()).ok_or(Error::Cancelled)?;
    let mut columns = vec![0.0; n * n];
    transpose(&vectors, &mut columns, n, n);
    Ok(side(sweep, columns, n, squares)?.round())
}

/// Triplets from orthonormal vectors of the smaller side (`small x r`): one more reading takes the other side's.
pub(super) fn side(sweep: &Sweep<'_>, vectors: Vec<f64>, r: usize, squares: f64) -> Result<Exact> {
    let matrix = sweep.matrix;
    let (level, scale, threads) = (sweep.level, sweep.scale(), sweep.settings.threads());
    let by_rows = matrix.columns <= matrix.rows;
    let (n, long) = (matrix.small(), matrix.rows.max(matrix.columns));
    let mut other = vec![0.0; long * r];
    sweep.control.expect(matrix.bytes());
    if by_rows {
        let error: Mutex<Option<(usize, Error)>> = Mutex::new(None);
        let slots: Vec<Mutex<&mut [f64]>> = other.chunks_mut(ROWS * r.max(1)).map(Mutex::new).collect();
        share(threads, slots.len(), |i| {
            if sweep.control.cancelled() {
                return;
            }
            let mut slot = slots[i].lock().unwrap_or_else(PoisonError::into_inner);
            let rows = i * ROWS..i * ROWS + slot.len() / r;
            let mut scratch: (Scratch<f32>, Scratch<f64>) = Default::default();
            let mut piece = vec![0.0; rows.len() * n];
            match panel::read_double((matrix, scale), level, rows, &mut scratch, &mut Vec::new(), &mut piece) {
                Ok(_) => add_product(level, 1, &mut slot, &piece, n, &vectors, r),
                Err(found) => {
                    let mut first = error.lock().unwrap_or_else(PoisonError::into_inner);
                    if first.as_ref().is_none_or(|(at, _)| i < *at) {
                        *first = Some((i, found));
                    }
                }
            }
        });
        if let Some((_, found)) = error.into_inner().unwrap_or_else(PoisonError::into_inner) {
            return Err(found);
        }
    } else {
        let width = DEPTH.min(long);
        let (mut across, mut piece) = (vec![0.0; n * width], vec![0.0; n * width]);
        for from in (0..long).step_by(DEPTH) {
            if sweep.control.cancelled() {
                return Err(Error::Cancelled);
            }
            let depth = DEPTH.min(long - from);
            read_across(sweep, from..from + depth, &mut across[..n * depth])?;
            transpose_shared(threads, &across[..n * depth], &mut piece[..n * depth], n, depth);
            let here = &mut other[from * r..(from + depth) * r];
            let slots: Vec<Mutex<&mut [f64]>> = here.chunks_mut(ROWS * r.max(1)).map(Mutex::new).collect();
            share(threads, slots.len(), |i| {
                let mut slot = slots[i].lock().unwrap_or_else(PoisonError::into_inner);
                let rows = &piece[i * ROWS * n..][..slot.len() / r * n];
                add_product(level, 1, &mut slot, rows, n, &vectors, r);
            });
        }
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
/// As [`spectrum`]; [`Error::Usage`] for a rank of zero.
pub fn bottom(matrix: &Matrix<'_>, rank: usize, settings: &Settings, control: &Control) -> Result<Triplets> {
    Ok(bottom_exact(matrix, rank, settings, control)?.round())
}

/// [`bottom`] with vectors in f64: what they make together is the dropped part to 1e-10, where f32 rounds it to 1e-7.
///
/// # Errors
/// As [`bottom`].
pub fn bottom_exact(matrix: &Matrix<'_>, rank: usize, settings: &Settings, control: &Control) -> Result<Exact> {
    some(rank)?;
    let sweep = Sweep::new(matrix, settings, control)?;
    let Gram { n, values, squares } = gather(&sweep)?;
    let r = rank.min(n);
    let fresh = Philox::new(0, matrix.name, FRESH);
    let (vectors, b) = inverse::smallest(sweep.level, settings.threads(), &values, n, r, fresh, control)?;
    drop(values);
    // The singular values of the matrix itself on that span: squares of them would have lost what is small beside the first.
    let mut found = side(&sweep, vectors, b, squares)?;
    let last = |x: &[f64]| x.chunks_exact(b).flat_map(|row| &row[b - r..]).copied().collect();
    found.u = last(&found.u);
    found.v = last(&found.v);
    found.s.drain(..b - r);
    found.s = sweep.restored_values(found.s)?;
    found.squares = sweep.restored_squares(squares)?;
    Ok(found)
}
