//! Products of two thin factors, made where they are read: what a LoRA adds to a matrix, and a low-rank tensor of a vector.
//!
//! `value[i, j] = scale * sum over k of (left[i, k] * weight[k]) * right[k, j]`, k ascending from +0, everything in f64, rounded once to the work
//! type. The matrix is never held: a worker widens the rows of `left` that its tile touches, and `right` as a whole. A stack of matrices has a
//! pair of factors for each, all of one rank, one below the other.

use std::ops::Range;

use crate::bf16::Work;
use crate::dtype::{Class, Dtype};
use crate::simd::Level;
use crate::simd::dispatch::{self, with_element};
use crate::store::TensorView;
use crate::store::map::Pool;
use crate::stream::BLOCK;
use crate::{Error, Result};

/// A factor on disk, perhaps stored as its transpose.
#[derive(Debug, Clone)]
struct Factor {
    view: TensorView,
    rows: u64,
    columns: u64,
    flipped: bool,
}

/// `scale * left @ right`, read from disk where it is needed.
#[derive(Debug, Clone)]
pub struct Product {
    left: Factor,
    /// None for a single column of ones.
    right: Option<Factor>,
    /// What each column of `left` is multiplied by, matrix after matrix, or nothing.
    weights: Vec<f64>,
    scale: f64,
    columns: u64,
    /// Rows of each matrix of a stack; all of them, for one matrix.
    height: u64,
}

/// Ranks above this are taken only for matrices that are as large themselves.
const PLAUSIBLE_RANK: u64 = 4096;

impl Factor {
    fn new(view: TensorView, flipped: bool) -> std::result::Result<Self, String> {
        if view.dtype().class() != Class::Float {
            return Err(format!("the factor {:?} is {}; factors are floats", view.entry.name, view.dtype()));
        }
        let [first, second] = view.entry.shape[..] else {
            return Err(format!(
                "the factor {:?} has the shape {:?}; factors are matrices",
                view.entry.name, view.entry.shape
            ));
        };
        let (rows, columns) = if flipped { (second, first) } else { (first, second) };
        Ok(Self { view, rows, columns, flipped })
    }

    /// A rectangle of it, row by row.
    fn read<W: Work>(&self, rows: Range<u64>, columns: Range<u64>, pool: &Pool) -> Result<Vec<W>> {
        let (height, width) = ((rows.end - rows.start) as usize, (columns.end - columns.start) as usize);
        let mut into = reserved(height * width)?;
        into.resize(height * width, W::ZERO);
        let (outer, inner) = if self.flipped { (columns, rows) } else { (rows, columns) };
        let stride = self.view.entry.shape[1];
        for (i, line) in outer.enumerate() {
            let bytes = self.view.window(line * stride + inner.start..line * stride + inner.end, pool)?;
            with_element!(self.view.dtype(), E => if self.flipped {
                use crate::bf16::Element;
                for (row, e) in bytes.chunks_exact(E::SIZE).enumerate() {
                    into[row * width + i] = W::widen(E::load(e));
                }
            } else {
                use crate::bf16::Element;
                for (w, e) in into[i * width..][..width].iter_mut().zip(bytes.chunks_exact(E::SIZE)) {
                    *w = W::widen(E::load(e));
                }
            });
        }
        Ok(into)
    }
}

/// Room for a panel, or an error where a stranger's file asks for more than there is.
fn reserved<T>(elements: usize) -> Result<Vec<T>> {
    let mut panel = Vec::new();
    panel
        .try_reserve_exact(elements)
        .map_err(|_| Error::Usage(format!("no memory for a factor of {elements} elements")))?;
    Ok(panel)
}

