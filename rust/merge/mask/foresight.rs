//! Making the output while its thresholds are still being searched for.
//!
//! The sample that begins a search tells which threshold to expect, and how many of its equals will be taken: differences of 16-bit formats have few
//! values, so it is nearly always right about the first. So the pass that counts makes the output as well, from what it has just read, and
//! when the thresholds are known only those blocks are made again that expected something else. The output does not depend on what was expected.

use std::ops::Range;
use std::sync::Arc;

use crate::Result;
use crate::bf16::Work;
use crate::select::{Pass, Search};
use crate::stream::BLOCK;

use super::super::method::Worker;
use super::super::points::{Points, Update};
use super::super::prepare::Job;
use super::combine::Combine;
use super::{Bound, Choice, Mask, Rule, Scratch, Stage};

impl Mask {
    /// Whether a measuring stage can make the output of what it reads, as far as one can know before its sample.
    pub(in crate::merge) fn may_foresee(&self, stage: usize) -> bool {
        let by_size = |choice: &Choice| matches!(choice, Choice::All | Choice::Largest(_) | Choice::Between(..));
        self.stages[stage] == Stage::Search
            && self.elements > crate::select::SAMPLE
            && matches!(&self.rule, Rule::Chosen { choices, .. } if choices.iter().all(by_size))
            && !self.stages.contains(&Stage::Sums)
    }

    /// [`Mask::update`] from what is expected, which counts for the searches what it reads.
    pub(in crate::merge) fn foresee<'a, W: Work>(
        &'a self,
        worker: Worker<'a>,
        job: &'a Job,
        scratch: &'a mut Scratch<W>,
    ) -> Result<impl Update<W> + use<'a, W>> {
        scratch.fit(self);
        self.sample(worker, job, scratch)?;
        Ok(Foresight { passes: self.passes(), inner: self.combine(worker, job, scratch) })
    }

    /// Forgets what a worker has counted of a block that it could not make; no block of the tensor is taken as it was foreseen then.
    pub(in crate::merge) fn forget<W>(&self, scratch: &mut Scratch<W>) {
        scratch.tallies.iter_mut().for_each(|tally| *tally = Default::default());
        let _ = self.mistaken.set(std::iter::once(0..self.blocks()).collect());
    }

    /// Whether a block's output was foreseen and is right.
    pub(in crate::merge) fn stands(&self, block: u64) -> bool {
        self.mistaken.get().is_some_and(|mistaken| !mistaken.iter().any(|range| range.contains(&block)))
    }

    /// Compares what was expected with what was found, when every search has ended: how many blocks are to be made again.
    pub(in crate::merge) fn look_back(&self) -> Option<u64> {
        if self.mistaken.get().is_some() || self.searches.iter().any(|s| s.found().is_none()) {
            return None;
        }
        let mistaken: Vec<_> = (0..self.searches.len()).map(|i| self.mistaken_by(i)).collect();
        let blocks = (0..self.blocks()).filter(|b| mistaken.iter().any(|range| range.contains(b))).count();
        let _ = self.mistaken.set(mistaken);
        Some(blocks as u64)
    }

    /// The blocks that a search's answer changes.
    fn mistaken_by(&self, i: usize) -> Range<u64> {
        let (search, all) = (&self.searches[i], 0..self.blocks());
        let (Some(found), Some(guess)) = (search.found(), search.guess()) else {
            // What is known without a search is known at once.
            return if search.guess().is_none() && self.order.cut(i).is_some() { 0..0 } else { all };
        };
        if found.key != guess.key {
            return all;
        }
        // Equals are taken before these blocks and not behind them, by expectation and in truth.
        let expected = self.expected_end(search);
        let (from, to) = match (self.order.cut(i), search.last()) {
            // Zeros change nothing, taken or not.
            _ if found.key == 0 => return 0..0,
            (Some(u64::MAX), _) => (all.end, all.end),
            (Some(0), _) => (0, 0),
            (_, Some(last)) => (last.block, last.block + 1),
            _ => return all,
        };
        from.min(expected)..to.max(expected)
    }

    fn blocks(&self) -> u64 {
        self.elements.div_ceil(BLOCK)
    }

    /// The block from which on no equals are expected to be taken.
    fn expected_end(&self, search: &Search) -> u64 {
        search.guess().map_or(0, |guess| (guess.share * self.blocks() as f64).round() as u64)
    }

    /// Where thresholds are expected to cut a block.
    fn expected_bounds(&self, block: u64, bounds: &mut Vec<Bound>) {
        bounds.clear();
        for (i, search) in self.searches.iter().enumerate() {
            bounds.push(match (search.found(), search.guess()) {
                (None, Some(guess)) => {
                    Bound { key: guess.key, at: if block < self.expected_end(search) { u64::MAX } else { 0 } }
                }
                (found, _) => {
                    Bound { key: found.map_or(0, |found| found.key), at: self.order.cut(i).unwrap_or(u64::MAX) }
                }
            });
        }
    }
}

/// What makes the tiles of an output that is expected.
struct Foresight<'a, W> {
    passes: Vec<Option<Arc<Pass>>>,
    inner: Combine<'a, W>,
}

impl<W: Work> Update<W> for Foresight<'_, W> {
    fn begin(&mut self, _points: &mut Points<'_, '_, W>, block: Range<u64>) -> Result<()> {
        self.inner.block = block.start;
        self.inner.mask.expected_bounds(block.start / BLOCK, &mut self.inner.scratch.bounds);
        Ok(())
    }

    fn make(&mut self, points: &mut Points<'_, '_, W>, u: &mut [W], elements: Range<u64>) -> Result<bool> {
        let Combine { mask, worker, job, ref mut scratch, .. } = self.inner;
        mask.count_elements(worker, job, points, elements.clone(), &self.passes, scratch)?;
        self.inner.make(points, u, elements)
    }

    fn end(&mut self, block: u64) {
        close(&self.passes, block, self.inner.scratch);
    }
}

/// Hands over what a worker has counted of a block.
pub(super) fn close<W>(passes: &[Option<Arc<Pass>>], block: u64, scratch: &mut Scratch<W>) {
    for (pass, tally) in passes.iter().zip(&mut scratch.tallies) {
        if let Some(pass) = pass {
            pass.close(block, tally);
        }
    }
}
