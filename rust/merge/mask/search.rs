//! Thresholds over one tensor: the sample, the passes, and where equals stop being taken.

use std::cmp::Ordering;
use std::ops::Range;
use std::sync::{Arc, PoisonError};

use crate::Result;
use crate::bf16::Work;
use crate::select::{Pass, Search, magnitude, places};
use crate::simd::dispatch::{self, with_element};
use crate::stream::{BLOCK, Tile};

use super::super::gram::micros;
use super::super::method::Worker;
use super::super::points::{Opened, Points};
use super::super::prepare::Job;
use super::foresight::close;
use super::{Bound, Mask, Rule, Scratch};

/// Elements whose windows fit the second-level cache together, for what is read once.
const WINDOW: u64 = BLOCK / 8;

impl Mask {
    /// Says where equals stop being taken, as far as that follows from the answers of the searches.
    pub(super) fn note_cuts(&self) {
        if matches!(self.rule, Rule::Fusion) {
            self.note_fence();
            return;
        }
        for (i, search) in self.searches.iter().enumerate() {
            let Some(found) = search.found() else { continue };
            // Whether a zero is kept makes no difference, except to the number of positions that sce selects.
            let indifferent = found.key == 0 && matches!(self.rule, Rule::Chosen { .. });
            if found.take == found.equal || indifferent {
                self.order.set_cut(i, u64::MAX);
            } else if found.take == 0 {
                self.order.set_cut(i, 0);
            }
        }
    }

    /// Median and one and a half times the distance of the quartiles, once all are found: the smallest importance that stays.
    fn note_fence(&self) {
        let found: Option<Vec<u64>> = self.searches.iter().map(|s| s.found().map(|t| t.key)).collect();
        let Some(keys) = found.filter(|k| k.len() == 6) else { return };
        let value = |key: u64| {
            if self.double { f64::from_bits(key) } else { f64::from(f32::from_bits(key as u32)) }
        };
        let quantile = |i: usize, q: f64| {
            let p = q * (self.elements - 1) as f64;
            let (x, y) = (value(keys[2 * i]), value(keys[2 * i + 1]));
            x + (p - p.floor()) * (y - x)
        };
        let (first, median, third) = (quantile(0, 0.25), quantile(1, 0.5), quantile(2, 0.75));
        let fence = median + 1.5 * (third - first);
        // The smallest number of the work type that is not below it; importances are not negative.
        let key = if fence <= 0.0 {
            0
        } else if self.double {
            fence.to_bits()
        } else {
            let near = fence as f32;
            u64::from(near.to_bits()) + u64::from(f64::from(near) < fence)
        };
        let _ = self.fence.set(key);
    }

    /// Begins the searches with a sample, whoever needs it first.
    pub(super) fn sample<W: Work>(&self, worker: Worker<'_>, job: &Job, scratch: &mut Scratch<W>) -> Result<()> {
        let _one = self.sampling.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.searches.iter().any(Search::wants_sample) {
            return Ok(());
        }
        let mut samples = vec![Vec::new(); self.weights.len()];
        for place in places(self.elements) {
            if matches!(self.rule, Rule::Fusion) {
                self.sample_rows(worker, job, &place, &mut samples[0])?;
                continue;
            }
            let mut opened = Opened::new(worker.level, job, &place, worker.pool)?;
            let mut points = opened.points();
            for elements in micros(place) {
                let finite = self.values(&mut points, &mut scratch.lanes, 0, &elements)?;
                worker.check::<W>(job, finite, &elements)?;
                let n = (elements.end - elements.start) as usize;
                for (i, sample) in samples.iter_mut().enumerate() {
                    sample.extend_from_slice(&self.stream(&scratch.lanes, i)[..n]);
                }
            }
        }
        for (i, (search, &input)) in self.searches.iter().zip(&self.over).enumerate() {
            search.begin(&samples[input]);
            if i > 0 && self.over[i - 1] == input {
                search.join(&self.searches[i - 1]);
            }
        }
        Ok(())
    }

    /// A pass of every search that has one to make.
    pub(super) fn count<W: Work>(
        &self,
        worker: Worker<'_>,
        job: &Job,
        tile: &Tile,
        scratch: &mut Scratch<W>,
    ) -> Result<()> {
        let passes = self.passes();
        if passes.iter().all(Option::is_none) {
            return Ok(());
        }
        for (block, range) in tile.blocks() {
            for at in range.clone().step_by(WINDOW as usize) {
                let window = at..(at + WINDOW).min(range.end);
                self.count_window(worker, job, window, &passes, scratch)?;
            }
            close(&passes, block, scratch);
        }
        Ok(())
    }

    /// The pass that each search has to make; what several share, once.
    pub(super) fn passes(&self) -> Vec<Option<Arc<Pass>>> {
        let mut passes: Vec<_> = self.searches.iter().map(Search::pass).collect();
        for i in 1..passes.len() {
            let known = |p: &Arc<Pass>| passes[..i].iter().flatten().any(|other| Arc::ptr_eq(p, other));
            if passes[i].as_ref().is_some_and(known) {
                passes[i] = None;
            }
        }
        passes
    }

    fn count_window<W: Work>(
        &self,
        worker: Worker<'_>,
        job: &Job,
        window: Range<u64>,
        passes: &[Option<Arc<Pass>>],
        scratch: &mut Scratch<W>,
    ) -> Result<()> {
        let mut opened = Opened::new(worker.level, job, &window, worker.pool)?;
        self.count_elements(worker, job, &mut opened.points(), window, passes, scratch)
    }

