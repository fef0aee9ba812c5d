//! Rows and columns of a matrix that lies on disk as a sum of terms.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use super::dense::share;
use super::scale::Scale;
use crate::bf16::Work;
use crate::operand::{Reader, Term, first_nonfinite};
use crate::philox::Philox;
use crate::simd::{Level, dispatch};
use crate::store::map::Pool;
use crate::stream::{BLOCK, Control};
use crate::{Error, Result};

/// A matrix that is read, never held.
#[derive(Debug, Clone, Copy)]
pub struct Matrix<'a> {
    /// The tensor's name, which random numbers are keyed by.
    pub name: &'a str,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub columns: usize,
    /// Its first element in the tensor: not zero for the later matrices of a stack (experts).
    pub start: u64,
    /// Elements of the whole tensor.
    pub elements: u64,
    /// What is summed. Random controls have their scales already.
    pub terms: &'a [Term],
}

impl<'a> Matrix<'a> {
    /// A tensor that is one matrix.
    ///
    /// # Errors
    /// [`Error::Mismatch`] for a shape that is not of two dimensions, or has none of something.
    pub fn new(name: &'a str, shape: &[u64], terms: &'a [Term]) -> Result<Self> {
        match *shape {
            [rows, columns] if rows > 0 && columns > 0 => Ok(Self {
                name,
                rows: rows as usize,
                columns: columns as usize,
                start: 0,
                elements: rows * columns,
                terms,
            }),
            _ => Err(Error::mismatch(
                name,
                format!(
                    "has the shape {shape:?}; singular values are those of a matrix [m, n]: take one of a stack by its number, leave other tensors out"
                ),
            )),
        }
    }

    /// One matrix of a stack `[E, m, n]`.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if there is no such matrix.
    pub fn of_stack(name: &'a str, shape: &[u64], number: u64, terms: &'a [Term]) -> Result<Self> {
        match *shape {
            [count, rows, columns] if number < count && rows > 0 && columns > 0 => Ok(Self {
                start: number * rows * columns,
                elements: count * rows * columns,
                ..Self::new(name, &[rows, columns], terms)?
            }),
            _ => Err(Error::mismatch(name, format!("has the shape {shape:?}: there is no matrix {number}"))),
        }
    }

    /// Whether its elements are summed in f64.
    pub fn is_double(&self) -> bool {
        self.terms.iter().any(Term::is_double)
    }

    /// The smaller side.
    pub fn small(&self) -> usize {
        self.rows.min(self.columns)
    }

    /// Bytes that one reading of it takes from its files.
    pub(super) fn bytes(&self) -> u64 {
        let stored = |t: &Term| {
            t.sources()
                .iter()
                .map(|s| s.stored_bytes() + s.tensors().iter().map(|t| t.entry.end - t.entry.begin).sum::<u64>())
                .sum::<u64>()
        };
        let whole: u64 = self.terms.iter().map(stored).sum();
        (whole as f64 * (self.rows * self.columns) as f64 / self.elements as f64) as u64
    }

    fn by_block(&self) -> bool {
        self.terms.iter().any(Term::by_block)
    }
}

/// What a worker needs to read panels.
#[derive(Debug, Default)]
pub(super) struct Scratch<W> {
    pool: Pool,
    block: Vec<W>,
    number: Option<u64>,
    wide: Vec<f64>,
}

/// Elements read at a time, so that windows stay in the first caches.
const PIECE: u64 = 1 << 16;

/// Sums the terms over some elements of the tensor.
fn sum<W: Work>(matrix: &Matrix<'_>, level: Level, elements: Range<u64>, pool: &Pool, into: &mut [W]) -> Result<()> {
    if matrix.terms.is_empty() {
        into.fill(W::ZERO);
    }
    for (i, term) in matrix.terms.iter().enumerate() {
        let mut reader: Reader<'_, W> = term.open(elements.clone(), pool)?;
        reader.add(level, into, elements.clone(), i == 0)?;
    }
    Ok(())
}

