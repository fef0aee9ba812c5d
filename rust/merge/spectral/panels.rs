//! Task vectors of one matrix, read panel by panel in f64, and the products that the methods are made of.

use std::marker::PhantomData;
use std::ops::Range;

use crate::bf16::Work;
use crate::linalg::dense::transpose;
use crate::linalg::packed::{self, Packed};
use crate::simd::Level;
use crate::stream::Control;
use crate::{Error, Result};

use crate::merge::linear::blame_input;
use crate::merge::method::Worker;
use crate::merge::points::Opened;
use crate::merge::prepare::Job;

/// What to do where NaN may pass and still is in the way.
const NEEDED: &str = "a matrix has singular values only if its numbers are finite, whatever else may pass; fix the checkpoint, or leave the tensor out with --exclude";

/// Rows of a panel.
pub(super) const PANEL: usize = 256;

/// A sum of task vectors: what each is multiplied by.
pub(super) type Mix = Vec<f64>;

/// The sum of some task vectors times a matrix, as columns `at..` of a wider one.
#[derive(Debug)]
pub(super) struct Piece {
    pub(super) mix: Mix,
    /// `n x columns`, row by row.
    pub(super) matrix: Vec<f64>,
    pub(super) columns: usize,
    pub(super) at: usize,
}

/// The task vectors of a matrix, turned so that it is not wider than long.
pub(super) struct Panels<'a, W> {
    pub(super) worker: Worker<'a>,
    job: &'a Job,
    start: u64,
    rows: usize,
    columns: usize,
    /// Whether what is called a row here is a column of the tensor.
    turned: bool,
    work: PhantomData<W>,
}

impl<'a, W: Work> Panels<'a, W> {
    pub(super) fn new(worker: Worker<'a>, job: &'a Job, start: u64, rows: usize, columns: usize) -> Self {
        Self { worker, job, start, rows, columns, turned: rows < columns, work: PhantomData }
    }

    /// The same with the tensor's rows, or its columns, as the side that is held.
    pub(super) fn turn(&self, turned: bool) -> Self {
        Self { turned, ..*self }
    }

    pub(super) fn turned(&self) -> bool {
        self.turned
    }

    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    pub(super) fn columns(&self) -> usize {
        self.columns
    }

    pub(super) fn level(&self) -> Level {
        self.worker.level
    }

    pub(super) fn threads(&self) -> usize {
        self.worker.threads
    }

    pub(super) fn control(&self) -> &Control {
        self.worker.control
    }

    /// The side that is held.
    pub(super) fn side(&self) -> usize {
        if self.turned { self.rows } else { self.columns }
    }

    fn long(&self) -> usize {
        if self.turned { self.columns } else { self.rows }
    }

    /// Task vectors of some elements of the tensor, from `at` on; those that there is no room for are not wanted.
    fn read(&self, elements: &Range<u64>, into: &mut [Vec<f64>], at: usize, lanes: &mut [Vec<W>; 2]) -> Result<()> {
        let n = (elements.end - elements.start) as usize;
        let [base, input] = lanes;
        base.resize(n, W::ZERO);
        input.resize(n, W::ZERO);
        let mut opened = Opened::<W>::new(self.level(), self.job, elements, self.worker.pool)?;
        let mut points = opened.points();
        points.base(base, elements);
        for (i, into) in into.iter_mut().enumerate().filter(|(_, into)| !into.is_empty()) {
            if !points.input(i, input, base, elements)? {
                // Not even where NaN may pass: there is no singular value of it.
                return Err(match blame_input::<W>(self.job, self.level(), elements.clone(), self.worker.pool) {
                    Error::NonFinite { path, tensor, index, value, advice } => {
                        let advice = if self.worker.allow_nonfinite { NEEDED } else { advice };
                        Error::NonFinite { path, tensor, index, value, advice }
                    }
                    other => other,
                });
            }
            into[at..at + n].iter_mut().zip(&*input).for_each(|(o, x)| *o = x.to_f64());
        }
        Ok(())
    }

    /// Calls `with` with the sums of task vectors on panel after panel: its rows, and one `rows x side` for each mix.
    pub(super) fn each(
        &self,
        mixes: &[Mix],
        mut with: impl FnMut(Range<usize>, &[Vec<f64>]) -> Result<()>,
    ) -> Result<()> {
        let n = self.side();
        let wanted = |i: usize| mixes.iter().any(|mix| mix[i] != 0.0);
        let mut lanes = [Vec::new(), Vec::new()];
        for from in (0..self.long()).step_by(PANEL) {
            if self.worker.control.cancelled() {
                return Err(Error::Cancelled);
            }
            let to = (from + PANEL).min(self.long());
            let room = |i: usize| vec![0.0; if wanted(i) { (to - from) * n } else { 0 }];
            let mut tasks: Vec<Vec<f64>> = (0..self.job.terms.len()).map(room).collect();
            if self.turned {
                for row in 0..self.rows {
                    let first = self.start + (row * self.columns) as u64;
                    let elements = first + from as u64..first + to as u64;
                    self.read(&elements, &mut tasks, row * (to - from), &mut lanes)?;
                }
                for task in tasks.iter_mut().filter(|task| !task.is_empty()) {
                    let mut upright = vec![0.0; task.len()];
                    transpose(task, &mut upright, n, to - from);
                    *task = upright;
                }
            } else {
                let elements = self.start + (from * n) as u64..self.start + (to * n) as u64;
                self.read(&elements, &mut tasks, 0, &mut lanes)?;
            }
            let mixed: Vec<Vec<f64>> = mixes
                .iter()
                .map(|mix| {
                    let mut sum = vec![0.0; (to - from) * n];
                    for (&c, task) in mix.iter().zip(&tasks).filter(|(c, _)| **c != 0.0) {
                        sum.iter_mut().zip(task).for_each(|(s, x)| *s += c * x);
                    }
                    sum
                })
                .collect();
            drop(tasks);
            with(from..to, &mixed)?;
        }
        Ok(())
    }