    /// Counts some elements for every pass.
    pub(super) fn count_elements<W: Work>(
        &self,
        worker: Worker<'_>,
        job: &Job,
        points: &mut Points<'_, '_, W>,
        window: Range<u64>,
        passes: &[Option<Arc<Pass>>],
        scratch: &mut Scratch<W>,
    ) -> Result<()> {
        let direct = self.is_direct(points, &window) && passes.iter().flatten().all(|pass| pass.is_plain());
        if direct {
            for elements in micros(window) {
                let mut finite = true;
                for ((pass, tally), &input) in passes.iter().zip(&mut scratch.tallies).zip(&self.over) {
                    if let (Some(pass), Some((dtype, pair))) = (pass, points.pair(input, &elements)) {
                        let largest = with_element!(dtype, E => pass.count_apart::<E, W>(worker.level, pair, tally));
                        finite &= W::from_magnitude(largest).is_finite();
                    }
                }
                worker.check::<W>(job, finite, &elements)?;
            }
            return Ok(());
        }
        for elements in points.spans(&window) {
            let finite = self.values(points, &mut scratch.lanes, 0, &elements)?;
            worker.check::<W>(job, finite, &elements)?;
            let n = (elements.end - elements.start) as usize;
            for ((pass, tally), &input) in passes.iter().zip(&mut scratch.tallies).zip(&self.over) {
                if let Some(pass) = pass {
                    pass.count(worker.level, &self.stream(&scratch.lanes, input)[..n], tally);
                }
            }
        }
        Ok(())
    }

    /// Whether searches look at differences of tensors of one format, as they are.
    fn is_direct<W: Work>(&self, points: &Points<'_, '_, W>, elements: &Range<u64>) -> bool {
        matches!(self.rule, Rule::Chosen { .. }) && self.over.iter().all(|&i| points.pair(i, elements).is_some())
    }

    pub(super) fn find_cuts<W: Work>(
        &self,
        worker: Worker<'_>,
        points: &mut Points<'_, '_, W>,
        block: &Range<u64>,
        scratch: &mut Scratch<W>,
    ) -> Result<()> {
        let found =
            |i: usize| self.searches[i].found().unwrap_or(crate::select::Threshold { key: 0, equal: 0, take: 0 });
        let (mut open, mut at) = (Vec::new(), vec![None; self.searches.len()]);
        for (i, search) in self.searches.iter().enumerate() {
            match search.last() {
                _ if self.order.cut(i).is_some() => {}
                None => open.push(i),
                Some(last) => match last.block.cmp(&(block.start / BLOCK)) {
                    Ordering::Less => at[i] = Some(0),
                    Ordering::Greater => at[i] = Some(u64::MAX),
                    Ordering::Equal => {
                        let cut = self.position(points, block, scratch, i, last.nth)?;
                        self.order.set_cut(i, cut);
                    }
                },
            }
        }
        if !open.is_empty() {
            let mut own = vec![0; self.searches.len()];
            for elements in points.spans(block) {
                let n = (elements.end - elements.start) as usize;
                let direct = matches!(self.rule, Rule::Chosen { .. })
                    && open.iter().all(|&i| points.pair(self.over[i], &elements).is_some());
                if !direct {
                    self.values(points, &mut scratch.lanes, 0, &elements)?;
                }
                for &i in &open {
                    let key = magnitude::<W>(found(i).key);
                    own[i] += match points.pair(self.over[i], &elements).filter(|_| direct) {
                        Some((dtype, pair)) => {
                            with_element!(dtype, E => dispatch::count_equal_apart::<E, W>(worker.level, pair, key))
                        }
                        None => {
                            let x = &self.stream(&scratch.lanes, self.over[i])[..n];
                            dispatch::count_equal(worker.level, x, key)
                        }
                    };
                }
            }
            let before = self.order.pass(block.start / BLOCK, &open, &own, worker.control)?;
            for &i in &open {
                let Some(before) = &before else { break };
                let take = found(i).take;
                if before[i] >= take {
                    at[i] = Some(0);
                } else if before[i] + own[i] < take {
                    at[i] = Some(u64::MAX);
                } else {
                    let cut = self.position(points, block, scratch, i, take - before[i])?;
                    self.order.set_cut(i, cut);
                }
            }
        }
        for (i, at) in at.into_iter().enumerate() {
            let at = at.or(self.order.cut(i)).unwrap_or(u64::MAX);
            scratch.bounds.push(Bound { key: found(i).key, at });
        }
        Ok(())
    }

    /// One past the `nth` element of a block that equals the threshold of a search.
    fn position<W: Work>(
        &self,
        points: &mut Points<'_, '_, W>,
        block: &Range<u64>,
        scratch: &mut Scratch<W>,
        search: usize,
        nth: u64,
    ) -> Result<u64> {
        let key = magnitude::<W>(self.searches[search].found().map_or(0, |t| t.key));
        let mut left = nth;
        for elements in micros(block.clone()) {
            self.values(points, &mut scratch.lanes, 0, &elements)?;
            let x = &self.stream(&scratch.lanes, self.over[search])[..(elements.end - elements.start) as usize];
            for (i, x) in x.iter().enumerate() {
                if x.magnitude() == key {
                    left -= 1;
                    if left == 0 {
                        return Ok(elements.start + i as u64 + 1);
                    }
                }
            }
        }
        Ok(block.end)
    }
}