/// Elements of the matrix, counted from its own first one.
fn read_elements<W: Work>(
    matrix: &Matrix<'_>,
    level: Level,
    elements: Range<u64>,
    scratch: &mut Scratch<W>,
    into: &mut [W],
) -> Result<()> {
    let (start, end) = (matrix.start + elements.start, matrix.start + elements.end);
    let mut at = start;
    while at < end {
        let next;
        if matrix.by_block() {
            let number = at / BLOCK;
            let block = number * BLOCK..((number + 1) * BLOCK).min(matrix.elements);
            next = block.end.min(end);
            if scratch.number != Some(number) {
                scratch.number = None;
                scratch.block.resize((block.end - block.start) as usize, W::ZERO);
                sum(matrix, level, block.clone(), &scratch.pool, &mut scratch.block)?;
                scratch.number = Some(number);
            }
            into[(at - start) as usize..(next - start) as usize]
                .copy_from_slice(&scratch.block[(at - block.start) as usize..(next - block.start) as usize]);
        } else {
            next = (at + PIECE).min(end);
            sum(matrix, level, at..next, &scratch.pool, &mut into[(at - start) as usize..(next - start) as usize])?;
        }
        at = next;
    }
    Ok(())
}

/// Whole rows, and their sum of squares.
///
/// # Errors
/// [`Error::NonFinite`] for the first element that is not finite; [`Error::Io`].
pub(super) fn read_rows<W: Work>(
    (matrix, scale): (&Matrix<'_>, Scale),
    level: Level,
    rows: Range<usize>,
    scratch: &mut Scratch<W>,
    into: &mut [W],
) -> Result<f64> {
    let n = matrix.columns as u64;
    let elements = rows.start as u64 * n..rows.end as u64 * n;
    read_elements(matrix, level, elements.clone(), scratch, into)?;
    scale.apply(into);
    let squares: f64 = into.chunks(dispatch::MICRO).map(|m| dispatch::dot(level, m, m)).sum();
    if !squares.is_finite() {
        let range = matrix.start + elements.start..matrix.start + elements.end;
        if let Some(error) = first_nonfinite::<W>(matrix.name, &[], matrix.terms, level, range, &scratch.pool)? {
            return Err(error);
        }
    }
    Ok(squares)
}

/// [`read_rows`] in f32: what is summed in f64 is rounded. Rows that were `looked` at before are taken as they are: their sum is not made again.
pub(super) fn read_single(
    (matrix, scale): (&Matrix<'_>, Scale),
    level: Level,
    rows: Range<usize>,
    looked: bool,
    scratch: &mut (Scratch<f32>, Scratch<f64>),
    into: &mut [f32],
) -> Result<f64> {
    if !matrix.is_double() {
        if looked {
            let n = matrix.columns as u64;
            read_elements(matrix, level, rows.start as u64 * n..rows.end as u64 * n, &mut scratch.0, into)?;
            scale.apply(into);
            return Ok(0.0);
        }
        return read_rows((matrix, scale), level, rows, &mut scratch.0, into);
    }
    let mut wide = std::mem::take(&mut scratch.1.wide);
    wide.resize(into.len(), 0.0);
    let squares = read_rows((matrix, scale), level, rows, &mut scratch.1, &mut wide)?;
    into.iter_mut().zip(&wide).for_each(|(o, &w)| *o = w as f32);
    scratch.1.wide = wide;
    Ok(squares)
}

/// [`read_rows`] in f64.
pub(super) fn read_double(
    (matrix, scale): (&Matrix<'_>, Scale),
    level: Level,
    rows: Range<usize>,
    scratch: &mut (Scratch<f32>, Scratch<f64>),
    single: &mut Vec<f32>,
    into: &mut [f64],
) -> Result<f64> {
    if matrix.is_double() {
        return read_rows((matrix, scale), level, rows, &mut scratch.1, into);
    }
    single.resize(into.len(), 0.0);
    let squares = read_rows((matrix, scale), level, rows, &mut scratch.0, single)?;
    into.iter_mut().zip(&*single).for_each(|(o, &w)| *o = f64::from(w));
    Ok(squares)
}

/// Some columns of some rows, in f64, row by row.
pub(super) fn read_columns(
    (matrix, scale): (&Matrix<'_>, Scale),
    level: Level,
    rows: Range<usize>,
    columns: Range<usize>,
    scratch: &mut (Scratch<f32>, Scratch<f64>),
    single: &mut Vec<f32>,
    into: &mut [f64],
) -> Result<()> {
    let width = columns.len();
    single.resize(width, 0.0);
    for (row, into) in rows.zip(into.chunks_exact_mut(width)) {
        let from = (row * matrix.columns + columns.start) as u64;
        let elements = from..from + width as u64;
        if matrix.is_double() {
            read_elements(matrix, level, elements, &mut scratch.1, into)?;
            scale.apply(into);
        } else {
            read_elements(matrix, level, elements, &mut scratch.0, single)?;
            scale.apply(single);
            into.iter_mut().zip(&*single).for_each(|(o, &w)| *o = f64::from(w));
        }
    }
    Ok(())
}

/// The largest magnitude of a matrix. One reading of it.
///
/// # Errors
/// [`Error::NonFinite`] for an element that is not finite, [`Error::Mismatch`] if their sum is not; [`Error::Io`], [`Error::Cancelled`].
pub(super) fn largest(matrix: &Matrix<'_>, level: Level, threads: usize, control: &Control) -> Result<f64> {
    let end = (matrix.rows * matrix.columns) as u64;
    let parts: Vec<Mutex<Result<f64>>> = (0..end.div_ceil(BLOCK)).map(|_| Mutex::new(Ok(0.0))).collect();
    share(threads, parts.len(), |i| {
        let range = i as u64 * BLOCK..((i as u64 + 1) * BLOCK).min(end);
        let found = match (control.cancelled(), matrix.is_double()) {
            (true, _) => Err(Error::Cancelled),
            (_, true) => largest_of::<f64>(matrix, level, range),
            (_, false) => largest_of::<f32>(matrix, level, range),
        };
        *parts[i].lock().unwrap_or_else(PoisonError::into_inner) = found;
    });
    let found = parts
        .into_iter()
        .map(|part| part.into_inner().unwrap_or_else(PoisonError::into_inner))
        .try_fold(0.0f64, |most, part| part.map(|x| most.max(x)))?;
    if found.is_finite() { Ok(found) } else { Err(nonfinite(matrix, level)) }
}

/// [`largest`] of some elements; infinity if one is not finite.
fn largest_of<W: Work>(matrix: &Matrix<'_>, level: Level, elements: Range<u64>) -> Result<f64> {
    let mut scratch = Scratch::<W>::default();
    let mut piece = vec![W::ZERO; PIECE.min(elements.end - elements.start) as usize];
    let (mut most, mut at) = (0.0f64, elements.start);
    while at < elements.end {
        let next = (at + PIECE).min(elements.end);
        let piece = &mut piece[..(next - at) as usize];
        read_elements(matrix, level, at..next, &mut scratch, piece)?;
        for x in &*piece {
            most = most.max(if x.is_finite() { x.abs().to_f64() } else { f64::INFINITY });
        }
        at = next;
    }
    Ok(most)
}

/// Turns signs at random, the same for an element wherever its panel begins.
pub(super) fn flip(matrix: &Matrix<'_>, level: Level, signs: Philox, rows: Range<usize>, values: &mut [f32]) {
    dispatch::flip(level, values, signs, matrix.start + (rows.start * matrix.columns) as u64);
}

/// The first element that is not finite, as the error that names it, when it is known that there is one.
pub(super) fn nonfinite(matrix: &Matrix<'_>, level: Level) -> Error {
    let pool = Pool::default();
    let end = matrix.start + (matrix.rows * matrix.columns) as u64;
    let mut at = matrix.start;
    while at < end {
        let next = ((at / BLOCK + 1) * BLOCK).min(end);
        match first_nonfinite::<f64>(matrix.name, &[], matrix.terms, level, at..next, &pool) {
            Ok(None) => at = next,
            Ok(Some(e)) | Err(e) => return e,
        }
    }
    Error::mismatch(
        matrix.name,
        "the numbers that it is made of are finite, what they make together is not: they are too large",
    )
}
