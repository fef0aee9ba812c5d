//! The spectral family: the update of a matrix is made of the singular vectors of its task vectors.
//!
//! With `d_i = x_i - B`, turned so that it has more rows than columns, every method here has an update `sum of d_i C_i` with square `C_i` of
//! the smaller side: Gram matrices of the task vectors are gathered in f64 ([`panels`]), eigenproblems give the `C_i` ([`methods`]), and one more
//! pass over the task vectors makes the update. The task vectors themselves are read panel by panel, and never held; the update of a
//! matrix is, from when it is made until its last element is written.
//!
//! A tensor is one matrix, whose update is made in a stage of its own while the matrix before it is written; or a stack of
//! them (packed experts), each made when its first element is wanted.

mod methods;
mod panels;

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use crate::bf16::Work;
use crate::stream::{BLOCK, Tile};
use crate::{Error, Result};

use super::method::{MethodPlan, Shape, Worker};
use super::points::{Points, Update};
use super::prepare::Job;
use methods::Kind;
use panels::Panels;

/// The method at work on one tensor.
#[derive(Debug)]
pub(super) struct Spectral {
    kind: Kind,
    weights: Vec<f64>,
    rows: usize,
    columns: usize,
    matrices: u64,
    double: bool,
    /// Updates that are made or being made, and not yet written.
    made: Mutex<HashMap<u64, Arc<Slot>>>,
}

/// The update of one matrix.
#[derive(Debug, Default)]
struct Slot {
    update: Mutex<Option<Held>>,
    /// Elements that are written.
    written: Mutex<u64>,
}

#[derive(Debug, Clone)]
enum Held {
    Single(Arc<Vec<f32>>),
    Double(Arc<Vec<f64>>),
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Spectral {
    /// The method, if it is one of this family.
    ///
    /// # Errors
    /// [`Error::Mismatch`] for a tensor that is neither a matrix nor a stack of them.
    pub(super) fn new(plan: &MethodPlan, weights: &[f64], shape: Shape<'_>) -> Result<Option<Self>> {
        let Some(kind) = Kind::new(plan) else { return Ok(None) };
        let (matrices, rows, columns) = match *shape.dims {
            [rows, columns] => (1, rows, columns),
            [count, rows, columns] => (count, rows, columns),
            _ => {
                let problem = format!(
                    "{} merges matrices [m, n] and stacks of them, this has the shape {:?}; merge it by its task vectors",
                    plan.name(),
                    shape.dims
                );
                return Err(Error::mismatch(shape.name, problem));
            }
        };
        Ok(Some(Self {
            kind,
            weights: weights.to_vec(),
            rows: rows as usize,
            columns: columns as usize,
            matrices,
            double: shape.double,
            made: Mutex::default(),
        }))
    }

    /// One stage where there is one matrix.
    pub(super) fn measures(&self) -> usize {
        usize::from(self.matrices == 1)
    }

    /// How often the inputs are read before the update is written.
    pub(super) fn readings(&self) -> u64 {
        self.kind.readings(self.weights.len())
    }

    fn elements(&self) -> u64 {
        (self.rows * self.columns) as u64
    }

    /// Bytes of an update.
    fn held(&self) -> u64 {
        self.elements() * if self.double { 8 } else { 4 }
    }

    /// Bytes that making an update takes, and the update.
    fn making(&self) -> u64 {
        self.held() + self.kind.memory(self.rows, self.columns, self.weights.len())
    }

    pub(super) fn shared_memory(&self) -> u64 {
        if self.matrices == 1 { self.making() } else { 0 }
    }

    pub(super) fn memory(&self) -> u64 {
        match self.matrices {
            1 => 0,
            // What is made, and what of a tile is still to be written.
            _ => self.making() + (BLOCK / self.elements().max(1) + 1) * self.held(),
        }
    }

    /// Makes the update of a tensor that is one matrix: the worker of its first tile does, the others go on with what comes after.
    pub(super) fn measure<W: Work>(&self, worker: Worker<'_>, job: &Job, tile: &Tile) -> Result<()> {
        if tile.elements.start == 0 && self.elements() > 0 {
            self.update_of::<W>(worker, job, 0)?;
        }
        Ok(())
    }

    /// The update of a matrix, made if it is not there.
    fn update_of<W: Work>(&self, worker: Worker<'_>, job: &Job, number: u64) -> Result<(Arc<Slot>, Held)> {
        let slot = lock(&self.made).entry(number).or_default().clone();
        let mut update = lock(&slot.update);
        let held = match &*update {
            Some(held) => held.clone(),
            None => {
                let panels = Panels::<W>::new(worker, job, number * self.elements(), self.rows, self.columns);
                let held = if self.double {
                    Held::Double(Arc::new(self.kind.update(&panels, &self.weights)?))
                } else {
                    Held::Single(Arc::new(self.kind.update(&panels, &self.weights)?))
                };
                // The first reading of a tensor with a stage of its own is counted there.
                let counted = self.measures() as u64;
                let bytes = job.bytes_read() / self.matrices.max(1);
                worker.control.advance(bytes * (self.readings() - counted));
                *update = Some(held.clone());
                held
            }
        };
        drop(update);
        Ok((slot, held))
    }

    /// What makes the tiles of the output.
    pub(super) fn update<'a, W: Work>(&'a self, worker: Worker<'a>, job: &'a Job) -> impl Update<W> + use<'a, W> {
        Place { spectral: self, worker, job, here: None }
    }
}

/// The updates of the matrices that a tile lies in, one after the other.
struct Place<'a> {
    spectral: &'a Spectral,
    worker: Worker<'a>,
    job: &'a Job,
    here: Option<Here>,
}

/// The matrix that is being written.
struct Here {
    number: u64,
    slot: Arc<Slot>,
    held: Held,
    written: u64,
}

impl Place<'_> {
    /// Says what was written of a matrix; whoever writes the last of it drops it.
    fn leave(&mut self) {
        let Some(Here { number, slot, written, .. }) = self.here.take() else { return };
        let mut all = lock(&slot.written);
        *all += written;
        if *all >= self.spectral.elements() {
            lock(&self.spectral.made).remove(&number);
        }
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.leave();
    }
}

impl<W: Work> Update<W> for Place<'_> {
    fn make(&mut self, _: &mut Points<'_, '_, W>, u: &mut [W], elements: Range<u64>) -> Result<bool> {
        let each = self.spectral.elements();
        let mut at = elements.start;
        while at < elements.end {
            let number = at / each;
            if self.here.as_ref().is_none_or(|h| h.number != number) {
                self.leave();
                let (slot, held) = self.spectral.update_of::<W>(self.worker, self.job, number)?;
                self.here = Some(Here { number, slot, held, written: 0 });
            }
            let end = ((number + 1) * each).min(elements.end);
            let into = &mut u[(at - elements.start) as usize..(end - elements.start) as usize];
            let from = (at - number * each) as usize..(end - number * each) as usize;
            if let Some(here) = &mut self.here {
                match &here.held {
                    Held::Single(v) => into.iter_mut().zip(&v[from]).for_each(|(u, &x)| *u = W::from_f64(f64::from(x))),
                    Held::Double(v) => into.iter_mut().zip(&v[from]).for_each(|(u, &x)| *u = W::from_f64(x)),
                }
                here.written += end - at;
            }
            at = end;
        }
        Ok(true)
    }
}