impl Product {
    /// Factors as they are stored: `left` is [rows, rank] and `right` [rank, columns], or their transposes if `flipped`. Without `right` the
    /// product is `left` itself, as a column. Problems come without the path.
    ///
    /// # Errors
    /// Factors that are no matrices of floats, do not fit each other, or whose product has another shape than `shape` (any shape of as
    /// many elements, for a column).
    pub fn new(
        left: TensorView,
        right: Option<TensorView>,
        flipped: bool,
        weights: Vec<f64>,
        scale: f64,
        shape: &[u64],
    ) -> std::result::Result<Self, String> {
        let Some(right) = right else {
            let mut left = left;
            if left.entry.shape != shape {
                return Err(format!("has the shape {shape:?}, what is added to it {:?}", left.entry.shape));
            }
            left.entry.shape = vec![left.elements(), 1];
            let left = Factor::new(left, false)?;
            let height = left.rows;
            return Ok(Self { left, right: None, weights, scale, columns: 1, height });
        };
        let (left, right) = (Factor::new(left, flipped)?, Factor::new(right, flipped)?);
        let rank = left.columns;
        if rank != right.rows || rank == 0 || !(weights.is_empty() || weights.len() as u64 == rank) {
            return Err(format!(
                "the factors {:?} of {:?} and {:?} of {:?} have no product",
                left.view.entry.name, left.view.entry.shape, right.view.entry.name, right.view.entry.shape
            ));
        }
        if shape != [left.rows, right.columns] {
            return Err(format!(
                "has the shape {shape:?}, the product of its factors [{}, {}]",
                left.rows, right.columns
            ));
        }
        if left.rows.checked_mul(right.columns).and_then(|n| n.checked_mul(16)).is_none() {
            return Err(format!("the shape {shape:?} overflows"));
        }
        if rank > PLAUSIBLE_RANK.max(left.rows).max(right.columns) {
            return Err(format!("a rank of {rank} is not credible for the shape {shape:?}"));
        }
        let (columns, height) = (right.columns, left.rows);
        Ok(Self { left, right: Some(right), weights, scale, columns, height })
    }

    /// A stack of products of the shape [matrices, rows, columns], from `left` of [matrices, rows, rank], a weight for each of the
    /// matrices x rank columns, and `right` of [matrices, rank, columns]. Problems come without the path.
    ///
    /// # Errors
    /// Factors that are no stacks of floats, do not fit each other, or whose product has another shape than `shape`.
    pub fn stack(
        mut left: TensorView,
        mut right: TensorView,
        weights: Vec<f64>,
        shape: &[u64],
    ) -> std::result::Result<Self, String> {
        let misfit = format!(
            "the factors {:?} of {:?} and {:?} of {:?} make no stack of the shape {shape:?}",
            left.entry.name, left.entry.shape, right.entry.name, right.entry.shape
        );
        let (&[matrices, rows, columns], &[a, b, rank], &[c, d, e]) =
            (shape, &left.entry.shape[..], &right.entry.shape[..])
        else {
            return Err(misfit);
        };
        if [a, b] != [matrices, rows] || [c, d, e] != [matrices, rank, columns] || shape.contains(&0) || rank == 0 {
            return Err(misfit);
        }
        let (Some(tall), Some(deep)) = (matrices.checked_mul(rows), matrices.checked_mul(rank)) else {
            return Err(misfit);
        };
        if weights.len() as u64 != deep || rank > rows.min(columns) {
            return Err(misfit);
        }
        if tall.checked_mul(columns).and_then(|n| n.checked_mul(16)).is_none() {
            return Err(format!("the shape {shape:?} overflows"));
        }
        left.entry.shape = vec![tall, rank];
        right.entry.shape = vec![deep, columns];
        let (left, right) = (Factor::new(left, false)?, Factor::new(right, false)?);
        Ok(Self { left, right: Some(right), weights, scale: 1.0, columns, height: rows })
    }

    /// Elements of the product.
    pub fn elements(&self) -> u64 {
        self.left.rows * self.columns
    }

    /// The factors on disk.
    pub fn factors(&self) -> impl Iterator<Item = &TensorView> {
        std::iter::once(&self.left.view).chain(self.right.iter().map(|f| &f.view))
    }

    /// Bytes of the factors on disk.
    pub fn bytes(&self) -> u64 {
        self.factors().map(|f| f.entry.end - f.entry.begin).sum()
    }

    /// Whether it is combined in f64.
    pub fn is_double(&self) -> bool {
        self.factors().any(|f| f.dtype() == Dtype::F64)
    }