    /// `a^T b` of sums of task vectors, for each pair of them.
    pub(super) fn products(&self, pairs: &[(Mix, Mix)]) -> Result<Vec<Vec<f64>>> {
        let n = self.side();
        let mut found = vec![vec![0.0; n * n]; pairs.len()];
        let mut mixes: Vec<Mix> = Vec::new();
        let mut place = |mix: &Mix| {
            mixes.iter().position(|m| m == mix).unwrap_or_else(|| {
                mixes.push(mix.clone());
                mixes.len() - 1
            })
        };
        let places: Vec<(usize, usize)> = pairs.iter().map(|(a, b)| (place(a), place(b))).collect();
        self.each(&mixes, |_, panel| {
            for (&(a, b), into) in places.iter().zip(&mut found) {
                let sides = ((&panel[a][..], n), (&panel[b][..], n));
                packed::add_cross(self.level(), self.threads(), into, sides.0, sides.1, a == b);
            }
            Ok(())
        })?;
        for (&(a, b), found) in places.iter().zip(&mut found) {
            if a == b {
                packed::mirror(found, n);
            }
        }
        Ok(found)
    }

    /// Calls `with` with panel after panel of what pieces make side by side, `rows x width`.
    fn each_piece(
        &self,
        pieces: &[Piece],
        width: usize,
        mut with: impl FnMut(Range<usize>, &[f64]) -> Result<()>,
    ) -> Result<()> {
        let n = self.side();
        let packed: Vec<Packed> = pieces.iter().map(|p| Packed::new(&p.matrix, n, p.columns)).collect();
        let mixes: Vec<Mix> = pieces.iter().map(|p| p.mix.clone()).collect();
        self.each(&mixes, |range, panel| {
            let mut whole = vec![0.0; range.len() * width];
            let mut part = Vec::new();
            for ((piece, packed), panel) in pieces.iter().zip(&packed).zip(panel) {
                if piece.columns == width {
                    packed::add(self.level(), self.threads(), &mut whole, panel, packed, false);
                    continue;
                }
                part.clear();
                part.resize(range.len() * piece.columns, 0.0);
                packed::add(self.level(), self.threads(), &mut part, panel, packed, false);
                for (whole, part) in whole.chunks_exact_mut(width).zip(part.chunks_exact(piece.columns.max(1))) {
                    whole[piece.at..].iter_mut().zip(part).for_each(|(w, p)| *w += p);
                }
            }
            with(range, &whole)
        })
    }

    /// The Gram matrix of what pieces make side by side.
    pub(super) fn gram(&self, pieces: &[Piece], width: usize) -> Result<Vec<f64>> {
        let mut found = vec![0.0; width * width];
        self.each_piece(pieces, width, |_, panel| {
            packed::add_cross(self.level(), self.threads(), &mut found, (panel, width), (panel, width), true);
            Ok(())
        })?;
        packed::mirror(&mut found, width);
        Ok(found)
    }

    /// An update: what pieces make side by side, times `width x side` if there is more to do.
    pub(super) fn update<O: Work>(&self, pieces: &[Piece], last: Option<(&[f64], usize)>) -> Result<Vec<O>> {
        let n = self.side();
        let mut update = vec![O::ZERO; self.rows * self.columns];
        let times = last.map(|(matrix, width)| (Packed::new(matrix, width, n), width));
        self.each_piece(pieces, times.as_ref().map_or(n, |(_, width)| *width), |range, panel| {
            match &times {
                None => self.put(&mut update, range, panel),
                Some((times, _)) => {
                    let mut whole = vec![0.0; range.len() * n];
                    packed::add(self.level(), self.threads(), &mut whole, panel, times, false);
                    self.put(&mut update, range, &whole);
                }
            }
            Ok(())
        })?;
        Ok(update)
    }

    /// Puts a panel where it belongs in the tensor.
    pub(super) fn put<O: Work>(&self, update: &mut [O], range: Range<usize>, panel: &[f64]) {
        let n = self.side();
        if self.turned {
            for row in 0..n {
                let into = &mut update[row * self.columns + range.start..row * self.columns + range.end];
                into.iter_mut().enumerate().for_each(|(k, o)| *o = O::from_f64(panel[k * n + row]));
            }
        } else {
            let into = &mut update[range.start * n..range.end * n];
            into.iter_mut().zip(panel).for_each(|(o, &x)| *o = O::from_f64(x));
        }
    }
}