    /// Bytes that a worker holds while it has a block open: the widened factors, and a line of them as it is read.
    pub fn memory(&self) -> u64 {
        let rank = self.left.columns;
        let item = if self.is_double() { 8 } else { 4 };
        let rows = (BLOCK / self.columns.max(1) + 2).min(self.left.rows);
        let matrices = (rows / self.height.max(1) + 2).min(self.left.rows / self.height.max(1));
        rank * (rows * 8 + self.columns * item * matrices) + rows.max(self.columns).max(rank) * 8
    }

    /// Opens it on some elements.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Usage`] if the factors have no room in memory.
    pub fn open(&self, elements: Range<u64>, pool: &Pool) -> Result<ProductReader> {
        let n = self.columns.max(1);
        let rank = self.left.columns;
        let rows = elements.start / n..elements.end.div_ceil(n).max(elements.start / n);
        // A tile inside one row needs no more columns than it has.
        let columns = if rows.end - rows.start == 1 {
            elements.start % n..elements.end - rows.start * n
        } else {
            0..self.columns
        };
        let height = self.height.max(1);
        let matrices = rows.start / height..rows.end.div_ceil(height).max(rows.start / height);
        let lines = matrices.start * rank..matrices.end * rank;
        let mut left: Vec<f64> = self.left.read(rows.clone(), 0..rank, pool)?;
        if !self.weights.is_empty() {
            for (at, row) in rows.clone().zip(left.chunks_exact_mut(rank as usize)) {
                let weights = &self.weights[(at / height * rank) as usize..][..rank as usize];
                row.iter_mut().zip(weights).for_each(|(l, w)| *l *= w);
            }
        }
        let right = match &self.right {
            None => Panel::Single(vec![1.0]),
            Some(f) if self.is_double() => Panel::Double(f.read(lines, columns.clone(), pool)?),
            Some(f) => Panel::Single(f.read(lines, columns.clone(), pool)?),
        };
        Ok(ProductReader {
            left,
            right,
            rank: rank as usize,
            scale: self.scale,
            first_row: rows.start,
            first_column: columns.start,
            width: (columns.end - columns.start) as usize,
            columns: n,
            height,
            first_matrix: matrices.start,
        })
    }
}

/// A product opened on a tile.
#[derive(Debug)]
pub struct ProductReader {
    left: Vec<f64>,
    right: Panel,
    rank: usize,
    scale: f64,
    first_row: u64,
    first_column: u64,
    /// Columns that `right` holds.
    width: usize,
    /// Columns of the whole.
    columns: u64,
    /// Rows of each matrix.
    height: u64,
    first_matrix: u64,
}

#[derive(Debug)]
enum Panel {
    Single(Vec<f32>),
    Double(Vec<f64>),
}

impl ProductReader {
    /// `acc = c * v`, or `acc + c * v` when not `first`, over some elements of the tile.
    pub fn add<W: Work>(&self, level: Level, acc: &mut [W], elements: Range<u64>, c: W, first: bool) {
        match &self.right {
            Panel::Single(right) => self.add_from(right, level, acc, elements, c, first),
            Panel::Double(right) => self.add_from(right, level, acc, elements, c, first),
        }
    }

    /// The elements as rectangles inside a matrix: the end of a row, whole rows, the start of a row.
    fn add_from<P: Work, W: Work>(
        &self,
        right: &[P],
        level: Level,
        acc: &mut [W],
        elements: Range<u64>,
        c: W,
        first: bool,
    ) {
        let n = self.columns;
        let mut at = elements.start;
        while at < elements.end {
            let (row, column) = (at / n, at % n);
            let whole = if column == 0 { ((elements.end - at) / n).min(self.height - row % self.height) } else { 0 };
            let (rows, width) = if whole > 0 { (whole, n) } else { (1, (n - column).min(elements.end - at)) };
            let from = (at - elements.start) as usize;
            let left = &self.left[(row - self.first_row) as usize * self.rank..][..rows as usize * self.rank];
            let lines = (row / self.height - self.first_matrix) as usize * self.rank;
            let panel = dispatch::PanelOf {
                left,
                right: &right[lines * self.width + (column - self.first_column) as usize..],
                rank: self.rank,
                stride: self.width,
                scale: self.scale,
            };
            dispatch::product::<P, W>(
                level,
                &mut acc[from..from + (rows * width) as usize],
                panel,
                width as usize,
                c,
                first,
            );
            at += rows * width;
        }
    }
}
